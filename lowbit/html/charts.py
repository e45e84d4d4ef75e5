"""Numbers as the geometry of inline SVG. Colours, text and labels are the templates' business."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lowbit.comparison import Row

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

HISTOGRAM_HEIGHT = 48
LATENCY_BINS, LATENCY_HEIGHT = 120, 28
BAR_HEIGHT = 24


def area(values: Sequence[float], height: int, most: float) -> str:
    """A path of steps two units wide, closed at the bottom; `most` is as high as `height`."""
    tops = [min(height, max(0, round(height * v / most))) if most > 0 else 0 for v in values]
    path, at = [f"M0 {height}"], 0
    for top in tops:
        if top != at:
            path.append(f"v{at - top}")
            at = top
        path.append("h2")
    return "".join(path) + f"V{height}z"


@dataclass(frozen=True)
class HistogramPaths:
    """Areas of two histograms at one scale, in a view of 2 x bins by `HISTOGRAM_HEIGHT`."""

    width: int
    reference: str
    quantized: str


def histogram(reference: Sequence[int], quantized: Sequence[int]) -> HistogramPaths:
    """Both by the square root of the share of their values, which keeps the tails in sight."""
    shares = []
    for counts in (reference, quantized):
        total = sum(counts) or 1
        shares.append([math.sqrt(count / total) for count in counts])
    most = max(max(values) for values in shares)
    paths = [area(values, HISTOGRAM_HEIGHT, most) for values in shares]
    return HistogramPaths(2 * len(reference), *paths)


@dataclass(frozen=True)
class Calls:
    """The single calls of one model, in a view of 2 x `LATENCY_BINS` by `LATENCY_HEIGHT`.

    Attributes:
        row: the model.
        path: area of the histogram, as high as the view at its fullest bin.
        median: where the median lies.
        beyond: calls that took longer than the axis shows.
    """

    row: Row
    path: str
    median: float
    beyond: int


@dataclass(frozen=True)
class Latency:
    """Histograms of the rounds on one axis from zero to `end` seconds."""

    end: float
    calls: tuple[Calls, ...]


def latency(rows: Sequence[Row]) -> Latency:
    """The axis ends behind the slowest model's 99th percentile: a disturbed round may not squash
    the others."""
    timed = [(row, row.timing) for row in rows if row.timing is not None]
    end = 1.05 * max(timing.percentile(99) for _, timing in timed)
    calls = []
    for row, timing in timed:
        counts, _ = np.histogram(timing.seconds, LATENCY_BINS, (0.0, end))
        calls.append(
            Calls(
                row,
                area(counts.tolist(), LATENCY_HEIGHT, float(counts.max())),
                round(2 * LATENCY_BINS * timing.p50 / end, 1),
                sum(seconds > end for seconds in timing.seconds),
            )
        )
    return Latency(end, tuple(calls))


def bars(values: Sequence[float | None], most: float) -> str:
    """A path of one bar a value, a gap between them; nothing for None."""
    finite = [most if v == math.inf else 0.0 if v is None or math.isnan(v) else v for v in values]
    path = []
    for index, value in enumerate(finite):
        top = min(BAR_HEIGHT, max(0, round(BAR_HEIGHT * value / most)))
        if top:
            path.append(f"M{4 * index} {BAR_HEIGHT}v-{top}h3v{top}z")
    return "".join(path)


# --- Speed against quality ------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A model's point with its bar and its label, in units of the view.

    Attributes:
        row: the model.
        x, y, radius: the disc; its area is that of the weights' bytes.
        low, high: ends of the bar from the 10th to the 90th percentile of the speed-up.
        label_x, label_y: where the label is anchored, on the baseline of its first line.
        anchor: "start", "middle" or "end".
        leader: whether the label is so far away that it needs a line.
    """

    row: Row
    x: float
    y: float
    radius: float
    low: float
    high: float
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"
    leader: bool = False


@dataclass(frozen=True)
class Scatter:
    """Speed-up over the float model against SQNR.

    Attributes:
        width, height: of the view.
        left, top, right, bottom: edges of the frame.
        x_ticks, y_ticks: positions with their texts.
        line: height of the float model's line, a speed-up of 1.
        marks: the models that have a place.
        absent: names of those that have none.
    """

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    line: float
    marks: tuple[Mark, ...]
    absent: tuple[str, ...] = field(default=())


_FONT, _LINE = 12.0, 14.0
_LETTER = 0.56 * _FONT  # mean width of one


def scatter(rows: Sequence[Row], width: int, height: int) -> Scatter:
    """Lays the picture out: axes, points, and labels that cover as little as possible.

    A model whose SQNR is not finite, or that was not timed, has no place on the axes.
    """
    left, top, right, bottom = 44, 14, width - 12, height - 44
    places = [(row, *found) for row in rows if (found := _place(row)) is not None]
    xs = [x for _, x, _ in places] or [0.0]
    ys = [1.0, *(y for _, _, y in places)]
    highest = max(1.0, *(row.speedup.p90 for row, _, _ in places if row.speedup), max(ys))
    highest = 1.12 * min(highest, 1.5 * max(ys))
    margin = max(2.0, 0.12 * (max(xs) - min(xs)))
    first, last = min(xs) - margin, max(xs) + margin
    most = max((row.weight_bytes or 0 for row, _, _ in places), default=0) or 1

    def at_x(value: float) -> float:
        return round(left + (right - left) * (value - first) / (last - first), 1)

    def at_y(value: float) -> float:
        return round(max(float(top), bottom - (bottom - top) * value / highest), 1)

    marks = [
        Mark(
            row,
            at_x(x),
            at_y(y),
            round(max(3.0, 16.0 * math.sqrt((row.weight_bytes or 0) / most)), 1),
            at_y(row.speedup.p10),
            at_y(row.speedup.p90),
        )
        for row, x, y in places
        if row.speedup is not None
    ]
    count = 8 if width > 500 else 5
    return Scatter(
        width,
        height,
        left,
        top,
        right,
        bottom,
        tuple((at_x(v), _number(v)) for v in ticks(first, last, count)),
        tuple((at_y(v), _number(v) + TIMES) for v in ticks(0.0, highest, count)),
        at_y(1.0),
        tuple(_labelled(marks, (left, top, right, bottom), at_y(1.0))),
        tuple(row.name for row in rows[1:] if _place(row) is None),
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two limits, about `count` of them: steps of 1, 2 or 5."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:g}".replace("-", MINUS)


def _place(row: Row) -> tuple[float, float] | None:
    if row.kind == "float" or row.speedup is None or row.quality is None:
        return None
    x, y = row.quality.sqnr_db, row.speedup.median
    return (x, y) if x is not None and math.isfinite(x) and math.isfinite(y) else None


_Box = tuple[float, float, float, float]


def _labelled(marks: Sequence[Mark], frame: _Box, line: float) -> list[Mark]:
    """The marks with labels: each where it is clear of points, other labels and the line."""
    taken: list[_Box] = [
        (m.x - m.radius, min(m.high, m.y - m.radius), m.x + m.radius, max(m.low, m.y + m.radius))
        for m in marks
    ]
    taken.append((frame[0], line - 1, frame[2], line + 1))
    labelled = []
    for mark in sorted(marks, key=lambda m: (m.y, m.x)):
        best: tuple[float, Mark, _Box] | None = None
        for far in (4.0, 14.0, 26.0, 40.0, 58.0, 80.0):
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
                placed, box = _label_at(mark, dx, dy, far)
                cost = _outside(box, frame) + sum(_overlap(box, other) for other in taken)
                if best is None or cost < best[0] - 1e-6:
                    best = cost, placed, box
            if best is not None and best[0] <= 1e-6:
                break
        assert best is not None
        labelled.append(best[1])
        taken.append(best[2])
    return labelled


def _label_at(mark: Mark, dx: int, dy: int, far: float) -> tuple[Mark, _Box]:
    """The mark with a label of two lines in that direction, and the label's box."""
    wide = _LETTER * max(len(mark.row.name), len("00.0 MB"))
    reach = mark.radius + far
    x, middle = mark.x + dx * reach, mark.y + dy * (reach + (_LINE if dx == 0 else 0))
    left = x - wide * (1 - dx) / 2
    box = (left, middle - _LINE - 1, left + wide, middle + _LINE + 1)
    placed = Mark(
        mark.row,
        mark.x,
        mark.y,
        mark.radius,
        mark.low,
        mark.high,
        round(x, 1),
        round(middle - 3, 1),
        ("end", "middle", "start")[dx + 1],
        far > 14.0,
    )
    return placed, box


def _overlap(a: _Box, b: _Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: _Box, frame: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
