"""`lowbit.nn.Conv2d`: the oracle's bits over geometries, memory formats and modes."""

import expected
import pytest
import torch
from torch import nn

from lowbit import _core
from lowbit.nn import Conv2d
from lowbit.schemes import Scheme

all_schemes = pytest.mark.parametrize("scheme", expected.SCHEMES)

# in_channels, out_channels, kernel_size, and the rest of nn.Conv2d's arguments
GEOMETRIES = {
    "pointwise": (40, 20, 1, {}),
    "3x3": (8, 12, 3, {"padding": 1}),
    "first layer": (3, 17, 3, {"stride": 2, "padding": 1}),
    "taps padded": (37, 10, 3, {"padding": 1}),
    "7x7 stride 4": (3, 8, 7, {"stride": 4, "padding": 3}),
    "no bias": (8, 12, 3, {"bias": False}),
    "one row": (4, 6, (1, 5), {"padding": (0, 2)}),
    "one column": (4, 6, (5, 1), {"padding": (2, 0), "stride": (2, 1)}),
    "unequal": (5, 7, (2, 3), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    "dilated": (6, 9, 3, {"padding": 2, "dilation": 2}),
    "same": (6, 9, 3, {"padding": "same"}),
    "same, even kernel": (6, 9, (4, 2), {"padding": "same"}),
    "same, even, dilated": (6, 9, (2, 4), {"padding": "same", "dilation": (1, 3)}),
    "valid": (6, 9, 3, {"padding": "valid"}),
    "grouped": (12, 8, 3, {"padding": 1, "groups": 4}),
    "grouped wide": (80, 40, 3, {"padding": 1, "groups": 2}),
    "depthwise": (19, 19, 3, {"padding": 1, "groups": 19}),
    "depthwise 5x5 stride 2": (33, 33, 5, {"padding": 2, "stride": 2, "groups": 33}),
    "depthwise, two outputs": (6, 12, 3, {"padding": 1, "groups": 6}),
    "reflect": (6, 9, 3, {"padding": 2, "padding_mode": "reflect"}),
    "replicate": (6, 9, 3, {"padding": (1, 2), "padding_mode": "replicate"}),
    "circular": (6, 9, 3, {"padding": 1, "padding_mode": "circular"}),
    "same, reflect, even": (6, 9, 4, {"padding": "same", "padding_mode": "reflect"}),
    "kernel as large as the image": (3, 4, (9, 8), {}),
}
all_geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def float_layer(geometry, dtype=torch.float32):
    in_channels, out_channels, kernel, kwargs = GEOMETRIES[geometry]
    return nn.Conv2d(in_channels, out_channels, kernel, dtype=dtype, **kwargs).eval()


def make(geometry="3x3", scheme="w4a8"):
    return Conv2d.from_float(float_layer(geometry), scheme)


def image(layer, batch=2, height=9, width=8):
    return torch.randn(batch, layer.in_channels, height, width)


# --- values --------------------------------------------------------------------------------------


@all_geometries
@all_schemes
def test_oracles_bits(geometry, scheme):
    layer = make(geometry, scheme)
    x = image(layer)
    assert expected.same_bits(layer(x), expected.conv2d(layer, x))


@pytest.mark.parametrize("geometry", ["3x3", "taps padded", "grouped", "depthwise", "pointwise"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w2a8", "w1a1"])
def test_every_isa_has_the_oracles_bits(geometry, scheme, isa):
    layer = make(geometry, scheme)
    x = image(layer)
    assert expected.same_bits(layer(x), expected.conv2d(layer, x))


@all_geometries
def test_close_to_the_float_layer(geometry):
    conv = float_layer(geometry)
    layer = Conv2d.from_float(conv, "w8a16")
    x = image(layer)
    with torch.no_grad():
        want, meant = conv(x), layer.dequantize()(x)
    y = layer(x)
    assert y.shape == want.shape
    assert (y - meant).norm() < 1e-4 * meant.norm()
    assert (y - want).norm() < 0.02 * want.norm()


@all_geometries
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(geometry, dtype):
    layer = make(geometry)
    x = image(layer).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert expected.same_bits(y, expected.conv2d(layer, x))


@all_geometries
def test_memory_format_changes_no_bit(geometry):
    layer = make(geometry, "w4a8-g32")
    x = image(layer)
    want = layer(x)
    last = layer(x.to(memory_format=torch.channels_last))
    # torch's circular padding returns a contiguous image, so the float layer's output is one too.
    assert last.is_contiguous(memory_format=torch.channels_last) == (geometry != "circular")
    assert want.is_contiguous()
    wide = torch.zeros(2, 2 * layer.in_channels, 9, 16)
    wide[:, ::2, :, ::2] = x
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    for y in (last, layer(wide[:, ::2, :, ::2]), layer(x.mT.contiguous().mT), layer(negated)):
        assert expected.same_bits(y, want)


@all_geometries
def test_memory_format_and_shape_are_those_of_the_float_layer(geometry):
    conv = float_layer(geometry)
    layer = Conv2d.from_float(conv, "w8a8")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image(layer).to(memory_format=memory_format)
        with torch.no_grad():
            want = conv(x)
        y = layer(x)
        assert (y.shape, y.stride()) == (want.shape, want.stride())


@pytest.mark.parametrize("geometry", ["3x3", "same, even kernel", "reflect", "depthwise"])
def test_unbatched(geometry):
    layer = make(geometry)
    x = image(layer)
    assert expected.same_bits(layer(x[0]), layer(x)[0])
    assert layer(x[0]).shape == layer.dequantize()(x[0]).shape


@pytest.mark.parametrize("geometry", ["3x3", "same, even kernel", "reflect", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_batch(geometry, dtype):
    layer = make(geometry)
    x = image(layer, batch=0).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == float_layer(geometry, dtype)(x).shape


@all_schemes
@pytest.mark.parametrize("geometry", ["3x3", "depthwise", "pointwise"])
def test_an_image_does_not_depend_on_the_others(geometry, scheme):
    layer = make(geometry, scheme)
    x = image(layer, batch=4)
    want = layer(x)
    x[1, 0, 2, 3] = float("inf")
    x[2] *= 1e5
    y = layer(x)
    assert y[1].isnan().all()
    for i in (0, 3):
        assert expected.same_bits(y[i], want[i])
        assert expected.same_bits(layer(x[i : i + 1])[0], want[i])


def test_threads_do_not_change_bits(use_threads):
    layer = make("taps padded")
    x = image(layer, 3, 30, 29)
    results = []
    for threads in (1, 2, 3):
        use_threads(threads)
        results.append(layer(x))
    assert all(expected.same_bits(results[0], other) for other in results[1:])


# --- weights -------------------------------------------------------------------------------------


@all_geometries
@all_schemes
def test_weight_is_the_float_layers_within_a_step(geometry, scheme):
    conv = float_layer(geometry)
    layer = Conv2d.from_float(conv, scheme)
    assert layer.weight.shape == conv.weight.shape
    if Scheme.parse(scheme).weight == "int8":
        step = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
        assert ((layer.weight - conv.weight).abs() <= step * 0.5001).all()
    else:
        assert ((layer.weight - conv.weight).norm() < conv.weight.norm()).all()


@all_geometries
@all_schemes
def test_padding_of_the_packed_weight_is_zero(geometry, scheme):
    layer = make(geometry, scheme)
    blocks, rows, depth = layer._layout()
    for part in layer.weight_packed.chunk(blocks):
        assert _core.padding_is_zero(part.numpy(), layer.scheme.weight, rows, depth)


@all_schemes
def test_padded_taps_do_not_enter_the_statistics(scheme):
    """37 channels are padded in every format; the scales are those of the weights alone."""
    scheme = Scheme.parse(scheme.split("-")[0])
    conv = nn.Conv2d(37, 5, 3).eval()
    layer = Conv2d.from_float(conv, scheme)
    flat = nn.Linear(37 * 9, 5)
    flat.weight.data = conv.weight.data.permute(0, 2, 3, 1).reshape(5, -1).contiguous()
    from lowbit.nn import Linear

    torch.testing.assert_close(
        layer.weight_scale, Linear.from_float(flat, scheme).weight_scale, rtol=1e-5, atol=0
    )


@all_geometries
def test_dequantize_has_the_float_layers_arguments(geometry):
    conv, back = float_layer(geometry), make(geometry).dequantize()
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode", "output_padding", "transposed"]
    assert [getattr(back, name) for name in names] == [getattr(conv, name) for name in names]
    assert [getattr(make(geometry), name) for name in names] == [getattr(conv, n) for n in names]
    assert (back.bias is None) == (conv.bias is None)
    assert repr(back) == repr(conv)


def test_constructed_by_sizes_is_zero():
    for geometry, (in_channels, out_channels, kernel, kwargs) in GEOMETRIES.items():
        layer = Conv2d(in_channels, out_channels, kernel, scheme="w2a8", **kwargs)
        y = layer(image(layer))
        assert not y.any(), geometry
        assert not layer.weight.any()
        layer.load_state_dict(make(geometry, "w2a8").state_dict())


def test_repr():
    text = repr(make("unequal", "w2a8-g64"))
    assert text.startswith(
        "Conv2d(5, 7, kernel_size=(2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), "
        "bias=True, w=int2 g64 mse, a=int8, kernel="
    )
    assert "groups=4" in repr(make("grouped"))


def test_changed_attributes_take_effect():
    layer, conv = make("3x3"), make("3x3").dequantize()
    x = image(layer)
    for name, value in [
        ("stride", (2, 2)),
        ("dilation", (2, 1)),
        ("padding", (2, 2)),
        ("padding", 3),
    ]:
        setattr(layer, name, value)
        setattr(conv, name, value)
        y, want = layer(x), conv(x)
        assert y.shape == want.shape


# --- under PyTorch's machinery -------------------------------------------------------------------

COMPILED = ["3x3", "same, even kernel", "reflect", "circular", "grouped", "depthwise", "pointwise"]


@pytest.mark.parametrize("geometry", COMPILED)
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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compile_with_inductor(memory_format):
    model = nn.Sequential(make("3x3"), nn.ReLU(), Conv2d.from_float(nn.Conv2d(12, 5, 1), "w8a8"))
    model.eval()
    x = image(model[0]).to(memory_format=memory_format)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        y, want = compiled(x), model(x)
    assert expected.same_bits(y, want)
    assert y.stride() == want.stride()
    torch._dynamo.reset()


@pytest.mark.parametrize("geometry", ["3x3", "same, even kernel", "reflect", "grouped"])
def test_export_with_dynamic_batch(geometry):
    layer = make(geometry)
    dims = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (image(layer),), dynamic_shapes=dims)
    assert any(node.target is torch.ops.lowbit.conv2d.default for node in program.graph.nodes)
    for batch in (2, 5):
        x = image(layer, batch)
        assert expected.same_bits(program.module()(x), layer(x))


def test_dynamic_image_sizes():
    layer = make("unequal")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for height, width in ((9, 8), (12, 20), (31, 17)):
        x = image(layer, 2, height, width)
        assert expected.same_bits(compiled(x), layer(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("geometry", ["3x3", "reflect"])
def test_autocast_returns_the_float_layers_dtype(geometry):
    layer = make(geometry)
    x = image(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer.dequantize()(x).dtype == torch.bfloat16
        y = layer(x)
    assert expected.same_bits(y, layer(x).bfloat16())


def test_meta_layer_gives_shapes():
    for geometry in COMPILED:
        layer = make(geometry).to("meta")
        y = layer(image(layer).to("meta"))
        assert y.is_meta
        assert y.shape == make(geometry)(image(layer)).shape
        assert layer.weight.shape == make(geometry).weight.shape


def test_gradients_are_not_kept():
    for geometry in ("3x3", "reflect"):
        layer = make(geometry).eval()
        x = image(layer).requires_grad_()
        assert not layer(x).requires_grad
        with torch.inference_mode():
            assert expected.same_bits(layer(x), layer(x.detach()))
