"""What a batch norm with running statistics does to a channel: a factor and an addend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def fold_channels(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factor of a layer's weights and the bias of the layer that computes both.

    Args:
        norm: a batch norm with running statistics, of N features.
        bias: [N], of the layer before it; None for zeros.

    Returns:
        Two float64 [N].
    """
    mean, var, gamma, beta = map(_double, _tensors(norm))
    assert mean is not None
    assert var is not None
    with torch.no_grad():
        scale = (var + getattr(norm, "eps", 0.0)).rsqrt()
        if gamma is not None:
            scale = scale * gamma
        shift = -mean if bias is None else bias.detach().double() - mean
        shift = shift * scale
        return scale, shift if beta is None else shift + beta


def _tensors(norm: nn.Module) -> tuple[Any, Any, Any, Any]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()
