"""onnxruntime's INT8, signed weights, one scale per channel.

Linears are dynamic (`quantize_dynamic`), convolutions static: QLinearConv, whose activations are
uint8, between a QuantizeLinear and a DequantizeLinear.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.blocks import signed_codes, uint8_range
from lowbit.benchmark.peers.onnx_graph import float_model, linear_graph, session
from lowbit.benchmark.peers.peer import Peer


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    model = _quantize(layer)
    size = layer.weight.numel() + 5 * layer.out_features
    return [Candidate("onnxruntime int8", size, lambda: session(model, threads), "dot")]


def _quantize(layer: nn.Linear) -> bytes:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _no_advice():
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(linear_graph(layer), path, per_channel=True, weight_type=QuantType.QInt8)
        return path.read_bytes()


def _conv(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> list[Candidate]:
    size = layer.weight.numel() + 8 * layer.out_channels

    def build() -> Forward:
        return session(_static_conv(layer, x).SerializeToString(), threads)

    return [Candidate("onnxruntime int8", size, build, "dot", layout="nchw")]


def _static_conv(layer: nn.Conv2d, x: torch.Tensor) -> Any:
    """An ONNX model; the ranges of input and output are those of `x` and the layer's output."""
    from onnx import helper, numpy_helper

    (x_scale, x_zero), (y_scale, y_zero) = uint8_range(x), uint8_range(layer(x))
    codes, scale = signed_codes(layer)
    constants = {
        "x_scale": np.float32(x_scale),
        "x_zero": np.uint8(x_zero),
        "y_scale": np.float32(y_scale),
        "y_zero": np.uint8(y_zero),
        "weight": codes,
        "weight_scale": scale.astype(np.float32),
        "weight_zero": np.zeros(layer.out_channels, np.int8),
    }
    operands = ["x_codes", "x_scale", "x_zero", "weight", "weight_scale", "weight_zero"]
    operands += ["y_scale", "y_zero"]
    if layer.bias is not None:
        bias = np.rint(layer.bias.detach().numpy() / (x_scale * scale)).astype(np.int32)
        constants["bias"] = bias
        operands.append("bias")
    window: dict[str, Any] = {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "pads": (*layer.padding, *layer.padding),
        "dilations": layer.dilation,
        "group": layer.groups,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_codes"]),
        helper.make_node("QLinearConv", operands, ["y_codes"], **window),
        helper.make_node("DequantizeLinear", ["y_codes", "y_scale", "y_zero"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    return float_model(nodes, x.shape, layer(x).shape, initializers)


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """It advises, on the root logger, a preparation that changes nothing for one multiplication."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


PEER = Peer("onnxruntime-int8", requires=("onnx", "onnxruntime"), linear=_linear, conv=_conv)
