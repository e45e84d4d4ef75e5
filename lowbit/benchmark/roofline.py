"""The roofline: what layers achieve, against the multiply-accumulates that they do with each byte.

Roofs are the probed ceilings: flat ones for arithmetic, slopes for reading from memory and caches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.benchmark.shapes import LinearShape, parse
from lowbit.benchmark.summary import Cell, Summary
from lowbit.figures import figure_class

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour a width, for lowbit's lines and the peers' marks; one mark an engine.
COLOURS = {
    32: "dimgray",
    16: "darkgray",
    8: "tab:blue",
    4: "tab:orange",
    2: "tab:green",
    1: "tab:red",
}
MARKS = {
    "torch": "s",
    "zentorch": "*",
    "onnxruntime": "^",
    "openvino": "v",
    "ggml": "D",
    "numkong": "P",
}
SIGNS = "tab:purple"  # W1A1, whose roof is another
OTHER_MARKS = "Xph<>8d"
_SLOPE = "slope"  # marks the labels of slopes
_SLOPES = {"read": "memory", "l3": "L3", "l2": "L2"}
_ROOFS = {"dot8": "int8 dot", "dot": "int8 dot", "fma": "float32 FMA", "xnor": "xnor + popcount"}


def roofline(summary: Summary, path: str | Path, shape: str | None = None) -> None:
    """Draws one panel for each number of threads, with every engine's points of one shape.

    A line joins lowbit's points of one width, from few rows to many; weights from memory where
    they were measured so, else from a cache. A peer's points are marks without a line.

    Args:
        summary: what was measured.
        path: of the picture; its suffix decides the format.
        shape: the layer, `"KxN"`; None takes the one with the most cells, the largest of those.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there are no points, or the file's suffix is not one that matplotlib writes.
    """
    figure_of = figure_class()
    shape = shape or _richest(summary)
    cells = [cell for cell in summary.cells if cell.shape == shape]
    if not cells:
        raise ValueError(f"no results for the shape {shape}")
    threads = sorted({cell.threads for cell in cells})
    figure = figure_of(figsize=(5.6 * len(threads) + 3.2, 6.4), layout="constrained")
    panels = figure.subplots(1, len(threads), squeeze=False, sharex=True, sharey=True)[0]
    for axes, count in zip(panels, threads, strict=True):
        here = [cell for cell in cells if cell.threads == count]
        _draw_points(axes, here)
        _draw_roofs(axes, summary, here)
        axes.set_title(f"{count} thread{'s' if count > 1 else ''}", fontsize=10)
        axes.set_xlabel("multiply-accumulates per byte of weights, input and output")
        axes.grid(True, which="major", color="gainsboro", linewidth=0.6)
    panels[0].set_ylabel("GMAC/s")
    cpu = summary.lines[-1]["result"]["environment"]["cpu"]["model"]
    size = _parsed(shape)
    figure.suptitle(f"Linear K = {size.k}, N = {size.n}, float32 in and out, {cpu}", fontsize=11)
    entries: dict[str, Artist] = {}
    for axes in panels:  # an engine may be missing in one of them
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside right center",
        fontsize=8,
        frameon=False,
        labelspacing=0.45,
    )
    _turn_slope_labels(figure)
    figure.savefig(path, dpi=130)


def _richest(summary: Summary) -> str:
    shapes = [cell.shape for cell in summary.cells if cell.kind == "linear"]
    if not shapes:
        raise ValueError("there are no results to draw")
    return max(shapes, key=lambda shape: (shapes.count(shape), _parsed(shape).weights))


def _parsed(shape: str) -> LinearShape:
    parsed = parse("linear", shape)
    assert isinstance(parsed, LinearShape)
    return parsed


def series(cells: Sequence[Cell]) -> list[Cell]:
    """One cell for each M, ascending: weights from memory where there is such a cell."""
    found: dict[int, Cell] = {}
    for cell in cells:
        if cell.m not in found or cell.source == "memory":
            found[cell.m] = cell
    return [found[m] for m in sorted(found)]


def _draw_points(axes: Axes, cells: Sequence[Cell]) -> None:
    names = dict.fromkeys(cell.name for cell in sorted(cells, key=lambda cell: not cell.own))
    used: set[tuple[str, str, bool]] = set()
    for name in names:
        points = series([cell for cell in cells if cell.name == name])
        x = [cell.intensity for cell in points]
        y = [cell.macs_per_second / 1e9 for cell in points]
        first = points[0]
        colour = SIGNS if name.endswith("w1a1") else COLOURS[max(first.widths)]
        if first.own:
            dashed = "a16" in name or "-g" in name
            axes.plot(
                x,
                y,
                color=colour,
                linestyle="--" if dashed else "-",
                linewidth=1.6,
                marker="o",
                markersize=5,
                markerfacecolor="white" if dashed else colour,
                zorder=3,
                label=f"lowbit {name}",
            )
            continue
        # Several formats of one engine and width: the second is hollow, more have other marks.
        marks = MARKS.get(name.split()[0], "") + OTHER_MARKS
        looks = ((mark, colour, hollow) for mark in marks for hollow in (False, True))
        look = next(look for look in looks if look not in used)
        used.add(look)
        mark, _, hollow = look
        axes.plot(
            x,
            y,
            linestyle="none",
            marker=mark,
            markersize=8 if mark == "*" else 5.5,
            markerfacecolor="none" if hollow else colour,
            markeredgecolor=colour,
            alpha=0.75,
            zorder=2,
            label=name,
        )


def _draw_roofs(axes: Axes, summary: Summary, cells: Sequence[Cell]) -> None:
    """Within the range of the points, with a margin; each labelled along its line."""
    found = {
        name: statistics.median(values) / 1e9
        for name, values in summary.ceilings(cells[0].threads).items()
    }
    left = min(cell.intensity for cell in cells) / 1.5
    right = max(cell.intensity for cell in cells) * 1.8
    lowest = min(cell.macs_per_second for cell in cells) / 1e9 / 2
    roofs = {name: words for name, words in _ROOFS.items() if name in found}
    top = max(found[name] for name in roofs)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest, 2.2 * top))
    style: dict[str, Any] = {"color": "black", "linewidth": 0.9, "zorder": 1}
    text: dict[str, Any] = {"fontsize": 7.5, "color": "black", "zorder": 4}
    slowest = found["read"]
    for name, words in roofs.items():
        roof = found[name]
        axes.plot([max(left, roof / max(found.get("l2", 0), slowest)), right], [roof] * 2, **style)
        axes.text(right / 1.1, roof * 1.06, f"{words} {roof:.0f}", ha="right", **text)
    for name, words in _SLOPES.items():
        if name in found:
            end = min(right, top / found[name])
            axes.plot([left, end], [found[name] * left, found[name] * end], **style)
            start = max(left * 1.15, lowest * 1.3 / found[name])
            axes.text(
                start,
                found[name] * start * 1.12,
                f"{words} {found[name]:.0f} GB/s",
                rotation_mode="anchor",
                gid=_SLOPE,
                **text,
            )


def _turn_slope_labels(figure: Figure) -> None:
    """Along their lines, whose angle is known when the panels have their final sizes."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        (x0, y0), (x1, y1) = axes.transData.transform([(1, 1), (10, 10)])
        for label in axes.texts:
            if label.get_gid() == _SLOPE:
                label.set_rotation(math.degrees(math.atan2(y1 - y0, x1 - x0)))
