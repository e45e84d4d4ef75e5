"""`lowbit.calibration.batches`: every form of data, and what is no data."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lowbit.calibration import batches

X = torch.arange(12.0).view(3, 4)


def equal(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            equal(found[key], wanted[key])
    else:
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            equal(a, b)


@pytest.mark.parametrize("batch", [X, (X, X), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_one_batch_is_data(batch):
    equal(list(batches(batch)), [batch])


def test_an_array_is_one_batch():
    equal(list(batches(X.numpy())), [X])


@pytest.mark.parametrize("wrap", [list, iter, lambda items: lambda: iter(items)])
def test_iterables_and_functions(wrap):
    items = [X, [X, X + 1], {"a": X}]
    equal(list(batches(wrap(items))), items)


def test_a_representative_dataset():
    def representative_dataset():
        for i in range(3):
            yield [np.full((1, 2), i, np.float32)]

    wanted = [[torch.full((1, 2), float(i))] for i in range(3)]
    equal(list(batches(representative_dataset)), wanted)
    equal(list(batches(representative_dataset)), wanted)  # a function can be read again


def test_arrays_become_tensors_at_any_depth():
    a = np.arange(4, dtype=np.int64)
    found = list(batches([{"ids": a, "more": (a, [a])}]))
    ids = torch.arange(4)
    equal(found, [{"ids": ids, "more": (ids, [ids])}])


def test_array_memory_is_shared_where_it_can_be():
    a = np.zeros(3, np.float32)
    (found,) = batches([a])
    a[0] = 5
    assert found[0] == 5


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_cannot_share():
    locked = np.arange(3.0)
    locked.flags.writeable = False
    equal(list(batches([locked, np.arange(3.0)[::-1], np.float32(2)])), [
        torch.arange(3, dtype=torch.float64),
        torch.tensor([2.0, 1, 0], dtype=torch.float64),
        torch.tensor(2.0),
    ])  # fmt: skip


def test_named_tuples_and_mappings_keep_their_type():
    pair = namedtuple("Pair", "a b")
    (found,) = batches([pair(X.numpy(), X)])
    assert type(found) is pair
    assert torch.equal(found.a, X)
    (found,) = batches([OrderedDict(x=X)])
    assert type(found) is OrderedDict


def test_data_loaders():
    loader = DataLoader(TensorDataset(X), batch_size=2)
    equal(list(batches(loader)), [[X[:2]], [X[2:]]])


def test_steps_ask_for_no_more():
    asked = []

    def source():
        for i in range(10):
            asked.append(i)
            yield X

    assert len(list(batches(source, steps=3))) == 3
    assert asked == [0, 1, 2]
    assert len(list(batches([X], steps=3))) == 1


@pytest.mark.parametrize("data", [[], list, iter(())])
def test_no_batch_is_an_error(data):
    with pytest.raises(ValueError, match="holds no batch"):
        next(batches(data))


def test_a_generator_that_is_used_up():
    source = (X for _ in range(2))
    list(batches(source))
    with pytest.raises(ValueError, match="used up"):
        list(batches(source))


@pytest.mark.parametrize("steps", [0, -1, 1.5, "2", True])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="steps is"):
        batches([X], steps)


@pytest.mark.parametrize("data", [5, None, "photos", lambda: 3])
def test_what_is_no_data(data):
    with pytest.raises(TypeError, match="calibration data is a"):
        batches(data)


def test_a_dataset_of_samples_is_refused():
    with pytest.raises(TypeError, match="DataLoader"):
        batches(TensorDataset(X))
