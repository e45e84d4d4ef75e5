"""What a benchmark times: a layer of some engine, which can be built as often as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Forward = Callable[[torch.Tensor], torch.Tensor]
"""One forward call on a float32 tensor, as a user of the engine would make it from Python."""


@dataclass(frozen=True)
class Candidate:
    """One engine's version of one float layer.

    Attributes:
        name: shown in the table, e.g. `"w4a8"` or `"onnxruntime int4 g128"`.
        weight_bytes: bytes of weights and scales that one forward call has to read.
        build: makes an independent copy with its own memory, prepared for the benchmark's input
            shape and number of threads; what it returns is what is timed.
        ceiling: the probe that bounds its arithmetic: `"dot"`, `"fma"` or `"xnor"`.
        passes: how often it runs through the multiplications; 2 for int16 activations, which are
            two int8 passes.
    """

    name: str
    weight_bytes: int
    build: Callable[[], Forward]
    ceiling: str
    passes: int = 1
