"""What `search` returns: a scheme per layer, what it costs and keeps, and the Pareto front."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lowbit.comparison import finite
from lowbit.mixed.effects import short, shown
from lowbit.mixed.finals import Confirmation
from lowbit.quality import Quality
from lowbit.tasks.metric import metric_of
from lowbit.timing import Ratio

FORMAT, VERSION = "lowbit schemes", 1


@dataclass(frozen=True)
class Point:
    """One choice that was measured.

    Attributes:
        name: of a uniform choice its scheme, else "".
        schemes: by layer; None is float.
        bytes: parameters and buffers of the whole model.
        seconds: of the first batch, estimated from the times of the layers; None without times.
        quality: of the whole model's outputs.
    """

    name: str
    schemes: Mapping[str, str | None]
    bytes: int
    seconds: float | None
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            **vars(self),
            "schemes": dict(self.schemes),
            "quality": self.quality.to_dict(),
        }


@dataclass(frozen=True)
class Found:
    """The result of `search`.

    Attributes:
        model: class name of the float model.
        budget: what was asked for, as text.
        objective: name of the figure whose loss was made small.
        overrides: the scheme of each layer, None for float: what `lowbit.quantize(model, None,
            overrides=...)` takes.
        notes: why layers stay float although a scheme converts them.
        float_bytes: parameters and buffers of the float model.
        bytes: of the quantized one.
        quality: its outputs against the float model's, over all batches.
        confirmation: what the batches that the search has not looked at say of it, against the
            best uniform scheme within the budget.
        float_seconds: of the first batch, float model.
        seconds: the same of the quantized model, measured alternately with it.
        speedup: the ratio of the two, round by round.
        uniform: each scheme alone, for every layer that it converts.
        front: the choices measured that no other one beats in both size (or time) and quality.
        threads: of torch and lowbit.
    """

    model: str
    budget: str
    objective: str
    overrides: dict[str, str | None]
    notes: dict[str, str]
    float_bytes: int
    bytes: int
    quality: Quality
    confirmation: Confirmation
    float_seconds: float
    seconds: float
    speedup: Ratio
    uniform: tuple[Point, ...]
    front: tuple[Point, ...]
    threads: int
    measured: int = field(default=0)

    def to_dict(self) -> dict[str, Any]:
        """Everything by name; the schemes under "schemes"; times in seconds, sizes in bytes."""
        rest = {name: value for name, value in vars(self).items() if name != "overrides"}
        return {
            "format": FORMAT,
            "version": VERSION,
            "schemes": dict(self.overrides),
            **rest,
            "quality": self.quality.to_dict(),
            "confirmation": self.confirmation.to_dict(),
            "speedup": self.speedup.to_dict(),
            "uniform": [point.to_dict() for point in self.uniform],
            "front": [point.to_dict() for point in self.front],
        }

    def to_json(self) -> str:
        """`to_dict` as indented, strict JSON; `read_schemes` reads the schemes back."""
        return json.dumps(finite(self.to_dict()), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Writes `to_json` to a file, for `read_schemes` and `lowbit convert --schemes`."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def __str__(self) -> str:
        return _render(self)


def read_schemes(path: str | Path) -> dict[str, str | None]:
    """The overrides in a file that `Found.save` wrote, as `lowbit.quantize` takes them.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        data = json.loads(text)
        if data["format"] != FORMAT or not isinstance(data["schemes"], dict):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a file of schemes that `lowbit search -o` wrote") from None
    if data.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {data.get('version')!r}, not {VERSION}, which this lowbit reads"
        )
    schemes: dict[str, str | None] = data["schemes"]
    return schemes


def _render(found: Found) -> str:
    metrics = shown(found.quality)
    rows: list[tuple[str, int, float | None, Quality | None]] = []
    rows.append(("float", found.float_bytes, found.float_seconds, None))
    rows += [(p.name, p.bytes, p.seconds, p.quality) for p in found.uniform]
    rows.append(("found", found.bytes, found.seconds, found.quality))
    cells = []
    for name, size, seconds, quality in rows:
        line = [name, f"{size / 1e6:.3f}", f"{100 * size / found.float_bytes:.1f}"]
        approximate = "~" if name not in ("float", "found") else ""
        line.append("-" if seconds is None else f"{approximate}{seconds * 1e3:.3f}")
        figures: dict[str, float] = {} if quality is None else quality.figures()
        cells.append([*line, *(metric.text(figures.get(metric.name)) for metric in metrics)])
    headers = ["", "MB", "of\nfloat, %", "ms"]
    headers += [metric.header for metric in metrics]
    align = ("left", *("right" for _ in headers[1:]))
    table = tabulate(cells, headers, colalign=align, disable_numparse=True)
    counts = Counter(scheme or "float" for scheme in found.overrides.values())
    rows_of_layers = [
        [short(name), scheme or "float", found.notes.get(name, "")]
        for name, scheme in found.overrides.items()
    ]
    columns = ["layer", "scheme", "why float"][: 3 if found.notes else 2]
    layers = tabulate(
        [row[: len(columns)] for row in rows_of_layers], columns, disable_numparse=True
    )
    closing = f"{found.measured} choices measured, {len(found.front)} of them on the Pareto front."
    if any(point.seconds is not None for point in found.uniform):
        closing += " ~: estimated from the times of the layers."
    return "\n\n".join(
        [
            f"{found.model}: {found.budget}",
            table,
            "layers: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()),
            layers,
            *_verdict(found),
            closing,
        ]
    )


def _verdict(found: Found) -> list[str]:
    """Sentences on what was confirmed, and on a model that stays as it is."""
    if not any(found.overrides.values()):
        return [
            "Every layer stays float, which loses nothing and fits the budget. For a smaller model "
            "ask for fewer bytes, or for a quality to keep at the least bytes, such as '30dB'."
        ]
    checked = found.confirmation
    if checked.uniform is None:
        return []
    where = "On all batches"
    if checked.batches:
        where = f"On {checked.batches} batch{'es' if checked.batches > 1 else ''} held back"
    if checked.excess == 0.0 and set(found.overrides.values()) == {checked.uniform}:
        return [
            f"No mix of its bytes was found to be better than {checked.uniform} for all layers."
        ]
    error = "" if math.isnan(checked.standard_error) else f" +- {checked.standard_error:.2g}"
    return [
        f"{where}, {_damage_name(found.objective)}: {checked.damage:.3g}, against "
        f"{checked.uniform_damage:.3g} of {checked.uniform}, the best uniform scheme within the "
        f"budget ({checked.excess:+.2g}{error})."
    ]


def _damage_name(objective: str) -> str:
    if objective.endswith("_db"):
        return "noise over signal"
    return f"1 - {objective}" if metric_of(objective).higher_is_better else objective
