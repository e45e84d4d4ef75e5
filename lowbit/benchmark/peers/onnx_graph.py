"""ONNX models from float32 to float32, that of a linear layer, and a session over a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.benchmark.candidate import Forward


def linear_graph(layer: nn.Linear) -> Any:
    """An ONNX model `y = x @ W.T + b` of a linear layer; x is float32 `[m, in_features]`."""
    from onnx import helper, numpy_helper

    weight = np.ascontiguousarray(layer.weight.detach().numpy().T)
    product = "y" if layer.bias is None else "product"
    nodes = [helper.make_node("MatMul", ["x", "weight"], [product])]
    constants = [numpy_helper.from_array(weight, "weight")]
    if layer.bias is not None:
        nodes.append(helper.make_node("Add", ["product", "bias"], ["y"]))
        constants.append(numpy_helper.from_array(layer.bias.detach().numpy(), "bias"))
    return float_model(nodes, ["m", layer.in_features], ["m", layer.out_features], constants)


def float_model(
    nodes: Sequence[Any],
    x_shape: Sequence[int | str],
    y_shape: Sequence[int | str],
    constants: Sequence[Any],
) -> Any:
    """An ONNX model from float32 `x` to float32 `y`."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
        constants,
    )
    opset = [helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)


def session(model: bytes, threads: int) -> Forward:
    """A session with its own copy of the weights, on `threads` threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its threads may spin inside a run, but not on while the next candidate is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    run = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(run(None, {"x": x.numpy()})[0])

    return forward
