"""Bad input gets an exception that names the layer, the value and the remedy."""

import contextlib
import copy

import expected
import pytest
import torch
from torch import nn

from lowbit.nn import Conv2d, Linear


def layers():
    linear = Linear.from_float(nn.Linear(75, 37).eval(), "w4a8-g32")
    conv = Conv2d.from_float(nn.Conv2d(6, 10, 3).eval(), "w4a8-g32")
    return {"linear": (linear, torch.randn(3, 75)), "conv": (conv, torch.randn(2, 6, 7, 8))}


@pytest.fixture(params=["linear", "conv"])
def layer_and_input(request):
    return layers()[request.param]


@pytest.fixture(params=["direct", "dispatched", "exported"])
def run(request):
    """Calls a layer without the dispatcher, through it, or with fake tensors for an export."""
    if request.param == "direct":
        return lambda layer, x: layer(x)
    if request.param == "dispatched":

        def call(layer, x):
            with torch.device("cpu"):
                return layer(x)

        return call

    return lambda layer, x: torch.export.export(layer, (x,), strict=False).module()(x)


WRONG_LINEAR = {
    "short": lambda x: x[:, :-1],
    "long": lambda x: torch.cat([x, x], 1),
    "transposed": lambda x: x.t(),
    "scalar": lambda x: x[0, 0],
    "empty row": lambda x: x[:, :0],
    "no rows, wrong features": lambda x: x[:0, :3],
}
WRONG_CONV = {
    "channels": lambda x: x[:, :-1],
    "channels last by mistake": lambda x: x.permute(0, 2, 3, 1),
    "two dimensions": lambda x: x[0, 0],
    "five dimensions": lambda x: x[None],
    "unbatched channels": lambda x: x[0, 1:],
    "smaller than the kernel": lambda x: x[..., :2],
    "no pixels": lambda x: x[..., :0],
    "no channels": lambda x: x[:, :0],
    "no images, wrong channels": lambda x: x[:0, 1:],
}


@pytest.mark.parametrize("wrong", WRONG_LINEAR)
def test_linear_shapes(wrong, run):
    layer, x = layers()["linear"]
    x = WRONG_LINEAR[wrong](x)
    with pytest.raises(ValueError, match=r"lowbit\.nn\.Linear\(.*last dimension must be .*75") as e:
        run(layer, x)
    assert str(list(x.shape)) in str(e.value)


@pytest.mark.parametrize("wrong", WRONG_CONV)
def test_conv_shapes(wrong, run):
    layer, x = layers()["conv"]
    with pytest.raises(ValueError, match=r"lowbit\.nn\.Conv2d\(.*(in_channels = 6|kernel)"):
        run(layer, WRONG_CONV[wrong](x))


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_dtypes(layer_and_input, run, dtype):
    layer, x = layer_and_input
    with pytest.raises(TypeError, match=rf"lowbit\.nn\..*{dtype}; convert it to float32"):
        run(layer, x.abs().to(dtype))


@pytest.mark.parametrize("value", [None, 3.0, [[1.0]], "x", {"x": 1}])
def test_no_tensor(layer_and_input, value):
    with pytest.raises(TypeError, match=rf"the input is a {type(value).__name__}, not a tensor"):
        layer_and_input[0](value)


def test_numpy_array(layer_and_input):
    with pytest.raises(TypeError, match="the input is a ndarray, not a tensor"):
        layer_and_input[0](layer_and_input[1].numpy())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to_sparse(), "torch.sparse_coo tensor; convert it to a dense one"),
        (lambda x: x.to_mkldnn(), "torch._mkldnn tensor"),
        (lambda x: torch.nested.nested_tensor([x, x[:1]]), "nested tensor"),
        (lambda x: x.to("meta"), "the input is on meta, the weights on cpu"),
    ],
)
def test_layouts_and_devices(layer_and_input, change, message):
    layer, x = layer_and_input
    with pytest.raises(RuntimeError, match=r"lowbit\.nn\..*" + message):
        layer(change(x))


def test_quantized_tensor():
    layer, x = layers()["linear"]
    with pytest.raises(TypeError, match=r"torch\.qint8"):
        layer(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))


def test_input_without_memory(layer_and_input):
    layer, x = layer_and_input
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="address"):
        layer(x)


def test_training(layer_and_input, run):
    layer, x = layer_and_input
    layer.train()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"for inference only.*eval\(\).*no_grad\(\)"):
        run(layer, x)
    with torch.no_grad():
        assert run(layer, x).shape[0] == len(x)
    assert not run(layer.eval(), x).requires_grad


def test_the_layers_name_is_told(run):
    for kind, (layer, x) in layers().items():
        layer._fqn = f"blocks.3.{kind}"
        with pytest.raises(
            ValueError, match=rf"lowbit\.nn\.{type(layer).__name__} 'blocks\.3\.{kind}'"
        ):
            run(layer, x[:, 1:])
        assert not any("_fqn" in name for name in layer.state_dict())


def test_padding_larger_than_the_image():
    layer = Conv2d(6, 4, 3, padding=5, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"lowbit\.nn\.Conv2d.*reflect padding .*does not fit"):
        layer(torch.randn(1, 6, 4, 4))
    with pytest.raises(ValueError, match="in_channels = 6"):
        layer(torch.randn(1, 5, 4, 4))


# --- the layer itself ----------------------------------------------------------------------------

BROKEN = {
    "moved": (lambda m: m.to("meta"), RuntimeError, "meta.*load a state dict"),
    "one tensor moved": (
        lambda m: setattr(m, "weight_scale", m.weight_scale.to("meta")),
        RuntimeError,
        "weight_scale is on meta",
    ),
    "data moved": (
        lambda m: setattr(m, "bias", m.bias.to("meta")),
        RuntimeError,
        "bias is on meta",
    ),
    "scale lost": (
        lambda m: setattr(m, "weight_scale", None),
        ValueError,
        "weight_scale is missing",
    ),
    "groups lost": (
        lambda m: setattr(m, "weight_group_scale", None),
        ValueError,
        "weight_group_scale is missing",
    ),
    "packed too short": (
        lambda m: setattr(m, "weight_packed", m.weight_packed[:, :1].contiguous()),
        ValueError,
        "weight_packed must be",
    ),
    "packed shrunk by its data": (
        lambda m: setattr(m.weight_packed, "data", torch.zeros(1, 1, 64, dtype=torch.uint8)),
        ValueError,
        "weight_packed must be",
    ),
    "packed not contiguous": (
        lambda m: setattr(m, "weight_packed", m.weight_packed.repeat(1, 2, 1)[:, ::2]),
        ValueError,
        "weight_packed must be contiguous",
    ),
    "bias in another dtype": (
        lambda m: setattr(m, "bias", m.bias.double()),
        ValueError,
        "bias must be a torch.float32",
    ),
    "bias too short": (lambda m: setattr(m, "bias", m.bias[:-1]), ValueError, "bias must be"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("used", [True, False])
def test_broken_layers(layer_and_input, broken, used):
    layer, x = layer_and_input
    if used:
        layer(x)
    change, error, message = BROKEN[broken]
    change(layer)
    with pytest.raises(error, match=r"lowbit\.nn\..*" + message):
        layer(x)


@pytest.mark.parametrize(
    "attributes",
    [
        {"in_features": 4000},
        {"out_features": 4000},
        {"in_channels": 600},
        {"out_channels": 1000},
        {"kernel_size": (90, 90)},
        {"kernel_size": (1, 1)},
        {"groups": 2},
        {"stride": (0, 1)},
        {"dilation": (1, 0)},
        {"padding": (-1, 0)},
        {"dilation": (1000, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("used", [True, False])
def test_attributes_set_to_nonsense_read_nothing_else(attributes, used):
    """Either the layer works on as it was checked, or it refuses."""
    kind = "linear" if "features" in str(attributes) else "conv"
    layer, x = layers()[kind]
    want = layer(x)
    if not used:
        layer = copy.deepcopy(layer)
    for name, value in attributes.items():
        setattr(layer, name, value)
    with contextlib.suppress(ValueError):
        assert expected.same_bits(layer(x), want)
        assert used


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Linear(-1, 3), ValueError, "sizes must not be negative"),
        (lambda: Linear(3, 3, scheme="w5a8"), ValueError, "unknown scheme 'w5a8'"),
        (lambda: Linear(3, 3, scheme=None), TypeError, "a scheme is"),
        (lambda: Linear(3, 3, dtype=torch.int8), ValueError, "no floating-point dtype"),
        (lambda: Conv2d(4, 6, 3, groups=3), ValueError, "divisible by groups"),
        (lambda: Conv2d(4, 6, 3, groups=4), ValueError, "divisible by groups"),
        (lambda: Conv2d(4, 6, 3, groups=0), ValueError, "groups must be a positive"),
        (lambda: Conv2d(0, 6, 3), ValueError, "in_channels 0"),
        (lambda: Conv2d(4, 0, 3), ValueError, "out_channels 0"),
        (lambda: Conv2d(4, 6, 0), ValueError, "kernel_size"),
        (lambda: Conv2d(4, 6, 3, stride=0), ValueError, "stride"),
        (lambda: Conv2d(4, 6, 3, dilation=0), ValueError, "dilation"),
        (lambda: Conv2d(4, 6, 3, padding=-1), ValueError, "padding"),
        (lambda: Conv2d(4, 6, 3, padding="full"), ValueError, "padding"),
        (lambda: Conv2d(4, 6, 3, padding="same", stride=2), ValueError, "padding='same'"),
        (lambda: Conv2d(4, 6, 3, padding_mode="mirror"), ValueError, "padding_mode"),
    ],
)
def test_constructors(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Conv2d(2, 3, 1), TypeError, r"takes a torch\.nn\.Linear, not Conv2d"),
        ("linear", TypeError, r"takes a torch\.nn\.Linear, not str"),
        (nn.Linear(3, 4, device="meta"), ValueError, "the weight is on meta"),
        (nn.Linear(3, 4, dtype=torch.complex64), TypeError, "complex64"),
    ],
    ids=["conv", "str", "meta", "complex"],
)
def test_from_float(module, error, message):
    with pytest.raises(error, match=message):
        Linear.from_float(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_from_float_of_weights_that_are_not_finite(value):
    linear = nn.Linear(3, 4)
    linear.weight.data[1, 2] = value
    with pytest.raises(ValueError, match="1 of 12 weights are NaN or Inf"):
        Linear.from_float(linear)
    conv = nn.Conv2d(3, 4, 1)
    conv.weight.data[1, 2] = value
    with pytest.raises(ValueError, match="1 of 12 weights are NaN or Inf"):
        Conv2d.from_float(conv)


def test_quantized_weight_of_another_layer():
    layer, _ = layers()["linear"]
    with pytest.raises(ValueError, match="takes weights of"):
        Linear(75, 36, scheme="w4a8-g32").set_quantized_weight(layer.quantized_weight())
    with pytest.raises(ValueError, match="takes weights of"):
        Linear(75, 37, scheme="w4a8").set_quantized_weight(layer.quantized_weight())
