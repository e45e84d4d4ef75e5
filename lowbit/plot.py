"""A comparison as a picture: speed against quality, one labelled point per model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.figures import figure_class

if TYPE_CHECKING:
    from lowbit.comparison import Comparison, Row

_COLORS = {"float": "#6b7280", "torch": "#c2410c", "candidate": "#1d4ed8"}
_MARKERS = {"torch": "s", "candidate": "o"}
# Where a label may stand relative to its point, in points (1/72 inch), nearest and clearest first:
# right, left, above, below, the corners, and then the same farther out.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES = (9.0, 20.0, 34.0, 50.0, 70.0)
_LEADER_FROM = 20.0  # a label this far from its point gets a line to it


def plot(comparison: Comparison, path: str | Path) -> None:
    """Draws speed-up over the float model against SQNR, with the weights' size at each point.

    Bars span the 10th to the 90th percentile of the rounds. A model whose SQNR is infinite (equal
    outputs) or undefined, or that has no timing, has no place on the axes: it is named below.

    Args:
        comparison: what `lowbit.compare` returned.
        path: the file to write; PNG, SVG or PDF by its suffix.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure_of = figure_class()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # A figure of its own on the Agg canvas: no display needed, the caller's pyplot state untouched.
    figure = figure_of(figsize=(8.0, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = [row for row in comparison.rows if _point(row) is not None]
    reference = comparison.rows[0]
    axes.axhline(1.0, color=_COLORS["float"], linewidth=1.0, linestyle="--", zorder=1)
    for row in drawn:
        _draw_point(axes, row)
    _set_axes(axes, drawn)
    axes.set_xlabel("quality: SQNR of the outputs, dB")
    axes.set_ylabel(f"speed-up over {reference.name}")
    figure.suptitle(_title(comparison), fontsize=11)
    absent = [row.name for row in comparison.rows[1:] if row not in drawn]
    if absent:
        figure.supxlabel(f"no point (see the table): {', '.join(absent)}", fontsize=9)
    figure.canvas.draw()  # fixes the layout: labels are placed in pixels
    _place_labels(axes, drawn, reference)
    figure.savefig(path)


def _point(row: Row) -> tuple[float, float] | None:
    if row.kind == "float" or row.speedup is None or row.quality is None:
        return None
    sqnr_db, speedup = row.quality.sqnr_db, row.speedup.median
    if sqnr_db is None or not (math.isfinite(sqnr_db) and math.isfinite(speedup)):
        return None
    return sqnr_db, speedup


def _megabytes(row: Row) -> str:
    if row.weight_bytes is None:
        return "size unknown"
    size = row.weight_bytes / 1e6
    return f"{size:.1f} MB" if size >= 1 else f"{size:.2g} MB"


def _title(comparison: Comparison) -> str:
    threads = f"{comparison.threads} thread{'s' if comparison.threads != 1 else ''}"
    batch = f"batch {comparison.batch_size}"
    return f"{comparison.model}, {batch}, {threads}\n{comparison.isa}, {comparison.cpu}"


def _draw_point(axes: Any, row: Row) -> None:
    point, speedup = _point(row), row.speedup
    if point is None or speedup is None:
        return
    x, y = point
    below, above = max(0.0, y - speedup.p10), max(0.0, speedup.p90 - y)
    axes.errorbar(
        x,
        y,
        yerr=[[below], [above]],
        marker=_MARKERS[row.kind],
        color=_COLORS[row.kind],
        markersize=8.5,
        markeredgecolor="white",
        markeredgewidth=1.0,
        elinewidth=1.2,
        capsize=3,
        zorder=3,
    )


def _set_axes(axes: Any, drawn: list[Row]) -> None:
    """Room for the labels around the points; the line of the float model always in sight."""
    points = [point for point in map(_point, drawn) if point is not None]
    xs = [x for x, _ in points] or [0.0]
    highest = max([1.0, *(row.speedup.p90 for row in drawn if row.speedup is not None)])
    # A disturbed round may not squash the points: its bar leaves the frame instead.
    highest = min(highest, 1.5 * max([1.0, *(y for _, y in points)]))
    margin = max(2.0, 0.18 * (max(xs) - min(xs)))
    axes.set_xlim(min(xs) - margin, max(xs) + margin)
    axes.set_ylim(0.0, 1.15 * highest)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _place_labels(axes: Any, drawn: list[Row], reference: Row) -> None:
    """A label near each point, where it covers no point, bar, line or other label."""
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    blocked = []
    for row in drawn:
        point, speedup = _point(row), row.speedup
        if point is not None and speedup is not None:
            x, low = axes.transData.transform((point[0], speedup.p10))
            _, high = axes.transData.transform((point[0], speedup.p90))
            _, y = axes.transData.transform(point)
            blocked.append(Bbox.from_extents(x - 12, min(low, y - 12), x + 12, max(high, y + 12)))
    blocked.append(_label_line(axes, reference, blocked, renderer))
    _, line = axes.transData.transform((0.0, 1.0))
    blocked.append(Bbox.from_extents(frame.x0, line - 1, frame.x1, line + 1))
    for row in drawn:
        point = _point(row)
        if point is None:
            continue
        label = axes.annotate(
            f"{row.name}\n{_megabytes(row)}",
            point,
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=9,
            color=_COLORS[row.kind],
            linespacing=1.15,
            zorder=4,
        )
        offset = _move_clear(label, frame, blocked, renderer)
        if max(map(abs, offset)) >= _LEADER_FROM:
            leader = {"arrowstyle": "-", "color": _COLORS[row.kind], "linewidth": 0.7}
            axes.annotate(
                "", point, xytext=offset, textcoords="offset points", arrowprops=leader, zorder=2
            )
        blocked.append(label.get_window_extent(renderer))


def _label_line(axes: Any, reference: Row, blocked: list[Any], renderer: Any) -> Any:
    """Names the float model's line where no point is near. Returns the box of the label."""
    label = axes.annotate(
        f"{reference.name}, {_megabytes(reference)}",
        (0.0, 1.0),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        color=_COLORS["float"],
        fontsize=9,
    )
    least, best = math.inf, 0.0
    for step in range(20):
        label.xy = (0.005 + 0.043 * step, 1.0)
        box = label.get_window_extent(renderer).padded(2)
        covered = sum(_overlap(box, other) for other in blocked)
        if covered < least:
            least, best = covered, label.xy[0]
    label.xy = (best, 1.0)
    return label.get_window_extent(renderer)


def _move_clear(label: Any, frame: Any, blocked: list[Any], renderer: Any) -> tuple[float, float]:
    """Moves the label to where it covers least, the nearest of equals. Returns its offset."""
    offsets = [(dx * far, dy * far, dx, dy) for far in _DISTANCES for dx, dy in _DIRECTIONS]
    best, least = offsets[0], math.inf
    for offset in offsets:
        _set_offset(label, offset)
        box = label.get_window_extent(renderer).padded(2)
        outside = box.width * box.height - _overlap(box, frame)
        cost = outside + sum(_overlap(box, other) for other in blocked)
        if cost < least - 1e-6:
            best, least = offset, cost
        if cost <= 1e-6:
            break
    _set_offset(label, best)
    return best[:2]


def _set_offset(label: Any, offset: tuple[float, float, int, int]) -> None:
    x, y, dx, dy = offset
    label.set_position((x, y))
    label.set_horizontalalignment(("right", "center", "left")[dx + 1])
    label.set_verticalalignment(("top", "center", "bottom")[dy + 1])
    label.set_multialignment(("right", "center", "left")[dx + 1])


def _overlap(a: Any, b: Any) -> float:
    """Area that two boxes share, square pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
