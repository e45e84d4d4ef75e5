"""The attribute `epilogue` of the layers: torch's own functions of the output, bit for bit."""

import copy
import io
import pickle

import expected
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit import _core
from lowbit.nn import Conv1d, Conv2d, Linear

FUNCTIONS = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish}
all_epilogues = pytest.mark.parametrize("epilogue", FUNCTIONS)

# Layers, and inputs of them that give outputs from below -3 to above 6.
LAYERS = {
    "linear": (lambda: nn.Linear(70, 83), (9, 70)),
    "linear, one row": (lambda: nn.Linear(70, 83), (1, 70)),
    "linear, many rows": (lambda: nn.Linear(33, 130), (2, 61, 33)),
    "conv1d": (lambda: nn.Conv1d(6, 19, 3, padding=1), (2, 6, 21)),
    "conv2d": (lambda: nn.Conv2d(6, 19, 3, padding=1), (2, 6, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(40, 70, 1), (2, 40, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(35, 35, 3, padding=1, groups=35), (2, 35, 9, 8)),
    "grouped finely": (lambda: nn.Conv2d(24, 24, 3, padding=1, groups=6), (2, 24, 9, 8)),
    "grouped": (lambda: nn.Conv2d(40, 80, 3, padding=1, groups=2), (2, 40, 9, 8)),
    "reflect": (lambda: nn.Conv2d(6, 19, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 8)),
}
all_layers = pytest.mark.parametrize("kind", LAYERS)


def make(kind, scheme="w8a8"):
    make_float, shape = LAYERS[kind]
    layer = make_float().eval()
    nn.init.normal_(layer.weight)
    classes = {nn.Linear: Linear, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d}
    quantized = classes[type(layer)].from_float(layer, scheme)
    return quantized, torch.randn(shape) * 2


def both(layer, epilogue, x):
    """What the layer returns with this epilogue, and torch's function of its output without."""
    layer.epilogue = "none"
    without = layer(x)
    assert without.min() < -3
    assert without.max() > 6
    layer.epilogue = epilogue
    return layer(x), FUNCTIONS[epilogue](without)


@all_epilogues
@all_layers
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_torchs_bits_on_every_isa(kind, epilogue, scheme, isa):
    layer, x = make(kind, scheme)
    y, want = both(layer, epilogue, x)
    assert expected.same_bits(y, want)


@all_epilogues
@pytest.mark.parametrize("scheme", expected.SCHEMES)
@pytest.mark.parametrize("kind", ["linear", "pointwise", "depthwise", "grouped finely"])
def test_every_scheme(kind, epilogue, scheme):
    layer, x = make(kind, scheme)
    y, want = both(layer, epilogue, x)
    assert expected.same_bits(y, want)


@all_epilogues
@pytest.mark.parametrize("kind", ["conv2d", "pointwise", "depthwise", "grouped finely", "grouped"])
def test_channels_last(kind, epilogue):
    layer, x = make(kind)
    x = x.to(memory_format=torch.channels_last)
    y, want = both(layer, epilogue, x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert expected.same_bits(y, want)


@all_epilogues
@pytest.mark.parametrize("kind", ["linear", "conv2d", "pointwise", "depthwise", "grouped finely"])
def test_nan_stays(kind, epilogue):
    layer, x = make(kind)
    x[0].view(-1)[3] = float("nan")
    layer.epilogue = epilogue
    y = layer(x)
    assert y[0].isnan().all()
    assert not y[1].isnan().any()


@pytest.mark.parametrize("isa", [i["name"] for i in _core.isas() if i["usable"]])
@all_epilogues
def test_special_values(epilogue, isa, use_isa):
    """A zero weight leaves the bias: every kind of float that an epilogue could trip over."""
    use_isa(isa)
    values = "0 -0 3 -3 6 -6 1e38 -1e38 1e-45 -1e-45 0.5 -0.5 inf -inf nan"
    near = "2.9999998 -2.9999998 6.0000005 5.9999995"
    bias = torch.tensor([float(v) for v in f"{values} {near}".split()])
    layer = Linear(4, len(bias))
    layer.bias = bias
    x = torch.ones(3, 4)
    plain = layer(x)
    assert expected.same_bits(plain.nan_to_num(7.5), bias.expand(3, -1).nan_to_num(7.5))
    layer.epilogue = epilogue
    y, want = layer(x), FUNCTIONS[epilogue](plain)
    assert torch.equal(y.isnan(), want.isnan())
    assert expected.same_bits(y.nan_to_num(7.5), want.nan_to_num(7.5))


@all_epilogues
def test_without_inputs(epilogue):
    layer = Linear.from_float(nn.Linear(0, 5), "w8a8")
    layer.bias = torch.tensor([-4.0, -1.0, 0.0, 1.0, 9.0])
    layer.epilogue = epilogue
    assert expected.same_bits(layer(torch.ones(1, 0))[0], FUNCTIONS[epilogue](layer.bias))


@all_epilogues
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype, epilogue):
    """Applied to the float32 outputs, which then get the input's dtype."""
    layer, x = make("conv2d")
    x = x.to(dtype)
    layer.epilogue = epilogue
    y = layer(x)
    layer.epilogue = "none"
    assert y.dtype == dtype
    assert expected.same_bits(y, FUNCTIONS[epilogue](layer(x.float())).to(dtype))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_a_change_is_noticed(kind):
    """By prepared calls, too: the second call of each is one where there are any."""
    layer, x = make(kind)
    plain = layer(x)
    for name in ("relu", "hardswish", "none", "relu6"):
        layer.epilogue = name
        want = FUNCTIONS.get(name, torch.clone)(plain)
        for _ in range(3):
            assert expected.same_bits(layer(x), want)
    layer.epilogue = "gelu"
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown epilogue 'gelu'; use one of: none, relu,"):
            layer(x)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_calls_are_prepared(kind):
    layer, x = make(kind)
    layer.epilogue = "relu"
    y = layer(x)
    if layer._direct is None:
        pytest.skip("this torch has no exchange table")
    assert expected.same_bits(layer._direct(x, layer.__dict__), y)
    layer.epilogue = "relu6"
    assert layer._direct(x, layer.__dict__) is None


@all_epilogues
@pytest.mark.parametrize("kind", ["linear", "conv1d", "depthwise", "reflect"])
def test_compile_and_export(kind, epilogue):
    layer, x = make(kind)
    layer.eval()
    layer.epilogue = epilogue
    y = layer(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert expected.same_bits(compiled(x), y)
    program = torch.export.export(layer, (x,))
    assert expected.same_bits(program.module()(x), y)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert expected.same_bits(torch.export.load(file).module()(x), y)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_opcheck(kind):
    layer, x = make(kind)
    operator = torch.ops.lowbit.linear if kind == "linear" else torch.ops.lowbit.conv2d
    args = [x, *layer.operator_tensors(), layer.scheme.weight, layer.scheme.activation]
    if kind == "linear":
        args += [layer.in_features, layer.out_features, 0]
    else:
        args += [layer.in_channels, layer.out_channels, 0, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1]
    torch.library.opcheck(operator.default, [*args, "hardswish"])
    y = operator(*args, epilogue="relu")
    assert expected.same_bits(y, operator(*args).relu())
    with pytest.raises(ValueError, match="unknown epilogue"):
        operator(*args, epilogue="tanh")


@all_epilogues
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_copies_have_it(kind, epilogue):
    layer, x = make(kind)
    layer.epilogue = epilogue
    y = layer(x)
    for same in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same.epilogue == epilogue
        assert expected.same_bits(same(x), y)


def test_pickles_of_before_have_none():
    layer, x = make("linear")
    y = layer(x)
    state = layer.__getstate__()
    del state["epilogue"]
    old = Linear.__new__(Linear)
    old.__setstate__(state)
    assert old.epilogue == "none"
    assert expected.same_bits(old(x), y)
    old.epilogue = "relu"
    assert expected.same_bits(old(x), y.relu())


@all_epilogues
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_dequantize_computes_it_too(kind, epilogue):
    layer, x = make(kind, "w8a16")
    layer.epilogue = epilogue
    back = layer.dequantize()
    assert [type(m).__name__.lower() for m in back] == [type(back[0]).__name__.lower(), epilogue]
    assert not back.training
    torch.testing.assert_close(back(x), layer(x), rtol=0.01, atol=0.01)


def test_shown():
    layer, _ = make("conv2d")
    assert "epilogue" not in repr(layer)
    layer.epilogue = "relu6"
    assert repr(layer).endswith(", epilogue=relu6)")


@pytest.mark.parametrize("index", [-1, len(_core.EPILOGUES)])
def test_the_extension_checks_the_index(index):
    layer, x = make("linear")
    layer(x)
    w, y = layer._checked, torch.empty(9, 83)
    with pytest.raises(ValueError, match="epilogue index"):
        _core.linear(x.data_ptr(), 9, y.data_ptr(), *w.operands, 1, index)
