"""The one reader of calibration data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

Data = Iterable[Any] | Callable[[], Iterable[Any]]


def batches(data: Data, steps: int | None = None) -> Iterator[Any]:
    """The batches of calibration data, one after the other.

    Each batch is what `lowbit.compare` takes for one: a tensor, a tuple or list of positional
    arguments, or a mapping of keyword arguments. NumPy arrays in it become tensors of the same
    dtype and memory; anything else is passed on as it is.

    Args:
        data: an iterable of batches (a list, a `DataLoader`, a generator, which is then used up),
            or a function without arguments that returns one or yields them (a
            `representative_dataset` as TFLite's converter takes it). A single tensor, array, tuple
            or mapping counts as one batch.
        steps: the most batches to take; no further one is asked for. None takes all.

    Raises:
        TypeError: `data` is none of these.
        ValueError: `steps` is below 1. Raised when the first batch is asked for: there is none.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps is {steps!r}; it is a number of batches, at least 1, or None")
    if is_one_batch(data):
        data = [data]
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"calibration data is a {type(data).__name__}, whose items are samples, not batches; "
            "pass torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    elif not isinstance(data, Iterable) and callable(data):
        data = data()
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(
            f"calibration data is a {type(data).__name__}; pass an iterable of batches, or a "
            "function that yields them"
        )
    return _read(iter(data), steps)


def repeatable(data: Data, steps: int | None = None) -> Callable[[], Iterator[Any]]:
    """`batches(data, steps)` for who needs it several times: a function that begins anew.

    What can be read once only (a generator) is kept; a function or a list is read again each time.
    """
    if isinstance(data, Iterator):
        data = list(batches(data, steps))
    return lambda: batches(data, steps)


def is_one_batch(data: object) -> bool:
    """Whether data are a batch, not several: a tensor, an array, a tuple or a mapping."""
    return isinstance(data, (Tensor, np.ndarray, tuple, Mapping))


def _read(source: Iterator[Any], steps: int | None) -> Iterator[Any]:
    empty = True
    for batch in itertools.islice(source, steps):
        empty = False
        yield _tensors(batch)
    if empty:
        raise ValueError(
            "the calibration data holds no batch (is it a generator that was used up before?)"
        )


def _tensors(batch: Any) -> Any:
    """The batch with tensors for NumPy arrays; tuples, lists and mappings are looked into."""
    if isinstance(batch, np.ndarray):
        # A copy where torch cannot take the memory: read-only, or negative strides.
        shared = batch.flags.writeable and all(step >= 0 for step in batch.strides)
        return torch.from_numpy(batch if shared else batch.copy())
    if isinstance(batch, np.generic):
        return torch.as_tensor(batch.item(), dtype=torch.from_numpy(np.empty(0, batch.dtype)).dtype)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_tensors, batch))
    if type(batch) in (tuple, list):
        return type(batch)(map(_tensors, batch))
    if type(batch) is dict:
        return {key: _tensors(value) for key, value in batch.items()}
    if isinstance(batch, Mapping) and any(isinstance(v, np.ndarray) for v in batch.values()):
        return {key: _tensors(value) for key, value in batch.items()}
    return batch
