"""onnxruntime's MatMulNBits: 4-bit weights in groups of 128 and 2-bit weights in groups of 32.

The node is written directly, as its own quantizer would write it; `accuracy_level=4` lets it
compute in int8, its quickest path.
"""

from __future__ import annotations

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate
from lowbit.benchmark.peers.blocks import block_codes, pack_codes
from lowbit.benchmark.peers.onnx_graph import session
from lowbit.benchmark.peers.peer import Peer

_WIDTHS = ((4, 128), (2, 32))


def _linear(layer: nn.Linear, x: torch.Tensor, threads: int) -> list[Candidate]:
    candidates = []
    for bits, group_size in _WIDTHS:
        if layer.in_features % group_size:
            continue  # the last block would have to be padded, which no model exporter does either
        model = _graph(layer, bits, group_size)
        groups = layer.out_features * layer.in_features // group_size
        size = layer.weight.numel() * bits // 8 + 4 * groups
        name = f"onnxruntime int{bits} g{group_size}"
        build = lambda model=model: session(model, threads)  # noqa: E731
        candidates.append(Candidate(name, size, build, "dot", widths=(bits,)))
    return candidates


def _graph(layer: nn.Linear, bits: int, group_size: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    codes, scale = block_codes(layer, bits, group_size)
    constants = [
        numpy_helper.from_array(pack_codes(codes, bits), "codes"),
        numpy_helper.from_array(scale.reshape(layer.out_features, -1), "scale"),
    ]
    inputs = ["x", "codes", "scale"]
    if layer.bias is not None:
        constants.append(numpy_helper.from_array(layer.bias.detach().numpy(), "bias"))
        inputs += ["", "", "bias"]  # no zero points, no group index
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        ["y"],
        domain="com.microsoft",
        K=layer.in_features,
        N=layer.out_features,
        bits=bits,
        block_size=group_size,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", layer.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", layer.out_features])],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


PEER = Peer("onnxruntime-nbits", requires=("onnx", "onnxruntime"), linear=_linear)
