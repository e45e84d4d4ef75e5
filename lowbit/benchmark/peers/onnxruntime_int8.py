"""onnxruntime's dynamic INT8: `quantize_dynamic` with signed weights, one scale per channel."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate
from lowbit.benchmark.peers.onnx_graph import linear_graph, session
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


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """It advises, on the root logger, a preparation that changes nothing for one multiplication."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


PEER = Peer("onnxruntime-int8", requires=("onnx", "onnxruntime"), linear=_linear)
