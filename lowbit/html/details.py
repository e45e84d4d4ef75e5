"""What a page shows beyond the tables: accounts, layers' errors, pictures, the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import one_line
from lowbit.html.pictures import Sample, samples
from lowbit.html.samples import split
from lowbit.info import cpu_info
from lowbit.layer_errors import LayerError, layer_errors
from lowbit.report import Report, is_converted, summary

MOST_LAYER_SAMPLES = 8

Progress = Callable[[str, float], None]

# What decides how fast or on what code a process runs.
_VARIABLES = ("LOWBIT_", "OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "MALLOC_")


@dataclass(frozen=True)
class Details:
    """Details of a comparison.

    Attributes:
        reports: candidate -> the account of its conversion; candidates without one are left out.
        layers: candidate -> the errors of its converted layers.
        layer_samples: samples that these are taken on.
        samples: pictures, of models that take pictures.
        environment: what `lowbit.cpu_info` says.
        variables: environment variables that bear on speed or on the code that runs.
        settings: arguments of the comparison, by name.
        made: when, ISO 8601, UTC.
        missing: what could not be taken, and why.
    """

    reports: dict[str, Report]
    layers: dict[str, tuple[LayerError, ...]]
    layer_samples: int
    samples: tuple[Sample, ...]
    environment: dict[str, Any]
    variables: dict[str, str]
    settings: dict[str, Any]
    made: str
    missing: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Accounts, layers' errors and settings as plain JSON types; no histograms or pictures."""
        return {
            "reports": {name: report.to_dict() for name, report in self.reports.items()},
            "layers": {
                name: [layer.to_dict() for layer in layers] for name, layers in self.layers.items()
            },
            "layer_samples": self.layer_samples,
            "settings": self.settings,
            "made": self.made,
            "missing": list(self.missing),
        }


def gather(
    models: Mapping[str, nn.Module],
    batches: Sequence[Any],
    *,
    labels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Details:
    """Takes the details of a comparison.

    What cannot be taken is told in `missing`, and does not stop the rest: a comparison has been
    made by then.

    Args:
        models: name -> model in eval mode; the float model first.
        batches: as `lowbit.compare` takes them, already in a sequence. The layers' errors are taken
            on up to 8 samples, the pictures on up to 6, spread over the batches.
        labels: names of the classes, for models that classify pictures.
        settings: arguments of the comparison.
        progress: called with the stage and the share of it that is done.
    """
    reference, *_ = models.values()
    candidates = {
        name: model for name, model in models.items() if any(map(is_converted, model.modules()))
    }
    missing = []
    each = max(1, MOST_LAYER_SAMPLES // max(1, len(batches)))
    chosen = [one for batch in batches for one in split(batch, each)][:MOST_LAYER_SAMPLES]
    layers: dict[str, tuple[LayerError, ...]] = {}
    pictures: tuple[Sample, ...] = ()
    try:
        layers = layer_errors(reference, candidates, chosen, progress)
    except Exception as error:  # foreign models, on samples of a batch: whatever they raise
        missing.append(f"errors of the layers: {one_line(error)}")
    try:
        pictures = samples(models, batches, labels)
    except Exception as error:
        missing.append(f"pictures: {one_line(error)}")
    return Details(
        reports={name: summary(model) for name, model in candidates.items()},
        layers=layers,
        layer_samples=len(chosen),
        samples=pictures,
        environment=_environment(),
        variables={k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        settings=dict(settings or {}),
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        missing=tuple(missing),
    )


def _environment() -> dict[str, Any]:
    """`cpu_info` without paths, which are nobody's business where a page is sent to."""
    info = cpu_info()
    runtimes = info["threads"]["openmp_runtimes"] or []
    info["threads"]["openmp_runtimes"] = [Path(path).name for path in runtimes]
    return info
