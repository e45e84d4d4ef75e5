"""torch's own float32 layers: what a user has before converting."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.peer import Peer


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    return [Candidate("torch float32", layer.weight.nbytes, lambda: copy.deepcopy(layer), "fma")]


def _conv(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> list[Candidate]:
    def channels_last() -> Forward:
        inner = copy.deepcopy(layer)
        weight = inner.weight.detach().to(memory_format=torch.channels_last)
        inner.weight = nn.Parameter(weight, requires_grad=False)
        # The input is converted once, outside the timing: a channels_last model keeps the format.
        prepared = x.to(memory_format=torch.channels_last)
        return lambda _: inner(prepared)

    size = layer.weight.nbytes
    return [
        Candidate("torch float32", size, lambda: copy.deepcopy(layer), "fma"),
        Candidate("torch float32 channels_last", size, channels_last, "fma"),
    ]


PEER = Peer("torch-float32", linear=_linear, conv=_conv)
