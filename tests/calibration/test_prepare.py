"""`lowbit.prepare`: what a prepared model computes, observes and remembers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import Net, RaggedNet, assert_same_state, row, state, trained
from torch import nn

import lowbit
from lowbit.calibration import prepare as prepare_module
from lowbit.calibration.prepare import NotCaptured
from lowbit.calibration.prepared import ObserverModule, detach, learned

IMAGES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def net():
    torch.manual_seed(0)
    return trained(Net())


def observers(model):
    return {
        name.removesuffix(".input_observer"): module.observer
        for name, module in model.named_modules()
        if isinstance(module, ObserverModule)
    }


@pytest.mark.parametrize("make", [Net, RaggedNet])
def test_it_runs_as_the_folded_float_model(make):
    model = trained(make())
    before = state(model)
    prepared = lowbit.prepare(model, "w8a8-static")
    assert torch.equal(prepared(IMAGES[0]), lowbit.fuse(model)(IMAGES[0]))
    assert isinstance(prepared.norm, nn.Identity)
    assert_same_state(model, before)
    assert not observers(model)


def test_without_fusing_it_runs_as_the_model():
    model = net()
    prepared = lowbit.prepare(model, "w8a8-static", fuse=False)
    assert torch.equal(prepared(IMAGES[0]), model(IMAGES[0]))


@torch.no_grad()
def test_every_static_layer_observes_its_input():
    prepared = lowbit.prepare(net(), "w8a8-static", overrides={"fc": "w8a8", "blocks.1": None})
    inputs = {}
    for name in ("stem", "blocks.0", "blocks.2"):
        layer = prepared.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
        )
    for x in IMAGES:
        prepared(x)
    found = observers(prepared)
    assert set(found) == set(inputs) == {"stem", "blocks.0", "blocks.2"}
    for name, observer in found.items():
        assert observer.seen == sum(x.numel() for x in inputs[name])
        assert float(observer.statistics["high"]) == max(float(x.max()) for x in inputs[name])
        assert float(observer.statistics["low"]) == min(float(x.min()) for x in inputs[name])


@pytest.mark.parametrize("name", lowbit.observers.OBSERVERS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_observer_is_chosen(name, symmetric):
    prepared = lowbit.prepare(net(), "w8a8-static", observer=name, symmetric=symmetric)
    assert {(o.name, o.symmetric, o.activation) for o in observers(prepared).values()} == {
        (name, symmetric, "int8")
    }


def test_observers_know_the_activation_format():
    prepared = lowbit.prepare(
        net(), "w4a16-static", overrides={"fc": "w8a8-static", "blocks.0": "w1a1-static"}
    )
    found = {name: observer.activation for name, observer in observers(prepared).items()}
    assert found == {
        "stem": "int16",
        "blocks.0": "binary",
        "blocks.1": "int16",
        "blocks.2": "int16",
        "fc": "int8",
    }


def test_a_shared_layer_has_one_observer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.same = self.fc

        def forward(self, x):
            return self.same(self.fc(x) * 100)

    prepared = lowbit.prepare(Twice(), "w8a8-static")
    (observer,) = observers(prepared).values()
    x = torch.randn(5, 8)
    with torch.no_grad():
        prepared(x)
        hidden = nn.functional.linear(x, prepared.fc.weight, prepared.fc.bias) * 100
    assert observer.seen == 80
    assert float(observer.statistics["high"]) == float(hidden.max())


def test_tied_weights_stay_tied_and_observe_apart():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    prepared = lowbit.prepare(Tied(), "w8a8-static")
    assert prepared.a.weight is prepared.b.weight
    assert len(observers(prepared)) == 2


def test_keyword_arguments_are_observed():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(input=x)

    prepared = lowbit.prepare(Keywords(), "w8a8-static")
    prepared(torch.randn(3, 8))
    assert observers(prepared)["fc"].seen == 24


def test_transformer_encoders_do_not_pass_by():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    prepared = lowbit.prepare(model, "w8a8-static")
    with torch.no_grad():
        x = torch.randn(2, 4, 16)
        torch.testing.assert_close(prepared(x), model(x))
    assert {observer.seen for observer in observers(prepared).values()} == {2 * 4 * 16, 2 * 4 * 32}


def test_a_layer_is_a_model():
    prepared = lowbit.prepare(nn.Linear(8, 4), "w8a8-static")
    prepared(torch.randn(2, 8))
    assert observers(prepared)["input_observer"].seen == 16


# --- State ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("name", lowbit.observers.OBSERVERS)
def test_copies_go_on_exactly(again, name):
    prepared = lowbit.prepare(net(), "w8a8-static", observer=name)
    lowbit.calibrate(prepared, IMAGES[:1])
    other = again(prepared)
    for model in (prepared, other):
        lowbit.calibrate(model, IMAGES[1:])
    assert_same_state(other, state(prepared))
    assert torch.equal(lowbit.convert(other)(IMAGES[0]), lowbit.convert(prepared)(IMAGES[0]))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_resume_exactly(assign):
    whole = lowbit.calibrate(lowbit.prepare(net(), "w8a8-static"), IMAGES)
    half = lowbit.calibrate(lowbit.prepare(net(), "w8a8-static"), IMAGES[:2])
    resumed = lowbit.prepare(net(), "w8a8-static")
    resumed.load_state_dict(copy.deepcopy(half.state_dict()), assign=assign)
    lowbit.calibrate(resumed, IMAGES[2:])
    for name, observer in observers(whole).items():
        assert observers(resumed)[name].parameters() == observer.parameters()


def test_moves_leave_the_statistics_alone():
    prepared = lowbit.calibrate(lowbit.prepare(net(), "w8a8-static"), IMAGES)
    before = {name: observer.parameters() for name, observer in observers(prepared).items()}
    prepared.bfloat16()
    assert prepared.fc.weight.dtype == torch.bfloat16
    assert {name: o.parameters() for name, o in observers(prepared).items()} == before
    lowbit.calibrate(prepared, [IMAGES[0].bfloat16()])


def test_detaching_can_be_undone():
    prepared = lowbit.calibrate(lowbit.prepare(net(), "w8a8-static"), IMAGES)
    calls = []
    handle = prepared.fc.register_forward_pre_hook(lambda *_: calls.append(1))
    layers, keys = learned(prepared), list(prepared.state_dict())
    undo = detach(prepared)
    assert not learned(prepared)
    assert not any("observer" in key for key in prepared.state_dict())
    undo()
    assert learned(prepared) == layers
    assert list(prepared.state_dict()) == keys
    prepared(IMAGES[0])
    assert len(calls) == 1
    handle.remove()
    prepared(IMAGES[0])
    assert len(calls) == 1


# --- The account ---------------------------------------------------------------------------------


def test_the_account_of_a_prepared_model():
    prepared = lowbit.prepare(net(), "w8a8-static", overrides={"fc": "w4a8", "blocks.1": None})
    assert row(prepared, "stem").note == "calibrates as w8a8-static; batch norm 'norm' folded in"
    assert row(prepared, "fc").note == "will be w4a8"
    assert row(prepared, "blocks.1").note == "override 'blocks.1' is None"
    assert row(prepared, "norm").note == "folded into 'stem'"
    assert not lowbit.summary(prepared).converted


def test_norms_in_training_mode_stay():
    model = Net().train()
    prepared = lowbit.prepare(model, "w8a8-static")
    assert isinstance(prepared.norm, nn.BatchNorm2d)
    assert "training mode" in row(prepared, "norm").note
    assert prepared.training


def test_a_graph_is_captured_where_it_can_be(monkeypatch):
    captured = nn.Identity()
    monkeypatch.setattr(prepare_module, "capture", lambda model, inputs: captured)
    assert lowbit.prepare(net(), "w8a8-static") is captured
    assert lowbit.prepare(net(), "w8a8-static", graph=False) is not captured


def test_why_a_graph_was_not_captured_is_in_the_account(monkeypatch):
    seen = []

    def refuse(model, inputs):
        seen.append((set(observers(model)), inputs))
        raise NotCaptured("its forward depends on values")

    monkeypatch.setattr(prepare_module, "capture", refuse)
    prepared = lowbit.prepare(net(), "w8a8-static", IMAGES[0], overrides={"fc": "w8a8"})
    ((names, inputs),) = seen
    assert "stem" in names
    assert inputs is IMAGES[0]
    converted = lowbit.convert(lowbit.calibrate(prepared, IMAGES))
    assert "layer by layer: its forward depends on values" in row(converted, "stem").note
    assert row(converted, "fc").note == ""


# --- Refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_prepared():
    model = net()
    with pytest.raises(ValueError, match=r"schemes \(w8a8\) are dynamic"):
        lowbit.prepare(model, "w8a8")
    with pytest.raises(ValueError, match="no layer converts"):
        lowbit.prepare(nn.Sequential(nn.ReLU()), "w8a8-static")
    with pytest.raises(ValueError, match="unknown observer 'best'"):
        lowbit.prepare(model, "w8a8-static", observer="best")
    with pytest.raises(ValueError, match="matches no layer"):
        lowbit.prepare(model, "w8a8-static", overrides={"head": None})
    with pytest.raises(ValueError, match="prepared already"):
        lowbit.prepare(lowbit.prepare(model, "w8a8-static"), "w8a8-static")
    with pytest.raises(ValueError, match="prepared already"):
        lowbit.prepare(lowbit.prepare_qat(model, "w8a8"), "w8a8-static")
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 'fc': 1 of the 40 weights are NaN or Inf"):
        lowbit.prepare(model, "w8a8-static")


@pytest.mark.filterwarnings("ignore:no layer was converted")
def test_quantize_leaves_prepared_layers_alone():
    quantized = lowbit.quantize(lowbit.prepare(net(), "w8a8-static"), "w8a8")
    assert "prepared for calibration: lowbit.convert" in row(quantized, "fc").note


def test_inputs_that_are_no_floats():
    prepared = lowbit.prepare(nn.Linear(4, 4), "w8a8-static")
    with pytest.raises(TypeError, match=r"the input to calibrate on is torch\.int64"):
        prepared(torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("function", [lambda x: lowbit.prepare(x, "w8a8-static"), lowbit.convert])
def test_what_is_no_model_is_refused(function):
    with pytest.raises(TypeError, match="a state dict, not a"):
        function(nn.Linear(2, 2).state_dict())
