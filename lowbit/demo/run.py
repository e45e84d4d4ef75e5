"""Runs the demo."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lowbit.compare import compare
from lowbit.convert import quantize
from lowbit.demo.network import load_model, predict
from lowbit.demo.photographs import PHOTOS, class_names, load_views
from lowbit.demo.result import Demo
from lowbit.demo.schemes import MIXED, MIXED_OVERRIDES, MIXED_SCHEME, SCHEMES
from lowbit.report import summary
from lowbit.schemes import Scheme

Progress = Callable[[str, float], None]


def run(
    budget_seconds: float = 12.0, details: bool = False, progress: Progress | None = None
) -> Demo:
    """Converts the network to every scheme of `SCHEMES`, and compares.

    Static schemes learn from the views that all are compared on, as torch's INT8 does.

    Args:
        budget_seconds: for the timing of the comparison.
        details: whether the comparison has what its `save_html` shows beyond the tables.
        progress: called with the stage and the share of it that is done.

    Raises:
        ModuleNotFoundError: a package of the demo is not installed; the message says how to.
    """
    say = progress if progress is not None else _silent
    say("loading the network", 0.0)
    model = load_model()
    views = {photo.name: load_views(photo) for photo in PHOTOS}
    models: dict[str, nn.Module] = {"float32": model}
    for done, scheme in enumerate(SCHEMES):
        say(f"converting to {scheme}", done / len(SCHEMES))
        learns = Scheme.parse(scheme).learns
        models[scheme] = quantize(model, scheme, calibration=batches(views) if learns else None)
    models[MIXED] = quantize(model, MIXED_SCHEME, overrides=MIXED_OVERRIDES)
    say("looking at the photographs", 1.0)
    predictions = {name: predict(side, views) for name, side in models.items()}
    candidates = {name: models[name] for name in (*SCHEMES, MIXED)}
    comparison = compare(
        model,
        candidates,
        batches(views),
        budget_seconds=budget_seconds,
        task="classification",
        details=details,
        labels=class_names(),
        progress=say,
    )
    reports = {name: summary(side) for name, side in candidates.items()}
    return Demo(predictions, reports, comparison)


def batches(views: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A single image first, which is what gets timed, and then the other views by photograph."""
    first, *others = views.values()
    # Slices, not view[None], whose strides torch does not take for channels_last.
    return [first[:1], first[1:], *others]


def _silent(stage: str, share: float) -> None:
    pass
