"""OpenVINO's static INT8 convolution: the graph that NNCF writes, symmetric on both sides.

A FakeQuantize in front and int8 weights with a scale for each channel become one int8 convolution
that ends in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.peers.blocks import signed_codes
from lowbit.benchmark.peers.openvino_request import request


def conv(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> list[Candidate]:
    """NCHW, and with input and output declared as NHWC, which is the order inside."""
    size = layer.weight.numel() + 4 * layer.out_channels

    def last() -> Forward:
        forward = request(_channels_last(_graph(layer, x)), threads)
        prepared = x.permute(0, 2, 3, 1).contiguous()
        return lambda _: forward(prepared).permute(0, 3, 1, 2)

    return [
        Candidate(
            "openvino int8",
            size,
            lambda: request(_graph(layer, x), threads),
            "dot",
            layout="nchw",
        ),
        Candidate("openvino int8 channels_last", size, last, "dot", layout="channels_last"),
    ]


def _graph(layer: nn.Conv2d, x: torch.Tensor) -> Any:
    import openvino as ov
    from openvino import opset15 as op

    codes, scale = signed_codes(layer)
    largest = float(x.abs().max())
    bounds = [op.constant(np.float32(v)) for v in (-largest * 128 / 127, largest)]
    parameter = op.parameter(list(x.shape), np.float32)
    source = op.fake_quantize(parameter, *bounds, *bounds, 256)
    shape = layer.weight.shape
    if layer.groups > 1:
        shape = torch.Size((layer.groups, shape[0] // layer.groups, *shape[1:]))
    factors = scale.reshape(*shape[: len(shape) - 3], 1, 1, 1).astype(np.float32)
    weight = op.multiply(op.convert(op.constant(codes.reshape(shape)), "f32"), op.constant(factors))
    convolution = op.group_convolution if layer.groups > 1 else op.convolution
    pads = list(layer.padding)
    y = convolution(source, weight, list(layer.stride), pads, pads, list(layer.dilation))
    if layer.bias is not None:
        y = op.add(y, op.constant(layer.bias.detach().numpy().reshape(1, -1, 1, 1)))
    return ov.Model([y], [parameter], "convolution")


def _channels_last(model: Any) -> Any:
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor

    process = PrePostProcessor(model)
    for end in (process.input(), process.output()):
        end.tensor().set_layout(Layout("NHWC"))
        end.model().set_layout(Layout("NCHW"))
    return process.build()
