"""What a matrix of results says: cells, medians over shapes, ratios to the fastest peers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.benchmark.shapes import Shape, parse

CEILINGS = {
    "dot8": ("int8 dot", "GMAC/s"),
    "dot4": ("int8 x int4 dot", "GMAC/s"),
    "dot2": ("int8 x int2 dot", "GMAC/s"),
    "dot1": ("int8 x binary dot", "GMAC/s"),
    "dot": ("int8 dot", "GMAC/s"),  # of files from before it had widths
    "fma": ("float32 FMA", "GMAC/s"),
    "xnor": ("xnor + popcount", "GMAC/s"),
    "read": ("read from memory", "GB/s"),
    "l3": ("read from L3", "GB/s"),
    "l2": ("read from L2", "GB/s"),
}
"""Ceiling -> words and unit."""


@dataclass(frozen=True)
class Spread:
    """A ratio over the rounds: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.p10:.2f}-{self.p90:.2f})"


@dataclass(frozen=True)
class Cell:
    """One engine's layer in one case.

    Attributes:
        name: lowbit's recipe, or the peer's engine and format.
        own: whether it is a layer of lowbit.
        widths: the widths of weights, in bits, that it offers.
        shape, m, threads, op: of the case.
        source: "memory" if the weights came from there, through copies; else "cache": the same
            weights each call, from a cache if they fit.
        seconds: median of a call.
        macs: multiply-accumulates of a call.
        weight_bytes: weights and scales.
        activation_bytes: float32 input and output.
        bound: the ceiling that bounds it: "dot8" to "dot1", "fma", "xnor", "read", "l3" or "l2".
        fraction: of that ceiling.
        peak: of the arithmetic ceiling, whatever bounds it; None where no probe times it.
        layout: memory format of a convolution, "nchw" or "channels_last".
        peer: the fastest peer; None for a peer's own cell, and where there is none.
        rivals: whether that peer offers the same width; otherwise it is an 8-bit one.
        ratio: how many times quicker than the peer, median of the rounds.
        p10, p90: percentiles of that ratio.
        int8: how many times quicker than torch's INT8, the better of its engines.
        float32: how many times quicker than torch's float32, in its better memory format.
    """

    name: str
    own: bool
    widths: tuple[int, ...]
    shape: str
    m: int
    threads: int
    source: str
    seconds: float
    macs: int
    weight_bytes: int
    activation_bytes: int
    bound: str
    fraction: float
    peer: str | None = None
    rivals: bool = False
    ratio: float | None = None
    p10: float | None = None
    p90: float | None = None
    op: str = "linear"
    peak: float | None = None
    layout: str | None = None
    int8: Spread | None = None
    float32: Spread | None = None

    @property
    def parsed(self) -> Shape:
        """The shape."""
        return parse(self.op, self.shape)

    @property
    def kind(self) -> str:
        """What targets and tables go by: "linear", "ragged", or a kind of convolution."""
        return self.parsed.kind

    @property
    def macs_per_second(self) -> float:
        """Multiply-accumulates per second."""
        return self.macs / self.seconds

    @property
    def intensity(self) -> float:
        """Multiply-accumulates per byte of weights, input and output."""
        return self.macs / (self.weight_bytes + self.activation_bytes)

    @property
    def column(self) -> Column:
        """Where it stands in a table."""
        return self.m, self.source

    def __str__(self) -> str:
        return f"{self.name}, {self.shape}, M = {self.m}, T = {self.threads}, {self.source}"


Column = tuple[int, str]


@dataclass(frozen=True)
class Summary:
    """All cells of a matrix.

    Attributes:
        cells: lowbit's and the peers'.
        groups: the groups as they were saved.
        lines: what the file held, the last first environment included.
    """

    cells: list[Cell]
    groups: list[dict[str, Any]]
    lines: list[dict[str, Any]]

    @property
    def own(self) -> list[Cell]:
        """lowbit's cells."""
        return [cell for cell in self.cells if cell.own]

    @property
    def compared(self) -> list[Cell]:
        """lowbit's cells that were raced against a peer."""
        return [cell for cell in self.own if cell.ratio is not None]

    @property
    def behind(self) -> list[Cell]:
        """Cells that are slower than the fastest peer, the worst first."""
        slower = [cell for cell in self.compared if ratio_of(cell) < 1.0]
        return sorted(slower, key=ratio_of)

    @property
    def threads(self) -> list[int]:
        """The numbers of threads."""
        return sorted({cell.threads for cell in self.cells})

    @property
    def columns(self) -> list[Column]:
        """M and source, few rows first, memory before cache."""
        return sorted({cell.column for cell in self.cells}, key=lambda c: (c[0], c[1] != "memory"))

    def part(self, holds: Callable[[Cell], bool]) -> Summary:
        """The same with fewer cells."""
        return dataclasses.replace(self, cells=[cell for cell in self.cells if holds(cell)])

    def select(self, **fields: Any) -> list[Cell]:
        """The cells whose fields have these values."""
        wanted = fields.items()
        return [c for c in self.cells if all(getattr(c, name) == v for name, v in wanted)]

    def failed(self) -> dict[str, tuple[str, int]]:
        """Engine -> the first reason, and in how many cases it failed."""
        found: dict[str, tuple[str, int]] = {}
        for group in self.groups:
            for name, reason in group["failed"].items():
                first, count = found.get(name, (reason, 0))
                found[name] = first, count + 1
        return found

    def ceilings(self, threads: int) -> dict[str, list[float]]:
        """Ceiling -> what the processes with so many threads probed."""
        found: dict[str, list[float]] = {}
        for group in self.groups:
            if group["threads"] == threads:
                for name in CEILINGS:
                    if group["ceilings"].get(name) is not None:
                        found.setdefault(name, []).append(group["ceilings"][name])
        return found


def summarize(lines: Iterable[dict[str, Any]]) -> Summary:
    """What `lowbit.benchmark.runner.load` returned for layers, as cells.

    Of two measurements of one cell (the formats of a case were measured in two runs) the later
    holds.
    """
    lines = list(lines)
    groups = [group for line in lines for group in line["result"]["groups"]]
    cells = {}
    for group in groups:
        for row in group["rows"]:
            cell = _cell(group, row)
            cells[cell.name, cell.shape, cell.m, cell.threads, cell.source] = cell
    return Summary(list(cells.values()), groups, lines)


def by_isa(lines: Iterable[dict[str, Any]]) -> dict[str, Summary]:
    """A summary for each instruction set that was in use, first the one that nothing was held to.

    Of several such ones, or of none, that of the most lines comes first.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["result"]["environment"]["isa"]["chosen"], []).append(line)

    def place(item: tuple[str, list[dict[str, Any]]]) -> tuple[bool, int]:
        return all(line["case"]["isa"] is not None for line in item[1]), -len(item[1])

    ordered = sorted(found.items(), key=place)
    return {isa: summarize(same) for isa, same in ordered}


def _spread(found: dict[str, float] | None) -> Spread | None:
    return Spread(found["median"], found["p10"], found["p90"]) if found else None


def _cell(group: dict[str, Any], row: dict[str, Any]) -> Cell:
    versus = row["versus_peer"] or {}
    return Cell(
        name=row["name"],
        own=row["own"],
        widths=tuple(row["widths"]),
        shape=group["shape"],
        m=group["m"],
        threads=group["threads"],
        source="memory" if group["rotated_bytes"] else "cache",
        seconds=row["timing"]["p50_seconds"],
        macs=group["macs"],
        weight_bytes=row["weight_bytes"],
        activation_bytes=group["activation_bytes"],
        bound=row["bound"],
        fraction=row["fraction_of_bound"],
        peer=row["peer"],
        rivals=row["peer_rivals"],
        ratio=versus.get("median"),
        p10=versus.get("p10"),
        p90=versus.get("p90"),
        op=group["op"],
        peak=row.get("fraction_of_peak"),
        layout=row.get("layout"),
        int8=_spread(row.get("versus_torch_int8")),
        float32=_spread(row.get("versus_float32")),
    )


def ratio_of(cell: Cell) -> float:
    """The ratio of a cell that was compared."""
    assert cell.ratio is not None
    return cell.ratio


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; NaN of none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan


def over_shapes(
    cells: Sequence[Cell], value: Callable[[Cell], float]
) -> dict[tuple[str, Column], list[float]]:
    """Name and column -> the values of all shapes, ascending, names in the order of the cells."""
    order = list(dict.fromkeys(cell.name for cell in cells))
    ordered = sorted(cells, key=lambda cell: (order.index(cell.name), cell.column))
    return {
        (name, column): sorted(map(value, same))
        for (name, column), same in itertools.groupby(ordered, lambda c: (c.name, c.column))
    }
