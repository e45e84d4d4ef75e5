"""`lowbit.convert` of calibrated models, and calibration in one call."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import Net, RaggedNet, assert_same_state, relative_error, row, state, trained
from torch import nn

import lowbit
from lowbit.calibration.prepared import ObserverModule

IMAGES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def net():
    return trained(Net())


def calibrated(model, scheme="w8a8-static", data=IMAGES, **options):
    return lowbit.calibrate(lowbit.prepare(model, scheme, **options), data)


SCHEMES = ("w8a8-static", "w4a8-static", "w4a8-g32-static", "w8a16-static", "w1a1-static")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_get_what_their_observers_chose(scheme):
    prepared = calibrated(trained(RaggedNet()), scheme)
    before = state(prepared)
    expected = {
        name.removesuffix(".input_observer"): module.observer.parameters()
        for name, module in prepared.named_modules()
        if isinstance(module, ObserverModule)
    }
    converted = lowbit.convert(prepared)
    found = {
        name: (float(module.activation_scale), int(module.activation_zero))
        for name, module in converted.named_modules()
        if isinstance(module, lowbit.nn.base.LowbitLayer)
    }
    assert found == expected
    assert len(found) == 5
    assert_same_state(prepared, before)
    assert not converted.training


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [Net, RaggedNet])
def test_one_call_equals_three(scheme, make):
    model = trained(make())
    three = lowbit.convert(calibrated(model, scheme))
    captured = lowbit.calibrate(lowbit.prepare(model, scheme, IMAGES[0]), IMAGES)
    network = lowbit.convert(captured)
    before = state(model)
    one = lowbit.quantize(model, scheme, calibration=IMAGES)
    assert_same_state(model, before)
    assert_same_state(one, state(network))
    assert str(lowbit.summary(one)) == str(lowbit.summary(network))
    report = lowbit.quantize_(model, scheme, calibration=iter(IMAGES))
    assert_same_state(model, state(three))
    rows = [(row.name, row.scheme) for row in report.rows]
    assert rows == [(row.name, row.scheme) for row in lowbit.summary(three).rows]
    assert "converted in place" in report.converted[0].note
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(one(x), network(x))
    assert torch.equal(model(x), three(x))


def fake_quantized(x, layer):
    scale, zero = float(layer.activation_scale), int(layer.activation_zero)
    q = torch.clamp(torch.round(x.double() / scale) + zero, -128, 127)
    return (q - zero) * scale


@torch.no_grad()
def test_outputs_are_those_of_rounded_weights_and_activations():
    """In float64, by torch's own convolution, from the float layers that the codes mean."""
    model = trained(RaggedNet())
    quantized = lowbit.quantize(model, "w8a8-static", calibration=IMAGES)
    x = IMAGES[0]
    rounded = copy.deepcopy(quantized)
    for name, module in quantized.named_modules():
        if isinstance(module, lowbit.nn.base.LowbitLayer):
            rounded.set_submodule(name, module.dequantize().double())

    def forward(net):
        def call(name, x):
            layer = quantized.get_submodule(name)
            return net.get_submodule(name)(fake_quantized(x, layer))

        y = F.relu(call("stem", x))
        y = F.relu(call("depthwise", call("grouped", y)))
        return call("head", call("fc", y.mean((2, 3))))

    expected = forward(rounded)
    error = float((quantized(x) - expected).norm() / expected.norm())
    assert error < 0.005  # a value in a million may round to the other side
    assert float((quantized(x) - model(x)).norm() / model(x).norm()) < 0.1


def test_static_quality_is_about_dynamic():
    model = trained(RaggedNet())
    x = torch.cat(IMAGES)
    with torch.no_grad():
        wanted = model(x)
        errors = {
            scheme: float(
                (lowbit.quantize(model, scheme, **data)(x) - wanted).norm() / wanted.norm()
            )
            for scheme, data in (
                ("w8a8", {}),
                ("w8a8-static", {"calibration": IMAGES}),
                ("w8a16-static", {"calibration": IMAGES}),
            )
        }
    assert errors["w8a8-static"] < 2 * errors["w8a8"]
    assert errors["w8a16-static"] < errors["w8a8"]


def test_mixed_schemes():
    overrides = {"stem": "w8a8", "blocks.1": None, "re:blocks.*": "w4a16-static"}
    converted = lowbit.convert(calibrated(net(), overrides=overrides))
    assert {r.name: r.scheme for r in lowbit.summary(converted).rows} == {
        "stem": "w8a8",
        "norm": "folded",
        "blocks.0": "w4a16-static",
        "blocks.1": "float32",
        "blocks.2": "w4a16-static",
        "fc": "w8a8-static",
    }
    assert row(converted, "blocks.1").note == "override 'blocks.1' is None"


def test_activations_behind_layers_are_absorbed_as_ever():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Flatten(), nn.Linear(288, 4)
    ).eval()
    converted = lowbit.convert(calibrated(model))
    assert converted[0].epilogue == "relu6"
    assert isinstance(converted[2], nn.Identity)
    assert (int(converted[4].activation_zero), int(converted[0].activation_zero)) != (0, 0)
    assert int(converted[4].activation_zero) == -128  # what a ReLU6 gives uses all codes
    apart = lowbit.convert(calibrated(model, fuse=False))
    assert apart[0].epilogue == "none"
    assert isinstance(apart[1], nn.BatchNorm2d)
    assert isinstance(apart[2], nn.ReLU6)


@pytest.mark.parametrize("convert", [lowbit.quantize, lowbit.quantize_])
def test_weights_learn_from_the_same_data(convert):
    """Also of what can be read once only."""
    results = {}
    for scheme in ("w4a8-static", "w4a8-static-gptq"):
        torch.manual_seed(0)
        model = trained(RaggedNet())
        converted = convert(model, scheme, calibration=iter(IMAGES))
        results[scheme] = model if convert is lowbit.quantize_ else converted
    plain, learned = results.values()
    assert torch.equal(plain.stem.activation_scale, learned.stem.activation_scale)
    assert learned.stem.scheme.quantizer == "gptq"
    assert not torch.equal(plain.grouped.weight_packed, learned.grouped.weight_packed)
    assert learned(IMAGES[0]).isfinite().all()
    if convert is lowbit.quantize:
        assert row(learned, "grouped").note == "in integers"


def test_layers_that_never_ran_stay_float():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, other=False):
            return self.unused(x) if other else self.used(x)

    prepared = calibrated(Branches(), data=[torch.randn(2, 8)])
    converted = lowbit.convert(prepared)
    assert isinstance(converted.unused, nn.Linear)
    assert type(converted.unused) is nn.Linear
    assert "never ran during calibration" in row(converted, "unused").note
    assert isinstance(converted.used, lowbit.nn.Linear)
    assert not hasattr(converted.unused, "input_observer")
    x = torch.randn(2, 8)
    assert torch.equal(converted(x, True), prepared.unused(x))


def test_calibration_can_go_on_after_converting():
    prepared = calibrated(net(), data=IMAGES[:1])
    first = lowbit.convert(prepared)
    lowbit.calibrate(prepared, [IMAGES[1] * 5, IMAGES[2]])
    assert_same_state(lowbit.convert(prepared), state(lowbit.convert(calibrated(
        net_like(prepared), data=[IMAGES[0], IMAGES[1] * 5, IMAGES[2]]))))  # fmt: skip
    assert float(lowbit.convert(prepared).stem.activation_scale) > float(
        first.stem.activation_scale
    )


def net_like(prepared):
    """The float model that was prepared, its norm folded."""
    model = Net().eval()
    model.norm = nn.Identity()
    model.load_state_dict({k: v for k, v in prepared.state_dict().items() if "observer" not in k})
    return model


def test_hooks_and_attributes_are_carried_over():
    model = net()
    model.fc.mine = 7
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    converted = lowbit.convert(calibrated(model))
    calls.clear()
    converted(IMAGES[0])
    assert calls == [1]
    assert converted.fc.mine == 7
    assert row(converted, "fc").note.startswith("hooks carried over: 1; ")


def test_a_layer_is_a_model():
    linear, x = nn.Linear(8, 4), torch.randn(5, 8)
    converted = lowbit.quantize(linear, "w8a8-static", calibration=[x])
    assert isinstance(converted, lowbit.nn.Linear)
    assert relative_error(converted(x), linear(x)) < 0.02


def test_transposed_and_one_dimensional_convolutions():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.Flatten(2), nn.Conv1d(4, 5, 3)).eval()
    converted = lowbit.convert(calibrated(model))
    assert len(lowbit.summary(converted).converted) == 2
    assert relative_error(converted(IMAGES[0]), model(IMAGES[0])) < 0.03


def test_files_keep_the_scales(tmp_path):
    converted = lowbit.convert(calibrated(net()))
    lowbit.save_file(converted, tmp_path / "model.safetensors")
    loaded = lowbit.load_file(net(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(IMAGES[0]), converted(IMAGES[0]))


def test_trained_models_convert_as_ever():
    prepared = lowbit.prepare_qat(net(), "w4a8").eval()
    assert torch.equal(lowbit.convert(prepared)(IMAGES[0]), prepared(IMAGES[0]))


# --- Refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match=r"not calibrated: run lowbit\.calibrate"):
        lowbit.convert(lowbit.prepare(net(), "w8a8-static"))
    with pytest.raises(ValueError, match="no layer of the model is prepared"):
        lowbit.convert(net())


@pytest.mark.parametrize("convert", [lowbit.quantize, lowbit.quantize_])
def test_static_schemes_need_data(convert):
    with pytest.raises(ValueError, match="layer 'stem': w8a8-static has static activations"):
        convert(net(), "w8a8-static")


def test_a_failure_in_place_leaves_a_float_model():
    model = net()
    wanted = model(IMAGES[0])
    with pytest.raises(ValueError, match="NaN or Inf"):
        lowbit.quantize_(model, "w8a8-static", calibration=[torch.full((1, 3, 8, 8), torch.nan)])
    assert not any(isinstance(m, ObserverModule) for m in model.modules())
    torch.testing.assert_close(model(IMAGES[0]), wanted)
    lowbit.quantize_(model, "w8a8-static", calibration=IMAGES)


def test_converters_that_return_no_layer_of_ours():
    class Wrapped(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    def convert(module, scheme):
        plain = nn.Linear(module.in_features, module.out_features)
        plain.weight, plain.bias = module.weight, module.bias
        return nn.Sequential(lowbit.nn.Linear.from_float(plain, scheme))

    lowbit.register_converter(Wrapped, convert)
    prepared = calibrated(nn.Sequential(Wrapped(8, 8)), data=[torch.randn(2, 8)])
    with pytest.raises(ValueError, match="layer '0': the converter of Wrapped returned a Sequen"):
        lowbit.convert(prepared)
    assert isinstance(prepared[0].input_observer, ObserverModule)
