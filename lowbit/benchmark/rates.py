"""The picture of a matrix of convolutions: the rate of every layer in every engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.benchmark.conv_targets import LAST
from lowbit.benchmark.roofline import COLOURS, MARKS, OTHER_MARKS, SIGNS
from lowbit.benchmark.shapes import KINDS
from lowbit.benchmark.summary import Cell, Summary
from lowbit.figures import figure_class

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_ROOFS = {"dot8": "int8 dot", "fma": "float32 FMA", "xnor": "xnor"}


def rates(summary: Summary, path: str | Path) -> None:
    """Draws a panel for each number of threads: a line for each layer, its rates as marks.

    The smallest batch that was measured; lowbit in channels_last, peers in what suits them.

    Args:
        summary: what was measured.
        path: of the picture; its suffix decides the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there are no results, or the file's suffix is not one that matplotlib writes.
    """
    figure_of = figure_class()
    if not summary.cells:
        raise ValueError("there are no results to draw")
    batch = min(cell.m for cell in summary.cells)
    cells = [cell for cell in _drawn(summary) if cell.m == batch]
    shapes = sorted(dict.fromkeys(cell.shape for cell in cells), key=_place(cells))
    threads = summary.threads
    size = (5.2 * len(threads) + 3.4, 0.28 * len(shapes) + 1.6)
    figure = figure_of(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(threads), squeeze=False, sharex=True, sharey=True)[0]
    for axes, count in zip(panels, threads, strict=True):
        _draw(axes, summary, [cell for cell in cells if cell.threads == count], shapes)
        axes.set_title(f"{count} thread{'s' if count > 1 else ''}", fontsize=10)
    kinds = {cell.shape: cell.kind for cell in cells}
    labels = [f"{kinds[shape]}  {shape}" for shape in shapes]
    panels[0].set_yticks(range(len(shapes)), labels, fontsize=7.5)
    panels[0].set_ylim(len(shapes) - 0.4, -1.6)  # above the first one, the roofs' names
    cpu = summary.lines[-1]["result"]["environment"]["cpu"]["model"]
    figure.suptitle(f"Conv2d, batch {batch}, float32 in and out, {cpu}", fontsize=11)
    entries: dict[str, Artist] = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=130)


def _drawn(summary: Summary) -> list[Cell]:
    """lowbit in channels_last, and of an engine's formats the quicker one for each layer."""
    drawn: dict[tuple[str, str, int, int], Cell] = {}
    for cell in summary.cells:
        if (cell.own and cell.layout != "channels_last") or cell.name.startswith("torch codes"):
            continue
        key = (engine(cell), cell.shape, cell.m, cell.threads)
        if key not in drawn or cell.seconds < drawn[key].seconds:
            drawn[key] = cell
    return list(drawn.values())


def engine(cell: Cell) -> str:
    """The name without the memory format; torch's INT8 without its engine."""
    name = cell.name.removesuffix(LAST)
    return f"lowbit {name}" if cell.own else " ".join(name.split()[:2])


def _place(cells: list[Cell]) -> Callable[[str], int]:
    order = {c.shape: KINDS.index(c.kind) if c.kind in KINDS else len(KINDS) for c in cells}
    return lambda shape: order[shape]


def _draw(axes: Axes, summary: Summary, cells: list[Cell], shapes: list[str]) -> None:
    used: set[tuple[str, str]] = set()
    for name in dict.fromkeys(engine(c) for c in sorted(cells, key=lambda cell: not cell.own)):
        mine = [cell for cell in cells if engine(cell) == name]
        own = mine[0].own
        colour = SIGNS if "w1a1" in name else COLOURS[max(mine[0].widths)]
        marks = "o" if own else MARKS.get(name.split()[0], "") + OTHER_MARKS
        mark = next((m for m in marks if (m, colour) not in used), marks[0])
        used.add((mark, colour))
        axes.plot(
            [cell.macs_per_second / 1e9 for cell in mine],
            [shapes.index(cell.shape) for cell in mine],
            linestyle="none",
            marker=mark,
            markersize=6 if own else 5,
            markerfacecolor=colour if own else "none",
            markeredgecolor=colour,
            zorder=2 if own else 3,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("GMAC/s")
    axes.grid(True, color="gainsboro", linewidth=0.6)
    probed = summary.ceilings(cells[0].threads) if cells else {}
    for ceiling, words in _ROOFS.items():
        if ceiling in probed:
            roof = statistics.median(probed[ceiling]) / 1e9
            axes.axvline(roof, color="black", linewidth=0.9, linestyle=":", zorder=1)
            axes.text(0.97 * roof, -0.9, f"{words} {roof:.0f}", fontsize=7, ha="right")
