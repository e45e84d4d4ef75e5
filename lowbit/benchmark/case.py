"""What is benchmarked: the shapes, the float layers, and lowbit's own candidates for them."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.formats import FORMATS as WEIGHTS
from lowbit.nn import Conv2d, Linear
from lowbit.nn.base import QuantizedLayer

LINEAR_SHAPES = ("4096x4096", "4096x11008", "768x3072", "1280x1000")
CONV_SHAPES = (
    "64x64k3@56",
    "128x128k3@28",
    "256x256k3@14",
    "256x64k1@56",
    "3x64k7s2@224",
    "96x96k3g96@112",
)
FORMATS = ("w8a8", "w4a8", "w2a8", "w1a8", "w1a1", "w8a16")
ACTIVATION_BITS = {"int8": 8, "int16": 16, "binary": 1}

_LINEAR = re.compile(r"(\d+)x(\d+)")
_CONV = re.compile(r"(\d+)x(\d+)k(\d+)(?:s(\d+))?(?:g(\d+))?@(\d+)")


@dataclass(frozen=True)
class Case:
    """One float layer and one input.

    Attributes:
        op: "linear" or "conv".
        shape: the text that `parse` took.
        m: rows of a linear's input, images of a convolution's.
        layer: the float layer, random weights, eval mode.
        x: float32 `[m, in_features]` or `[m, channels, size, size]`, standard normal.
        macs: multiply-accumulates of one forward call.
    """

    op: str
    shape: str
    m: int
    layer: nn.Linear | nn.Conv2d
    x: torch.Tensor
    macs: int


def check_shape(op: str, shape: str) -> None:
    """Raises ValueError, with the grammar, if a shape is not valid for the operation."""
    if op == "linear":
        match = _LINEAR.fullmatch(shape)
        grammar = "INxOUT, e.g. 4096x11008"
    else:
        match = _CONV.fullmatch(shape)
        grammar = "INxOUTkKERNEL[sSTRIDE][gGROUPS]@SIZE, e.g. 64x128k3s2@56"
    if match is None:
        raise ValueError(f"shape {shape!r} is not {grammar}")
    if any(number is not None and int(number) == 0 for number in match.groups()):
        raise ValueError(f"shape {shape!r} holds a zero")
    if op == "conv":
        inputs, outputs, _, _, groups, _ = (int(number or 1) for number in match.groups())
        if inputs % groups or outputs % groups:
            raise ValueError(f"shape {shape!r}: {groups} groups do not divide the channels")


def make(op: str, shape: str, m: int, layer: nn.Linear | nn.Conv2d | None = None) -> Case:
    """A case with seeded random weights and input, whose weights do not depend on `m`.

    Args:
        op: "linear" or "conv".
        shape: see `check_shape`; convolutions are padded by `kernel // 2`.
        m: rows or images.
        layer: that of another case of the same shape, to be used again.
    """
    check_shape(op, shape)
    torch.manual_seed(0)
    if op == "linear":
        inputs, outputs = map(int, shape.split("x"))
        layer = layer or nn.Linear(inputs, outputs).eval()
        torch.manual_seed(1)
        return Case(op, shape, m, layer, torch.randn(m, inputs), m * inputs * outputs)
    match = _CONV.fullmatch(shape)
    assert match is not None  # checked above
    inputs, outputs, kernel, stride, groups, size = (int(number or 1) for number in match.groups())
    layer = layer or nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups).eval()
    torch.manual_seed(1)
    x = torch.randn(m, inputs, size, size)
    pixels = ((size + 2 * (kernel // 2) - kernel) // stride + 1) ** 2
    return Case(op, shape, m, layer, x, m * pixels * outputs * (inputs // groups) * kernel**2)


def convert(layer: nn.Linear | nn.Conv2d, formats: Iterable[str]) -> dict[str, QuantizedLayer]:
    """lowbit's layers by recipe; a large one takes seconds, so several cases can share them."""
    if isinstance(layer, nn.Linear):
        return {name: Linear.from_float(layer, name) for name in formats}
    return {name: Conv2d.from_float(layer, name) for name in formats}


def lowbit_candidates(case: Case, layers: Mapping[str, QuantizedLayer]) -> list[Candidate]:
    """lowbit's candidates for a case: what `convert` made; convolutions in both memory formats."""
    candidates = []
    for name, layer in layers.items():
        scheme = layer.scheme
        # The bias is read too, but it is the same few bytes for every engine.
        size = sum(t.nbytes for key, t in layer.state_dict().items() if key.startswith("weight_"))
        binary = (scheme.weight, scheme.activation) == ("binary", "binary")
        build = lambda layer=layer: copy.deepcopy(layer)  # noqa: E731
        candidate = Candidate(
            name,
            size,
            build,
            "xnor" if binary else "dot",
            passes=2 if scheme.activation == "int16" else 1,
            widths=(WEIGHTS[scheme.weight].bits,),
            activation_bits=ACTIVATION_BITS[scheme.activation],
            own=True,
        )
        candidates.append(candidate)
        if case.op == "conv":
            last = lambda layer=layer: _channels_last(layer, case.x)  # noqa: E731
            name = f"{name} channels_last"
            candidates.append(dataclasses.replace(candidate, name=name, build=last))
    return candidates


def _channels_last(layer: nn.Module, x: torch.Tensor) -> Forward:
    inner = copy.deepcopy(layer)
    prepared = x.to(memory_format=torch.channels_last)
    return lambda _: inner(prepared)
