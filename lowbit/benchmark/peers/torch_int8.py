"""torch's INT8: dynamic quantization of linears, static quantization of convolutions.

Every engine of torch that `lowbit.baselines` knows is a candidate, because which one is better
depends on the shape and the CPU: ratios are taken against the better one. The static convolution
includes what it takes to be dropped into a float model: quantize its input, dequantize its output;
the bare operator, codes in and codes out, is shown beside it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from lowbit.baselines import engines
from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.case import channels_last
from lowbit.benchmark.peers.peer import Peer

_Converted = TypeVar("_Converted")


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    def convert(engine: str) -> Forward:
        from torch.ao.quantization import quantize_dynamic

        model = nn.Sequential(copy.deepcopy(layer))
        forward: Forward = quantize_dynamic(model, {nn.Linear}, torch.qint8)[0]  # type: ignore[no-untyped-call]
        return forward

    return _candidates(layer.weight, convert)


def _candidates(weight: torch.Tensor, convert: Callable[[str], Forward]) -> list[Candidate]:
    build = {engine: functools.partial(_with_engine, engine, convert) for engine in engines()}
    size = _bytes(weight)
    return [Candidate(f"torch int8 {e}", size, build[e], "dot") for e in build]


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() + 4 * weight.shape[0]  # codes, and a float32 scale per output channel


def _conv(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> list[Candidate]:
    """Both memory formats, and the bare operator between codes."""
    size = _bytes(layer.weight)
    found = []
    for engine in engines():
        build = functools.partial(_static, layer, x, engine)
        last = lambda build=build: channels_last(build(), x)  # noqa: E731
        codes = lambda build=build: build().on_codes(x)  # noqa: E731
        name, bare = f"torch int8 {engine}", f"torch codes {engine}"
        layout = "channels_last"
        found += [
            Candidate(name, size, build, "dot", layout="nchw"),
            Candidate(f"{name} {layout}", size, last, "dot", layout=layout),
            Candidate(f"{bare} {layout}", size, codes, "dot", layout=layout, rival=False),
        ]
    return found


class _Static(nn.Module):
    """A quantized convolution between quantizing and dequantizing, without FX's own overhead."""

    def __init__(self, conv: nn.Module, scale: float, zero_point: int) -> None:
        super().__init__()
        self.conv, self.scale, self.zero_point = conv, scale, zero_point

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        return torch.quantize_per_tensor(x, self.scale, self.zero_point, torch.quint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(self.quantize(x)).dequantize()
        return y

    def on_codes(self, x: torch.Tensor) -> Forward:
        """The operator alone, on codes that are there."""
        codes = self.quantize(x.to(memory_format=torch.channels_last))
        return lambda _: self.conv(codes)


def _static(layer: nn.Conv2d, x: torch.Tensor, engine: str) -> _Static:
    """What torch's static quantization of the layer computes, calibrated on one image."""

    def convert(engine: str) -> _Static:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        model = nn.Sequential(copy.deepcopy(layer)).eval()
        prepared = prepare_fx(model, get_default_qconfig_mapping(engine), (x[:1],))
        prepared(x[:1])
        converted = convert_fx(prepared)
        (node,) = (n for n in converted.graph.nodes if n.target is torch.quantize_per_tensor)
        scale, zero_point = (getattr(converted, source.target) for source in node.args[1:3])
        return _Static(converted.get_submodule("0"), float(scale), int(zero_point))

    return _with_engine(engine, convert)


def _with_engine(engine: str, convert: Callable[[str], _Converted]) -> _Converted:
    """Converts under an engine; the packed weights remember it, the global setting is restored."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.ao announces its deprecation at every step
            return convert(engine)
    finally:
        torch.backends.quantized.engine = before


PEER = Peer("torch-int8", linear=_linear, conv=_conv)
