"""torch's bfloat16: what a user gets from `layer.bfloat16()` on a CPU that has the instructions.

The conversions of a float32 input and output are in its time, as they are for the integer engines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.case import channels_last
from lowbit.benchmark.peers.peer import Peer


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    return [_candidate("torch bfloat16", layer.weight, lambda: _bfloat16(layer))]


def _conv(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> list[Candidate]:
    last = "channels_last"
    build = lambda: channels_last(_bfloat16(layer), x)  # noqa: E731
    return [_candidate(f"torch bfloat16 {last}", layer.weight, build, last)]


class _Converting(nn.Module):
    """A bfloat16 layer between the conversions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x.bfloat16()).float()
        return y


def _bfloat16(layer: nn.Module) -> nn.Module:
    return _Converting(copy.deepcopy(layer).bfloat16())


def _candidate(
    name: str, weight: torch.Tensor, build: Callable[[], Forward], layout: str | None = None
) -> Candidate:
    size = 2 * weight.numel()
    return Candidate(name, size, build, None, widths=(16,), activation_bits=16, layout=layout)


PEER = Peer("torch-bfloat16", linear=_linear, conv=_conv)
