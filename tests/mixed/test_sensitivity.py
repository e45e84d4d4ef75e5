"""`sensitivity`: every figure against a model that `quantize` makes, and what is left behind."""

import copy
import json

import pytest
import torch
from mixed_nets import LAYERS, batches, net
from torch import nn

import lowbit
from lowbit import timing
from lowbit.baselines import weight_bytes
from lowbit.mixed import layers as layers_module
from lowbit.mixed.layers import Conversion, Workbench, parse_schemes
from lowbit.mixed.measure import Steps, damage
from lowbit.quality import QualityMeter
from lowbit.timing import Timing

SCHEMES = ("w8a8", "w2a8")


@pytest.fixture(autouse=True)
def canned(monkeypatch):
    """Known times: a layer in w2a8 takes 3 s, in w8a8 1 s, in float 2 s."""
    seconds = {"w2a8": 3.0, "w8a8": 1.0}

    def alternate(sides, **_):
        for call in sides.values():
            call()
        return {name: Timing(9.0, (seconds.get(name, 2.0),) * 4) for name in sides}

    monkeypatch.setattr(timing, "alternate", alternate)


def _quality(model, overrides, data):
    meter = QualityMeter()
    with torch.inference_mode():
        converted = lowbit.quantize(model, None, overrides=overrides)
        for x in data:
            meter.update(model(x), converted(x))
    return meter.result()


def test_every_quality_is_that_of_the_converted_model():
    model, data = net(), batches()
    found = lowbit.sensitivity(model, data, SCHEMES)
    assert [layer.name for layer in found.layers] == list(LAYERS)
    for at, layer in enumerate(found.layers):
        for scheme in SCHEMES:
            effect = layer.schemes[scheme]
            assert effect.alone == _quality(model, {layer.name: scheme}, data)
            upto = dict.fromkeys(LAYERS[: at + 1], scheme)
            assert effect.accumulated == _quality(model, upto, data)
    assert found.objective == "kl_divergence"


def test_bytes_and_times():
    model = net()
    found = lowbit.sensitivity(model, batches(), SCHEMES)
    stem = found["stem"]
    assert stem.float_bytes == weight_bytes(nn.Sequential(model.stem, model.norm))
    assert stem.schemes["w2a8"].bytes == weight_bytes(lowbit.quantize(model, "w2a8").stem)
    assert (stem.calls, stem.float_seconds) == (1, 2.0)
    assert (stem.schemes["w2a8"].seconds, stem.schemes["w8a8"].seconds) == (3.0, 1.0)
    assert stem.schemes["w8a8"].speedup.median == 2.0
    without = lowbit.sensitivity(model, batches(), "w8a8", latency=False, accumulated=False)
    assert without["fc"].float_seconds is None
    assert without["fc"].schemes["w8a8"].accumulated is None


def test_the_model_is_as_before():
    model = net()
    model.body.train()
    modules = dict(model.named_modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: module.training for name, module in modules.items()}
    lowbit.sensitivity(model, batches(), SCHEMES)
    assert dict(model.named_modules()) == modules
    assert {name: module.training for name, module in modules.items()} == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in modules.values())


def test_the_model_is_as_before_after_an_error():
    model, calls = net(), []
    modules = dict(model.named_modules())

    def run(net, x):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return net(x)

    with pytest.raises(KeyboardInterrupt):
        lowbit.sensitivity(model, batches(), SCHEMES, forward_fn=run)
    assert dict(model.named_modules()) == modules


def test_an_interrupted_run_goes_on(tmp_path):
    model, data, path = net(), batches(), tmp_path / "run.jsonl"
    whole = lowbit.sensitivity(model, data, SCHEMES)
    calls = []

    def run(net, x):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return net(x)

    with pytest.raises(KeyboardInterrupt):
        lowbit.sensitivity(model, data, SCHEMES, forward_fn=run, resume=path)
    kept = len(path.read_text().splitlines()) - 1
    assert kept > 2
    assert lowbit.sensitivity(model, data, SCHEMES, forward_fn=run, resume=path) == whole
    calls.clear()
    assert lowbit.sensitivity(model, data, SCHEMES, forward_fn=run, resume=path) == whole
    assert len(calls) == 1 + len(data), "once to count calls, once for the float model's outputs"
    with pytest.raises(ValueError, match="belongs to another run: schemes differ"):
        lowbit.sensitivity(model, data, ["w4a8"], resume=path)


def test_nothing_is_copied_while_layers_are_swapped(monkeypatch):
    model = net()
    with Workbench(model, parse_schemes(SCHEMES), Conversion(), lambda *_: None) as bench:
        monkeypatch.setattr(copy, "deepcopy", None)
        monkeypatch.setattr(layers_module, "quantize", None)
        first = bench.bytes({"fc": "w2a8"})
        assert model.fc is bench.layers[2].versions["w2a8"]
        assert bench.bytes({}) - first == 64 * 32 * 4 + 64 * 4 - bench.layers[2].bytes("w2a8")
        bench.set({"stem": "w8a8"})
        assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_shared_layers_and_layers_that_are_not_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(4, 32)
    found = lowbit.sensitivity(model, x, "w4a8")
    assert {layer.name: layer.calls for layer in found.layers} == {"a": 2, "unused": 0}
    assert found["a"].float_seconds == 4.0
    assert found["unused"].schemes["w4a8"].speedup is None
    assert found["a"].schemes["w4a8"].alone == _quality(model, {"re:[ab]": "w4a8"}, [x])


def test_a_transformer_layer_is_measured_with_its_lowbit_layers():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model, x = nn.Sequential(encoder).eval(), torch.randn(2, 5, 32)
    found = lowbit.sensitivity(model, x, "w2a8", latency=False)
    assert [layer.name for layer in found.layers] == ["0.linear1", "0.linear2"]
    expected = _quality(model, {"0.linear1": "w2a8"}, [x])
    assert found.layers[0].schemes["w2a8"].alone.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.1)
    assert torch.backends.mha.get_fastpath_enabled()


def test_text_and_json():
    found = lowbit.sensitivity(net(), batches(), SCHEMES)
    text = str(found)
    assert "w2a8" in text
    assert max(map(len, text.splitlines())) <= 120
    data = json.loads(found.to_json())
    assert data["layers"][0]["schemes"]["w8a8"]["alone"]["rows"] == 16
    worst = found.worst("w2a8")[0]
    assert worst.schemes["w2a8"].alone.kl_divergence == max(
        layer.schemes["w2a8"].alone.kl_divergence for layer in found.layers
    )
    with pytest.raises(KeyError, match="no layer 'tail'; they are stem"):
        found["tail"]


def test_a_task_of_its_own_is_shown():
    found = lowbit.sensitivity(net(), batches(), "w8a8", task=lambda r, o: {"close": 0.5})
    assert found["fc"].schemes["w8a8"].alone.metrics == {"close": 0.5}
    assert "close" in str(found)
    assert found.objective == "sqnr_db"


@pytest.mark.parametrize(
    ("make", "data", "schemes", "match"),
    [
        (net, batches(), [], "`schemes` is empty"),
        (net, batches(), ["w8a8", "w8a8"], "given twice"),
        (net, batches(), ["w9"], "unknown scheme"),
        (net, [], ["w8a8"], "no batch"),
        (lambda: nn.Linear(32, 4), torch.ones(1, 32), ["w8a8"], "is itself a layer, a Linear"),
        (lambda: nn.Sequential(nn.Tanh()), torch.ones(1, 3), ["w8a8"], "no layer that these"),
    ],
)
@pytest.mark.filterwarnings("ignore:no layer was converted")
def test_what_cannot_be_measured_is_refused(make, data, schemes, match):
    with pytest.raises(ValueError, match=match):
        lowbit.sensitivity(make(), data, schemes)


def test_schemes_that_learn_need_calibration():
    with pytest.raises(ValueError, match="needs calibration data"):
        lowbit.sensitivity(net(), batches(), "w4a8-gptq")
    found = lowbit.sensitivity(net(), batches(), "w4a8-gptq", calibration=batches(seed=9))
    assert found.schemes == ("w4a8-gptq",)


def test_static_schemes_are_measured_layer_by_layer():
    model, data, calibration = net(), batches(), batches(seed=9)
    with pytest.raises(ValueError, match="calibrat"):
        lowbit.sensitivity(model, data, "w8a8-static")
    found = lowbit.sensitivity(model, data, "w8a8-static", calibration=calibration)
    prepared = lowbit.prepare(model, None, overrides={"fc": "w8a8-static"}, graph=False)
    copy = lowbit.convert(lowbit.calibrate(prepared, calibration))
    meter = QualityMeter()
    with torch.inference_mode():
        for x in data:
            meter.update(model(x), copy(x))
    effect = found["fc"].schemes["w8a8-static"].alone
    assert 15 < effect.sqnr_db == pytest.approx(meter.result().sqnr_db, rel=1e-6)


def test_damage():
    assert damage({"sqnr_db": 20.0}, "sqnr_db") == pytest.approx(0.01)
    assert damage({"sqnr_db": float("inf")}, "sqnr_db") == 0.0
    assert damage({"sqnr_db": float("-inf")}, "sqnr_db") == float("inf")
    assert damage({"kl_divergence": float("nan")}, "kl_divergence") == float("inf")
    assert damage({"top1_agreement": 0.75}, "top1_agreement") == 0.25
    assert damage({"kl_divergence": 0.5}, "kl_divergence") == 0.5


def test_the_time_left_is_told():
    ticks = iter([0.0, 30.0, 30.0, 60.0])
    said = []
    steps = Steps(lambda stage, share: said.append((stage, share)), 4, lambda: next(ticks))
    steps.step("a")
    steps.step("b", restored=True)
    steps.step("c")
    assert said == [("a, 1:30 min left", 0.25), ("b, 1:00 min left", 0.5), ("c, 30 s left", 0.75)]
