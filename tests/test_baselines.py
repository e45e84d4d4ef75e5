"""torch's INT8 as a baseline: what is converted, which engine wins, and what failure looks like."""

import io
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit import baselines
from lowbit.baselines import torch_int8, weight_bytes
from lowbit.quality import measure
from lowbit.timing import Timing

pytestmark = pytest.mark.skipif(not baselines.engines(), reason="torch has no quantized engine")


class _SamePadded(nn.Conv2d):
    """A convolution with a forward of its own, as TensorFlow ports have it."""

    def __init__(self, *args, pad, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d(pad)

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding)


class _ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.symmetric = _SamePadded(8, 8, 3, pad=1, bias=False)
        self.asymmetric = _SamePadded(8, 16, 3, pad=(0, 1, 0, 1), stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.asymmetric(self.symmetric(x)).relu()
        return self.head(x.mean((2, 3)))


class _Untraceable(nn.Module):
    """Control flow on values: FX gives up on it."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x) if x.sum() > 0 else self.layers(-x)


@pytest.fixture
def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval()


@pytest.fixture
def convs():
    torch.manual_seed(0)
    return _ConvNet().eval()


def _images(count=4):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + 0.1


def _run(model, x):
    with torch.inference_mode():
        return model(x)


def test_linear_models_are_quantized_dynamically(linears):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    found = torch_int8(linears, [x], budget_seconds=0)
    assert found.method == "dynamic"
    assert found.engine in baselines.engines()
    assert found.label == f"dynamic, {found.engine}"
    assert found.reason is None
    assert found.first_seconds > 0
    assert {f"dynamic {e}" for e in baselines.engines()} == found.attempts.keys()
    assert [type(m) for m in linears] == [nn.Linear, nn.ReLU, nn.Linear], "the model was changed"
    quality = measure(_run(linears, x), _run(found.model, x))
    assert 20 < quality.sqnr_db < 80, "int8 that is far off, or no int8 at all"


def test_convolutions_are_quantized_statically(convs):
    x = _images()
    expected = _run(convs, x)
    found = torch_int8(convs, [x, _images(2)], budget_seconds=0)
    assert (found.method, found.reason) == ("static", None)
    assert torch.equal(_run(convs, x), expected), "the model was changed"
    quality = measure(expected, _run(found.model, x))
    assert 15 < quality.sqnr_db < 60


def test_convolutions_with_their_own_forward_become_modules(convs):
    lifted = baselines._as_modules(convs)
    found = [m for m in lifted.modules() if isinstance(m, nn.Conv2d)]
    assert [type(m) for m in found] == [nn.Conv2d] * 3
    assert [m.padding for m in found] == [(1, 1), (1, 1), (0, 0)]
    # Only the asymmetric padding is left as a layer.
    assert [m.padding for m in lifted.modules() if isinstance(m, nn.ZeroPad2d)] == [(0, 1, 0, 1)]
    x = _images()
    torch.testing.assert_close(_run(lifted, x), _run(convs, x))


def test_named_inputs(linears):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linears

        def forward(self, *, x, scale):
            return self.inner(x) * scale

    batch = {"x": torch.randn(3, 64), "scale": torch.tensor(2.0)}
    found = torch_int8(Named().eval(), [batch], budget_seconds=0)
    assert baselines.run(found.model, batch).shape == (3, 10)


def test_the_fastest_engine_wins(linears, monkeypatch):
    if len(baselines.engines()) < 2:
        pytest.skip("one engine only")
    slow, quick = baselines.engines()
    seconds = {slow: 0.25, quick: 0.125}

    def alternate(sides, **_):
        return {name: Timing(seconds[name] * 2, (seconds[name],) * 3) for name in sides}

    monkeypatch.setattr(baselines.timing, "alternate", alternate)
    found = torch_int8(linears, [torch.randn(2, 64)])
    assert (found.engine, found.first_seconds) == (quick, 0.25)
    assert found.attempts == {f"dynamic {slow}": "250 ms", f"dynamic {quick}": "125 ms"}


def test_an_engine_that_fails_leaves_the_other(linears, monkeypatch):
    if len(baselines.engines()) < 2:
        pytest.skip("one engine only")
    broken, working = baselines.engines()
    convert = baselines._dynamic

    def fails_on_one(model, batches, engine):
        if engine == broken:
            raise RuntimeError("no such kernel\nand a long C++ backtrace")
        return convert(model, batches, engine)

    monkeypatch.setattr(baselines, "_dynamic", fails_on_one)
    found = torch_int8(linears, [torch.randn(2, 64)], budget_seconds=0)
    assert found.engine == working
    assert found.attempts[f"dynamic {broken}"] == "RuntimeError: no such kernel"


def test_untraceable_convolutions_fall_back_to_their_linear_layers():
    model = _Untraceable(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)).eval()
    found = torch_int8(model, [_images()], budget_seconds=0)
    assert found.method == "dynamic, Linear only"
    static = [text for name, text in found.attempts.items() if name.startswith("static")]
    assert len(static) == len(baselines.engines())
    assert all("control flow" in text for text in static)


def test_failure_gives_the_reason():
    found = torch_int8(_Untraceable(nn.Conv2d(3, 4, 3)).eval(), [_images()], budget_seconds=0)
    assert (found.model, found.engine, found.first_seconds) == (None, None, None)
    assert found.label == "not available"
    assert "control flow" in found.reason
    assert all(engine in found.reason for engine in baselines.engines())


def test_a_model_without_layers_to_convert():
    assert "no Linear" in torch_int8(nn.ReLU(), [torch.ones(2)]).reason


def test_subclasses_that_torch_passes_over_are_no_baseline():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    found = torch_int8(Scaled(8, 4).eval(), [torch.ones(2, 8)], budget_seconds=0)
    assert found.model is None
    assert "converted none of the layers" in found.reason


def test_a_torch_without_these_interfaces(linears, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
    found = torch_int8(linears, [torch.ones(2, 64)])
    assert found.model is None
    assert "torch.ao.quantization" in found.reason


def test_engine_and_warnings_are_left_alone(linears, convs, recwarn):
    before = torch.backends.quantized.engine
    torch_int8(linears, [torch.ones(2, 64)], budget_seconds=0)
    torch_int8(convs, [_images()], budget_seconds=0)
    torch_int8(_Untraceable(nn.Conv2d(3, 4, 3)).eval(), [_images()], budget_seconds=0)
    assert torch.backends.quantized.engine == before
    assert [str(w.message) for w in recwarn] == []


def test_batches_are_needed(linears):
    with pytest.raises(ValueError, match="at least one batch"):
        torch_int8(linears, [])


def test_weight_bytes_counts_shared_storage_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.BatchNorm1d(8))
    # two biases; the norm's weight, bias, mean and variance, and its int64 counter
    assert weight_bytes(model) == 4 * (64 + 2 * 8 + 4 * 8) + 8
    model.register_buffer("scratch", torch.zeros(5, dtype=torch.float16), persistent=False)
    assert weight_bytes(model) == 4 * (64 + 2 * 8 + 4 * 8) + 8 + 10


def test_weight_bytes_sees_packed_weights(linears, convs):
    dynamic = torch_int8(linears, [torch.ones(2, 64)], budget_seconds=0).model
    codes = 64 * 48 + 48 * 10
    assert codes < weight_bytes(dynamic) < codes + 1000 < weight_bytes(linears) / 3
    static = torch_int8(convs, [_images()], budget_seconds=0).model
    codes = 8 * 27 + 8 * 72 + 16 * 72 + 160
    assert codes < weight_bytes(static) < codes + 2000
    saved = io.BytesIO()
    torch.save(static.state_dict(), saved)
    assert saved.tell() > weight_bytes(static)
