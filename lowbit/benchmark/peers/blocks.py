"""Plain block-wise rounding of weights, for peers whose graphs take ready-made codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, np.dtype[Any]]


def block_codes(layer: nn.Linear | nn.Conv2d, bits: int, group_size: int) -> tuple[Array, Array]:
    """Rounds a weight to the nearest of `2**bits` even levels, group by group.

    Returns:
        Unsigned codes uint8 `[N, G, group_size]` around the middle `2**(bits-1)`, and scales
        float32 `[N, G, 1]`: value = scale * (code - middle).
    """
    weight = layer.weight.detach().numpy().reshape(len(layer.weight), -1, group_size)
    middle = 1 << (bits - 1)
    limit = max(middle - 1, 1)
    scale = np.abs(weight).max(axis=2, keepdims=True) / limit
    values = np.rint(weight / np.where(scale == 0, 1, scale)).clip(-middle, middle - 1)
    return (values + middle).astype(np.uint8), scale


def signed_codes(layer: nn.Linear | nn.Conv2d) -> tuple[Array, Array]:
    """Rounds a weight to 8 bits, one scale for each output channel.

    Returns:
        int8 in the shape of the weight and float32 `[N]`.
    """
    codes, scale = block_codes(layer, 8, layer.weight[0].numel())
    return (codes ^ 0x80).view(np.int8).reshape(layer.weight.shape), scale.reshape(-1)


def uint8_range(values: torch.Tensor) -> tuple[float, int]:
    """The scale and the zero point of uint8 codes that span the values and 0."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)


def pack_codes(codes: Array, bits: int) -> Array:
    """Packs codes in the order of ONNX and OpenVINO: the first code in a byte's lowest bits.

    Returns:
        uint8, the last dimension shorter by `8 / bits`; it has to divide.
    """
    fields = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    packed = np.zeros(fields.shape[:-1], np.uint8)
    for position in range(8 // bits):
        packed |= fields[..., position] << (bits * position)
    return packed
