"""The page of mixed schemes against uniform ones: a section for each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate

from lowbit.benchmark.mixed import Line
from lowbit.benchmark.mixed_networks import NETWORKS, Figure, Network


def page(found: Mapping[str, Sequence[Line]], command: str) -> str:
    """The page in Markdown.

    Args:
        found: what was measured, by the names of `NETWORKS`.
        command: what made it.
    """
    parts = ["# Mixed schemes against uniform ones", f"Written by `{command}`.", _INTRODUCTION]
    for name, lines in found.items():
        network = NETWORKS[name]
        parts += [f"## {network.title}", network.text, table(network, lines)]
        parts += [_comparison(network, lines), *_target(network, lines)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = (
    "Each mix has at most the bytes of what it is compared with. Bytes are all that is asked for: "
    "a layer may get slower than in float32, which `lowbit.search` keeps from by default. "
    "`layers`: bytes of the layers that convert. `seconds`: of one processor that converting took, "
    "and for a mix its search; the first search pays for what those after it use, too."
)


def table(network: Network, lines: Sequence[Line]) -> str:
    """A row for each model, smallest first."""
    cells = [
        [
            "mixed" if line.mixed else "uniform",
            line.name,
            f"{line.bytes:,}",
            f"{line.layer_bytes:,}",
            *(_text(column, line) for column in network.columns),
            f"{line.seconds:.0f}",
            ", ".join(f"{count} {name}" for name, count in line.layers.items()),
        ]
        for line in sorted(lines, key=lambda line: (line.bytes, line.mixed))
    ]
    figures = [column.header for column in network.columns]
    headers = ["", "scheme", "bytes", "layers, bytes", *figures, "seconds", "layers"]
    align = ("left", "left", *("right",) * (len(headers) - 3), "left")
    return tabulate(cells, headers, "github", colalign=align, disable_numparse=True)


def _comparison(network: Network, lines: Sequence[Line]) -> str:
    mixed = {line.name: line for line in lines if line.mixed}
    first: dict[int, str] = {}  # of the schemes of one size
    for line in lines:
        first.setdefault(line.bytes, f"as {line.name}")
    uniform = [line for line in lines if not line.mixed and first[line.bytes] in mixed]
    pairs = [(line, mixed[first[line.bytes]]) for line in uniform]
    told = [
        f"{one.name} "
        + ", ".join(f"{c.header} {_text(c, one)} -> {_text(c, two)}" for c in network.columns)
        for one, two in pairs
    ]
    return f"At most the same bytes, uniform -> mixed: {'; '.join(told)}."


def _target(network: Network, lines: Sequence[Line]) -> list[str]:
    if network.target is None:
        return []
    column = network.columns[-1]
    half = next(line for line in lines if line.mixed and line.name.startswith("half"))
    value = half.figures[column.header]
    verdict = "reached" if column.better * (value - network.target) >= 0 else "not reached"
    return [
        f"Target at half the bytes of {lines[0].name}, {column.header} "
        f"{network.target:{column.spec}}: {verdict}, {_text(column, half)} with {half.bytes:,} "
        "bytes."
    ]


def _text(column: Figure, line: Line) -> str:
    return format(line.figures[column.header], column.spec)
