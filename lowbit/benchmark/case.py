"""What is benchmarked: the shapes, the float layers, and lowbit's own candidates for them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lowbit import observers
from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.shapes import LinearShape, parse
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


def make(op: str, shape: str, m: int, layer: nn.Linear | nn.Conv2d | None = None) -> Case:
    """A case with seeded random weights and input, whose weights do not depend on `m`.

    Args:
        op: "linear" or "conv".
        shape: see `lowbit.benchmark.shapes.parse`.
        m: rows or images.
        layer: that of another case of the same shape, to be used again.
    """
    parsed = parse(op, shape)
    torch.manual_seed(0)
    layer = layer or parsed.layer()
    torch.manual_seed(1)
    return Case(op, shape, m, layer, parsed.input(m), parsed.macs(m))


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
        if scheme.static:
            observer = observers.make("minmax", scheme.activation)
            observer.observe(case.x)
            found = observer.parameters()
            layer.set_activation(found.scale, found.zero)
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
        if case.op == "linear":
            candidates.append(candidate)
            continue
        candidates.append(dataclasses.replace(candidate, layout="nchw"))
        last = lambda layer=layer: channels_last(copy.deepcopy(layer), case.x)  # noqa: E731
        name = f"{name} channels_last"
        candidates.append(
            dataclasses.replace(candidate, name=name, build=last, layout="channels_last")
        )
    return candidates


def channels_last(forward: Forward, x: torch.Tensor) -> Forward:
    """A call with a channels_last input.

    That is converted once, outside the timing: a channels_last model keeps the format.
    """
    prepared = x.to(memory_format=torch.channels_last)
    return lambda _: forward(prepared)


def padded_candidates(case: Case, formats: Iterable[str]) -> list[Candidate]:
    """lowbit's layers for the case's shape in whole vectors and panels: what raggedness costs.

    The case's weights are a corner of the larger ones, and the input's further features are zero,
    so that the first `n` outputs are those of the case up to rounding.
    """
    shape = parse(case.op, case.shape)
    if not isinstance(shape, LinearShape) or shape.padded == shape:
        return []
    larger = shape.padded
    layer, x = larger.layer(), torch.zeros(case.m, larger.k)
    x[:, : shape.k] = case.x
    with torch.no_grad():
        layer.weight[: shape.n, : shape.k] = case.layer.weight
        assert case.layer.bias is not None
        layer.bias[: shape.n] = case.layer.bias
    padded = Case(case.op, f"{larger.k}x{larger.n}", case.m, layer, x, larger.macs(case.m))
    return [
        dataclasses.replace(
            candidate,
            name=f"{candidate.name} padded",
            build=functools.partial(_corner, candidate.build, x, shape.n),
            own=False,
            rival=False,
        )
        for candidate in lowbit_candidates(padded, convert(layer, formats))
    ]


def _corner(build: Callable[[], Forward], x: torch.Tensor, n: int) -> Forward:
    forward = build()
    return lambda _: forward(x)[:, :n]
