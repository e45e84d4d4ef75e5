"""`lowbit.nn.ConvTranspose2d`: the oracle's bits, and what `nn.ConvTranspose2d` does."""

import copy
import io
import pickle

import expected
import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn import SAFE_GLOBALS, ConvTranspose2d

all_schemes = pytest.mark.parametrize("scheme", expected.SCHEMES)

# in_channels, out_channels, kernel_size, and the rest of nn.ConvTranspose2d's arguments
GEOMETRIES = {
    "2x2 stride 2": (9, 5, 2, {"stride": 2}),
    "4x4 stride 2": (8, 12, 4, {"stride": 2, "padding": 1}),
    "3x3 stride 2": (37, 6, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
    "stride 1": (6, 9, 3, {"padding": 1}),
    "pointwise": (6, 9, 1, {}),
    "no bias": (8, 12, 4, {"stride": 2, "bias": False}),
    "unequal": (5, 7, (3, 2), {"stride": (2, 3), "padding": (1, 0), "output_padding": (0, 2)}),
    "dilated": (6, 9, 3, {"stride": 2, "dilation": 3, "output_padding": 2}),
    "dilation and stride share a factor": (6, 9, 3, {"stride": 2, "dilation": 2, "padding": 1}),
    "grouped": (12, 8, 4, {"stride": 2, "groups": 4}),
    "depthwise": (19, 19, 3, {"stride": 2, "padding": 1, "groups": 19}),
    "gaps": (6, 4, 2, {"stride": 3, "output_padding": 1}),
    "gaps, no bias": (6, 4, 1, {"stride": 2, "bias": False}),
    "more padding than kernel": (6, 4, 3, {"stride": 2, "padding": 4, "output_padding": 1}),
}
all_geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
some = ["4x4 stride 2", "3x3 stride 2", "depthwise", "gaps", "stride 1"]


def float_layer(geometry, dtype=torch.float32):
    in_channels, out_channels, kernel, kwargs = GEOMETRIES[geometry]
    return nn.ConvTranspose2d(in_channels, out_channels, kernel, dtype=dtype, **kwargs).eval()


def make(geometry="3x3 stride 2", scheme="w4a8"):
    return ConvTranspose2d.from_float(float_layer(geometry), scheme)


def image(layer, batch=2, height=6, width=5):
    return torch.randn(batch, layer.in_channels, height, width)


# --- values --------------------------------------------------------------------------------------


@all_geometries
@all_schemes
def test_oracles_bits(geometry, scheme):
    layer = make(geometry, scheme)
    x = image(layer)
    want = expected.conv_transpose2d(layer, x)
    assert expected.same_bits(layer(x), want)
    assert expected.same_bits(layer(x.to(memory_format=torch.channels_last)), want)


@pytest.mark.parametrize("geometry", some)
@pytest.mark.parametrize("scheme", ["w8a8", "w2a8", "w1a1"])
def test_every_isa_has_the_oracles_bits(geometry, scheme, isa):
    layer = make(geometry, scheme)
    x = image(layer)
    assert expected.same_bits(layer(x), expected.conv_transpose2d(layer, x))


@all_geometries
def test_outputs_are_like_those_of_the_float_layer(geometry):
    conv = float_layer(geometry)
    layer = ConvTranspose2d.from_float(conv, "w8a16")
    back = layer.dequantize()
    assert repr(back) == repr(conv)
    base = image(layer, height=10)
    for x in (
        base,
        base.to(memory_format=torch.channels_last),
        base.mT.contiguous().mT,
        base[:, :, ::2],
        base[0],
        base[:0],
    ):
        with torch.no_grad():
            want, meant = conv(x), back(x)
        y = layer(x)
        assert (y.shape, y.stride()) == (want.shape, want.stride())
        assert (y - meant).norm() <= 2e-4 * meant.norm()
        assert (y - want).norm() <= 0.02 * want.norm()


@all_geometries
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(geometry, dtype):
    layer = make(geometry)
    x = image(layer).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert expected.same_bits(y, expected.conv_transpose2d(layer, x))


@pytest.mark.parametrize("geometry", ["4x4 stride 2", "gaps", "depthwise"])
@pytest.mark.parametrize("scheme", ["w8a8", "w1a1"])
def test_an_image_does_not_depend_on_the_others(geometry, scheme):
    layer = make(geometry, scheme)
    x = image(layer, batch=3)
    want = layer(x)
    x[1, 0, 2, 3] = float("inf")
    y = layer(x)
    assert y[1].isnan().all()
    for i in (0, 2):
        assert expected.same_bits(y[i], want[i])
        assert expected.same_bits(layer(x[i]), want[i])


def test_output_size():
    layer = make()
    conv = layer.dequantize()
    for x in (image(layer), image(layer)[0]):
        for size in ([11, 10], [12, 9], [*x.shape[:-3], 6, 12, 9]):
            y, want = layer(x, size), conv(x, size)
            assert y.shape == want.shape
            assert (y - want).norm() < 0.05 * want.norm()
        assert layer(x, output_size=torch.Size([11, 10])).shape[-2:] == (11, 10)
        for size in ([10, 10], [11, 11], [11], [1, 2, 3, 4, 5]):
            with pytest.raises(ValueError, match=r"ConvTranspose2d.*output_size"):
                layer(x, size)
            with pytest.raises(ValueError, match="output"):
                conv(x, size)


# --- the layer -----------------------------------------------------------------------------------


@all_geometries
@all_schemes
def test_weight_and_bias_are_the_float_layers(geometry, scheme):
    conv = float_layer(geometry)
    layer = ConvTranspose2d.from_float(conv, scheme)
    assert layer.weight_shape == layer.weight.shape == conv.weight.shape
    assert (layer.bias is None) == (conv.bias is None)
    assert conv.bias is None or torch.equal(layer.bias, conv.bias)
    assert (layer.weight - conv.weight).norm() < conv.weight.norm()
    if layer.scheme.weight == "int8":
        step = conv.weight.detach().abs().max() / 127
        assert ((layer.weight - conv.weight).abs() <= step * 0.5001).all()


def test_attributes_are_those_of_the_float_layer():
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode", "output_padding", "transposed"]
    for geometry in GEOMETRIES:
        conv, layer = float_layer(geometry), make(geometry)
        assert [getattr(layer, name) for name in names] == [getattr(conv, name) for name in names]
    assert repr(make("unequal", "w2a8-g64")).startswith(
        "ConvTranspose2d(5, 7, kernel_size=(3, 2), stride=(2, 3), padding=(1, 0), "
        "output_padding=(0, 2), bias=True, w=int2 g64 mse, a=int8, kernel="
    )
    assert "\n" not in repr(make())


def test_the_numbers_of_parts():
    assert len(make("4x4 stride 2").parts) == len(make("2x2 stride 2").parts) == 1
    assert len(make("3x3 stride 2").parts) == len(make("depthwise").parts) == 4


@all_geometries
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w1a1"])
def test_state_dict_copies_and_files(geometry, scheme):
    layer = make(geometry, scheme)
    x = image(layer)
    want = layer(x)
    keys = list(layer.state_dict())
    assert keys[0] == "parts.0.weight_packed"
    assert layer.packed_bytes == sum(t.nbytes for t in layer.state_dict().values())
    in_channels, out_channels, kernel, kwargs = GEOMETRIES[geometry]
    other = ConvTranspose2d(in_channels, out_channels, kernel, scheme=scheme, **kwargs)
    assert not other(x).any()
    assert not other.weight.any()
    other.load_state_dict(layer.state_dict())
    others = [other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        others.append(torch.load(file, weights_only=True))
    for same in others:
        assert expected.same_bits(same(x), want)
        assert same.scheme == layer.scheme


def test_files_of_models(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), float_layer("grouped"), nn.Conv1d(4, 4, 1)).eval()
    model[1] = nn.ConvTranspose2d(6, 4, 3, stride=2)
    quantized = lowbit.quantize(model[:2], "w4a8-g32")
    lowbit.save_file(quantized, tmp_path / "model.safetensors")
    loaded = lowbit.load_file(model[:2], tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 5, 5)
    assert expected.same_bits(loaded(x), quantized(x))
    assert lowbit.summary(loaded) == lowbit.summary(quantized)
    row = lowbit.summary(quantized).rows[1]
    assert (row.name, row.kind, row.shape) == ("1", "ConvTranspose2d", (6, 4, 3, 3))
    assert row.bytes_before == 4 * (6 * 4 * 9 + 4)
    assert row.bytes_after == quantized[1].packed_bytes


def test_moves():
    layer = make()
    x = image(layer)
    want = layer(x)
    layer.half()
    assert layer.weight.dtype == layer.dequantize().weight.dtype == torch.float16
    assert expected.same_bits(layer(x), want)
    layer.to("meta")
    assert layer(x.to("meta")).shape == want.shape
    assert layer.weight.is_meta
    with pytest.raises(RuntimeError, match=r"weight_packed is on meta"):
        layer(x)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input_names_the_layer(device):
    layer = make("4x4 stride 2").to(device)
    layer._fqn = "up.0"
    for shape in ((2, 7, 5, 5), (7, 5, 5), (5, 5), (1, 2, 8, 5, 5), (2, 8, 0, 5), (0, 7, 5, 5)):
        with pytest.raises(ValueError, match=r"lowbit\.nn\.ConvTranspose2d 'up\.0'"):
            layer(torch.zeros(shape, device=device))
    with pytest.raises(TypeError, match=r"ConvTranspose2d 'up\.0'.*int32"):
        layer(torch.zeros(2, 8, 5, 5, dtype=torch.int32, device=device))


def test_training_and_gradients():
    layer = make().train()
    x = image(layer).requires_grad_()
    with pytest.raises(RuntimeError, match=r"ConvTranspose2d.*for inference only"):
        layer(x)
    assert not layer.eval()(x).requires_grad


def test_what_cannot_change_or_be_loaded_is_refused():
    layer = make()
    layer.padding = (0, 0)
    assert layer(image(layer)).shape == (2, 6, 14, 12)
    layer.stride = (1, 1)
    with pytest.raises(ValueError, match=r"stride and dilation cannot change .*convert the float"):
        layer(image(layer))
    layer.stride, layer.padding = (2, 2), (9, 9)
    with pytest.raises(ValueError, match="less padding"):
        layer(image(layer))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="float weight; load it into the float model"):
            make().load_state_dict(float_layer("3x3 stride 2").state_dict(), strict=strict)
    state = make("3x3 stride 2", "w8a8").state_dict()
    with pytest.raises(RuntimeError, match=r"parts\.0.*holds int8 .*takes int4"):
        make().load_state_dict(state)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConvTranspose2d(4, 6, 3, groups=3), "divisible by groups"),
        (lambda: ConvTranspose2d(0, 6, 3), "in_channels 0"),
        (lambda: ConvTranspose2d(4, 6, 0), "kernel_size"),
        (lambda: ConvTranspose2d(4, 6, 3, stride=0), "stride"),
        (lambda: ConvTranspose2d(4, 6, 3, padding=-1), "padding"),
        (lambda: ConvTranspose2d(4, 6, 3, padding_mode="reflect"), "zeros"),
        (lambda: ConvTranspose2d(4, 6, 3, scheme="w5a8"), "unknown scheme"),
        (lambda: ConvTranspose2d(4, 6, 3, output_padding=1)(torch.zeros(1, 4, 5, 5)), "smaller"),
    ],
)
def test_constructors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_operator_checks_its_lists():
    layer = make()
    tensors = layer.operator_tensors()
    window = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, (1, 1), 1)
    sizes = ("int4", "int8", 37, 6, 0)
    x = image(layer)
    operator = torch.ops.lowbit.conv_transpose2d
    assert expected.same_bits(operator(x, *tensors, *sizes, *window), layer(x))
    with pytest.raises(ValueError, match="takes 4 tensors of each kind"):
        operator(x, *(t[:3] for t in tensors), *sizes, *window)
    with pytest.raises(ValueError, match="weight_packed must be"):
        operator(x, tensors[0][::-1], *tensors[1:], *sizes, *window)


# --- under PyTorch's machinery -------------------------------------------------------------------


@pytest.mark.parametrize("geometry", some)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compile_gives_the_same_bits(geometry, memory_format):
    layer = make(geometry)
    x = image(layer).to(memory_format=memory_format)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y, want = compiled(x), layer(x)
    assert expected.same_bits(y, want)
    assert y.stride() == want.stride()
    assert expected.same_bits(compiled(x[0]), layer(x[0]))
    torch._dynamo.reset()


def test_compile_with_inductor_and_dynamic_sizes():
    model = nn.Sequential(make("4x4 stride 2"), nn.ReLU()).eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for height, width in ((6, 5), (9, 12)):
            x = image(model[0], 2, height, width)
            assert expected.same_bits(compiled(x), model(x))
    torch._dynamo.reset()


def test_export_and_autocast():
    layer = make()
    x = image(layer)
    dims = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=dims)
    for batch in (2, 5):
        other = image(layer, batch)
        assert expected.same_bits(program.module()(other), layer(other))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert expected.same_bits(y, layer(x).bfloat16())
