"""torch's weight-only operators: `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu`.

They are what torchao and other packages call. Activations are bfloat16: float32 ones they take too,
at a twentieth of the speed.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.blocks import Array, block_codes, signed_codes
from lowbit.benchmark.peers.peer import Peer

_GROUPS = (128, 32)
_DEPTH = 32  # with another K, the int8 operator returns nonsense or ends the process
_PANEL = 16  # output channels that the int4 operator packs together


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    numel, n, k = layer.weight.numel(), layer.out_features, layer.in_features
    candidates = []
    if k % _DEPTH == 0:
        # Rounded once, however many copies are built.
        int8 = functools.cache(functools.partial(signed_codes, layer))
        build = lambda: _int8(layer.bias, *int8())  # noqa: E731
        name = "torch weight-only int8"
        candidates.append(Candidate(name, numel + 2 * n, build, None, activation_bits=16))
    for group_size in _GROUPS:
        if k % group_size or n % _PANEL:
            continue
        size = numel // 2 + 4 * numel // group_size
        int4 = functools.cache(functools.partial(_int4_operands, layer, group_size))
        grouped = lambda g=group_size, int4=int4: _int4(layer.bias, g, *int4())  # noqa: E731
        name = f"torch weight-only int4 g{group_size}"
        candidates.append(Candidate(name, size, grouped, None, widths=(4,), activation_bits=16))
    return candidates


def _int8(bias: torch.Tensor | None, codes: Array, scale: Array) -> Forward:
    weight, scales = torch.from_numpy(codes.copy()), torch.from_numpy(scale).bfloat16()
    return _with_bias(bias, lambda x: torch._weight_int8pack_mm(x, weight, scales))


def _int4_operands(layer: nn.Linear, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = block_codes(layer, 4, group_size)
    unpacked = torch.from_numpy(codes).reshape(layer.weight.shape).int()
    packed = torch._convert_weight_to_int4pack_for_cpu(unpacked, 1)
    # [G, N, 2]: the scale, and what code 8 stands for.
    scales = torch.from_numpy(scale).squeeze(2).T.contiguous()
    return packed, torch.stack((scales, torch.zeros_like(scales)), 2).bfloat16()


def _int4(
    bias: torch.Tensor | None, group_size: int, packed: torch.Tensor, grid: torch.Tensor
) -> Forward:
    packed, grid = packed.clone(), grid.clone()
    return _with_bias(
        bias, lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group_size, grid)
    )


def _with_bias(bias: torch.Tensor | None, product: Forward) -> Forward:
    """The operators have no bias, and take and return bfloat16."""
    if bias is None:
        return lambda x: product(x.bfloat16()).float()
    addend = bias.detach().clone()
    return lambda x: product(x.bfloat16()) + addend  # float32, from float32's bias


PEER = Peer("torch-weight-only", linear=_linear)
