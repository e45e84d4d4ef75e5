"""A transposed convolution as ordinary ones.

Output pixel o of a dimension reads input pixel (o + padding - k * dilation) / stride for every
kernel position k for which that is an integer. So the outputs of one *phase*, (o + padding) mod
stride, read through the same kernel positions, its *taps*: they form an ordinary convolution of
stride 1. Phases with the same number of taps are computed together, as channels of one convolution:
a *part*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd
from typing import Any

Pair = tuple[int, int]


@dataclass(frozen=True)
class Phases:
    """Phases of one dimension that have the same number of taps.

    Attributes:
        phases: (output + padding) mod stride of each.
        taps: of each phase, kernel positions in the order of the input pixels that they read.
        shifts: of each phase: its output number u * stride + phase - padding reads pixels up to
            u - shift.
        dilation: pixels from one tap to the next.
    """

    phases: tuple[int, ...]
    taps: tuple[tuple[int, ...], ...]
    shifts: tuple[int, ...]
    dilation: int

    @property
    def size(self) -> int:
        """The number of taps."""
        return len(self.taps[0])


@dataclass(frozen=True)
class Part:
    """A convolution that computes the phases of `rows` times those of `columns`."""

    rows: Phases
    columns: Phases

    @property
    def kernel_size(self) -> Pair:
        return self.rows.size, self.columns.size

    @property
    def dilation(self) -> Pair:
        return self.rows.dilation, self.columns.dilation

    @property
    def count(self) -> int:
        """The number of phases: channels of the part for each channel of the output."""
        return len(self.rows.phases) * len(self.columns.phases)

    def taps(self) -> Iterator[tuple[Any, ...]]:
        """For each phase, the index of its taps in a weight [..., kh, kw]."""
        for rows, columns in product(self.rows.taps, self.columns.taps):
            yield ..., [[row] for row in rows], list(columns)


@lru_cache
def parts(kernel_size: Pair, stride: Pair, dilation: Pair, depthwise: bool) -> tuple[Part, ...]:
    """The parts of a transposed convolution.

    Args:
        depthwise: whether every part is to have one phase, and so stays depthwise.
    """
    rows, columns = (
        tuple(_phases(k, s, d, depthwise))
        for k, s, d in zip(kernel_size, stride, dilation, strict=True)
    )
    return tuple(Part(r, c) for r in rows for c in columns)


def _phases(kernel: int, stride: int, dilation: int, single: bool) -> Iterator[Phases]:
    step = stride // gcd(stride, dilation)  # from one tap of a phase to its next
    taps: dict[int, tuple[int, ...]] = {}
    for first in range(min(kernel, step)):
        taps[first * dilation % stride] = tuple(reversed(range(first, kernel, step)))
    for size in sorted({len(t) for t in taps.values()}, reverse=True):
        members = sorted(phase for phase in taps if len(taps[phase]) == size)
        for chosen in [[phase] for phase in members] if single else [members]:
            yield Phases(
                phases=tuple(chosen),
                taps=tuple(taps[phase] for phase in chosen),
                shifts=tuple((taps[phase][-1] * dilation - phase) // stride for phase in chosen),
                dilation=dilation // gcd(stride, dilation),
            )


@dataclass(frozen=True)
class Window:
    """What a part does along one dimension of an input.

    Attributes:
        padding: pixels before and after the input.
        slices: for each phase its outputs: (first in the output, first of the part's, how many).
    """

    padding: Pair
    slices: tuple[tuple[int, int, int], ...]


@lru_cache(256)
def window(phases: Phases, size: int, output: int, stride: int, padding: int) -> Window | None:
    """How the outputs of these phases are computed; None if there are none.

    The whole input is convolved, with more padding than needed rather than less, so that every part
    quantizes the same pixels.

    Args:
        size: pixels of the input.
        output: pixels of the output.
        stride, padding: of the transposed convolution.
    """
    spans = []
    for phase, shift in zip(phases.phases, phases.shifts, strict=True):
        # The outputs are u * stride + phase - padding, for u from first to last.
        first = -((phase - padding) // stride)
        last = (padding + output - 1 - phase) // stride
        spans.append((first * stride + phase - padding, first - shift, max(0, last - first + 1)))
    used = [(start, count) for _, start, count in spans if count]
    if not used:
        return None
    reach = phases.dilation * (phases.size - 1)
    before = max(0, reach - min(start for start, _ in used))
    after = max(0, max(start + count for start, count in used) - size)
    slices = tuple((at, start - reach + before, count) for at, start, count in spans)
    return Window((before, after), slices)
