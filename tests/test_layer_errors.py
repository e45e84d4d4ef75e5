"""The layers' errors: against NumPy on tensors that are taken without the code under test."""

import math

import numpy as np
import pytest
import torch
from models import Net, trained
from torch import nn

import lowbit
from lowbit.layer_errors import BINS, layer_errors


def sqnr(reference, output):
    r, o = (t.detach().numpy().astype(np.float64) for t in (reference, output))
    return 10 * np.log10((r**2).sum() / ((r - o) ** 2).sum())


class Chain(nn.Module):
    """A folded norm, an activation in an epilogue, a layer that is called twice, one never."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.head = nn.Linear(32, 7)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x))).mean((2, 3))
        return self.head(self.twice(self.twice(x).tanh()).tanh())


@pytest.fixture
def model():
    torch.manual_seed(5)
    return trained(Chain())


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3)]


def errors(model, quantized, batches):
    return {e.name: e for e in layer_errors(model, {"q": quantized}, batches)["q"]}


def test_the_first_layer_by_hand(model, batches):
    quantized = lowbit.quantize(model, "w4a8")
    assert quantized.stem.epilogue == "relu"
    found = errors(model, quantized, batches)["stem"]
    with torch.no_grad():
        norm, stem = model.norm, model.stem
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = stem.weight * factor[:, None, None, None]
        x = torch.cat(batches)
        expected = norm(stem(x)).relu()
        got = torch.cat([quantized.stem(batch) for batch in batches])
    assert found.scheme == "w4a8"
    assert found.weight_db == pytest.approx(sqnr(weight, quantized.stem.weight), abs=1e-3)
    assert found.alone_db == pytest.approx(sqnr(expected, got), abs=1e-3)
    assert found.network_db == found.alone_db  # nothing before it


def test_a_later_layer_has_the_noise_of_those_before_it(model, batches):
    quantized = lowbit.quantize(model, "w4a8")
    inputs, outputs, made = [], [], []

    def keep(_, args, output):
        inputs.append(args[0].clone())
        outputs.append(output.clone())

    handles = [
        model.head.register_forward_hook(keep),
        quantized.head.register_forward_hook(lambda *call: made.append(call[2].clone())),
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
            quantized(batch)
    for handle in handles:
        handle.remove()
    found = errors(model, quantized, batches)["head"]
    expected = torch.cat(outputs)
    alone = torch.cat([quantized.head(x) for x in inputs])
    assert found.alone_db == pytest.approx(sqnr(expected, alone), abs=1e-3)
    assert found.network_db == pytest.approx(sqnr(expected, torch.cat(made)), abs=1e-3)
    assert found.network_db < found.alone_db


def test_histograms_count_every_value(model, batches):
    quantized = lowbit.quantize(model, "w1a8")
    found = errors(model, quantized, batches)["head"]
    weight = model.head.weight.detach().numpy()
    counts, _ = np.histogram(weight, BINS, (found.weights.low, found.weights.high))
    assert (found.weights.low, found.weights.high) == (weight.min(), weight.max())
    assert np.abs(np.array(found.weights.reference) - counts).sum() <= 4  # edges in float32
    assert sum(found.weights.quantized) == weight.size
    assert sum(found.outputs.reference) == sum(found.outputs.quantized) == 6 * 7
    # Every output channel of a binary weight has one magnitude, with both signs.
    assert sum(count > 0 for count in found.weights.quantized) <= 2 * 7


def test_layers_called_twice_and_never(model, batches):
    found = errors(model, lowbit.quantize(model, "w8a8"), batches)
    assert list(found) == ["stem", "twice", "unused", "head"]
    assert sum(found["twice"].outputs.reference) == 2 * 6 * 32
    assert found["twice"].network_db > 20
    unused = found["unused"]
    assert unused.weight_db > 30
    assert (unused.alone_db, unused.network_db, unused.outputs) == (None, None, None)


def test_an_unfolded_candidate_is_compared_with_the_unfolded_layer(model, batches):
    both = {
        "folded": lowbit.quantize(model, "w8a8"),
        "unfolded": lowbit.quantize(model, "w8a8", fuse=False),
    }
    found = layer_errors(model, both, batches)
    for errors_ in found.values():
        assert errors_[0].weight_db > 35
        assert errors_[0].alone_db > 30


def test_float_layers_have_no_entry_and_nothing_is_left_behind(model, batches):
    quantized = lowbit.quantize(model, "w8a8", overrides={"twice": None})
    steps = []
    layer_errors(model, {"q": quantized}, batches, lambda *step: steps.append(step))
    assert "twice" not in errors(model, quantized, batches)
    for module in (*model.modules(), *quantized.modules()):
        assert not module._forward_hooks
    assert steps[-1] == ("layers", 1.0)
    assert len(steps) == 2 * len(batches)


def test_a_failing_model_leaves_no_hooks(model):
    quantized = lowbit.quantize(model, "w8a8")
    with pytest.raises(RuntimeError):
        layer_errors(model, {"q": quantized}, [torch.zeros(1, 5, 8, 8)])
    for module in (*model.modules(), *quantized.modules()):
        assert not module._forward_hooks


def test_a_model_that_is_a_layer_and_constant_outputs():
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    (found,) = layer_errors(layer, {"q": lowbit.quantize(layer, "w8a8")}, [torch.zeros(2, 64)])["q"]
    assert found.name == "(root)"
    assert found.network_db == math.inf  # no input, no noise: the bias alone
    layer.bias.data.zero_()
    (found,) = layer_errors(layer, {"q": lowbit.quantize(layer, "w8a8")}, [torch.zeros(2, 64)])["q"]
    assert found.outputs.low < 0 < found.outputs.high
    assert sum(found.outputs.reference) == 16


def test_values_that_are_not_finite_are_in_no_bin():
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    x = torch.randn(4, 64)
    x[1, 3] = math.nan
    (found,) = layer_errors(layer, {"q": lowbit.quantize(layer, "w8a8")}, [x])["q"]
    assert math.isnan(found.network_db)
    assert sum(found.outputs.reference) == sum(found.outputs.quantized) == 3 * 8


def test_grouped_and_depthwise_convolutions(batches):
    torch.manual_seed(1)
    net = trained(Net())
    found = errors(net, lowbit.quantize(net, "w8a16"), batches)
    assert all(e.weight_db > 30 and e.network_db > 25 for e in found.values())
