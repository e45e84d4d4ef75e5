"""Functions of one value, and the tables that compute them on codes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import _core
from lowbit.observers import Affine

ENTRIES, MOST_ENTRIES = 4096, 65536
"""Of a table behind a convolution: usually, and where that would be too coarse."""

_PARTS = 8  # of a step of the output's codes, as fine as a table should be
_FARTHEST = 1e6

Table = tuple[float, int, bytes]
"""(inv, low, codes): codes[clamp(rne(v * inv), low, low + len(codes) - 1) - low]."""


@dataclass(frozen=True)
class Function:
    """A function of one value: its name in `FUNCTIONS` and its constant arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def epilogue(self) -> str | None:
        """What the kernels call it, if they compute it from floats."""
        return self.name if self.name in _core.EPILOGUES and not self.arguments else None

    def __call__(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x, **self.arguments)

    def __str__(self) -> str:
        return self.name


def _rsub(x: Tensor, other: float) -> Tensor:
    return other - x


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "clamp": torch.clamp,
    "add": torch.add,
    "sub": torch.sub,
    "rsub": _rsub,
    "mul": torch.mul,
    "div": torch.div,
}

# Attributes of a module that are arguments of its function.
MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.SiLU: ("silu", ()),
    nn.GELU: ("gelu", ("approximate",)),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.Mish: ("mish", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
}

# Functions and names of methods, with the names of their arguments behind the first.
CALLS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ("inplace",)),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    "relu": ("relu", ()),
    "relu_": ("relu", ()),
    F.relu6: ("relu6", ("inplace",)),
    F.hardswish: ("hardswish", ("inplace",)),
    F.hardsigmoid: ("hardsigmoid", ("inplace",)),
    F.silu: ("silu", ("inplace",)),
    F.gelu: ("gelu", ("approximate",)),
    F.sigmoid: ("sigmoid", ()),
    torch.sigmoid: ("sigmoid", ()),
    "sigmoid": ("sigmoid", ()),
    "sigmoid_": ("sigmoid", ()),
    F.tanh: ("tanh", ()),
    torch.tanh: ("tanh", ()),
    "tanh": ("tanh", ()),
    "tanh_": ("tanh", ()),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.elu: ("elu", ("alpha", "inplace")),
    F.mish: ("mish", ("inplace",)),
    F.softplus: ("softplus", ("beta", "threshold")),
    F.hardtanh: ("hardtanh", ("min_val", "max_val", "inplace")),
    torch.clamp: ("clamp", ("min", "max")),
    "clamp": ("clamp", ("min", "max")),
    "clamp_": ("clamp", ("min", "max")),
}

# Operators of torch.export, by their names.
CALLS |= {
    name: CALLS[getattr(F, name)]
    for name in (
        "relu6",
        "hardswish",
        "hardsigmoid",
        "silu",
        "gelu",
        "leaky_relu",
        "elu",
        "mish",
        "softplus",
        "hardtanh",
    )
}

# Operators of a tensor and a number; the third column is the function where the number is first.
_ARITHMETIC: dict[Any, tuple[str, str]] = {
    operator.add: ("add", "add"),
    operator.iadd: ("add", "add"),
    torch.add: ("add", "add"),
    "add": ("add", "add"),
    "add_": ("add", "add"),
    operator.sub: ("sub", "rsub"),
    "sub": ("sub", "rsub"),
    "rsub": ("rsub", ""),
    operator.mul: ("mul", "mul"),
    operator.imul: ("mul", "mul"),
    torch.mul: ("mul", "mul"),
    "mul": ("mul", "mul"),
    "mul_": ("mul", "mul"),
    operator.truediv: ("div", ""),
    operator.itruediv: ("div", ""),
    torch.div: ("div", ""),
    "div": ("div", ""),
}


def of_module(module: nn.Module) -> Function | None:
    """The function that a module of torch computes."""
    found = MODULES.get(type(module))
    if found is None:
        return None
    name, attributes = found
    return _normal(name, {key: getattr(module, key) for key in attributes})


def of_call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Function | None:
    """The function of the one tensor among the arguments that a call computes.

    Args:
        args, kwargs: as they are called, the tensor None.
    """
    if target in CALLS and args[:1] == (None,):
        name, names = CALLS[target]
        given = dict(zip(names, args[1:], strict=False)) | dict(kwargs)
        given.pop("inplace", None)
        return _normal(name, given)
    if target in _ARITHMETIC and len(args) == 2 and not kwargs:
        forward, backward = _ARITHMETIC[target]
        number = args[1] if args[0] is None else args[0]
        name = forward if args[0] is None else backward
        if name and isinstance(number, (int, float)) and not isinstance(number, bool):
            return Function(name, {"other": number})
    return None


def _normal(name: str, arguments: dict[str, Any]) -> Function | None:
    """ReLU and ReLU6 under whatever name; arguments that are their defaults left out."""
    if any(not isinstance(v, (int, float, str, type(None))) for v in arguments.values()):
        return None
    bounds = tuple(arguments.get(key) for key in ("min", "max"))
    if name == "hardtanh":
        bounds = arguments.get("min_val", -1.0), arguments.get("max_val", 1.0)
    if name in ("clamp", "hardtanh"):
        if bounds == (0, 6):
            return Function("relu6")
        if bounds == (0, None):
            return Function("relu")
        return Function("clamp", {"min": bounds[0], "max": bounds[1]})
    if name == "gelu" and arguments.get("approximate", "none") == "none":
        arguments = {}
    return Function(name, arguments)


def lookup(function: Function, x: Affine, to: Affine) -> bytes:
    """The code of the function's value for each code of x; at position code mod 256."""
    codes = np.arange(256, dtype=np.uint8).view(np.int8)
    points = torch.from_numpy((codes.astype(np.int64) - x.zero) * float(np.float32(x.scale)))
    return _codes(function(points), to).tobytes()


def table(function: Function, to: Affine) -> Table:
    """A function of a convolution's outputs, tabulated where its codes change.

    Beyond both ends of the table the code stays what it is there. Evaluated in float64, so that
    the table does not depend on the CPU.
    """
    span = _span(function, to)
    points = torch.linspace(-span, span, 1 << 18, dtype=torch.float64)
    found = _codes(function(points), to)
    changes = np.flatnonzero(found[1:] != found[:-1])
    if not len(changes):
        return 1.0, 0, bytes(found[:1].tobytes() * ENTRIES)
    low, high = float(points[changes[0]]), float(points[changes[-1] + 1])
    count = ENTRIES
    while count < MOST_ENTRIES and (high - low) / count > to.scale / _PARTS:
        count *= 2
    inv = float(np.float32((count - 4) / max(high - low, 1e-6)))
    first = int(np.floor(low * inv)) - 1
    entries = torch.arange(first, first + count, dtype=torch.float64) / inv
    return inv, first, _codes(function(entries), to).tobytes()


def _span(function: Function, to: Affine) -> float:
    """How far from 0 the code of a function changes."""
    span = 300 * to.scale + 64
    while span < _FARTHEST:
        ends = torch.tensor([-2 * span, -span, span, 2 * span], dtype=torch.float64)
        codes = _codes(function(ends), to)
        if codes[0] == codes[1] and codes[2] == codes[3]:
            break
        span *= 2
    return span


def _codes(v: Tensor, to: Affine) -> np.ndarray[Any, np.dtype[np.int8]]:
    codes = (v / float(np.float32(to.scale))).round() + to.zero
    return codes.nan_to_num().clamp(-128, 127).to(torch.int8).numpy()


def code(value: float, to: Affine) -> int:
    """The code of a number."""
    return int(_codes(torch.tensor([value], dtype=torch.float64), to)[0])
