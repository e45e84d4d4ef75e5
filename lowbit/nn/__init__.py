"""Quantized layers."""

from torch import nn

from lowbit.nn.conv import Conv1d, Conv2d
from lowbit.nn.conv_transpose import ConvTranspose2d
from lowbit.nn.linear import Linear
from lowbit.schemes import Scheme

__all__ = ["SAFE_GLOBALS", "Conv1d", "Conv2d", "ConvTranspose2d", "Linear"]

SAFE_GLOBALS = [Conv1d, Conv2d, ConvTranspose2d, Linear, Scheme, nn.ModuleList]
"""For `torch.serialization.add_safe_globals`, to load whole pickled layers with weights_only."""
