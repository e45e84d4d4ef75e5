"""A program of code-to-code steps, as `_core.Program` takes it: what a segment becomes.

`tests/static/oracle.py` states what each step computes.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Any

from lowbit.nn.base import QuantizedLayer
from lowbit.observers import Affine
from lowbit.packed import PackedWeight


@dataclass(frozen=True)
class Value:
    """Codes int8 [height, width, channels] of an image; tokens are one row, features one pixel."""

    channels: int
    height: int
    width: int
    scale: float
    zero: int

    @property
    def affine(self) -> Affine:
        return Affine(self.scale, self.zero)

    @property
    def size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width


@dataclass
class Program:
    """Values and steps in order of execution.

    Attributes:
        steps: "op" and its operands, which are indices of values where the field's name is "x",
            "xs", "a", "b", "residual" or "to"; "input" and "output" are positions of float tensors.
        names: of the nodes of the network that each step computes.
        held: the layers of the convolutions, in order, and their operands, whose memory is used.
    """

    values: list[Value] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    held: list[tuple[QuantizedLayer, PackedWeight]] = field(default_factory=list)

    def value(self, size: tuple[int, int, int], affine: Affine) -> int:
        """A new value of (channels, height, width); its index."""
        self.values.append(Value(*size, affine.scale, affine.zero))
        return len(self.values) - 1

    def step(self, name: str, op: str, **operands: Any) -> None:
        """Appends a step that computes what the node of this name does."""
        self.steps.append({"op": op, **operands})
        self.names.append(name)

    def is_current(self) -> bool:
        """Whether the layers still have the tensors that the steps refer to."""
        return all(layer._operands() is operands for layer, operands in self.held)

    def arguments(self) -> tuple[list[tuple[int, int, int, float, int]], list[dict[str, Any]]]:
        """What the constructor of `_core.Program` takes."""
        return [astuple(value) for value in self.values], self.steps
