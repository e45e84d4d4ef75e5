"""Layers of static schemes: the oracle's bits, their parameters, and what programs do to layers."""

import copy
import io
import pickle

import expected
import pytest
import torch
from torch import nn

import lowbit
from lowbit import direct
from lowbit import nn as lnn
from lowbit.nn import Conv1d, Conv2d, ConvTranspose2d, Linear

RECIPES = (
    "w8a8-static",
    "w4a8-g32-static",
    "w2a8-static",
    "wta8-static",
    "w1a8-static",
    "w1a1-static",
    "w8a16-static",
    "w4a16-g32-static",
)
KINDS = {
    "linear": (Linear, lambda: nn.Linear(75, 37), (3, 75), expected.linear),
    "conv": (Conv2d, lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 7, 8), expected.conv2d),
    "wide": (Conv2d, lambda: nn.Conv2d(40, 9, 3, padding=2), (2, 40, 5, 6), expected.conv2d),
    "fine": (
        Conv2d,
        lambda: nn.Conv2d(32, 32, 3, padding=1, groups=8),
        (2, 32, 6, 6),
        expected.conv2d,
    ),
    "depthwise": (
        Conv2d,
        lambda: nn.Conv2d(20, 20, 3, 2, padding=1, groups=20),
        (2, 20, 7, 8),
        expected.conv2d,
    ),
    "padded": (
        Conv2d,
        lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"),
        (2, 6, 7, 8),
        expected.conv2d,
    ),
    "signal": (Conv1d, lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9), expected.conv1d),
    "transposed": (
        ConvTranspose2d,
        lambda: nn.ConvTranspose2d(6, 10, 3, stride=2, padding=1, output_padding=1),
        (2, 6, 5, 4),
        expected.conv_transpose2d,
    ),
    "transposed, wide": (
        ConvTranspose2d,
        lambda: nn.ConvTranspose2d(40, 10, 4, stride=2, padding=1),
        (2, 40, 4, 3),
        expected.conv_transpose2d,
    ),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)
all_recipes = pytest.mark.parametrize("recipe", RECIPES)
some_recipes = pytest.mark.parametrize("recipe", ["w8a8-static", "w4a8-g32-static", "w1a1-static"])


def uncalibrated(kind="linear", recipe="w8a8-static"):
    build, make_float, shape, _ = KINDS[kind]
    return build.from_float(make_float().eval(), recipe), torch.randn(shape)


def parameters_of(recipe):
    activation = lowbit.Scheme.parse(recipe).activation
    return {"int8": (0.03, -37), "int16": (0.0002, 0), "binary": (0.8, 0)}[activation]


def make(kind="linear", recipe="w8a8-static"):
    layer, x = uncalibrated(kind, recipe)
    layer.set_activation(*parameters_of(recipe))
    return layer, x


def oracle_of(kind, layer, x):
    return KINDS[kind][3](layer, x)


# --- values --------------------------------------------------------------------------------------


@all_kinds
@all_recipes
def test_the_oracles_bits(kind, recipe, isa):
    layer, x = make(kind, recipe)
    for given in (x, x * 100, torch.zeros_like(x), x[:0]):
        want = oracle_of(kind, layer, given) if len(given) else layer(given)
        assert expected.same_bits(layer(given), want)
        assert expected.same_bits(layer(given), want)  # by the prepared call, where there is one
    if x.dim() == 4:
        y = layer(x.to(memory_format=torch.channels_last))
        assert expected.same_bits(y.contiguous(), oracle_of(kind, layer, x))


@all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(kind, dtype):
    layer, x = make(kind)
    assert expected.same_bits(layer(x.to(dtype)), oracle_of(kind, layer, x.to(dtype)))


@all_kinds
def test_close_to_float(kind):
    build, make_float, shape, _ = KINDS[kind]
    layer = make_float().eval()
    x = torch.rand(shape) * 6 - 1  # its range is not symmetric
    quantized = build.from_float(layer, "w8a8-static")
    quantized.set_activation(6 / 255, -128 + round(255 / 6))
    with torch.no_grad():
        want = layer(x)
    assert (quantized(x) - want).norm() < 0.02 * want.norm()


@all_kinds
@some_recipes
def test_images_do_not_see_each_other(kind, recipe):
    layer, x = make(kind, recipe)
    whole = layer(x)
    for i in range(len(x)):
        assert expected.same_bits(layer(x[i : i + 1]), whole[i : i + 1])
    bad = x.clone()
    bad[0].view(-1)[-1] = torch.inf
    y = layer(bad)
    assert y[0].isnan().all()
    assert expected.same_bits(y[1:], whole[1:])


def test_outputs_that_read_no_input():
    layer = ConvTranspose2d.from_float(nn.ConvTranspose2d(4, 3, 1, stride=2).eval(), "w8a8-static")
    layer.set_activation(0.03, 100)
    y = layer(torch.randn(1, 4, 3, 3))
    assert torch.equal(y[0, :, 1, 1], layer.bias)


@pytest.mark.parametrize("epilogue", ["relu", "relu6", "hardswish"])
@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
def test_epilogue(kind, epilogue):
    layer, x = make(kind)
    y = layer(x)
    layer.epilogue = epilogue
    function = getattr(nn.functional, epilogue)
    assert expected.same_bits(layer(x), function(y))


# --- parameters ----------------------------------------------------------------------------------


@all_kinds
def test_a_fresh_layer_says_that_it_is_not_calibrated(kind):
    layer, x = uncalibrated(kind)
    assert "a=int8 static (not calibrated)" in repr(layer)
    assert float(layer.activation_scale) == int(layer.activation_zero) == 0
    message = rf"lowbit\.nn\.{type(layer).__name__}\(.*not calibrated.*calibration=.*set_activation"
    with pytest.raises(RuntimeError, match=message):
        layer(x)
    with pytest.raises(RuntimeError, match=message), torch.device("cpu"):
        layer(x)  # through the dispatcher
    with pytest.raises(RuntimeError, match=r"not calibrated"):
        torch.export.export(layer, (x,), strict=False).module()(x)


@all_kinds
def test_set_activation(kind):
    layer, x = make(kind)
    y = layer(x)
    assert "a=int8 static (scale=0.03, zero=-37)" in repr(layer)
    for scale, zero in ((0.02, -37), (0.02, 11), (0.02, 0), (0.03, -128)):
        layer.set_activation(scale, zero)
        assert layer.activation_scale.dtype == torch.float32
        assert layer.activation_zero.dtype == torch.int32
        assert float(layer.activation_scale) == float(torch.tensor(scale))
        assert int(layer.activation_zero) == zero
        assert expected.same_bits(layer(x), oracle_of(kind, layer, x))
    layer.set_activation(0.03, -37)
    assert expected.same_bits(layer(x), y)


@pytest.mark.parametrize(
    ("recipe", "scale", "zero", "message"),
    [
        ("w8a8-static", 0.0, 0, "activation_scale 0.0 must be a positive number"),
        ("w8a8-static", -1.0, 0, "activation_scale -1.0 must be a positive number"),
        ("w8a8-static", float("nan"), 0, "activation_scale nan"),
        ("w8a8-static", float("inf"), 0, "activation_scale inf"),
        ("w8a8-static", 1e-39, 0, "float32 can divide by"),
        ("w8a8-static", 1e39, 0, "activation_scale inf"),
        ("w8a8-static", 1.0, 128, r"activation_zero 128 must be in -128\.\.127"),
        ("w8a8-static", 1.0, -129, r"activation_zero -129 must be in -128\.\.127"),
        ("w8a8-static", 1.0, 0.5, "activation_zero 0.5 must be an integer"),
        ("w8a8-static", 1.0, True, "activation_zero True must be an integer"),
        ("w8a16-static", 1.0, 1, "int16 activations have no zero point"),
        ("w1a1-static", 1.0, -1, "binary activations have no zero point"),
        ("w8a8", 1.0, 0, "its scheme w8a8 quantizes activations as they come"),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_bad_parameters(kind, recipe, scale, zero, message):
    layer, _ = uncalibrated(kind, recipe)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(ValueError, match=rf"lowbit\.nn\..*{message}"):
        layer.set_activation(scale, zero)
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())


def change_weights(layer):
    layer.weight_packed.copy_(layer.weight_packed.flip(0))


def change_scale(layer):
    layer.weight_scale.mul_(2)


def change_bias(layer):
    layer.bias.add_(1)


def change_activation_scale(layer):
    layer.activation_scale.mul_(2)


def change_activation_zero(layer):
    layer.activation_zero.fill_(5)


def replace_weights(layer):
    layer.weight_packed = layer.weight_packed.flip(0).contiguous()


CHANGES = (
    change_weights,
    change_scale,
    change_bias,
    change_activation_scale,
    change_activation_zero,
    replace_weights,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "signal", "padded"])
def test_changes_in_place_are_noticed(kind, prepared, change, monkeypatch):
    """What is made of the weights and the zero point is made anew."""
    monkeypatch.setattr(direct, "_bound", direct._bound and prepared)
    oracle = KINDS[kind][3]
    layer, x = make(kind)
    layer(x), layer(x)
    change(layer)
    assert expected.same_bits(layer(x), oracle(layer, x))
    assert expected.same_bits(layer(x), oracle(layer, x))


def test_loading_is_noticed_where_torch_counts_no_writes():
    first, x = make("linear")
    state = make("linear")[0].state_dict()
    with torch.inference_mode():
        layer = copy.deepcopy(first)
        assert layer.weight_packed.is_inference()
        layer(x)
        layer.load_state_dict(state)
        assert expected.same_bits(layer(x), expected.linear(layer, x))
    assert not expected.same_bits(layer(x), first(x))


def test_what_a_layer_reads_is_prepared():
    if not direct._bound:
        pytest.skip("this torch has no exchange table")
    for kind in ("linear", "conv"):
        layer, x = make(kind)
        y = layer(x)
        assert expected.same_bits(layer._direct(x, layer.__dict__), y)


# --- state ---------------------------------------------------------------------------------------


@all_kinds
@some_recipes
def test_state_dict(kind, recipe):
    layer, x = make(kind, recipe)
    state = layer.state_dict()
    scales = [value for key, value in state.items() if key.endswith("activation_scale")]
    zeros = [value for key, value in state.items() if key.endswith("activation_zero")]
    assert len(scales) == len(zeros) == len(getattr(layer, "parts", [0]))
    assert all(s.dtype == torch.float32 and s.shape == () for s in scales)
    assert all(z.dtype == torch.int32 and z.shape == () for z in zeros)
    want = layer(x)
    for assign in (False, True):
        other, _ = uncalibrated(kind, recipe)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert expected.same_bits(other(x), want)
    other, _ = make(kind, recipe)
    other(x)
    other.load_state_dict(state)  # into operands that were checked, and a bias that was made
    assert expected.same_bits(other(x), want)


@all_kinds
def test_copies(kind):
    layer, x = make(kind)
    want = layer(x)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    loaded, _ = uncalibrated(kind)
    loaded.load_state_dict(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert expected.same_bits(other(x), want)
    half = copy.deepcopy(layer).half()
    assert half.state_dict().keys() == layer.state_dict().keys()
    assert expected.same_bits(half(x), want)
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    assert expected.same_bits(moved(x), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("activation_scale"), "activation_scale missing"),
        (lambda s: s.pop("activation_zero"), "activation_zero missing"),
        (lambda s: s.update(activation_scale=torch.ones(1)), r"activation_scale must be .*\[\]"),
        (lambda s: s.update(activation_scale=torch.tensor(1.0).double()), "float64"),
        (lambda s: s.update(activation_zero=torch.tensor(1)), "activation_zero must be .*int32"),
        (lambda s: s.update(activation_scale=torch.tensor(-1.0)), "activation_scale -1.0"),
        (lambda s: s.update(activation_scale=torch.tensor(torch.nan)), "activation_scale nan"),
        (
            lambda s: s.update(activation_zero=torch.tensor(128, dtype=torch.int32)),
            "activation_zero 128",
        ),
        (lambda s: s.update(activation_scale=torch.tensor(0.0)), "activation_scale 0.0"),
    ],
)
def test_damaged_state_dicts(change, message):
    layer, x = make("conv")
    want, state = layer(x), dict(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=rf"lowbit\.nn\.Conv2d.*{message}"):
        layer.load_state_dict(state)
    assert expected.same_bits(layer(x), want)


def test_static_and_dynamic_state_dicts_are_told_apart():
    static, _ = make()
    dynamic, _ = uncalibrated(recipe="w8a8")
    with pytest.raises(RuntimeError, match="build the layer with a static scheme"):
        dynamic.load_state_dict(static.state_dict())
    with pytest.raises(RuntimeError, match="activation_scale, activation_zero missing"):
        static.load_state_dict(dynamic.state_dict())


def test_parts_of_one_layer_have_one_scale():
    layer, _ = make("transposed")
    state = layer.state_dict()
    state["parts.1.activation_zero"] = torch.tensor(3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="the parts differ in activation_zero"):
        layer.load_state_dict(state)


def test_an_uncalibrated_state_dict_loads():
    layer, x = make()
    layer.load_state_dict(uncalibrated()[0].state_dict())
    with pytest.raises(RuntimeError, match="not calibrated"):
        layer(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.up(self.stem(x).relu()).mean((2, 3)))


def static_net(model):
    """A converted copy whose layers are calibrated, without any data."""
    model = copy.deepcopy(model)
    for name in ("stem", "up", "head"):
        module = getattr(model, name)
        layer = getattr(lnn, type(module).__name__).from_float(module, "w8a8-static")
        layer.set_activation(0.05, -20)
        setattr(model, name, layer)
    return model


def test_files(tmp_path):
    model = Net().eval()
    static, x = static_net(model), torch.randn(2, 3, 9, 9)
    lowbit.save_file(static, tmp_path / "net.safetensors")
    loaded = lowbit.load_file(Net().eval(), tmp_path / "net.safetensors")
    assert loaded.stem.scheme.name == "w8a8-static"
    assert expected.same_bits(loaded(x), static(x))
    again = lowbit.load_file(loaded, tmp_path / "net.safetensors")
    assert expected.same_bits(again(x), static(x))
    assert "w8a8-static" in str(lowbit.summary(loaded))


def test_dynamic_and_static_files_are_told_apart(tmp_path):
    static = static_net(Net().eval())
    lowbit.save_file(static, tmp_path / "net.safetensors")
    dynamic = lowbit.quantize(Net().eval(), "w8a8")
    with pytest.raises(lowbit.FileFormatError, match=r"'stem' is w8a8-static, but w8a8"):
        lowbit.load_file(dynamic, tmp_path / "net.safetensors")


# --- programs ------------------------------------------------------------------------------------


@all_kinds
@some_recipes
def test_operators_and_programs(kind, recipe):
    layer, x = make(kind, recipe)
    want = layer(x)
    with torch.device("cpu"):  # a mode: through the dispatcher
        assert expected.same_bits(layer(x), want)
    exported = torch.export.export(layer, (x,), strict=False)
    assert expected.same_bits(exported.module()(x), want)
    names = [str(node.target) for node in exported.graph.nodes if "lowbit" in str(node.target)]
    assert names


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_compile(kind):
    layer, x = make(kind)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert expected.same_bits(compiled(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_vmap(kind):
    layer, x = make(kind)
    many = torch.stack([x, x * 2])
    want = torch.stack([layer(x), layer(x * 2)])
    assert expected.same_bits(torch.func.vmap(layer)(many), want)


def test_dequantize():
    for kind in KINDS:
        layer, _ = make(kind)
        float_layer = layer.dequantize()
        assert type(float_layer) is type(KINDS[kind][1]())
        assert torch.equal(float_layer.weight, layer.weight)


def test_operators_check_their_parameters():
    layer, x = make()
    sizes = ("int8", "int8", 75, 37, 0, "none")
    call = torch.ops.lowbit.linear
    tensors = layer.operator_tensors()
    scale, zero = layer.activation_scale, layer.activation_zero
    assert expected.same_bits(call(x, *tensors, *sizes, scale, zero), layer(x))
    dynamic = copy.deepcopy(layer)
    dynamic.scheme = lowbit.Scheme.parse("w8a8")
    assert expected.same_bits(call(x, *tensors, *sizes), expected.linear(dynamic, x))
    for given, message in (
        ((scale, None), "activation_scale and activation_zero go together"),
        ((None, zero), "activation_scale and activation_zero go together"),
        ((scale.double(), zero), "activation_scale must be a torch.float32 tensor"),
        ((scale[None], zero), r"activation_scale must be .*\[\]"),
        ((scale, zero.long()), "activation_zero must be a torch.int32 tensor"),
        ((-scale, zero), "activation_scale -0.0"),
        ((scale, zero + 200), "activation_zero 163 must be in"),
    ):
        with pytest.raises(ValueError, match=rf"lowbit::linear: {message}"):
            call(x, *tensors, *sizes, *given)
    with pytest.raises(RuntimeError, match="not calibrated"):
        call(x, *tensors, *sizes, torch.tensor(0.0), zero)
