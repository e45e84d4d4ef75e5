"""torch's bfloat16: what a user gets from `layer.bfloat16()` on a CPU that has the instructions.

The conversions of a float32 input and output are in its time, as they are for the integer engines.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.peer import Peer


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    def build() -> Forward:
        inner = copy.deepcopy(layer).bfloat16()
        return lambda x: inner(x.bfloat16()).float()

    size = 2 * layer.weight.numel()
    return [Candidate("torch bfloat16", size, build, None, widths=(16,), activation_bits=16)]


PEER = Peer("torch-bfloat16", linear=_linear)
