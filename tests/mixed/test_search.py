"""`search`: budgets are kept, no uniform scheme is better, its file is what `quantize` takes."""

import itertools
import json
import math

import pytest
import torch
from mixed_nets import LAYERS, batches, net

import lowbit
from lowbit import timing
from lowbit.baselines import weight_bytes
from lowbit.mixed.found import read_schemes
from lowbit.mixed.layers import Conversion
from lowbit.mixed.search import search_many
from lowbit.quality import QualityMeter
from lowbit.timing import Timing

SCHEMES = ("w8a8", "w4a8", "w2a8")
SECONDS = {"float": 4.0, "w8a8": 2.0, "w4a8": 1.0, "w2a8": 5.0}


@pytest.fixture(autouse=True)
def canned(monkeypatch):
    """Known times of layers: w2a8 is slower than float. A whole model takes the sum."""

    def alternate(sides, **_):
        taken = {}
        for name, call in sides.items():
            call()
            seconds = SECONDS.get(name)
            taken[name] = seconds if seconds is not None else 20.0 - 3.0 * int(name)
        return {name: Timing(9.0, (seconds,) * 4) for name, seconds in taken.items()}

    monkeypatch.setattr(timing, "alternate", alternate)


def _quality(model, copy, data):
    meter = QualityMeter()
    with torch.inference_mode():
        for x in data:
            meter.update(model(x), copy(x))
    return meter.result()


def test_the_least_loss_of_all_choices_is_nearly_found():
    model, data = net(), batches()
    limit = 0.45 * weight_bytes(lowbit.quantize(model, "w8a8"))
    schemes = ("w8a8", "w2a8")
    found = lowbit.search(model, data, limit, schemes, allow_slower=True)
    least = math.inf
    for choice in itertools.product((None, *schemes), repeat=len(LAYERS)):
        overrides = dict(zip(LAYERS, choice, strict=True))
        copy = lowbit.quantize(model, None, overrides=overrides) if any(choice) else model
        if weight_bytes(copy) <= limit:
            least = min(least, _quality(model, copy, data).kl_divergence)
    assert found.bytes <= limit
    assert found.quality.kl_divergence <= 1.1 * least
    assert found.quality == _quality(
        model, lowbit.quantize(model, None, overrides=found.overrides), data
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_uniform_scheme_of_its_size_is_better(scheme):
    model, data = net(), batches()
    copy = lowbit.quantize(model, scheme)
    found = lowbit.search(model, data, weight_bytes(copy), SCHEMES, allow_slower=True, front=0)
    assert found.bytes <= weight_bytes(copy)
    assert found.quality.kl_divergence <= _quality(model, copy, data).kl_divergence
    row = next(point for point in found.uniform if point.name == scheme)
    assert (row.bytes, row.quality) == (weight_bytes(copy), _quality(model, copy, data))


def test_shares_of_bytes():
    model, data = net(), batches(1)
    half = weight_bytes(lowbit.quantize(model, "w8a8")) * 0.6
    for budget, limit in (
        ("60% of w8a8", half),
        ("20%", 0.2 * weight_bytes(model)),
        ("100% of w4a8-g32", weight_bytes(lowbit.quantize(model, "w4a8-g32"))),
    ):
        found = lowbit.search(model, data, budget, SCHEMES, allow_slower=True, front=0, rounds=0)
        assert 0.5 * limit < found.bytes <= limit


def test_layers_that_would_be_slower_stay_float():
    model, data = net(), batches(1)
    found = lowbit.search(model, data, "100%", ["w2a8"], front=0)
    assert set(found.overrides.values()) == {None}
    assert found.notes["fc"] == "would be slower, times float: w2a8 1.25"
    assert found.quality.sqnr_db == math.inf
    with pytest.raises(ValueError, match=r"cannot be met.*allow_slower=True"):
        lowbit.search(model, data, "50%", ["w2a8"], front=0)
    free = lowbit.search(model, data, "50%", ["w2a8"], front=0, allow_slower=True)
    assert "w2a8" in free.overrides.values()
    assert free.front == () or free.front[0].seconds is None, "layers were not timed"


def test_a_budget_with_room_for_float_says_so():
    found = lowbit.search(net(), batches(1), "100%", SCHEMES, allow_slower=True, front=0)
    assert set(found.overrides.values()) == {None}
    assert set(found.notes.values()) == {"fits the budget"}
    assert found.bytes == found.float_bytes
    text = str(found)
    assert "Every layer stays float" in text
    assert "held back" not in text


class Outliers(torch.nn.Module):
    """Three layers of one shape; in each row of the second one weight is far larger than all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))
        with torch.no_grad():
            self.b.weight[:, 0] = 3.0

    def forward(self, x):
        return self.c(self.b(self.a(x) * torch.cat([torch.full((1,), 0.01), torch.ones(63)])))


@pytest.mark.parametrize("schemes", [("w8a8", "w4a8"), ("w8a8-gptq", "w4a8-gptq")])
def test_a_sensitive_layer_keeps_its_bits(schemes):
    model = Outliers().eval()
    generator = torch.Generator().manual_seed(1)
    data, calibration = (
        [torch.randn(32, 64, generator=generator) for _ in range(6)] for _ in range(2)
    )
    given = {"calibration": calibration} if "w4a8-gptq" in schemes else {}
    wide, narrow = (weight_bytes(lowbit.quantize(model, name)) for name in ("w8a8", "w4a8-minmax"))
    limit = narrow + (wide - narrow) // 3 + 1  # one layer may be wide
    found = lowbit.search(
        model, data, limit, schemes, task="other", allow_slower=True, front=0, **given
    )
    assert found.overrides == {"a": schemes[1], "b": schemes[0], "c": schemes[1]}
    copy = lowbit.quantize(model, None, overrides=found.overrides, **given)
    uniform = lowbit.quantize(model, schemes[1], **given)
    sides = []
    for side in (copy, uniform):
        meter = QualityMeter("other")
        for number in (1, 4):  # every third batch is held back
            with torch.inference_mode():
                meter.update(model(data[number]), side(data[number]))
        sides.append(meter.result().sqnr_db)
    assert sides[0] > sides[1] + 3
    checked = found.confirmation
    assert (checked.uniform, checked.batches) == (schemes[1], 2)
    assert checked.damage < checked.uniform_damage
    assert checked.excess == pytest.approx(checked.damage - checked.uniform_damage)
    assert 0 < checked.standard_error < -checked.excess
    assert "On 2 batches held back, noise over signal" in str(found)


@pytest.mark.parametrize("budget", ["100% of w4a8", "60% of w8a8", "100% of w2a8"])
def test_learned_mixes_are_no_worse_than_uniform_on_what_was_held_back(budget):
    model, data, calibration = net(), batches(4, rows=4), batches(2, seed=5)
    schemes = ("w8a8", "w4a8-gptq", "w2a8-gptq")
    found = lowbit.search(
        model, data, budget, schemes, calibration=calibration, allow_slower=True, front=0
    )

    def lost(overrides):
        copy = lowbit.quantize(model, None, overrides=overrides, calibration=calibration)
        return weight_bytes(copy), _quality(model, copy, data[1:2]).kl_divergence

    size, own = lost(found.overrides)
    assert size == found.bytes
    compared = 0
    for scheme in schemes[1:]:
        bytes_, loss = lost({"re:.*": scheme})
        if bytes_ <= found.bytes:
            compared += 1
            assert own <= loss
    assert compared >= 1
    assert found.confirmation.damage == pytest.approx(own)


def test_a_budget_that_nothing_meets():
    model = net()
    least = weight_bytes(lowbit.quantize(model, "w2a8")) / 1e6
    with pytest.raises(ValueError, match=f"cannot be met.*at least {least:.3f} MB$"):
        lowbit.search(model, batches(1), "1kB", SCHEMES, allow_slower=True)


@pytest.mark.parametrize("floor", ["20dB", "top1_agreement>=0.99", "kl_divergence<=0.001"])
def test_a_floor_is_kept_at_few_bytes(floor):
    model, data = net(), batches()
    found = lowbit.search(model, data, floor, SCHEMES, allow_slower=True)
    copy = lowbit.quantize(model, None, overrides=found.overrides)
    figures = _quality(model, copy, data).figures()
    assert {
        "20dB": figures["sqnr_db"] >= 20,
        "top1_agreement>=0.99": figures["top1_agreement"] >= 0.99,
        "kl_divergence<=0.001": figures["kl_divergence"] <= 0.001,
    }[floor]
    assert found.bytes == weight_bytes(copy) < 0.5 * weight_bytes(model)


def test_a_floor_that_a_uniform_scheme_keeps_is_met_at_no_more_bytes():
    model, data, calibration = net(), batches(4, rows=4), batches(4, rows=16, seed=5)
    schemes = ("w8a8", "w4a8-gptq")
    copy = lowbit.quantize(model, "w4a8-gptq", calibration=calibration)
    floor = f"{_quality(model, copy, data).sqnr_db - 0.01:.4f}dB"
    found = lowbit.search(
        model, data, floor, schemes, calibration=calibration, allow_slower=True, rounds=0, front=0
    )
    assert found.bytes <= weight_bytes(copy)
    assert found.quality.sqnr_db >= float(floor[:-2])


def test_a_floor_of_the_users_own():
    def worst(reference, output):
        return {"close": 1 - (reference - output).abs().max() / reference.abs().max()}

    model, data = net(), batches(1)
    found = lowbit.search(model, data, "close>=0.9", SCHEMES, task=worst, allow_slower=True)
    assert found.quality.metrics["close"] >= 0.9
    with pytest.raises(ValueError, match=r"no figure 'clsoe'.*close"):
        lowbit.search(model, data, "clsoe>=0.9", SCHEMES, task=worst)


def test_milliseconds():
    found = lowbit.search(net(), batches(1), "18s", SCHEMES, front=0)
    assert found.seconds == 17.0
    assert found.float_seconds == 20.0
    assert set(found.overrides.values()) <= {"w8a8", "w4a8", None}
    assert set(found.overrides.values()) != {None}
    with pytest.raises(ValueError, match=r"of 5000.000 ms cannot be met: .* took 17000.000 ms"):
        lowbit.search(net(), batches(1), "5s", SCHEMES, front=0)


def test_the_front_has_no_beaten_points():
    found = lowbit.search(net(), batches(1), "40%", SCHEMES, allow_slower=True)
    losses = [point.quality.kl_divergence for point in found.front]
    sizes = [point.bytes for point in found.front]
    assert len(found.front) > 3
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)


def test_the_same_again_and_after_an_interruption(tmp_path):
    data, path, calls = batches(1), tmp_path / "run.jsonl", []
    whole = lowbit.search(net(), data, "40%", SCHEMES)

    def run(model, x):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        lowbit.search(net(), data, "40%", SCHEMES, forward_fn=run, resume=path)
    assert lowbit.search(net(), data, "40%", SCHEMES, forward_fn=run, resume=path) == whole
    assert lowbit.search(net(), data, "40%", SCHEMES) == whole


LEARNED = ("w8a8", "w2a8-gptq")


def _search(path, calibration, **options):
    options = {"resume": path, "calibration": calibration, "allow_slower": True, **options}
    return lowbit.search(net(), batches(1), "15%", LEARNED, rounds=1, front=0, **options)


def test_layers_that_learn_are_kept_beside_the_file(tmp_path, monkeypatch):
    alone = []
    layered = Conversion.layered
    monkeypatch.setattr(
        Conversion,
        "layered",
        lambda self, model, scheme: (alone.append(scheme.name), layered(self, model, scheme))[1],
    )
    data = batches(2, seed=5)
    found = _search(tmp_path / "run.jsonl", data)
    assert alone == list(LEARNED)
    kept = [path.name for path in tmp_path.glob("*.safetensors*")]
    assert len(kept) == 1
    assert kept[0].startswith("run.")
    assert kept[0].endswith(".w2a8-gptq.safetensors")
    again = _search(tmp_path / "run.jsonl", data)
    assert alone == [*LEARNED, "w8a8"]
    assert again.overrides == found.overrides
    assert again.quality == found.quality
    with pytest.raises(ValueError, match="belongs to another run: calibration differ"):
        _search(tmp_path / "run.jsonl", batches(2, seed=6))
    assert alone == [*LEARNED, "w8a8"]
    other = _search(tmp_path / "other.jsonl", batches(2, seed=6))
    assert alone[3:] == list(LEARNED)
    assert other.quality != found.quality


def test_the_choice_that_wins_is_not_converted_again(monkeypatch):
    made, quantize = [], Conversion.quantize

    def counted(self, model, scheme, assignment=None):
        if scheme is None:
            made.append(tuple(sorted((assignment or {}).items())))
        return quantize(self, model, scheme, assignment)

    monkeypatch.setattr(Conversion, "quantize", counted)
    handed = []
    for budget in ("40%", "20dB"):
        made.clear()
        search_many(net(), batches(1), [budget], SCHEMES, each=lambda *pair: handed.append(pair))
        assert len(made) > 1
        assert len(made) == len(set(made))
    (first, model), _ = handed
    again = lowbit.quantize(net(), None, overrides=first.overrides)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_each_result_is_handed_out_with_its_model(tmp_path):
    model, data, handed = net(), batches(1), []
    found = search_many(
        model, data, ["40%", "20%"], SCHEMES, each=lambda *pair: handed.append(pair)
    )
    assert [result for result, _ in handed] == found
    for result, copy in handed:
        assert weight_bytes(copy) == result.bytes
        assert _quality(model, copy, data) == result.quality


def test_uniform_schemes_that_learn_are_as_quantize_makes_them(tmp_path):
    data = batches(2, seed=5)
    found = _search(tmp_path / "run.jsonl", data)
    copy = lowbit.quantize(net(), "w2a8-gptq", calibration=data)
    row = next(point for point in found.uniform if point.name == "w2a8-gptq")
    assert row.quality == _quality(net(), copy, batches(1))


def test_its_file_is_what_quantize_takes(tmp_path):
    model, data = net(), batches(1)
    found = lowbit.search(model, data, "35%", SCHEMES, allow_slower=True, rounds=1)
    found.save(tmp_path / "schemes.json")
    overrides = read_schemes(tmp_path / "schemes.json")
    assert overrides == found.overrides == json.loads(found.to_json())["schemes"]
    copy = lowbit.quantize(model, None, overrides=overrides)
    assert _quality(model, copy, data) == found.quality
    assert weight_bytes(copy) == found.bytes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "is not a file of schemes"),
        ("{", "is not a file of schemes"),
        ('{"format": "lowbit schemes", "schemes": 3}', "is not a file of schemes"),
        ('{"format": "lowbit schemes", "version": 2, "schemes": {}}', "has version 2, not 1"),
    ],
)
def test_other_files_are_refused(tmp_path, text, match):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_schemes(tmp_path / "x.json")


def test_several_budgets_share_their_measurements():
    model, data, calls = net(), batches(1), []

    def run(model, x):
        calls.append(1)
        return model(x)

    small, large = search_many(
        model, data, ["30%", "50%"], SCHEMES, allow_slower=True, forward_fn=run
    )
    assert small.bytes <= 0.3 * small.float_bytes
    assert small.bytes <= large.bytes <= 0.5 * large.float_bytes
    together = len(calls)
    calls.clear()
    for budget in ("30%", "50%"):
        lowbit.search(model, data, budget, SCHEMES, allow_slower=True, forward_fn=run)
    assert together < len(calls)


def test_schemes_that_learn_are_learned_again_for_the_result():
    model, data = net(), batches(1)
    found = lowbit.search(
        model,
        data,
        "25%",
        ["w8a8", "w4a8-gptq", "w2a8-gptq"],
        allow_slower=True,
        calibration=batches(2, seed=5),
        rounds=0,
        front=0,
    )
    copy = lowbit.quantize(model, None, overrides=found.overrides, calibration=batches(2, seed=5))
    assert found.quality == _quality(model, copy, data)
    assert found.bytes <= 0.25 * found.float_bytes


def test_static_schemes():
    model, data, calibration = net(), batches(1), batches(2, seed=5)
    schemes = ["w8a8-static", "w4a8-static"]
    found = lowbit.search(
        model, data, "30%", schemes, allow_slower=True, calibration=calibration, rounds=0, front=0
    )
    copy = lowbit.quantize(model, None, overrides=found.overrides, calibration=calibration)
    assert found.quality == _quality(model, copy, data)
    assert found.bytes == weight_bytes(copy) <= 0.3 * found.float_bytes


def test_text():
    text = str(lowbit.search(net(), batches(1), "40%", SCHEMES, front=2))
    for word in ("Net: 40 % of the bytes of float", "w8a8", "found", "would be slower", "ms"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_no_search_is_refused():
    with pytest.raises(ValueError, match="a budget is a size"):
        lowbit.search(net(), batches(1), "small")
    with pytest.raises(ValueError, match="rounds and front are at least 0"):
        lowbit.search(net(), batches(1), "1MB", rounds=-1)


def test_a_layer_with_two_names():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
            self.b = self.a

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(4, 64)
    found = lowbit.search(model, x, "20%", SCHEMES, allow_slower=True, front=0)
    assert list(found.overrides) == ["a", "b", "c"]
    assert found.overrides["a"] == found.overrides["b"]
    copy = lowbit.quantize(model, None, overrides=found.overrides)
    assert weight_bytes(copy) == found.bytes <= 0.2 * found.float_bytes
