"""ggml, the library under llama.cpp: Q8_0, Q4_0, Q4_K, Q2_K, TQ2_0 and Q1_0.

Weights are rounded by ggml's own quantizers and repacked where its CPU backend repacks them
(Q4_0, Q4_K and Q2_K on x86); activations are float32, which it quantizes to 8 bits on the fly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate
from lowbit.benchmark.peers import ggml_library
from lowbit.benchmark.peers.peer import Peer


@dataclass(frozen=True)
class _Kind:
    """A type of ggml: its number in `ggml_type`, and the widths that it stands for."""

    number: int
    widths: tuple[int, ...]


_KINDS = {
    "q8_0": _Kind(8, (8,)),
    "q4_0": _Kind(2, (4,)),
    "q4_k": _Kind(12, (4,)),
    "q2_k": _Kind(10, (2,)),
    "tq2_0": _Kind(35, (2, 1)),
    "q1_0": _Kind(41, (1,)),
}


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    ggml = ggml_library.load()
    n, k = layer.weight.shape
    candidates = []
    for name, kind in _KINDS.items():
        if k % ggml.ggml_blck_size(kind.number):
            continue  # a row is a whole number of blocks
        codes = functools.cache(functools.partial(ggml_library.quantize, layer.weight, kind.number))
        build = lambda codes=codes, number=kind.number: ggml_library.MatMul(  # noqa: E731
            codes(), number, layer.bias, x, n, threads
        )
        size = n * ggml.ggml_row_size(kind.number, k)
        candidates.append(Candidate(f"ggml {name}", size, build, "dot", widths=kind.widths))
    return candidates


PEER = Peer(
    "ggml",
    linear=_linear,
    absent=ggml_library.absent,
    tell_version=ggml_library.version,
)
