"""Single samples out of batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def split(batch: Any, count: int) -> list[Any]:
    """The first `count` samples of a batch, each as a batch of one.

    A batch whose tensors do not all have the samples in their first dimension cannot be split: it
    comes back whole.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    parts = values if isinstance(values, (list, tuple)) else [values]
    tensors = [v for v in parts if isinstance(v, torch.Tensor)]
    sizes = {t.shape[0] if t.ndim else None for t in tensors}
    size = next(iter(sizes)) if len(sizes) == 1 and len(tensors) == len(parts) else None
    if size is None:
        return [batch]
    return [_slice(batch, at) for at in range(min(count, size))]


def _slice(batch: Any, at: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: value[at : at + 1] for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(value[at : at + 1] for value in batch)
    return batch[at : at + 1]
