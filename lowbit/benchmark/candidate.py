"""What a benchmark times: a layer of some engine, which can be built as often as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Forward = Callable[[torch.Tensor], torch.Tensor]
"""One forward call on a float32 tensor, as a user of the engine would make it from Python."""

MOST_ERROR = {32: 1e-3, 16: 0.02, 8: 0.15, 4: 0.2, 2: 0.65, 1: 0.8}
"""Relative error of the output that weights of so many bits may have: plain rounding of random
weights, 2 bits with the largest weight as a level. More is not this layer."""


@dataclass(frozen=True)
class Candidate:
    """One engine's version of one float layer.

    Attributes:
        name: shown in the table, e.g. `"w4a8"` or `"onnxruntime int4 g128"`.
        weight_bytes: bytes of weights and scales that one forward call has to read.
        build: makes an independent copy with its own memory, prepared for the benchmark's input
            shape and number of threads; what it returns is what is timed.
        ceiling: what bounds its arithmetic: `"dot"` (integers), `"fma"` or `"xnor"`; None for
            instructions that no probe times, such as bfloat16's.
        passes: how often it runs through the multiplications; 2 for int16 activations, which are
            two int8 passes.
        widths: the widths of weights, in bits, that it offers; 32 and 16 are floats. Ternary
            weights stand for 2 bits and for 1.
        activation_bits: 8 for int8, 16 for int16 and bfloat16, 32 for float32, 1 for signs.
        own: whether it is a layer of lowbit.
        layout: memory format of a convolution's input and output, "nchw" or "channels_last"; None
            for a linear.
        rival: whether it is the layer as a user calls it, float32 in and out. What is not (a bare
            operator, a padded shape) is timed and shown, but nothing has to be quicker than it.
    """

    name: str
    weight_bytes: int
    build: Callable[[], Forward]
    ceiling: str | None
    passes: int = 1
    widths: tuple[int, ...] = (8,)
    activation_bits: int = 8
    own: bool = False
    layout: str | None = None
    rival: bool = True

    @property
    def probe(self) -> str | None:
        """The probe of `ceiling`: integers have one for each width of weights."""
        return f"dot{max(self.widths)}" if self.ceiling == "dot" else self.ceiling

    @property
    def most_error(self) -> float:
        """Relative error above which an output is nonsense; that of all zeros is 1."""
        return 1.0 if self.activation_bits == 1 else MOST_ERROR[max(self.widths)]

    def rivals(self, other: Candidate) -> bool:
        """Whether `other` offers this one's width, with activations that are no coarser."""
        offers = max(self.widths) in other.widths and other.activation_bits >= self.activation_bits
        return offers and self.races(other)

    def races(self, other: Candidate) -> bool:
        """Whether `other` is a layer of another engine that this one can be held against.

        An engine may have the layout that it prefers, but who has NCHW is held against NCHW.
        """
        same_layout = self.layout in ("channels_last", other.layout)
        return other.rival and not other.own and same_layout
