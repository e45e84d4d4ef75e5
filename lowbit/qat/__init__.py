"""Quantization-aware training: layers that round as the layers that they will become."""

from lowbit.qat.layers import Conv1d, Conv2d, Linear, QATLayer
from lowbit.qat.prepare import convert, prepare_qat

__all__ = ["Conv1d", "Conv2d", "Linear", "QATLayer", "convert", "prepare_qat"]
