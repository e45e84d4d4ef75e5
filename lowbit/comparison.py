"""What `compare` returns: a row per model, as dicts, JSON, a plot, a page, or tables for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lowbit.quality import Quality
from lowbit.tasks.metric import METRICS, Metric, metric_of
from lowbit.timing import Ratio, Timing

if TYPE_CHECKING:
    from lowbit.html.details import Details

_WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One model of a comparison. What could not be measured is None, and `notes` says why.

    Attributes:
        name: the candidate's name; "float32" (the model's dtype) or "torch int8".
        kind: "float", "torch" or "candidate".
        timing: seconds of a call with the first batch.
        samples_per_second: batch size over the median.
        speedup: over the float model: ratio of the times, per round.
        speedup_over_torch: the same over torch INT8.
        weight_bytes: parameters and buffers, each storage once.
        file_bytes: size when saved: safetensors for models with lowbit layers, else `torch.save`
            of the state dict.
        memory_growth_bytes: resident memory that a warm call takes on top of the process's.
        peak_memory_bytes: the process's peak resident memory meanwhile, all models included.
        quality: against the float model; None for that itself.
        notes: engine and method of torch INT8, or why something is missing.
    """

    name: str
    kind: str
    timing: Timing | None = None
    samples_per_second: float | None = None
    speedup: Ratio | None = None
    speedup_over_torch: Ratio | None = None
    weight_bytes: int | None = None
    file_bytes: int | None = None
    memory_growth_bytes: int | None = None
    peak_memory_bytes: int | None = None
    quality: Quality | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, nested dataclasses as dicts."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("timing", "speedup", "speedup_over_torch", "quality"):
            values[name] = None if values[name] is None else values[name].to_dict()
        return values | {"notes": list(self.notes)}


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: the float model first, then torch INT8, then the candidates.

    Attributes:
        model: class name of the float model.
        cpu: name of the CPU.
        isa: instruction set that lowbit's kernels used.
        threads: threads that torch and lowbit used.
        batch_size: samples in the batch that was timed.
        batches: batches that the quality is taken over.
        torch_version: torch's version.
        rows: one per model.
        details: what a page shows beyond that, where `compare` was asked for it.
    """

    model: str
    cpu: str
    isa: str
    threads: int
    batch_size: int
    batches: int
    torch_version: str
    rows: tuple[Row, ...]
    details: Details | None = None

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Everything by name; times in seconds, sizes in bytes, agreements as shares."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["rows"] = [row.to_dict() for row in self.rows]
        details = values.pop("details")
        return values if details is None else values | {"details": details.to_dict()}

    def to_json(self) -> str:
        """`to_dict` as indented, strict JSON: NaN and infinities as "nan", "inf" and "-inf"."""
        return json.dumps(finite(self.to_dict()), indent=2, allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Draws speed-up against SQNR into a file (PNG, SVG or PDF by its suffix)."""
        from lowbit.plot import plot

        plot(self, path)

    def save_html(
        self, path: str | Path, *, command: str | None = None, inputs: str | None = None
    ) -> None:
        """Writes one HTML page that needs neither network nor script.

        Args:
            path: the file to write.
            command: the command that made the comparison, to be shown.
            inputs: what the models ran on, to be shown.

        Raises:
            ModuleNotFoundError: jinja2 or Pillow is not installed.
            OSError: the file cannot be written.
        """
        from lowbit.html.page import page

        Path(path).write_text(page(self, command=command, inputs=inputs), encoding="utf-8")

    @property
    def title(self) -> str:
        """Model, batch, threads, ISA and CPU in one line."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"{self.model}, batch {self.batch_size}, {threads}, {self.isa}, {self.cpu}"

    def __str__(self) -> str:
        return _render(self)


def finite(value: Any) -> Any:
    """Non-finite floats as the strings that `float()` takes."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


Column = tuple[str, Callable[[Row], str]]


def _text(value: float | None, spec: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, spec)


def _spread(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return str(ratio) if ratio.p10 != ratio.p90 else f"{ratio.median:.2f}"


def _time_column(header: str, of: Callable[[Timing], float]) -> Column:
    return header, lambda row: "-" if row.timing is None else f"{of(row.timing) * 1e3:.3f}"


def quality_columns(result: Comparison) -> list[Column]:
    """The figures that a row has, in the order of `METRICS`, then those of a function."""
    found = {row.name: {} if row.quality is None else row.quality.figures() for row in result.rows}
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    order = [*(name for name in METRICS if name in names), *names]

    def column(metric: Metric) -> Column:
        return metric.header, lambda row: metric.text(found[row.name].get(metric.name))

    return [column(metric_of(name)) for name in dict.fromkeys(order)]


SPEED: list[Column] = [
    _time_column("first\nms", lambda t: t.first),
    _time_column("mean\nms", lambda t: t.mean),
    _time_column("std\nms", lambda t: t.std),
    _time_column("p50\nms", lambda t: t.p50),
    _time_column("p95\nms", lambda t: t.p95),
    ("samples\nper s", lambda row: _text(row.samples_per_second, ".1f")),
    ("speed-up over\nfloat (p10-p90)", lambda row: _spread(row.speedup)),
    ("over torch int8\n(p10-p90)", lambda row: _spread(row.speedup_over_torch)),
]
SIZE: list[Column] = [
    ("weights\nMB", lambda row: _text(row.weight_bytes, ".3f", 1e-6)),
    ("file\nMB", lambda row: _text(row.file_bytes, ".3f", 1e-6)),
    ("call\nMB", lambda row: _text(row.memory_growth_bytes, ".1f", 1e-6)),
]


def _render(result: Comparison) -> str:
    """Tables of at most 120 columns: all in one if it fits, else speed and size, then quality."""
    tables: list[list[Column]] = []
    for group in (SPEED, SIZE, quality_columns(result)):
        if tables and _width(_table(result, [*tables[-1], *group])) <= _WIDTH:
            tables[-1] = [*tables[-1], *group]
        else:
            tables.append(list(group))
    return "\n\n".join(
        [result.title, *(_table(result, columns) for columns in tables), "\n".join(notes(result))]
    )


def notes(result: Comparison) -> list[str]:
    """What the tables do not say: engines, failures, rounds, NaN."""
    found = [f"{row.name}: {note}" for row in result.rows for note in row.notes]
    timed = next(row.timing for row in result.rows if row.timing is not None)
    batches = f"{result.batches} batch{'es' if result.batches != 1 else ''}"
    found += [f"torch {result.torch_version}, {timed.rounds} rounds, {batches}."]
    found += ["call MB: resident memory that a warm call takes on top of the loaded models."]
    for row in result.rows:
        if row.quality is not None and row.quality.nonfinite_output:
            count, total = row.quality.nonfinite_output, row.quality.elements
            found.append(f"{row.name}: {count} of {total} outputs are NaN or infinite.")
    return found


def _table(result: Comparison, columns: Sequence[Column]) -> str:
    cells = [[row.name, *(cell(row) for _, cell in columns)] for row in result.rows]
    headers = ["", *(header for header, _ in columns)]
    align = ("left", *("right" for _ in columns))
    return tabulate(cells, headers=headers, colalign=align, disable_numparse=True)


def _width(table: str) -> int:
    return max(len(line) for line in table.splitlines())
