"""torch's own float32 layers: what a user has before converting."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.case import channels_last
from lowbit.benchmark.peers.peer import Peer


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    return [_candidate("torch float32", layer, lambda: copy.deepcopy(layer))]


def _conv(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> list[Candidate]:
    last = "channels_last"
    return [
        _candidate("torch float32", layer, lambda: copy.deepcopy(layer), "nchw"),
        _candidate(f"torch float32 {last}", layer, lambda: channels_last(_copy(layer), x), last),
    ]


def _copy(layer: nn.Conv2d) -> nn.Conv2d:
    inner = copy.deepcopy(layer)
    weight = inner.weight.detach().to(memory_format=torch.channels_last)
    inner.weight = nn.Parameter(weight, requires_grad=False)
    return inner


def _candidate(
    name: str, layer: nn.Module, build: Callable[[], Forward], layout: str | None = None
) -> Candidate:
    size = layer.get_parameter("weight").nbytes
    return Candidate(name, size, build, "fma", widths=(32,), activation_bits=32, layout=layout)


PEER = Peer("torch-float32", linear=_linear, conv=_conv)
