"""torch's own float32 layers: what a user has before converting."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.peer import Peer


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    return [_candidate("", layer.weight, lambda: copy.deepcopy(layer))]


def _conv(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> list[Candidate]:
    def channels_last() -> Forward:
        inner = copy.deepcopy(layer)
        weight = inner.weight.detach().to(memory_format=torch.channels_last)
        inner.weight = nn.Parameter(weight, requires_grad=False)
        # The input is converted once, outside the timing: a channels_last model keeps the format.
        prepared = x.to(memory_format=torch.channels_last)
        return lambda _: inner(prepared)

    return [
        _candidate("", layer.weight, lambda: copy.deepcopy(layer)),
        _candidate(" channels_last", layer.weight, channels_last),
    ]


def _candidate(layout: str, weight: torch.Tensor, build: Callable[[], Forward]) -> Candidate:
    name = f"torch float32{layout}"
    return Candidate(name, weight.nbytes, build, "fma", widths=(32,), activation_bits=32)


PEER = Peer("torch-float32", linear=_linear, conv=_conv)
