"""What the pages of results have in common, in Markdown: machine, ceilings, targets, what falls
short, what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from lowbit.benchmark.summary import CEILINGS, Cell, Summary, geometric_mean, ratio_of
from lowbit.benchmark.targets import Target, outcomes

MOST_BEHIND = 30
"""How many of the cells that are slower than a peer are listed."""


def machine(summary: Summary) -> str:
    """CPU, versions, dates."""
    environment = summary.lines[-1]["result"]["environment"]
    cpu, versions = environment["cpu"], environment["versions"]
    caches = ", ".join(
        f"{level.upper()} {_size(size)}" for level, size in cpu.get("caches", {}).items()
    )
    first, last = (f(line["finished"][:10] for line in summary.lines) for f in (min, max))
    peers: dict[str, None] = {}
    for line in summary.lines:
        for text in line["result"]["peers"].values():
            peers |= dict.fromkeys(text.split(", "))
    rows = [
        ("CPU", f"{cpu['model']}, {cpu['usable_cpus']} cores; {caches}"),
        ("ISA", environment["isa"]["chosen"]),
        ("lowbit", versions["lowbit"]),
        ("Python", f"{versions['python']}, {versions['platform']}"),
        ("engines", ", ".join(sorted(peers)) or "none"),
        ("measured", first if first == last else f"{first} to {last}"),
    ]
    return table(rows, ("", ""))


def _size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def ceilings(summary: Summary) -> str:
    """Every process probes its own: the median, and how far they went apart."""
    rows = []
    probed = {threads: summary.ceilings(threads) for threads in summary.threads}
    for name, (words, unit) in CEILINGS.items():
        cells = []
        for found in probed.values():
            values = sorted(found.get(name, []))
            text = number(statistics.median(values) / 1e9) if values else ""
            if values and values[0] < values[-1]:
                text += f" ({number(values[0] / 1e9)} to {number(values[-1] / 1e9)})"
            cells.append(text)
        if any(cells):
            rows.append((f"{words}, {unit}", *cells))
    return table(rows, ("ceiling", *(in_threads(count) for count in probed)))


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def in_threads(count: int) -> str:
    """A number of threads in words."""
    return "1 thread" if count == 1 else f"{count} threads"


def verdict(summary: Summary, what: str) -> str:
    """The geometric mean over all cells that were raced; `what` says in words what a cell is."""
    cells = summary.compared
    if not cells:
        return "No peer was measured."
    mean = geometric_mean(map(ratio_of, cells))
    strict = geometric_mean(ratio_of(cell) for cell in cells if cell.rivals)
    return (
        f"Geometric mean of all {len(cells)} cells: **{mean:.2f} times the fastest peer** "
        f"({strict:.2f} over the {sum(c.rivals for c in cells)} cells whose width a peer offers). "
        f"Cells below 1.0: {len(summary.behind)}. A cell is {what}. Its "
        "peer is the fastest one with weights of as many bits and activations that are no coarser; "
        "a width that no peer offers (\\*) is compared with the fastest 8-bit one."
    )


def target_table(summary: Summary, targets: Iterable[Target]) -> str:
    """One row a target and number of threads; what is not reached is bold."""
    rows: dict[tuple[str, int, str], list[str]] = {}
    for outcome in outcomes(summary, targets):
        target = outcome.target
        show = _percent if target.limit < 1 else _times
        entry = f"{outcome.name.removesuffix(' channels_last')} {show(outcome.figure)}"
        if target.every:
            entry += f" (worst {show(outcome.worst)}; {outcome.count} of {len(outcome.figures)})"
        sign = "<=" if target.at_most else ">="
        key = (target.regime, outcome.threads, f"{sign} {show(target.limit)}")
        rows.setdefault(key, []).append(entry if outcome.reached else f"**{entry}**")
    body = [(*key, ", ".join(entries)) for key, entries in rows.items()]
    figures = (
        "median (worst; cells that reach it), bold: not all of them"
        if any(target.every for target in targets)
        else "median over shapes (bold: not reached)"
    )
    heads = ("regime", "threads", "target", figures)
    return f"Targets:\n\n{table(body, heads)}" if body else ""


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _times(value: float) -> str:
    return f"{value:.2f}"


def behind(summary: Summary) -> str:
    """The cells that are slower than a peer, the worst first."""
    if not summary.behind:
        return "Nothing." if summary.compared else ""
    rows = [
        (
            cell.name,
            cell.shape,
            str(cell.m),
            str(cell.threads),
            *([] if cell.layout else [cell.source]),
            f"{ratio_of(cell):.2f} ({cell.p10:.2f}-{cell.p90:.2f})",
            f"{cell.peer}{'' if cell.rivals else ' *'}",
            f"{_percent(cell.fraction)} of {CEILINGS[cell.bound][0]}",
        )
        for cell in summary.behind[:MOST_BEHIND]
    ]
    places = ("batch", "threads") if summary.behind[0].layout else ("M", "threads", "weights")
    heads = ("", "shape", *places, "ratio (p10-p90)", "peer", "limit")
    more = len(summary.behind) - len(rows)
    return table(rows, heads) + (f"\n\nAnd {more} more." if more > 0 else "")


def absent(summary: Summary) -> str:
    """Which peers were missing, and which failed."""
    missing: dict[str, str] = {}
    for line in summary.lines:
        missing |= line["result"]["missing"]
    lines = [f"- missing: {name} ({reason})" for name, reason in sorted(missing.items())]
    for name, (reason, count) in sorted(summary.failed().items()):
        lines.append(f"- failed in {count} of {len(summary.groups)} cases: {name} ({reason})")
    return "\n".join(lines)


def option(summary: Summary, name: str, field: str) -> str:
    """An option of the command that would measure the summary's cases again."""
    values: dict[Any, None] = {}
    for line in summary.lines:
        value = line["case"][field]
        values |= dict.fromkeys(value if isinstance(value, list) else [value])
    return f"{name} {','.join(map(str, values))}"


def reproduce(commands: Sequence[Sequence[str]]) -> str:
    """The commands, one option a line, and how to cut them into parts."""
    text = "\n".join(" \\\n  ".join(words) for words in commands)
    return (
        f"```sh\n{text}\n```\n\n"
        "`bench/README.md` says how the peers are installed. The run can be cut into parts: "
        "`--minutes 20` ends it after the case that it is at, and the same command goes on."
    )


def engine_order(cells: Iterable[Cell]) -> list[Cell]:
    """lowbit's before the peers'."""
    return sorted(cells, key=lambda cell: not cell.own)


def table(rows: Iterable[Sequence[Any]], heads: Sequence[str]) -> str:
    """A Markdown table of texts."""
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)
