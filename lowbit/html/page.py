"""Fills the templates: one page, everything inside it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowbit.comparison import SIZE, SPEED, Column, Comparison, Row, notes, quality_columns
from lowbit.html import charts
from lowbit.html.charts import MINUS, TIMES
from lowbit.html.packages import check_packages
from lowbit.info import describe, version
from lowbit.report import size_text
from lowbit.tasks.metric import metric_of

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from lowbit.html.details import Details
    from lowbit.layer_errors import LayerError
    from lowbit.quality import Quality

MOST_HISTOGRAMS = 400
"""Pairs of a layer and a candidate that have histograms: about 1.6 kB each."""
MOST_ROWS = 400
"""Rows of one table of layers."""
FULL_DB = 50.0
"""The SQNR, in dB, at which a bar has its full length."""

_NONE, _JOINED = "\N{EN DASH}", "\N{NO-BREAK SPACE}"
_BREAKS = re.compile(r"(?<=[./])(?=\w)|(?<=[^\W_]_)(?=[^\W_])")


@dataclass(frozen=True)
class LayerFigures:
    """The histograms of one layer: candidate -> its error."""

    name: str
    errors: dict[str, LayerError]


def page(comparison: Comparison, *, command: str | None = None, inputs: str | None = None) -> str:
    """The page as HTML.

    Args:
        comparison: what `lowbit.compare` returned. Without details (`compare(..., details=True)`)
            the page says so in place of accounts, layers and pictures.
        command: the command that made it, to be shown.
        inputs: what the models ran on, to be shown.

    Raises:
        ModuleNotFoundError: jinja2 or Pillow is not installed.
    """
    check_packages()
    details = comparison.details
    layers = _figures(details) if details is not None else []
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            c=comparison,
            d=details,
            reference=comparison.rows[0],
            tables=_tables(comparison),
            notes=notes(comparison),
            wide=charts.scatter(comparison.rows, 680, 400),
            narrow=charts.scatter(comparison.rows, 340, 380),
            latency=charts.latency(comparison.rows),
            figures=layers,
            more_layers=0 if details is None else len(_layer_names(details)) - len(layers),
            most_rows=MOST_ROWS,
            environment=None if details is None else describe(details.environment),
            version=version(),
            command=command,
            inputs=inputs,
        )
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lowbit.html"),
        autoescape=True,  # names of layers, classes and schemes are anyone's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bars": charts.bars,
        "breakable": _breakable,
        "db": _db,
        "size": _size,
        "ms": lambda seconds: f"{seconds * 1e3:.3g}",
        "percent": _percent,
        "times": _times,
        "bar": _bar_length,
        "level": _level,
        "number": lambda value: f"{value:.3g}".replace("-", MINUS),
    }
    environment.globals |= {
        "histogram": charts.histogram,
        "HISTOGRAM_HEIGHT": charts.HISTOGRAM_HEIGHT,
        "LATENCY_WIDTH": 2 * charts.LATENCY_BINS,
        "LATENCY_HEIGHT": charts.LATENCY_HEIGHT,
        "BAR_HEIGHT": charts.BAR_HEIGHT,
        "FULL_DB": FULL_DB,
        "in_short": _in_short,
        "worst": _worst,
    }
    return environment


def _db(value: float | None) -> str:
    if value is None or math.isnan(value):
        return _NONE if value is None else "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return f"{round(value, 1) + 0.0:.1f}".replace("-", MINUS)  # no minus before a zero


def _size(count: int | None) -> str:
    return _NONE if count is None else size_text(count).replace(" ", _JOINED)


def _times(value: float) -> str:
    return f"{value:.2f}{TIMES}" if value < 10 else f"{value:.1f}{TIMES}"


def _in_short(quality: Quality) -> list[tuple[str, str]]:
    """The figures of a card: SQNR, and what says most of the task."""
    figures = quality.figures()
    named: dict[str, tuple[str, str]] = {}
    if quality.sqnr_db is not None:
        named["sqnr_db"] = "SQNR", f"{_db(quality.sqnr_db)} dB"
    if quality.top1_agreement is not None:
        named["top1_agreement"] = "same first guess", _percent(quality.top1_agreement)
    for name in list(quality.metrics)[:2] or ([] if len(named) > 1 else ["cosine"]):
        if name in figures and name not in named:
            metric = metric_of(name)
            named[name] = metric.title, metric.text(figures[name])
    return list(named.values())


def _percent(share: float) -> str:
    return f"{100 * share:.0f}{_JOINED}%"


def _breakable(name: str) -> Markup:
    """A name, escaped, that may be broken behind its dots and underscores."""
    from markupsafe import Markup, escape

    return Markup(_BREAKS.sub("<wbr>", str(escape(name))))


def _bar_length(value: float | None) -> float:
    """Percent of the full length."""
    if value is None or math.isnan(value):
        return 0.0
    return round(100 * min(1.0, max(0.0, value / FULL_DB)), 1)


def _level(value: float | None) -> str:
    """How much noise: a class of the style sheet; the number stands beside the bar."""
    if value is None or value >= 20.0:
        return "quiet"
    return "audible" if value >= 10.0 else "loud"  # NaN is loud


def _worst(layers: Sequence[LayerError]) -> LayerError | None:
    """The layer with the least SQNR in the network."""
    measured = [layer for layer in layers if layer.network_db is not None]
    return min(measured, key=_clearness, default=None)


def _clearness(layer: LayerError) -> float:
    """SQNR in the network, or alone where a program runs the layers as one; NaN is the least."""
    value = layer.alone_db if layer.network_db is None else layer.network_db
    if value is None:
        return math.inf
    return -math.inf if math.isnan(value) else value


def _tables(comparison: Comparison) -> list[tuple[str, list[str], list[tuple[Row, list[str]]]]]:
    """Caption, headers, and each row's cells."""
    groups: list[tuple[str, Sequence[Column]]] = [
        ("Speed: one call with the first batch", SPEED),
        ("Size and memory", SIZE),
        ("Quality: the outputs against the float model's", quality_columns(comparison)),
    ]
    return [
        (
            caption,
            [header.replace("\n", " ") for header, _ in columns],
            [(row, [cell(row) for _, cell in columns]) for row in comparison.rows],
        )
        for caption, columns in groups
        if columns
    ]


def _layer_names(details: Details) -> list[str]:
    """Layers that have a histogram in any candidate, in the order of the model."""
    names: dict[str, None] = {}
    for layers in details.layers.values():
        for layer in layers:
            if layer.weights is not None or layer.outputs is not None:
                names.setdefault(layer.name)
    return list(names)


def _figures(details: Details) -> list[LayerFigures]:
    """All layers; or those with the most noise, where there are more than the page has room for."""
    names = _layer_names(details)
    by_name: dict[str, dict[str, LayerError]] = {name: {} for name in names}
    for candidate, layers in details.layers.items():
        for layer in layers:
            if layer.name in by_name:
                by_name[layer.name][candidate] = layer
    room = max(1, MOST_HISTOGRAMS // max(1, len(details.layers)))
    if len(names) > room:
        loudest = sorted(names, key=lambda name: min(map(_clearness, by_name[name].values())))[
            :room
        ]
        names = [name for name in names if name in set(loudest)]
    return [LayerFigures(name, by_name[name]) for name in names]
