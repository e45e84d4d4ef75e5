"""`compare`: which rows come out, where their figures come from, what is restored, what fails how.

Times come from a stand-in for `timing.alternate`, so that the speed-ups are known; two tests at the
end run the real thing, and assert nothing about its times.
"""

import copy
import json
import math

import pytest
import torch
from torch import nn

from lowbit import baselines, timing
from lowbit.compare import compare
from lowbit.quality import measure
from lowbit.timing import MemoryUse, Timing

SECONDS = {"float32": (8.0, 6.0, 8.0), "torch int8": (4.0, 2.0, 2.0), "close": (1.0, 1.0, 2.0)}


@pytest.fixture
def canned(monkeypatch):
    """Known times and memory, every side called once as the real functions would."""

    def alternate(sides, **_):
        for call in sides.values():
            call()
        return {name: Timing(9.0, SECONDS.get(name, (1.0, 1.0, 1.0))) for name in sides}

    monkeypatch.setattr(timing, "alternate", alternate)
    monkeypatch.setattr(timing, "memory_use", lambda call: MemoryUse(1_500_000, 200_000_000))


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(64, 96)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(96, 7)

    def forward(self, x, scale=1.0):
        return self.last(self.drop(self.first(x).relu())) * scale


def _close(model, amount=1e-3):
    """A candidate whose weights are a little off."""
    candidate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in candidate.parameters():
            parameter.mul_(1 + amount)
    return candidate


@pytest.fixture
def model():
    return _Net().eval()


def _x(rows=4, seed=0):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def test_rows_and_where_their_figures_come_from(canned, model):
    candidate, batches = _close(model), [_x(4), _x(2, seed=1)]
    found = compare(model, {"close": candidate}, batches, threads=1)
    assert [(row.name, row.kind) for row in found.rows] == [
        ("float32", "float"),
        ("torch int8", "torch"),
        ("close", "candidate"),
    ]
    assert (found.model, found.threads, found.batch_size, found.batches) == ("_Net", 1, 4, 2)
    row = found["close"]
    assert row.timing == Timing(9.0, SECONDS["close"])
    assert row.speedup.median == 6.0  # rounds: 8, 6, 4
    assert row.speedup_over_torch.median == 2.0  # rounds: 4, 2, 1
    assert row.samples_per_second == 4.0  # four samples, median one second
    assert row.weight_bytes == 4 * (64 * 96 + 96 + 96 * 7 + 7)
    assert row.file_bytes > row.weight_bytes
    assert (row.memory_growth_bytes, row.peak_memory_bytes) == (1_500_000, 200_000_000)
    with torch.no_grad():
        whole = torch.cat(batches)
        expected = measure(model(whole), candidate(whole))
    assert row.quality.rows == 6
    assert row.quality.sqnr_db == pytest.approx(expected.sqnr_db, abs=1e-3)
    assert row.quality.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-3)
    assert found["float32"].quality is None
    assert found["float32"].speedup.median == 1.0


def test_torch_int8_says_what_it_is_and_keeps_its_real_first_call(canned, model, monkeypatch):
    fake = baselines.Int8Baseline(_close(model), "dynamic", "x86", 0.25, {}, None)
    monkeypatch.setattr(baselines, "torch_int8", lambda *_: fake)
    row = compare(model, {"close": _close(model)}, _x())["torch int8"]
    assert row.notes == ("dynamic, x86",)
    assert row.timing == Timing(0.25, SECONDS["torch int8"])
    assert row.quality.sqnr_db > 0


def test_missing_torch_int8_gives_its_reason(canned, model, monkeypatch):
    fake = baselines.Int8Baseline(None, None, None, None, {}, "static x86: TraceError: loop")
    monkeypatch.setattr(baselines, "torch_int8", lambda *_: fake)
    found = compare(model, {"close": _close(model)}, _x())
    row = found["torch int8"]
    assert [r.name for r in found.rows] == ["float32", "torch int8", "close"]
    assert (row.timing, row.speedup, row.quality, row.weight_bytes) == (None, None, None, None)
    assert row.notes == ("static x86: TraceError: loop",)
    assert found["close"].speedup_over_torch is None
    assert "torch int8: static x86: TraceError: loop" in str(found)


def test_torch_int8_can_be_left_out(canned, model):
    found = compare(model, {"close": _close(model)}, _x(), torch_int8=False)
    assert [row.name for row in found.rows] == ["float32", "close"]
    with pytest.raises(KeyError, match="there are float32, close"):
        found["torch int8"]


def test_torch_int8_that_fails_on_a_later_batch_keeps_its_time(canned, model, monkeypatch):
    class OneShape(_Net):
        def forward(self, x, scale=1.0):
            if x.shape[0] != 4:
                raise ValueError("traced for four rows")
            return super().forward(x, scale)

    fake = baselines.Int8Baseline(OneShape().eval(), "static", "x86", 0.5, {}, None)
    monkeypatch.setattr(baselines, "torch_int8", lambda *_: fake)
    row = compare(model, {"close": _close(model)}, [_x(4), _x(3)])["torch int8"]
    assert row.quality is None
    assert row.timing is not None
    reason = "no quality, failed on batch 2: ValueError: traced for four rows"
    assert row.notes == ("static, x86", reason)


@pytest.mark.parametrize(
    ("inputs", "batch_size", "batches"),
    [
        (_x(3), 3, 1),
        ((_x(3), 2.0), 3, 1),
        ({"scale": 2.0, "x": _x(3)}, 3, 1),
        ([_x(5), _x(3)], 5, 2),
        ([(_x(5), 1.0), {"x": _x(3)}, [_x(2), 0.5]], 5, 3),
    ],
    ids=["tensor", "tuple", "dict", "list", "mixed list"],
)
def test_forms_of_input(canned, model, inputs, batch_size, batches):
    found = compare(model, {"close": _close(model)}, inputs, torch_int8=False)
    assert (found.batch_size, found.batches) == (batch_size, batches)


def test_a_generator_is_read_once_and_to_its_end(canned, model):
    seen = []

    def stream():
        for index in range(20):
            seen.append(index)
            yield _x(2, seed=index)

    found = compare(model, {"close": _close(model)}, stream(), torch_int8=False)
    assert seen == list(range(20))
    assert (found.batches, found["close"].quality.rows) == (20, 40)


def test_flags_threads_and_grad_mode_are_restored(canned, model):
    candidate = _close(model).train()
    candidate.last.eval()
    model.train()
    states = []
    for side in (model, candidate):
        side.drop.register_forward_hook(
            lambda module, *_: states.append((module.training, torch.is_inference_mode_enabled()))
        )
    before = torch.get_num_threads()
    found = compare(model, {"close": candidate}, _x(), threads=before + 1, torch_int8=False)
    assert found.threads == before + 1
    assert torch.get_num_threads() == before
    assert set(states) == {(False, True)}
    assert all(module.training for module in model.modules())
    assert candidate.training
    assert not candidate.last.training
    assert torch.is_grad_enabled()


def test_state_is_restored_after_a_failure(canned, model):
    before = torch.get_num_threads()
    model.train()
    with pytest.raises(RuntimeError, match="'broken' failed on the inputs: mat1 and mat2"):
        compare(model, {"broken": nn.Linear(3, 3)}, _x(), threads=before + 1, torch_int8=False)
    assert torch.get_num_threads() == before
    assert model.training


def test_a_candidate_with_other_outputs_is_named(canned, model):
    with pytest.raises(RuntimeError, match=r"'wide' failed on batch 1: outputs differ"):
        compare(model, {"wide": nn.Linear(64, 9)}, _x(), torch_int8=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": {}}, "`candidates` is empty"),
        ({"candidates": {"float32": nn.ReLU()}}, "'float32'"),
        ({"candidates": {"torch int8": nn.ReLU()}}, "'torch int8'"),
        ({"inputs": []}, "no batch"),
        ({"inputs": 3}, "is a int"),
        ({"threads": 0}, "at least 1"),
        ({"task": "regression"}, "unknown task"),
        ({"candidates": ["w8a8-static"]}, "'w8a8-static' learns from calibration data"),
        ({"calibration": "input"}, "pass batches, or 'inputs'"),
    ],
)
def test_bad_arguments(canned, model, change, message):
    arguments = {"candidates": {"close": _close(model)}, "inputs": _x()} | change
    with pytest.raises(ValueError, match=message):
        compare(model, **arguments)


def test_a_model_in_bfloat16_is_called_so(canned, model):
    half = copy.deepcopy(model).bfloat16()
    found = compare(half, {"close": _close(half, 0.1)}, _x().bfloat16(), torch_int8=False)
    assert [row.name for row in found.rows] == ["bfloat16", "close"]


def test_nan_shows_in_the_table_and_in_json(canned, model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.last.bias[2] = math.nan
    found = compare(model, {"broken": broken}, _x(5), torch_int8=False)
    assert math.isnan(found["broken"].quality.sqnr_db)
    assert "broken: 5 of 35 outputs are NaN or infinite." in str(found)
    quality = json.loads(found.to_json())["rows"][1]["quality"]
    assert (quality["sqnr_db"], quality["top1_agreement"]) == ("nan", 0.0)


def test_json_is_strict_and_complete(canned, model):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = compare(model, {"close": _close(model), "same": copy.deepcopy(model)}, _x())
    read = json.loads(found.to_json(), parse_constant=refuse)
    assert float(read["rows"][3]["quality"]["sqnr_db"]) == math.inf
    expected = found.to_dict()
    expected["rows"][3]["quality"]["sqnr_db"] = "inf"
    assert read == expected
    assert read["rows"][2]["timing"]["p50_seconds"] == 1.0
    assert set(read["rows"][0]) == set(read["rows"][2])


def test_table_has_every_row_units_and_a_readable_width(canned, model):
    text = str(compare(model, {"close": _close(model)}, _x(4), threads=1))
    lines = text.splitlines()
    assert lines[0].startswith("_Net, batch 4, 1 thread, ")
    assert max(map(len, lines)) <= 120
    for name in ("float32", "torch int8", "close"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 2  # speed; size and quality
    for unit in ("ms", "MB", "dB", "%", "nats", "per s"):
        assert unit in text
    speed = next(line for line in lines if line.startswith("close "))
    assert speed.split()[1:6] == ["9000.000", "1333.333", "577.350", "1000.000", "1900.000"]
    assert "6.00 (4.40-7.60)" in speed
    assert "2.00 (1.20-3.60)" in speed


def test_memory_that_cannot_be_measured_is_a_dash(canned, model, monkeypatch):
    monkeypatch.setattr(timing, "memory_use", lambda call: None)
    found = compare(model, {"close": _close(model)}, _x(), torch_int8=False)
    assert found["close"].memory_growth_bytes is None
    assert found["close"].peak_memory_bytes is None
    size = [line for line in str(found).splitlines() if line.startswith("close ")][1]
    assert size.split()[3] == "-"


def test_a_candidate_that_cannot_be_saved_says_so(canned, model):
    class Unsaved(_Net):
        def state_dict(self, *args, **kwargs):
            return super().state_dict(*args, **kwargs) | {"hook": lambda: None}

    row = compare(model, {"unsaved": Unsaved().eval()}, _x(), torch_int8=False)["unsaved"]
    assert row.file_bytes is None
    assert row.notes[0].startswith("not saved: ")


def test_progress_names_the_stages(canned, model):
    seen = []
    compare(model, {"close": _close(model)}, _x(), progress=lambda *step: seen.append(step))
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["converting", "torch int8", "quality, batch 1"]
    assert all(0.0 <= share <= 1.0 for _, share in seen)


def test_recipes_are_converted_and_saved_as_safetensors(model):
    found = compare(model, ["w8a8", "w4a8"], [_x(8), _x(3, seed=1)], budget_seconds=0)
    assert [row.name for row in found.rows] == ["float32", "torch int8", "w8a8", "w4a8"]
    w8, w4 = found["w8a8"], found["w4a8"]
    assert w8.quality.sqnr_db > w4.quality.sqnr_db > 0
    assert w4.weight_bytes < w8.weight_bytes < found["float32"].weight_bytes / 2
    assert w8.weight_bytes < w8.file_bytes < found["float32"].file_bytes / 2
    assert len(w8.timing.seconds) == len(found["float32"].timing.seconds) >= 5
    assert all(isinstance(module, nn.Linear) for module in (model.first, model.last))


def test_quantized_models_and_recipes_mix(model):
    from lowbit.convert import quantize

    candidates = {"mine": quantize(model, "w8a8"), "theirs": "w8a8"}
    found = compare(model, candidates, _x(), budget_seconds=0, torch_int8=False)
    assert found["mine"].quality == found["theirs"].quality
    assert found["mine"].weight_bytes == found["theirs"].weight_bytes


def test_calibration_data_are_for_all_that_learn(canned, model, monkeypatch):
    from lowbit.convert import quantize

    learned, x = [_x(16, seed=s) for s in (1, 2)], _x()
    seen = []
    original = baselines.torch_int8

    def torch_int8(model, batches, *, calibration=None, **options):
        seen.append(calibration)
        return original(model, batches, calibration=calibration, **options)

    monkeypatch.setattr(baselines, "torch_int8", torch_int8)
    found = compare(model, ["w8a8", "w8a8-static", "w4a8-static"], x, calibration=iter(learned))
    for recipe in ("w8a8-static", "w4a8-static"):
        expected = measure(model(x), quantize(model, recipe, calibration=learned)(x))
        assert found[recipe].quality.sqnr_db == pytest.approx(expected.sqnr_db)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], learned, strict=True))
    compare(model, ["w8a8"], x)
    assert seen[1] is None  # torch's learns from the inputs, then


def test_inputs_calibrate_if_they_are_said_to(canned, model):
    from lowbit.convert import quantize

    inputs = [_x(8), _x(3, seed=1)]
    found = compare(model, ["w8a8-static"], inputs, calibration="inputs", torch_int8=False)
    quantized = quantize(model, "w8a8-static", calibration=inputs)
    expected = measure(torch.cat([model(x) for x in inputs]),
                       torch.cat([quantized(x) for x in inputs]))  # fmt: skip
    assert found["w8a8-static"].quality.sqnr_db == pytest.approx(expected.sqnr_db)
