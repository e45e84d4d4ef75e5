"""What kernels are to reach, and what a matrix of results says they do; the linears' targets.

Written for AVX-512-VNNI; on another ISA the same table shows how far it is from the same marks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lowbit.benchmark.shapes import LinearShape
from lowbit.benchmark.summary import Cell, Summary

Figure = Callable[[Cell, Summary], float | None]
PER_CHANNEL = ("w8a8", "w4a8", "w2a8", "w1a8")


@dataclass(frozen=True)
class Target:
    """A figure to reach, as the median over shapes, for each width and number of threads.

    Attributes:
        regime: in words.
        names: lowbit's recipes.
        holds: the cells that it is about.
        figure: what is compared, or None where a cell has no partner to be compared with.
        limit: the figure to reach.
        at_most: whether the limit is the largest figure rather than the smallest.
        kinds: of the layers.
        every: whether every cell has to reach it, not their median alone.
    """

    regime: str
    names: tuple[str, ...]
    holds: Callable[[Cell], bool]
    limit: float
    figure: Figure = lambda cell, _: cell.fraction
    at_most: bool = False
    kinds: tuple[str, ...] = ("linear",)
    every: bool = False

    def reached(self, figure: float) -> bool:
        """Whether a figure is as good as the limit."""
        return figure <= self.limit if self.at_most else figure >= self.limit


@dataclass(frozen=True)
class Outcome:
    """What one recipe reached on one number of threads.

    Attributes:
        target, name, threads: which.
        figures: of the cells, ascending.
        shapes: how many different ones.
    """

    target: Target
    name: str
    threads: int
    figures: tuple[float, ...]
    shapes: int

    @property
    def figure(self) -> float:
        """The median."""
        return statistics.median(self.figures)

    @property
    def worst(self) -> float:
        """The figure that is furthest from the target."""
        return self.figures[-1] if self.target.at_most else self.figures[0]

    @property
    def count(self) -> int:
        """How many cells reach the target."""
        return sum(map(self.target.reached, self.figures))

    @property
    def reached(self) -> bool:
        """Whether the median, or every cell, is as good as the limit."""
        return self.target.reached(self.worst if self.target.every else self.figure)


def partner(cell: Cell, summary: Summary, **other: object) -> Cell | None:
    wanted = {
        "name": cell.name,
        "shape": cell.shape,
        "m": cell.m,
        "threads": cell.threads,
        "source": cell.source,
    }
    return next(iter(summary.select(**(wanted | other))), None)


def _time_over_int8(cell: Cell, summary: Summary) -> float | None:
    int8 = partner(cell, summary, name=cell.name.replace("a16", "a8"))
    return None if int8 is None else cell.seconds / int8.seconds


def _over_one_thread(cell: Cell, summary: Summary) -> float | None:
    one = partner(cell, summary, threads=1)
    return None if one is None else one.seconds / cell.seconds


def _padded_over(cell: Cell, summary: Summary) -> float | None:
    padded = partner(cell, summary, name=f"{cell.name} padded")
    return None if padded is None else padded.seconds / cell.seconds


def _k(cell: Cell) -> int:
    assert isinstance(cell.parsed, LinearShape)
    return cell.parsed.k


def _many(cell: Cell) -> bool:
    return cell.m >= 128


def _wide(cell: Cell) -> bool:
    return cell.m >= 128 and _k(cell) >= 768


def _few(m: int) -> Callable[[Cell], bool]:
    return lambda cell: cell.m == m and cell.source == "cache"


def _from_memory(cell: Cell) -> bool:
    return cell.m == 1 and cell.source == "memory"


def _from_l3(cell: Cell) -> bool:
    return cell.m == 1 and cell.bound == "l3"


def _with_groups(size: int, *names: str) -> tuple[str, ...]:
    return tuple(f"{name}-g{size}" for name in names or PER_CHANNEL)


TARGETS = (
    Target("M >= 128, K >= 768: of the dot peak", PER_CHANNEL, _wide, 0.90),
    Target("the same, groups of 128", _with_groups(128), _wide, 0.85),
    Target("the same, groups of 32", _with_groups(32), _wide, 0.65),
    Target("M = 8, cached: of the bounding peak", PER_CHANNEL, _few(8), 0.60),
    Target("M = 32, cached: of the bounding peak", PER_CHANNEL, _few(32), 0.80),
    Target(
        "M = 1 from memory: of the read bandwidth",
        ("w8a8", "w4a8", *_with_groups(128, "w8a8", "w4a8")),
        _from_memory,
        0.88,
    ),
    Target("the same", ("w2a8", *_with_groups(128, "w2a8")), _from_memory, 0.85),
    Target("the same", ("w1a8", *_with_groups(128, "w1a8")), _from_memory, 0.75),
    Target("M = 1 from L3: of its bandwidth", ("w8a8", "w4a8"), _from_l3, 0.85),
    Target("the same", ("w2a8",), _from_l3, 0.60),
    Target("W1A1, M >= 128: of the xnor peak", ("w1a1",), _many, 0.75),
    Target(
        "int16 activations, M >= 128: time over int8's",
        ("w8a16", "w4a16"),
        _many,
        2.1,
        _time_over_int8,
        at_most=True,
    ),
    Target(
        "the same, M = 1 from memory",
        ("w8a16", "w4a16"),
        _from_memory,
        1.15,
        _time_over_int8,
        at_most=True,
    ),
    Target(
        "2 threads over 1, M >= 128",
        (*PER_CHANNEL, "w1a1", "w8a16", "w4a16"),
        lambda cell: cell.m >= 128 and cell.threads == 2,
        1.85,
        _over_one_thread,
    ),
    Target(
        "ragged shapes: time of the padded shape over theirs",
        (*PER_CHANNEL, "w1a1", "w8a16", "w4a16"),
        lambda cell: True,
        0.70,
        _padded_over,
        kinds=("ragged",),
    ),
)


def outcomes(summary: Summary, targets: Iterable[Target] = TARGETS) -> list[Outcome]:
    """What each recipe reached of each target, as far as the matrix holds it."""
    found = []
    for target in targets:
        for threads in summary.threads:
            for name in target.names:
                cells = [
                    cell
                    for cell in summary.select(name=name, threads=threads)
                    if cell.kind in target.kinds and target.holds(cell)
                ]
                figures = sorted(f for c in cells if (f := target.figure(c, summary)) is not None)
                if figures:
                    shapes = len({cell.shape for cell in cells})
                    found.append(Outcome(target, name, threads, tuple(figures), shapes))
    return found
