"""What `sensitivity` returns: each layer's effect, as dicts, JSON, or a table for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from lowbit.comparison import finite
from lowbit.quality import Quality
from lowbit.tasks.metric import METRICS, Metric, metric_of
from lowbit.timing import Ratio

_SHOWN = ("sqnr_db", "top1_agreement", "kl_divergence")
NAME_WIDTH = 40


@dataclass(frozen=True)
class Effect:
    """One layer in one scheme.

    Attributes:
        alone: quality of the outputs when this layer alone is quantized.
        accumulated: when every layer up to it is, in the order of execution; None if not asked for.
        bytes: parameters and buffers of the layer.
        seconds: of its calls for the first batch; None where times were not asked for.
        speedup: time of the float layer over that; None for a layer that is not called.
    """

    alone: Quality
    accumulated: Quality | None
    bytes: int
    seconds: float | None
    speedup: Ratio | None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "alone": self.alone.to_dict(),
            "accumulated": None if self.accumulated is None else self.accumulated.to_dict(),
            "bytes": self.bytes,
            "seconds": self.seconds,
            "speedup": None if self.speedup is None else self.speedup.to_dict(),
        }


@dataclass(frozen=True)
class LayerEffect:
    """One layer.

    Attributes:
        name: fully qualified name.
        kind: class of the float layer.
        shape: of its weight.
        calls: how often it is called for the first batch.
        float_bytes: parameters and buffers of the float layer, and of the batch norm that its
            lowbit layers take in.
        float_seconds: of the calls of these for the first batch; None where not asked for.
        schemes: its effect by scheme; a scheme that does not convert it is not there.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    calls: int
    float_bytes: int
    float_seconds: float | None
    schemes: dict[str, Effect]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        effects = {name: effect.to_dict() for name, effect in self.schemes.items()}
        return {**vars(self), "shape": list(self.shape), "schemes": effects}


@dataclass(frozen=True)
class Sensitivity:
    """The result of `sensitivity`; layers in the order of execution.

    Attributes:
        model: class name of the float model.
        objective: name of the figure that a search would work on.
        schemes: names.
        batches: batches that the qualities are taken over.
        threads: of torch and lowbit while times were measured.
        layers: one entry per layer that a scheme converts.
    """

    model: str
    objective: str
    schemes: tuple[str, ...]
    batches: int
    threads: int
    layers: tuple[LayerEffect, ...]

    def __getitem__(self, name: str) -> LayerEffect:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; they are {', '.join(x.name for x in self.layers)}")

    def to_dict(self) -> dict[str, Any]:
        """Everything by name; times in seconds, sizes in bytes, agreements as shares."""
        return {
            **vars(self),
            "schemes": list(self.schemes),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_json(self) -> str:
        """`to_dict` as indented, strict JSON: NaN and infinities as "nan", "inf" and "-inf"."""
        return json.dumps(finite(self.to_dict()), indent=2, allow_nan=False)

    def worst(self, scheme: str) -> list[LayerEffect]:
        """The layers that the scheme converts, those that lose most alone first."""
        from lowbit.mixed.measure import damage

        rows = [layer for layer in self.layers if scheme in layer.schemes]
        lost = {
            layer.name: damage(layer.schemes[scheme].alone.figures(), self.objective)
            for layer in rows
        }
        return sorted(rows, key=lambda layer: -lost[layer.name])

    def __str__(self) -> str:
        return _render(self)


def _render(result: Sensitivity) -> str:
    """One table per scheme, in the order of execution."""
    threads = f"{result.threads} thread{'s' if result.threads != 1 else ''}"
    batches = f"{result.batches} batch{'es' if result.batches != 1 else ''}"
    parts = [f"{result.model}, {batches}, {threads}"]
    for scheme in result.schemes:
        rows = [layer for layer in result.layers if scheme in layer.schemes]
        if not rows:
            parts.append(f"{scheme}: converts no layer")
            continue
        parts.append(f"{scheme}\n\n{_table(rows, scheme)}")
        parts.append("loses most alone: " + ", ".join(x.name for x in result.worst(scheme)[:5]))
    parts.append(
        "alone: only this layer is quantized; all: every layer up to it is. Bytes against those of "
        "the float layer."
    )
    return "\n\n".join(parts)


def _table(rows: list[LayerEffect], scheme: str) -> str:
    effects = [layer.schemes[scheme] for layer in rows]
    timed = effects[0].seconds is not None
    accumulated = effects[0].accumulated is not None
    metrics = shown(effects[0].alone)
    headers = ["layer", "kB", "of\nfloat, %"]
    headers += ["us", "speed-\nup"] if timed else []
    headers += [f"{metric.header}\nalone" for metric in metrics]
    headers += [f"{metric.header}\nall" for metric in metrics] if accumulated else []
    cells = []
    for layer, effect in zip(rows, effects, strict=True):
        line = [short(layer.name), f"{effect.bytes / 1e3:.1f}"]
        line.append(f"{100 * effect.bytes / max(1, layer.float_bytes):.0f}")
        if effect.seconds is not None:
            line.append(f"{effect.seconds * 1e6:.0f}")
            line.append("-" if effect.speedup is None else f"{effect.speedup.median:.2f}")
        for quality in (effect.alone, effect.accumulated):
            if quality is not None:
                figures = quality.figures()
                line += [metric.text(figures.get(metric.name)) for metric in metrics]
        cells.append(line)
    align = ("left", *("right" for _ in headers[1:]))
    return tabulate(cells, headers, colalign=align, disable_numparse=True)


def shown(quality: Quality) -> list[Metric]:
    """The figures that a table of many rows has room for: the task's own, or the usual ones."""
    figures = quality.figures()
    names = [name for name in _SHOWN if name in figures]
    own = [name for name in METRICS if name in quality.metrics]
    own += [name for name in quality.metrics if name not in METRICS]
    if own:
        names = [*(name for name in names if name == "sqnr_db"), *own[:3]]
    return [metric_of(name) for name in names]


def short(name: str) -> str:
    """A layer's name in at most `NAME_WIDTH` characters; the end is what tells layers apart."""
    return name if len(name) <= NAME_WIDTH else "..." + name[3 - NAME_WIDTH :]
