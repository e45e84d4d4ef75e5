"""Quantized layers."""

from typing import Any

from torch import nn

from lowbit.nn.conv import Conv1d, Conv2d
from lowbit.nn.conv_transpose import ConvTranspose2d
from lowbit.nn.linear import Linear
from lowbit.schemes import Scheme

__all__ = ["LAYERS", "SAFE_GLOBALS", "Conv1d", "Conv2d", "ConvTranspose2d", "Linear"]

LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.ConvTranspose2d: ConvTranspose2d,
}
"""The float classes that convert, and what to."""

SAFE_GLOBALS = [Conv1d, Conv2d, ConvTranspose2d, Linear, Scheme, nn.ModuleList]
"""For `torch.serialization.add_safe_globals`, to load whole pickled layers with weights_only."""
