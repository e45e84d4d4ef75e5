"""Schemes: the widths that a layer's weights and activations get, and how weights are rounded."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit import _core, quantizers
from lowbit.formats import FORMATS

VERSION = 1

_WEIGHT_LETTER = {"int8": "8", "int4": "4", "int2": "2", "binary": "1", "ternary": "t"}
_ACTIVATION_LETTER = {"int8": "8", "int16": "16", "binary": "1"}
_RECIPE = re.compile(
    r"w(8|4|2|1|t)a(16|8|1)(?:-g(\d+))?(-static)?(?:-(?!g\d*$|static$)([a-z]\w*))?"
)

RECIPES = (
    "w8a8",
    "w4a8",
    "w2a8",
    "wta8",
    "w1a8",
    "w1a1",
    "w8a16",
    "w4a16",
    "w2a16",
    "wta16",
    "w1a16",
)
"""The usual recipes; each takes a suffix such as "-g128" for one scale per 128 weights, and
"-static" for calibrated activations."""


def _dtype_names(**names: str) -> dict[torch.dtype, str]:
    # Some of these dtypes are newer than the oldest torch supported.
    return {getattr(torch, t): name for t, name in names.items() if hasattr(torch, t)}


_WEIGHT_DTYPES = _dtype_names(int8="int8", int4="int4", int2="int2", int1="binary")
_ACTIVATION_DTYPES = _dtype_names(int8="int8", int16="int16", int1="binary")


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized.

    Attributes:
        weight: "int8", "int4", "int2", "ternary" (-1, 0, 1) or "binary" (-1, 1). A torch dtype
            such as `torch.int4` is accepted too.
        activation: "int8", "int16" (practically lossless, about half the speed) or "binary"
            (the sign). Quantized during the forward pass, one scale per row or image, unless
            `static`.
        group_size: weights along K that share a scale, a multiple of 32; None for one scale per
            output channel.
        quantizer: how scales and codes are chosen, see `lowbit.quantizers` and `lowbit.rounding`.
            None takes the default of the weight format.
        static: whether activations have one scale, and int8 ones a zero point, that calibration
            found, the same for every input of the layer: faster, since the input is read once.

    Raises:
        ValueError: an unknown name, a group size that no kernel takes, or a quantizer that does
            not serve the weight format.
    """

    weight: str = "int4"
    activation: str = "int8"
    group_size: int | None = None
    quantizer: str | None = None
    static: bool = False

    def __post_init__(self) -> None:
        weight = _name(self.weight, _WEIGHT_DTYPES, "weight", tuple(FORMATS))
        activation = _name(
            self.activation, _ACTIVATION_DTYPES, "activation", tuple(_core.ACTIVATIONS)
        )
        quantizer = self.quantizer
        if quantizer is None:
            quantizer = quantizers.DEFAULTS[weight]
        quantizers.find(quantizer, weight)
        # Frozen: normalized values are set once, here, so that equal schemes compare equal.
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "activation", activation)
        object.__setattr__(self, "group_size", _group_size(self.group_size))
        object.__setattr__(self, "quantizer", quantizer)
        if not isinstance(self.static, bool):
            raise ValueError(f"static is True or False, not {self.static!r}")

    @property
    def name(self) -> str:
        """Short name, e.g. "w4a8-g128"; `Scheme.parse` reads it back."""
        name = f"w{_WEIGHT_LETTER[self.weight]}a{_ACTIVATION_LETTER[self.activation]}"
        if self.group_size is not None:
            name += f"-g{self.group_size}"
        if self.static:
            name += "-static"
        if self.quantizer != quantizers.DEFAULTS[self.weight]:
            name += f"-{self.quantizer}"
        return name

    def __str__(self) -> str:
        return self.name

    @property
    def learns(self) -> bool:
        """Whether it takes calibration data to convert: static activations, or its quantizer."""
        return self.static or quantizers.needs_data(self.quantizer or "")

    @classmethod
    def parse(cls, value: str | Scheme | Mapping[str, Any]) -> Scheme:
        """A scheme from a recipe ("w4a8-g128", "w4a8-minmax"), a dict of `to_dict`, or a scheme.

        Raises:
            ValueError: an unknown recipe; the message lists those that exist.
            TypeError: any other type.
        """
        if isinstance(value, Scheme):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if not isinstance(value, str):
            raise TypeError(
                f"a scheme is a recipe such as 'w4a8', a lowbit Scheme or a dict, not "
                f"{type(value).__name__}: {reprlib.repr(value)}"
            )
        match = _RECIPE.fullmatch(value)
        if match is None:
            raise ValueError(
                f"unknown scheme {value!r}; use one of {', '.join(RECIPES)}, with suffixes in this "
                "order: '-g128' for groups, '-static' for calibrated activations, a quantizer such "
                "as '-gptq'; or a lowbit Scheme"
            )
        weight, activation, group_size, static, quantizer = match.groups()
        return cls(
            weight=_key_of(_WEIGHT_LETTER, weight),
            activation=_key_of(_ACTIVATION_LETTER, activation),
            group_size=None if group_size is None else int(group_size),
            quantizer=quantizer,
            static=static is not None,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the version of this description."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """The inverse of `to_dict`; fields that are left out take their defaults.

        Raises:
            ValueError: a version or a field that this lowbit does not know.
        """
        fields = dict(data)
        version = fields.pop("version", VERSION)
        if version != VERSION:
            raise ValueError(
                f"scheme version {version!r} is not version {VERSION}, which this lowbit reads; "
                "use the lowbit that wrote it"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"unknown scheme fields {unknown}; the fields are {', '.join(known)}")
        return cls(**fields)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Scheme:
        """The inverse of `to_json`.

        Raises:
            ValueError: no JSON object, or one that `from_dict` refuses.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"a scheme's JSON is an object, not {text!r}")
        return cls.from_dict(data)


def _key_of(letters: Mapping[str, str], letter: str) -> str:
    return next(name for name, candidate in letters.items() if candidate == letter)


def _name(
    value: object, dtypes: Mapping[torch.dtype, str], what: str, valid: tuple[str, ...]
) -> str:
    name = dtypes.get(value) if isinstance(value, torch.dtype) else value
    if not isinstance(name, str) or name not in valid:
        raise ValueError(f"unknown {what} format {value!r}; use one of {', '.join(valid)}")
    return name


def _group_size(value: object) -> int | None:
    if value is None:
        return None
    try:
        size = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        size = 0
    if size <= 0 or size % 32:
        raise ValueError(
            f"group_size {value!r} is not a positive multiple of 32; use e.g. 32, 64 or 128, or "
            "None for one scale per output channel"
        )
    return size
