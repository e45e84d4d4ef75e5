"""numkong: packed int8 dot products, and Hamming distances of bits for binary weights and signs.

It multiplies integers; what makes a linear layer of that (quantizing a row, scales, bias) is done
here with torch and NumPy, as a user of the package would have to, and is in the time. It has no
threads of its own: rows are shared among Python threads, as its documentation advises. (It brings
an OpenMP runtime beside torch's, which these functions do not start.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.blocks import Array, signed_codes
from lowbit.benchmark.peers.peer import Peer


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    k, n = layer.in_features, layer.out_features
    codes = functools.cache(functools.partial(signed_codes, layer))
    int8 = lambda: _int8(_bias(layer), *codes(), threads)  # noqa: E731
    return [
        Candidate("numkong int8", n * (k + 4), int8, "dot"),
        Candidate(
            "numkong w1a1",
            n * (-(-k // 8) + 4),
            lambda: _bits(layer, threads),
            "xnor",
            widths=(1,),
            activation_bits=1,
        ),
    ]


def _int8(bias: torch.Tensor, codes: Array, scale: Array, threads: int) -> Forward:
    import numkong

    packed = numkong.dots_pack(codes, dtype="int8")
    dots = _shared(numkong.dots_packed, packed, threads, "int32")
    scales = torch.from_numpy(scale)

    def forward(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(1, keepdim=True) / 127
        codes = (x / scale).round_().to(torch.int8)
        return torch.addcmul(bias, dots(codes.numpy()).float().mul_(scale), scales)

    return forward


def _bits(layer: nn.Linear, threads: int) -> Forward:
    import numkong

    weight, k = layer.weight.detach(), layer.in_features
    packed = numkong.hammings_pack(np.packbits(weight.numpy() >= 0, axis=1), dtype="uint1")
    hammings = _shared(numkong.hammings_packed, packed, threads, "uint32")
    scales, bias = weight.abs().mean(1), _bias(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        signs = np.packbits(x.numpy() >= 0, axis=1)
        sums = hammings(signs).float().mul_(-2).add_(k)  # each difference is -1 in place of +1
        return torch.addcmul(bias, sums.mul_(x.abs().mean(1, keepdim=True)), scales)

    return forward


def _bias(layer: nn.Linear) -> torch.Tensor:
    return torch.zeros(1) if layer.bias is None else layer.bias.detach().clone()


def _shared(
    kernel: Callable[..., Any], packed: Any, threads: int, dtype: Any
) -> Callable[[Array], torch.Tensor]:
    """A kernel over `[m, k]` rows, which are shared among threads; int32 `[m, n]`."""
    import numkong

    def tensor(result: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(result).view(np.int32))

    def run(rows: Array) -> torch.Tensor:
        m = len(rows)
        if threads == 1 or m < threads:
            return tensor(kernel(rows, packed))
        pool = _pool(threads)
        out = numkong.empty((m, packed.width), dtype=dtype)
        starts = [m * thread // threads for thread in range(threads + 1)]
        parts = [
            pool.submit(kernel, rows, packed, out=out, start_row=begin, end_row=end)
            for begin, end in itertools.pairwise(starts)
        ]
        for part in parts:
            part.result()
        return tensor(out)

    return run


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


PEER = Peer("numkong", requires=("numkong",), linear=_linear)
