"""A compiled OpenVINO graph as a forward call."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.benchmark.candidate import Forward


def request(graph: Any, threads: int, **more: Any) -> Forward:
    """Compiles a graph of one input and one output, for the CPU.

    Its output is a buffer that it uses again in each call, as a call of a compiled model gives it.

    Args:
        graph: an `openvino.Model`, new, so that its constants are a copy of their own.
        threads: number of threads.
        more: properties beside those that every candidate has.
    """
    import openvino as ov

    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned, it leaves the threads of the engines that are timed next on one core.
        "ENABLE_CPU_PINNING": False,
        # Its default on CPUs with bfloat16 is bfloat16, for which it has no 2-bit kernel.
        "INFERENCE_PRECISION_HINT": "f32",
        **more,
    }
    infer = ov.Core().compile_model(graph, "CPU", config).create_infer_request().infer

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(infer([x.numpy()], share_inputs=True, share_outputs=True)[0])

    return forward
