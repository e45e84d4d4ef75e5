"""Runs prepared models on example data."""

from __future__ import annotations

import operator

import torch
from torch import nn
from tqdm import tqdm

from lowbit.baselines import eval_mode, run
from lowbit.calibration.data import Data, batches, is_one_batch
from lowbit.calibration.prepared import ObserverModule
from lowbit.convert import ForwardFn


def calibrate(
    prepared: nn.Module,
    data: Data,
    forward_fn: ForwardFn | None = None,
    steps: int | None = None,
) -> nn.Module:
    """Runs a prepared model on example data, in eval mode and without gradients.

    Progress shows on a terminal. Memory does not grow with the number of batches. May be called
    again: the statistics go on.

    Args:
        prepared: of `lowbit.prepare`; its observers learn, its modes are restored.
        data: batches, see `lowbit.calibration.batches`. A few hundred samples of what the model
            will see are usual.
        forward_fn: `forward_fn(prepared, batch)` runs the model on a batch, where neither
            `model(batch)`, `model(*batch)` nor `model(**batch)` does: batches with labels, methods
            other than forward.
        steps: the most batches to take.

    Returns:
        `prepared`.

    Raises:
        ValueError: the model is not prepared; the data holds no batch, or NaN or Inf (the message
            names the layer that met it first); no layer ran.
        TypeError: data of another kind, or a batch that does not fit the model's arguments.
    """
    observers = [m.observer for m in prepared.modules() if isinstance(m, ObserverModule)]
    if not observers:
        raise ValueError("the model has no observers: lowbit.prepare makes a model to calibrate")
    source = batches(data, steps)
    length = 1 if is_one_batch(data) else operator.length_hint(data, -1)
    total = min((n for n in (length, steps) if n is not None and n >= 0), default=None)
    before = sum(observer.seen for observer in observers)
    with eval_mode([prepared]), torch.no_grad():
        bar = tqdm(source, desc="calibrate", unit="batch", total=total, disable=None, leave=False)
        for count, batch in enumerate(bar, start=1):
            if forward_fn is not None:
                forward_fn(prepared, batch)
                continue
            try:
                run(prepared, batch)
            except TypeError as error:
                raise TypeError(
                    f"calibration batch {count} does not fit the model: {error}; pass forward_fn, "
                    "e.g. lambda model, batch: model(batch[0])"
                ) from error
    if sum(observer.seen for observer in observers) == before:
        raise ValueError(
            "no layer to calibrate ran on the data: does forward_fn call the prepared model?"
        )
    return prepared
