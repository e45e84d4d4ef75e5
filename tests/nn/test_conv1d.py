"""`lowbit.nn.Conv1d`: the oracle's bits, and what `nn.Conv1d` does with shapes and strides."""

import copy

import expected
import pytest
import torch
from torch import nn

from lowbit.nn import Conv1d

all_schemes = pytest.mark.parametrize("scheme", expected.SCHEMES)

GEOMETRIES = {
    "pointwise": (40, 20, 1, {}),
    "three": (8, 12, 3, {"padding": 1}),
    "first layer": (1, 17, 10, {"stride": 5}),
    "taps padded": (37, 10, 3, {"padding": 1}),
    "no bias": (8, 12, 3, {"bias": False}),
    "dilated": (6, 9, 3, {"padding": 2, "dilation": 2}),
    "same": (6, 9, 4, {"padding": "same", "dilation": 3}),
    "valid": (6, 9, 3, {"padding": "valid"}),
    "grouped": (12, 8, 3, {"padding": 1, "groups": 4}),
    "depthwise": (19, 19, 7, {"padding": 3, "groups": 19}),
    "depthwise, stride": (19, 19, 4, {"stride": 2, "groups": 19}),
    "depthwise, two outputs": (6, 12, 3, {"padding": 1, "groups": 6}),
    "reflect": (6, 9, 3, {"padding": 2, "padding_mode": "reflect"}),
    "replicate": (6, 9, 3, {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    "circular": (6, 9, 3, {"padding": 1, "padding_mode": "circular"}),
    "same, reflect": (6, 9, 4, {"padding": "same", "padding_mode": "reflect"}),
}
all_geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def float_layer(geometry, dtype=torch.float32):
    in_channels, out_channels, kernel, kwargs = GEOMETRIES[geometry]
    return nn.Conv1d(in_channels, out_channels, kernel, dtype=dtype, **kwargs).eval()


def make(geometry="three", scheme="w4a8"):
    return Conv1d.from_float(float_layer(geometry), scheme)


def signal(layer, batch=2, length=23):
    return torch.randn(batch, layer.in_channels, length)


def layouts(x):
    """The same values with other strides."""
    yield x
    yield x.mT.contiguous().mT
    yield torch.stack([x, x], -1)[..., 0]
    yield x[:1].expand(2, -1, -1)
    yield x[0]
    yield x[0].mT.contiguous().mT


@all_geometries
@all_schemes
def test_oracles_bits(geometry, scheme):
    layer = make(geometry, scheme)
    x = signal(layer)
    want = expected.conv1d(layer, x)
    assert expected.same_bits(layer(x), want)
    assert expected.same_bits(layer(x.mT.contiguous().mT), want)


@pytest.mark.parametrize("scheme", ["w8a8", "w2a8", "w1a1"])
def test_every_isa_has_the_oracles_bits(scheme, isa):
    for geometry in ("three", "grouped", "depthwise", "pointwise"):
        layer = make(geometry, scheme)
        x = signal(layer)
        assert expected.same_bits(layer(x), expected.conv1d(layer, x))


@all_geometries
def test_outputs_are_like_those_of_the_float_layer(geometry):
    conv = float_layer(geometry)
    layer = Conv1d.from_float(conv, "w8a16")
    back = layer.dequantize()
    assert repr(back) == repr(conv)
    for x in layouts(signal(layer)):
        with torch.no_grad():
            want, meant = conv(x), back(x)
        y = layer(x)
        assert (y.shape, y.stride()) == (want.shape, want.stride())
        assert (y - meant).norm() < 1e-4 * meant.norm()
        assert (y - want).norm() < 0.02 * want.norm()


@all_geometries
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(geometry, dtype):
    layer = make(geometry)
    x = signal(layer).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert expected.same_bits(y, expected.conv1d(layer, x))


def test_attributes_are_those_of_the_float_layer():
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode", "output_padding", "transposed"]
    for geometry in GEOMETRIES:
        conv, layer = float_layer(geometry), make(geometry)
        assert [getattr(layer, name) for name in names] == [getattr(conv, name) for name in names]
        assert layer.weight_shape == layer.weight.shape == conv.weight.shape
    text = repr(make("dilated"))
    assert text.startswith(
        "Conv1d(6, 9, kernel_size=(3,), stride=(1,), padding=(2,), dilation=(2,), bias=True, w=int4"
    )


def test_changed_attributes_take_effect():
    layer, conv = make(), make().dequantize()
    x = signal(layer)
    for name, value in [("stride", (2,)), ("dilation", (3,)), ("padding", (4,)), ("padding", 2)]:
        setattr(layer, name, value)
        setattr(conv, name, value)
        assert layer(x).shape == conv(x).shape


@pytest.mark.parametrize("geometry", ["three", "same", "reflect", "circular", "grouped"])
def test_under_pytorchs_machinery(geometry):
    layer = make(geometry)
    for x in layouts(signal(layer)):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        y, want = compiled(x), layer(x)
        assert expected.same_bits(y, want)
        assert y.stride() == want.stride()
        torch._dynamo.reset()
    x = signal(layer)
    program = torch.export.export(
        layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    assert expected.same_bits(
        program.module()(signal(layer, 5).mul_(0)), layer(0 * signal(layer, 5))
    )
    assert expected.same_bits(program.module()(x), layer(x))
    meta = make(geometry).to("meta")
    assert meta(x.to("meta")).shape == layer(x).shape
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert expected.same_bits(layer(x).float(), layer(x.float()).bfloat16().float())


def test_bad_input_names_the_layer():
    layer = make()
    layer._fqn = "encoder.0"
    for x in (torch.zeros(2, 7, 9), torch.zeros(7, 9), torch.zeros(8), torch.zeros(1, 2, 8, 9)):
        for device in ("cpu", "meta"):  # directly, and through the dispatcher
            with pytest.raises(ValueError, match=r"Conv1d 'encoder\.0'.*\[N, C, L\] or \[C, L\]"):
                copy.deepcopy(layer).to(device)(x.to(device))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        Conv1d(8, 8, 5)(torch.zeros(1, 8, 3))
    with pytest.raises(ValueError, match="reflect padding"):
        Conv1d(8, 8, 5, padding=4, padding_mode="reflect")(torch.zeros(1, 8, 3))
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Conv1d, not Conv2d"):
        Conv1d.from_float(nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match="stride"):
        Conv1d(8, 8, 3, stride=0)
