"""torch's INT8: dynamic quantization of linears, static quantization of convolutions.

Every engine of torch that `lowbit.baselines` knows is a candidate, because which one is better
depends on the shape and the CPU: ratios are taken against the better one. The static convolution
includes what it takes to be dropped into a float model: quantize its input, dequantize its output.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn

from lowbit.baselines import engines
from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.peer import Peer


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    def convert(engine: str) -> Forward:
        from torch.ao.quantization import quantize_dynamic

        model = nn.Sequential(copy.deepcopy(layer))
        forward: Forward = quantize_dynamic(model, {nn.Linear}, torch.qint8)[0]  # type: ignore[no-untyped-call]
        return forward

    return _candidates(layer.weight, convert)


def _conv(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> list[Candidate]:
    def convert(engine: str) -> Forward:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        model = nn.Sequential(copy.deepcopy(layer)).eval()
        prepared = prepare_fx(model, get_default_qconfig_mapping(engine), (x,))
        prepared(x)
        forward: Forward = convert_fx(prepared)
        return forward

    return _candidates(layer.weight, convert)


def _candidates(weight: torch.Tensor, convert: Callable[[str], Forward]) -> list[Candidate]:
    size = weight.numel() + 4 * weight.shape[0]  # codes, and a float32 scale per output channel
    candidates = []
    for engine in engines():
        build = lambda engine=engine: _with_engine(engine, convert)  # noqa: E731
        candidates.append(Candidate(f"torch int8 {engine}", size, build, "dot"))
    return candidates


def _with_engine(engine: str, convert: Callable[[str], Forward]) -> Forward:
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
