"""zentorch, AMD's extension of torch: dynamic W8A8 and W4A8, and weight-only int4.

`zentorch_dynamic_qlinear` takes int8 weights with float32 activations, and 4-bit weights with
bfloat16 ones; `zentorch_woq_linear` multiplies bfloat16 activations. The operators reorder a weight
when they first see it and keep the result, by address and shape, until the process ends: what comes
after in the same process must have the same values in the same place, or a place of its own.

Importing zentorch changes none of torch's settings; it shares torch's OpenMP runtime.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.blocks import Array, block_codes, signed_codes
from lowbit.benchmark.peers.peer import Peer

_GROUP = 128


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    numel, n, k = layer.weight.numel(), layer.out_features, layer.in_features
    # Rounded once, however many copies are built.
    int8 = functools.cache(functools.partial(signed_codes, layer))
    build = lambda: _int8(layer.bias, *int8())  # noqa: E731
    candidates = [Candidate("zentorch w8a8", numel + 4 * n, build, "dot")]
    if k % 8:
        return candidates  # eight codes make a word
    for group_size, suffix in ((k, ""), (_GROUP, f" g{_GROUP}")):
        if k % group_size:
            continue
        size = numel // 2 + 2 * numel // group_size
        int4 = functools.cache(functools.partial(_int4_operands, layer, group_size))
        dynamic = lambda int4=int4: _dynamic_int4(layer.bias, *int4())  # noqa: E731
        woq = lambda int4=int4: _weight_only(layer.bias, *int4())  # noqa: E731
        name = f"zentorch weight-only int4{suffix}"
        candidates += [
            Candidate(f"zentorch w4a8{suffix}", size, dynamic, "dot", widths=(4,)),
            Candidate(name, size, woq, None, widths=(4,), activation_bits=16),
        ]
    return candidates


def _operators() -> Any:
    import zentorch  # noqa: F401  # registers the operators

    return torch.ops.zentorch


def _int8(bias: torch.Tensor | None, codes: Array, scale: Array) -> Forward:
    operator = _operators().zentorch_dynamic_qlinear
    weight, scales = torch.from_numpy(codes.copy()), torch.from_numpy(scale)
    bias = None if bias is None else bias.detach().clone()
    return lambda x: operator(x, weight, scales, bias)


def _int4_operands(layer: nn.Linear, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 `[N, K / 8]`, eight codes a word, and bfloat16 scales `[G, N]`."""
    codes, scale = block_codes(layer, 4, group_size)
    values = torch.from_numpy(codes).reshape(layer.weight.shape).to(torch.int8) - 8
    packed = _operators().zentorch_woq_repack_weight(values)
    return packed, torch.from_numpy(scale).squeeze(2).T.contiguous().bfloat16()


def _dynamic_int4(bias: torch.Tensor | None, packed: torch.Tensor, scales: torch.Tensor) -> Forward:
    operator = _operators().zentorch_dynamic_qlinear
    packed, bias = packed.clone(), None if bias is None else bias.detach().bfloat16()
    return lambda x: operator(x.bfloat16(), packed, scales, bias).float()


def _weight_only(bias: torch.Tensor | None, packed: torch.Tensor, scales: torch.Tensor) -> Forward:
    operator = _operators().zentorch_woq_linear
    columns, bias = packed.clone().T, None if bias is None else bias.detach().bfloat16()
    return lambda x: operator(x.bfloat16(), columns, scales, None, bias).float()


PEER = Peer("zentorch", requires=("zentorch",), linear=_linear)
