"""`torch.ops.lowbit`: registration, checks of the operands, memory formats."""

import expected
import pytest
import torch
import torch.nn.functional as F

from lowbit import inputs
from lowbit.nn import Conv2d, Linear
from lowbit.packed import pack_groups


def linear_args(layer, x):
    return [
        x,
        layer.weight_packed,
        layer.weight_scale,
        layer.weight_group_scale,
        layer.weight_group_zero,
        layer.bias,
        layer.scheme.weight,
        layer.scheme.activation,
        layer.in_features,
        layer.out_features,
        layer.scheme.group_size or 0,
    ]


def conv_args(layer, x):
    height, width = layer.padding
    return [
        x,
        *linear_args_of_weight(layer),
        layer.in_channels,
        layer.out_channels,
        layer.scheme.group_size or 0,
        layer.kernel_size,
        layer.stride,
        (height, width, height, width),
        layer.dilation,
        layer.groups,
    ]


def linear_args_of_weight(layer):
    return [
        layer.weight_packed,
        layer.weight_scale,
        layer.weight_group_scale,
        layer.weight_group_zero,
        layer.bias,
        layer.scheme.weight,
        layer.scheme.activation,
    ]


def linear_layer(scheme="w4a8-g32", **kwargs):
    return Linear.from_float(torch.nn.Linear(70, 33, **kwargs).eval(), scheme)


def conv_layer(scheme="w4a8-g32", **kwargs):
    return Conv2d.from_float(torch.nn.Conv2d(6, 10, 3, padding=1, **kwargs).eval(), scheme)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w1a1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_linear(scheme, dtype):
    args = linear_args(linear_layer(scheme), torch.randn(2, 5, 70, dtype=dtype))
    torch.library.opcheck(torch.ops.lowbit.linear.default, args)


def test_opcheck_linear_without_bias_and_with_zeros():
    layer = linear_layer(bias=False)
    layer.weight_group_zero = pack_groups(torch.randn(33, 3).half(), 1)
    torch.library.opcheck(torch.ops.lowbit.linear.default, linear_args(layer, torch.randn(3, 70)))
    assert expected.same_bits(layer(x := torch.randn(3, 70)), expected.linear(layer, x))


@pytest.mark.parametrize("scheme", ["w8a8", "w2a16-g32", "w1a1"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck_conv2d(scheme, memory_format):
    x = torch.randn(2, 6, 7, 5).to(memory_format=memory_format)
    torch.library.opcheck(torch.ops.lowbit.conv2d.default, conv_args(conv_layer(scheme), x))


def test_operator_equals_layer_and_oracle():
    layer, x = linear_layer(), torch.randn(4, 70)
    y = torch.ops.lowbit.linear(*linear_args(layer, x))
    assert expected.same_bits(y, layer(x))
    assert expected.same_bits(y, expected.linear(layer, x))
    conv, image = conv_layer(), torch.randn(2, 6, 7, 5)
    y = torch.ops.lowbit.conv2d(*conv_args(conv, image))
    assert expected.same_bits(y, conv(image))
    assert expected.same_bits(y, expected.conv2d(conv, image))


def test_meta_tensors_give_shapes():
    layer = linear_layer().to("meta")
    y = torch.ops.lowbit.linear(*linear_args(layer, torch.empty(2, 9, 70, device="meta").half()))
    assert y.is_meta
    assert y.shape == (2, 9, 33)
    assert y.dtype == torch.float16
    conv = conv_layer().to("meta")
    y = torch.ops.lowbit.conv2d(*conv_args(conv, torch.empty(2, 6, 7, 5, device="meta")))
    assert y.shape == (2, 10, 7, 5)


LINEAR_MISTAKES = {
    "packed shape": (1, lambda t: t[:, :-1].contiguous(), ValueError, "weight_packed must be"),
    "packed dtype": (1, lambda t: t.view(torch.int8), ValueError, r"torch\.uint8"),
    "packed strides": (
        1,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        ValueError,
        "weight_packed must be contiguous",
    ),
    "scale shape": (2, lambda t: t[:-1], ValueError, r"weight_scale must be .*\[33\]"),
    "scale dtype": (2, lambda t: t.double(), ValueError, "weight_scale must be"),
    "scale strides": (2, lambda t: t.repeat_interleave(2)[::2], ValueError, "contiguous"),
    "group shape": (
        3,
        lambda t: t[:, :-1],
        ValueError,
        r"weight_group_scale must be .*\[3, 3, 16\]",
    ),
    "group dtype": (3, lambda t: t.float(), ValueError, r"torch\.float16"),
    "no groups": (3, lambda t: None, ValueError, "weight_group_scale is missing"),
    "zero shape": (4, lambda t: torch.zeros(3, 2, 16).half(), ValueError, "weight_group_zero must"),
    "bias shape": (5, lambda t: torch.zeros(34), ValueError, "bias must be"),
    "bias dtype": (5, lambda t: t.bfloat16(), ValueError, "bias must be"),
    "format": (6, lambda t: "int3", ValueError, "unknown formats 'int3'"),
    "activation": (7, lambda t: "fp8", ValueError, "'fp8'.*int8, int16, binary"),
    "in_features": (8, lambda t: 71, ValueError, r"in_features = 71|weight_packed must"),
    "negative": (9, lambda t: -33, ValueError, "negative"),
    "out_features": (9, lambda t: 34, ValueError, "must be"),
    "group_size": (10, lambda t: 33, ValueError, "group_size 33"),
    "other groups": (10, lambda t: 64, ValueError, "weight_group_scale must be"),
    "groups given": (10, lambda t: 0, ValueError, "weight_group_scale is given"),
    "features": (0, lambda t: t[:, 1:], ValueError, "in_features = 70"),
    "integers": (0, lambda t: t.long(), TypeError, r"torch\.int64.*float32"),
    "complex": (0, lambda t: t.to(torch.complex64), TypeError, "complex64"),
    "scalar": (0, lambda t: t[0, 0], ValueError, "in_features = 70"),
}


@pytest.mark.parametrize("mistake", LINEAR_MISTAKES)
def test_linear_refuses(mistake):
    position, change, error, message = LINEAR_MISTAKES[mistake]
    args = linear_args(linear_layer(), torch.randn(3, 70))
    args[position] = change(args[position])
    with pytest.raises(error, match="lowbit::linear: .*" + message):
        torch.ops.lowbit.linear(*args)


CONV_MISTAKES = {
    "channels": (0, lambda t: t[:, 1:], "in_channels = 6"),
    "unbatched": (0, lambda t: t[0], r"\[N, C, H, W\]"),
    "too small": (0, lambda t: t[:, :, :0], "is empty or smaller than the kernel"),
    "packed": (1, lambda t: t[:1, :-1].contiguous(), "weight_packed must be"),
    "in_channels": (8, lambda t: 0, "at least 1"),
    "out_channels": (9, lambda t: 11, "must be"),
    "kernel": (11, lambda t: (3, 2), "must be"),
    "empty kernel": (11, lambda t: (0, 3), "at least 1"),
    "stride": (12, lambda t: (1, 0), "at least 1"),
    "padding": (13, lambda t: (1, 1, -1, 1), "at least 0"),
    "dilation": (14, lambda t: (0, 1), "at least 1"),
    "huge dilation": (14, lambda t: (2**40, 1), "smaller than the kernel"),
    "groups": (15, lambda t: 4, "groups 4 must divide"),
    "other groups": (15, lambda t: 2, "must be"),
    "negative groups": (15, lambda t: -1, "at least 1"),
}


@pytest.mark.parametrize("mistake", CONV_MISTAKES)
def test_conv2d_refuses(mistake):
    position, change, message = CONV_MISTAKES[mistake]
    args = conv_args(conv_layer(), torch.randn(2, 6, 7, 5))
    args[position] = change(args[position])
    with pytest.raises(ValueError, match="lowbit::conv2d: .*" + message):
        torch.ops.lowbit.conv2d(*args)


@pytest.mark.parametrize(("name", "x"), [pytest.param(n, x, id=n) for n, x in expected.images()])
@pytest.mark.parametrize("out_channels", [1, 4])
def test_memory_format_is_what_torch_gives(name, x, out_channels):
    conv = torch.nn.Conv2d(x.shape[1], out_channels, 3, padding=1).eval()
    layer = Conv2d.from_float(conv, "w8a8")
    with torch.no_grad():
        want = conv(x)
        y = layer(x)
    assert y.shape == want.shape
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert y.is_contiguous(memory_format=memory_format) == want.is_contiguous(
            memory_format=memory_format
        )
    assert y.stride() == want.stride()
    if x.numel():
        assert expected.same_bits(y, expected.conv2d(layer, x))


@pytest.mark.parametrize(("name", "x"), [pytest.param(n, x, id=n) for n, x in expected.images()])
def test_fake_strides_are_the_real_ones(name, x):
    layer = Conv2d.from_float(torch.nn.Conv2d(x.shape[1], 4, 3, padding=1).eval(), "w8a8")
    real = layer(x)
    with torch._subclasses.FakeTensorMode() as mode:
        args = [
            mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in conv_args(layer, x)
        ]
        fake = torch.ops.lowbit.conv2d(*args)
    assert fake.shape == real.shape
    assert fake.stride() == real.stride()


def test_runs_directly_only_where_nothing_intercepts():
    x = torch.randn(3)

    class Subclass(torch.Tensor):
        pass

    assert inputs.runs_directly(x)
    assert inputs.runs_directly(torch.nn.Parameter(x))
    assert not inputs.runs_directly(x.as_subclass(Subclass))
    assert not inputs.runs_directly(x.to("meta"))
    assert not inputs.runs_directly(x.to_sparse())
    assert not inputs.runs_directly([1.0])
    assert not inputs.runs_directly(None)
    with torch.device("cpu"):
        assert not inputs.runs_directly(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not inputs.runs_directly(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not inputs.runs_directly(x)
    with torch.profiler.profile():
        assert not inputs.runs_directly(x)
    assert not torch.vmap(lambda row: torch.tensor(inputs.runs_directly(row)))(
        torch.ones(2, 3)
    ).any()
    assert inputs.runs_directly(x)


def test_suggested_memory_format_of_a_padded_image():
    x = F.pad(torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last), [1, 1, 1, 1])
    assert inputs.suggests_channels_last(x) == x.is_contiguous(memory_format=torch.channels_last)


def test_a_torch_without_the_internals_gets_the_dispatcher(monkeypatch):
    assert inputs._asks("_len_torch_dispatch_stack") is torch._C._len_torch_dispatch_stack
    missing = inputs._asks("_autograd._no_such_question")
    assert missing()
    x = torch.zeros(1)
    assert inputs.runs_directly(x)
    monkeypatch.setattr(inputs, "QUESTIONS", (*inputs.QUESTIONS, missing))
    assert not inputs.runs_directly(x)
