"""The layers of a benchmark by the texts that name them: linears `INxOUT`, convolutions
`INxOUTkKERNEL[sSTRIDE][dDILATION][gGROUPS]@SIZE`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

VECTOR_K, PANEL_N = 32, 16
"""What one packed vector holds of the narrowest weights, and output channels of a panel."""

KINDS = ("dense 3x3", "dense 1x1", "7x7 map", "first layer", "depthwise", "grouped", "dilated")
"""Of convolutions, in the order of tables; other dense kernels come behind."""

HELD_KINDS = ("dense 3x3", "dense 1x1", "7x7 map", "depthwise")
"""Of convolutions, those with a target on older instruction sets."""

_LINEAR = re.compile(r"(\d+)x(\d+)")
_CONV = re.compile(r"(\d+)x(\d+)k(\d+)(?:s(\d+))?(?:d(\d+))?(?:g(\d+))?@(\d+)")


@dataclass(frozen=True)
class LinearShape:
    """`k` input features, `n` output features."""

    k: int
    n: int

    @property
    def padded(self) -> LinearShape:
        """The shape in whole vectors and panels of every width; the same one, unless ragged."""
        return LinearShape(-(-self.k // VECTOR_K) * VECTOR_K, -(-self.n // PANEL_N) * PANEL_N)

    @property
    def kind(self) -> str:
        """ "linear" or "ragged"."""
        return "linear" if self.padded == self else "ragged"

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.k * self.n

    def macs(self, m: int) -> int:
        """Multiply-accumulates of `m` rows."""
        return m * self.k * self.n

    def layer(self) -> nn.Linear:
        """A float layer with random weights, eval mode."""
        return nn.Linear(self.k, self.n).eval()

    def input(self, m: int) -> torch.Tensor:
        """Standard normal `[m, k]`."""
        return torch.randn(m, self.k)


@dataclass(frozen=True)
class ConvShape:
    """A square kernel on square images of `size` pixels a side, padded to keep them (`same`)."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    groups: int
    size: int

    @property
    def padding(self) -> int:
        """Pixels on each side."""
        return self.dilation * (self.kernel // 2)

    @property
    def output_size(self) -> int:
        """Pixels of a side of the output."""
        covered = self.dilation * (self.kernel - 1) + 1
        return (self.size + 2 * self.padding - covered) // self.stride + 1

    @property
    def kind(self) -> str:
        """One of `KINDS`, or another dense kernel."""
        if self.groups > 1:
            return "depthwise" if self.groups == self.inputs else "grouped"
        if self.dilation > 1:
            return "dilated"
        if self.inputs <= 4:
            return "first layer"
        return "7x7 map" if self.output_size <= 7 else f"dense {self.kernel}x{self.kernel}"

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.outputs * (self.inputs // self.groups) * self.kernel**2

    def macs(self, m: int) -> int:
        """Multiply-accumulates of `m` images."""
        return m * self.output_size**2 * self.weights

    def layer(self) -> nn.Conv2d:
        """A float layer with random weights, eval mode."""
        sizes = (self.inputs, self.outputs, self.kernel, self.stride)
        return nn.Conv2d(*sizes, self.padding, self.dilation, self.groups).eval()

    def input(self, m: int) -> torch.Tensor:
        """Standard normal `[m, inputs, size, size]`."""
        return torch.randn(m, self.inputs, self.size, self.size)


Shape = LinearShape | ConvShape


def parse(op: str, text: str) -> Shape:
    """The shape that a text names.

    Args:
        op: "linear" or "conv".
        text: `INxOUT`, or `INxOUTkKERNEL[sSTRIDE][dDILATION][gGROUPS]@SIZE`.

    Raises:
        ValueError: the text is not a shape of the operation; the message gives the grammar.
    """
    pattern, grammar = {
        "linear": (_LINEAR, "INxOUT, e.g. 4096x11008"),
        "conv": (_CONV, "INxOUTkKERNEL[sSTRIDE][dDILATION][gGROUPS]@SIZE, e.g. 64x128k3s2@56"),
    }[op]
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"shape {text!r} is not {grammar}")
    if any(number is not None and int(number) == 0 for number in match.groups()):
        raise ValueError(f"shape {text!r} holds a zero")
    numbers = tuple(int(number or 1) for number in match.groups())
    if op == "linear":
        return LinearShape(*numbers)
    shape = ConvShape(*numbers)
    if shape.inputs % shape.groups or shape.outputs % shape.groups:
        raise ValueError(f"shape {text!r}: {shape.groups} groups do not divide the channels")
    return shape


def kind(op: str, text: str) -> str:
    """What kind of layer a text names: what targets and tables go by."""
    return parse(op, text).kind
