"""Which layers convert, which do not and why, and what converts in a way of its own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import Net, assert_same_state, relative_error, row, schemes, state
from torch import nn
from torch.nn.utils import parametrizations, prune

import lowbit
from lowbit import rules
from lowbit.convert import register_converter
from lowbit.rules import PaddedConv2d

# --- What is not converted, and why --------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class PaddedForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 0, 1, 0)), weight, bias)


def with_replaced_forward():
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: x
    return layer


def with_state_dict_hook():
    layer = nn.Linear(32, 32)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


def with_extra_parameter():
    layer = nn.Linear(32, 32)
    layer.scale = nn.Parameter(torch.ones(1))
    return layer


KEPT = {
    "overridden forward": (lambda: Doubled(32, 32), "Doubled overrides the forward"),
    "overridden conv": (lambda: PaddedForward(8, 8, 3), "register_converter(PaddedForward"),
    "instance forward": (with_replaced_forward, "forward was replaced on the instance"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
        "remove_parametrizations",
    ),
    "weight hook": (
        lambda: prune.random_unstructured(nn.Linear(32, 32), "weight", 0.5),
        "computed by a hook",
    ),
    "state_dict hook": (with_state_dict_hook, "state_dict hooks"),
    "extra parameter": (with_extra_parameter, "beside weight and bias: scale"),
    "lazy": (lambda: nn.LazyLinear(8), "lazy"),
    "lazy conv": (lambda: nn.LazyConv2d(8, 3), "lazy"),
    "meta": (lambda: nn.Linear(32, 32, device="meta"), "device 'meta'"),
    "float8": (lambda: nn.Linear(32, 32).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "complex": (lambda: nn.Linear(32, 32, dtype=torch.complex64), "torch.complex64"),
    "empty": (lambda: nn.Linear(0, 32), "no elements"),
    "embedding": (lambda: nn.Embedding(8, 8), "nn.Embedding is not supported yet"),
    "conv3d": (lambda: nn.Conv3d(8, 8, 3), "nn.Conv3d is not supported yet"),
    "transposed": (lambda: nn.ConvTranspose1d(8, 8, 3), "nn.ConvTranspose1d is not supported"),
    "lstm": (lambda: nn.LSTM(8, 8), "nn.LSTM is not supported yet"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("make", "reason"), KEPT.values(), ids=[k.replace(" ", "-") for k in KEPT])
def test_kept_layers_say_why(make, reason):
    model = nn.Sequential(make(), nn.Linear(32, 32))
    kept = model[0]
    report = lowbit.quantize_(model, "w4a8")
    assert model[0] is kept
    assert [r.name for r in report.converted] == ["1"]
    (only,) = report.kept
    assert only.name == "0"
    assert reason in only.note


def test_modules_without_weights_have_no_rows():
    model = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8), nn.ReLU(), nn.GroupNorm(2, 8))
    report = lowbit.quantize_(model, "w4a8")
    assert [r.name for r in report.rows] == ["0"]
    assert report.other_bytes == 4 * (8 + 8 + 8 + 8)


def test_layers_inside_a_kept_layer_convert():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(32, 32)
            self.down, self.up = nn.Linear(32, 4), nn.Linear(4, 32)

        def forward(self, x):
            return super().forward(x) + self.up(self.down(x))

    report = lowbit.quantize_(nn.Sequential(Adapted()), "w8a8")
    assert [r.name for r in report.kept] == ["0"]
    assert [r.name for r in report.converted] == ["0.down", "0.up"]
    assert report.kept[0].bytes_after == 4 * (32 * 32 + 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_with_nan_are_errors_that_name_the_layer(bad):
    model = Net()
    with torch.no_grad():
        model.blocks[2].weight[3, 0, 1, 1] = bad
    before = state(model)
    for convert in (lowbit.quantize, lowbit.quantize_):
        with pytest.raises(ValueError, match=r"layer 'blocks\.2': 1 of the 72 weights"):
            convert(model, "w4a8")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    lowbit.quantize_(model, "w4a8", overrides={"blocks.2": None})


def test_biases_with_nan_are_errors_too():
    model = Net()
    with torch.no_grad():
        model.fc.bias[:2] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'fc': 2 of the \d+ biases are NaN"):
        lowbit.quantize(model, "w4a8")


# --- Modules that are special in torch -----------------------------------------------------------


def test_traced_graphs_convert():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 32)
    expected = lowbit.quantize(model, "w8a8")(x)
    assert torch.equal(lowbit.quantize(graph, "w8a8")(x), expected)
    assert type(graph.get_submodule("0")) is nn.Linear
    lowbit.quantize_(graph, "w8a8")
    assert torch.equal(graph(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_stay_float():
    part = torch.jit.trace(nn.Linear(32, 32), torch.zeros(1, 32))
    model = nn.Sequential(part, nn.Linear(32, 32)).eval()
    report = lowbit.quantize_(model, "w8a8")
    assert [(r.name, r.converted) for r in report.rows] == [("0", False), ("1", True)]
    assert model(torch.zeros(1, 32)).shape == (1, 32)


def test_a_module_that_copies_itself_cannot_lose_layers_silently():
    class Itself(nn.Sequential):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(Itself(nn.Linear(32, 32)))
    with pytest.raises(ValueError, match=r"layer '0\.0' did not get into the copy"):
        lowbit.quantize(model, "w4a8")
    lowbit.quantize_(model, "w4a8")
    assert isinstance(model[0][0], lowbit.nn.Linear)


# --- Registered converters -----------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """Converters that a test registers are forgotten after it."""
    monkeypatch.setattr(rules, "_registered", dict(rules._registered))


def test_a_registered_converter_serves_its_class_and_subclasses(registry):
    class Doubles(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return 2 * self.linear(x)

    class StillDoubled(Doubled):
        pass

    class Tripled(Doubled):
        def forward(self, x):
            return 1.5 * super().forward(x)

    def convert(module, scheme):
        return Doubles(lowbit.nn.Linear.from_float(module, scheme))

    register_converter(Doubled, convert)
    model = nn.Sequential(Doubled(32, 32), StillDoubled(32, 32), Tripled(32, 32))
    quantized = lowbit.quantize(model, "w8a8")
    assert [type(m).__name__ for m in quantized] == ["Doubles", "Doubles", "Tripled"]
    assert quantized[0].linear._fqn == "0"
    x = torch.randn(4, 32)
    assert relative_error(quantized(x), model(x)) < 0.05
    first = row(quantized, "0")
    assert (first.kind, first.scheme, first.converted) == ("Doubled", "w8a8", True)
    assert first.bytes_after == quantized[0].linear.packed_bytes
    assert "Tripled overrides" in row(quantized, "2").note


def test_a_converter_may_serve_any_class_and_may_decline(registry):
    def convert(module, scheme):
        if module.in_channels == 1:
            return module
        linear = nn.Linear(module.in_channels, module.out_channels)
        return lowbit.nn.Linear.from_float(linear, scheme)

    register_converter(nn.Conv1d, convert)
    model = nn.Sequential(nn.Conv1d(32, 8, 1), nn.Conv1d(1, 8, 1))
    before = state(model)
    quantized = lowbit.quantize(model, "w8a8", overrides={"0": "w4a8"})
    assert schemes(quantized) == {"0": "w4a8", "1": "float32"}
    assert "returned it unchanged" in row(quantized, "1").note
    assert_same_state(model, before)
    assert quantized[1] is not model[1]
    assert not any("lowbit" in key for key in vars(model[1]))
    lowbit.quantize_(model, "w8a8")
    assert "returned it unchanged" in row(model, "1").note


def test_errors_of_converters_name_the_layer(registry):
    def fail(module, scheme):
        raise ValueError("cannot")

    register_converter(Doubled, fail)
    with pytest.raises(ValueError, match=r"layer '0' \(w4a8\): cannot"):
        lowbit.quantize(nn.Sequential(Doubled(32, 32)), "w4a8")
    register_converter(Doubled, lambda module, scheme: None)
    with pytest.raises(TypeError, match=r"layer '0'.*NoneType"):
        lowbit.quantize(nn.Sequential(Doubled(32, 32)), "w4a8")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        register_converter(int, fail)
    with pytest.raises(TypeError, match="function"):
        register_converter(Doubled, "fail")


# --- Convolutions that pad in their own forward --------------------------------------------------


def padded_conv(*args, image_size, **options):
    utilities = pytest.importorskip("efficientnet_lite_pytorch.utils")
    return utilities.Conv2dStaticSamePadding(*args, image_size=image_size, **options)


@pytest.mark.parametrize("image_size", [(16, 16), (15, 15), (17, 14), (224, 224)], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2), (2, 1), (1, 2)])
def test_static_same_padding_is_kept_exactly(kernel, stride, image_size):
    original = padded_conv(6, 8, kernel, stride=stride, image_size=image_size, groups=2)
    layer = lowbit.quantize(original, "w8a8")
    pads = getattr(original.static_padding, "padding", (0, 0, 0, 0))
    symmetric = pads[0] == pads[1] and pads[2] == pads[3]
    assert isinstance(layer, lowbit.nn.Conv2d if symmetric else PaddedConv2d)

    dequantized = layer.dequantize()
    inner = dequantized if symmetric else dequantized[1]
    assert getattr(layer, "static_padding", pads) == pads
    original.weight.data.copy_(inner.weight)
    for size in [(16, 16), (15, 17), (9, 22)]:
        x = torch.randn(2, 6, *size)
        # In float64: how torch sums a float32 convolution depends on its threads.
        exact = [copy.deepcopy(module).double()(x.double()) for module in (dequantized, original)]
        torch.testing.assert_close(*exact, rtol=1e-12, atol=1e-12)
        assert layer(x).shape == original(x).shape
        assert relative_error(layer(x), original(x)) < 0.05
    x = torch.randn(6, 9, 9)  # unbatched
    assert torch.equal(layer(x), layer(x[None])[0])
    x = torch.randn(2, 6, 9, 9).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w1a1"])
def test_static_padding_is_padding_of_the_convolution(scheme):
    original = padded_conv(40, 8, 2, image_size=16)  # one column to the right, one row below
    layer = lowbit.quantize(original, scheme)
    assert layer.static_padding == (0, 1, 0, 1)
    around = nn.Conv2d(40, 8, 2, padding=1)
    around.load_state_dict(original.state_dict())
    x = torch.randn(2, 40, 9, 7)
    expected = lowbit.quantize(around, scheme)(x)[:, :, 1:, 1:]
    assert torch.equal(layer(x), expected)
    assert "static_padding=(0, 1, 0, 1)" in repr(layer)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(copied(x), expected)


def test_whole_converted_layers_load_with_weights_only():
    layer = lowbit.quantize(padded_conv(4, 8, 3, stride=2, image_size=16), "w4a8")
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    with torch.serialization.safe_globals(lowbit.nn.SAFE_GLOBALS):
        loaded = torch.load(stream, weights_only=True)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(loaded(x), layer(x))
    assert lowbit.summary(loaded) == lowbit.summary(layer)


def test_a_class_of_that_name_with_another_padding_is_reported():
    class Conv2dStaticSamePadding(nn.Conv2d):
        def __init__(self):
            super().__init__(4, 4, 3)
            self.static_padding = nn.ReflectionPad2d(1)

        def forward(self, x):
            return super().forward(self.static_padding(x))

    model = nn.Sequential(Conv2dStaticSamePadding(), nn.Conv2d(4, 4, 3))
    report = lowbit.quantize_(model, "w8a8")
    assert "overrides the forward" in report.kept[0].note


def test_efficientnet_lite_converts_in_full():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0").eval()
    quantized = lowbit.quantize(model, "w8a16")
    report = lowbit.summary(quantized)
    assert not report.kept
    assert len(report.converted) == 49 + 1  # convolutions and the classifier
    assert {r.kind for r in report.converted} == {"Conv2dStaticSamePadding", "Linear"}
    assert report.bytes_before == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert report.bytes_after == sum(t.nbytes for t in quantized.state_dict().values())
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert relative_error(quantized(x), model(x)) < 0.1
