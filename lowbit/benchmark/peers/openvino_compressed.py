"""OpenVINO's linears with compressed weights: int8, 4-bit and 2-bit codes in groups of 128.

The graph is the one that NNCF writes (codes, minus a zero point, times a scale, reshaped, into a
MatMul), which the CPU plugin fuses into its own low-bit kernels with activations quantized on the
fly to int8. A width that the installed release does not have is reported as failed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.blocks import Array, block_codes, pack_codes
from lowbit.benchmark.peers.openvino_conv import conv
from lowbit.benchmark.peers.openvino_request import request
from lowbit.benchmark.peers.peer import Peer

_GROUP = 128
_WIDTHS = {"i8": 8, "u4": 4, "u2": 2}


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    if layer.in_features % _GROUP:
        return []  # a shorter last group is not something that its models have
    groups = layer.out_features * layer.in_features // _GROUP
    candidates = []
    for kind, bits in _WIDTHS.items():
        codes, scale = block_codes(layer, bits, _GROUP)
        graph = functools.partial(_graph, layer.bias, codes, scale, bits, x.shape[0])
        build = functools.partial(_build, graph, threads)
        size = layer.weight.numel() * bits // 8 + 2 * groups
        name = f"openvino {kind} g{_GROUP}"
        candidates.append(Candidate(name, size, build, "dot", widths=(bits,)))
    return candidates


def _build(graph: Callable[[], Any], threads: int) -> Forward:
    return request(graph(), threads, DYNAMIC_QUANTIZATION_GROUP_SIZE=_GROUP)


def _graph(bias: torch.Tensor | None, codes: Array, scale: Array, bits: int, m: int) -> Any:
    import openvino as ov
    from openvino import opset15 as op

    n, groups, _ = codes.shape
    inputs = groups * _GROUP
    if bits == 8:
        value = op.convert(op.constant((codes ^ 0x80).view(np.int8)), "f16")
    else:
        value = op.convert(_constant(codes, bits), "f16")
        middle = np.full((n, groups, 1), 1 << (bits - 1), np.uint8)
        value = op.subtract(value, op.convert(_constant(middle, bits), "f16"))
    value = op.multiply(value, op.constant(scale.astype(np.float16)))
    weight = op.convert(op.reshape(value, [n, inputs], False), "f32")
    x = op.parameter([m, inputs], np.float32)
    y = op.matmul(x, weight, False, True)
    if bias is not None:
        y = op.add(y, op.constant(bias.detach().numpy()[None]))
    return ov.Model([y], [x], "linear")


def _constant(codes: Array, bits: int) -> Any:
    """A `u4` or `u2` constant with memory of its own."""
    import openvino as ov
    from openvino import opset15 as op

    flat = codes.reshape(-1)
    packed = pack_codes(np.pad(flat, (0, -flat.size % (8 // bits))), bits)
    tensor = ov.Tensor(getattr(ov.Type, f"u{bits}"), list(codes.shape))
    np.copyto(tensor.data.view(np.uint8).reshape(-1), packed)
    return op.constant(tensor)


PEER = Peer("openvino", requires=("openvino",), linear=_linear, conv=conv)
