"""`lowbit.calibrate`: forms of data, modes, and data that will not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import Net, trained
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lowbit
from lowbit.calibration.prepared import ObserverModule

IMAGES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def prepared_net():
    torch.manual_seed(0)
    return lowbit.prepare(trained(Net()), "w8a8-static")


def chosen(model):
    return {
        name: module.observer.parameters()
        for name, module in model.named_modules()
        if isinstance(module, ObserverModule)
    }


def by_hand(images):
    """What torch's users do: call the model."""
    prepared = prepared_net()
    for x in images:
        prepared(x)
    return chosen(prepared)


@pytest.mark.parametrize(
    "data",
    [
        IMAGES,
        tuple(IMAGES[:1]),
        lambda: (x for x in IMAGES),
        lambda: ([x.numpy()] for x in IMAGES),
        [{"x": x} for x in IMAGES],
        [(x,) for x in IMAGES],
    ],
    ids=["list", "one batch", "function", "representative_dataset", "dicts", "tuples"],
)
def test_forms_of_data(data):
    prepared = prepared_net()
    expected = by_hand(IMAGES[:1] if isinstance(data, tuple) else IMAGES)
    assert lowbit.calibrate(prepared, data) is prepared
    assert chosen(prepared) == expected


def test_a_generator():
    prepared = prepared_net()
    lowbit.calibrate(prepared, iter(IMAGES))
    assert chosen(prepared) == by_hand(IMAGES)


def test_steps():
    prepared = prepared_net()
    lowbit.calibrate(prepared, IMAGES, steps=2)
    assert chosen(prepared) == by_hand(IMAGES[:2])


def test_loaders_that_do_not_know_their_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(IMAGES[0])

    prepared = prepared_net()
    lowbit.calibrate(prepared, DataLoader(Stream(), 2), forward_fn=lambda model, x: model(x))
    assert chosen(prepared) == by_hand([IMAGES[0]])


def test_forward_fn():
    prepared = prepared_net()
    data = [(x, torch.tensor(0)) for x in IMAGES]
    lowbit.calibrate(prepared, data, forward_fn=lambda model, batch: model(batch[0]))
    assert chosen(prepared) == by_hand(IMAGES)


def test_models_with_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(6, 4)

        def forward(self, a, b):
            return self.a(a) + self.b(b)

    a, b = torch.randn(3, 4), torch.rand(3, 6) * 9
    for data in ([(a, b)], [{"b": b, "a": a}], (a, b), lambda: iter([[a.numpy(), b.numpy()]])):
        prepared = lowbit.prepare(Two(), "w8a8-static", observer="minmax")
        lowbit.calibrate(prepared, data)
        found = chosen(prepared)
        assert found["b.input_observer"].scale == np.float32(float(b.max()) / 255)
        assert found["a.input_observer"].scale == np.float32(
            (float(a.max()) - float(a.min())) / 255
        )


def test_modes_and_gradients():
    model = trained(Net())
    model.blocks.add_module("3", nn.Dropout(0.5))
    prepared = lowbit.prepare(model, "w8a8-static").train()
    prepared.blocks[3].eval()
    modes = []

    def forward(model, batch):
        modes.append((model.training, model.blocks[3].training, torch.is_grad_enabled()))
        return model(batch)

    lowbit.calibrate(prepared, IMAGES[:1], forward_fn=forward)
    assert modes == [(False, False, False)]
    assert (prepared.training, prepared.blocks[3].training) == (True, False)


def test_in_inference_mode():
    prepared = prepared_net()
    with torch.inference_mode():
        lowbit.calibrate(prepared, IMAGES)
    assert chosen(prepared) == by_hand(IMAGES)


# --- What will not do ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_with_nan_names_the_layer(bad):
    prepared = prepared_net()
    data = [IMAGES[0], IMAGES[1].clone()]
    data[1][0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="layer 'stem': 1 of 384 values are NaN or Inf"):
        lowbit.calibrate(prepared, data)
    assert prepared.stem.input_observer.observer.seen == IMAGES[0].numel()
    with pytest.raises(ValueError, match="value of 'x': 1 of 384 values are NaN or Inf"):
        lowbit.quantize(trained(Net()), "w8a8-static", calibration=data)


@pytest.mark.parametrize("data", [[], lambda: iter(())])
def test_no_data(data):
    with pytest.raises(ValueError, match="holds no batch"):
        lowbit.calibrate(prepared_net(), data)


def test_batches_with_labels():
    with pytest.raises(TypeError, match=r"batch 1 does not fit the model.*pass forward_fn"):
        lowbit.calibrate(prepared_net(), [(IMAGES[0], torch.tensor(0))])


def test_no_layer_ran():
    with pytest.raises(ValueError, match="no layer to calibrate ran"):
        lowbit.calibrate(prepared_net(), IMAGES, forward_fn=lambda model, batch: None)


def test_no_observers():
    with pytest.raises(ValueError, match="has no observers"):
        lowbit.calibrate(Net(), IMAGES)


def test_an_error_restores_the_modes():
    prepared = prepared_net().train()
    with pytest.raises(RuntimeError):
        lowbit.calibrate(prepared, [torch.randn(2, 5, 8, 8)])
    assert prepared.training
