"""A picture of a benchmark's result: how many times quicker than torch float32, per case."""

from __future__ import annotations

from pathlib import Path

from lowbit.benchmark.result import Result
from lowbit.figures import figure_class


def plot(result: Result, path: str | Path) -> None:
    """Writes horizontal bars, one panel per group, on a common logarithmic axis.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing was compared to torch float32, or the file's suffix is not one that
            matplotlib writes.
    """
    figure_of = figure_class()
    groups = [group for group in result.groups if any(row.versus_float32 for row in group.rows)]
    if not groups:
        raise ValueError("a plot shows ratios to torch float32: run with --peers torch-float32")
    heights = [len(group.rows) for group in groups]
    figure = figure_of(figsize=(8, sum(0.22 * h + 0.6 for h in heights)), layout="constrained")
    panels = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes, group in zip(panels[:, 0], groups, strict=True):
        for position, row in enumerate(group.rows):
            if row.versus_float32 is None:
                continue
            median = row.versus_float32.median
            low, high = row.versus_float32.p10, row.versus_float32.p90
            axes.barh(
                position,
                median,
                color="tab:blue" if row.name[0] == "w" else "silver",
                xerr=[[median - low], [high - median]],
                error_kw={"elinewidth": 0.8},
            )
        axes.set_yticks(range(len(group.rows)), [row.name for row in group.rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(group.title, fontsize=8)
    panels[-1, 0].set_xlabel("times quicker than torch float32 (median, 10th-90th percentile)")
    figure.savefig(path)
