"""The operators `torch.ops.lowbit.linear` and `torch.ops.lowbit.conv2d`, for any PyTorch program.

Each has one eager implementation, which checks its input, hands addresses to the extension and
returns a tensor of the input's dtype and memory format. The layers of `lowbit.nn` call it without
the dispatcher where nothing has to see the call (`runs_directly`), and through `torch.ops`
otherwise: under `torch.compile`, `torch.export`, tracing, dispatch modes, functorch transforms,
the profiler, and for tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import _core
from lowbit.inputs import (
    check_channels,
    check_features,
    check_tensor,
    output_size,
    suggests_channels_last,
)
from lowbit.packed import PackedWeight, conv2d_weight, linear_weight

_float32, _get_num_threads = torch.float32, torch.get_num_threads

_LINEAR = (
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_group_scale, "
    "Tensor? weight_group_zero, Tensor? bias, str weight_format, str activation, "
    "int in_features, int out_features, int group_size) -> Tensor"
)
_CONV2D = (
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_group_scale, "
    "Tensor? weight_group_zero, Tensor? bias, str weight_format, str activation, "
    "int in_channels, int out_channels, int group_size, int[2] kernel_size, int[2] stride, "
    "int[4] padding, int[2] dilation, int groups) -> Tensor"
)


def linear_direct(x: Tensor, w: PackedWeight) -> Tensor:
    """y = x W^T + bias in the numerics of the formats; x [..., K], plain, strided, on the CPU.

    Returns:
        [..., N], contiguous, in x's dtype.
    """
    dtype, shape = x.dtype, x.shape
    if not shape or shape[-1] != w.channels:
        check_features(shape, w.channels, w.owner)
    if dtype is not _float32:
        check_tensor(x, w.owner)
        x = x.to(_float32)
    if not x.is_contiguous() or x.is_neg():
        x = x.resolve_neg().contiguous()
    y = x.new_empty(*shape[:-1], w.out_features)  # sizes one by one are parsed sooner than a tuple
    size = y.numel()
    if size:
        if w.depth:
            m = size // w.out_features
            _core.linear(  # type: ignore[call-arg]  # mypy takes the star for all the rest
                x.data_ptr(), m, y.data_ptr(), *w.operands, _get_num_threads()
            )
        elif w.bias is not None:
            y.copy_(w.bias)
        else:
            y.zero_()
    return y if dtype is _float32 else y.to(dtype)


def conv2d_direct(
    x: Tensor,
    w: PackedWeight,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    channels_last: bool | None = None,
) -> Tensor:
    """Convolution of x [N, C, H, W], plain, strided, on the CPU.

    Args:
        padding: top, left, bottom, right; the padding contributes nothing.
        channels_last: the output's memory format, else contiguous; None: as x is.

    Returns:
        [N, out_channels, out_h, out_w] in x's dtype.
    """
    dtype, shape = x.dtype, x.shape
    if len(shape) != 4 or shape[1] != w.channels:
        check_channels(shape, w.channels, w.owner)
    height, width = output_size(shape, w.kernel_size, stride, padding, dilation, w.owner)
    if channels_last is None:
        channels_last = suggests_channels_last(x)
    if dtype is not _float32:
        check_tensor(x, w.owner)
        x = x.to(_float32)
    # The kernel takes both memory formats; the sum behind binary activations has NHWC's order.
    nchw = x.is_contiguous() and w.activation != "binary" and not x.is_neg()
    if not nchw and (not x.is_contiguous(memory_format=torch.channels_last) or x.is_neg()):
        x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    n, c, h, wd = shape
    y = _new_image(x, w.out_features, height, width, channels_last)
    if y.numel():
        sizes = (n, h, wd, c, w.out_features, height, width)
        geometry = (*sizes, *w.kernel_size, *stride, *padding[:2], *dilation, w.groups)
        _core.conv2d(  # type: ignore[call-arg]  # as above
            x.data_ptr(),
            y.data_ptr(),
            geometry,
            *w.operands,
            _get_num_threads(),
            not nchw,
            channels_last,
        )
    return y if dtype is _float32 else y.to(dtype)


def _new_image(x: Tensor, channels: int, height: int, width: int, channels_last: bool) -> Tensor:
    """A new tensor [N, channels, height, width] of x's kind, dense."""
    size = (x.shape[0], channels, height, width)
    if not channels_last:
        return x.new_empty(*size)
    return x.new_empty_strided(size, (height * width * channels, 1, width * channels, channels))


def _plain_input(x: Tensor, owner: str) -> None:
    check_tensor(x, owner)
    if not x.is_cpu:
        raise RuntimeError(f"{owner}: the input is on {x.device}; move it to the CPU")


def _linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_group_scale: Tensor | None,
    weight_group_zero: Tensor | None,
    bias: Tensor | None,
    weight_format: str,
    activation: str,
    in_features: int,
    out_features: int,
    group_size: int,
) -> Tensor:
    owner = "lowbit::linear"
    tensors = (weight_packed, weight_scale, weight_group_scale, weight_group_zero, bias)
    _plain_input(x, owner)
    w = linear_weight(
        tensors, (weight_format, activation), group_size, (in_features, out_features), owner
    )
    return linear_direct(x, w)


def _linear_fake(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_group_scale: Tensor | None,
    weight_group_zero: Tensor | None,
    bias: Tensor | None,
    weight_format: str,
    activation: str,
    in_features: int,
    out_features: int,
    group_size: int,
) -> Tensor:
    check_tensor(x, "lowbit::linear")
    check_features(x.shape, in_features, "lowbit::linear")
    return x.new_empty((*x.shape[:-1], out_features))


def _conv2d(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_group_scale: Tensor | None,
    weight_group_zero: Tensor | None,
    bias: Tensor | None,
    weight_format: str,
    activation: str,
    in_channels: int,
    out_channels: int,
    group_size: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    owner = "lowbit::conv2d"
    tensors = (weight_packed, weight_scale, weight_group_scale, weight_group_zero, bias)
    _plain_input(x, owner)
    sizes = (in_channels, out_channels, (kernel_size[0], kernel_size[1]), groups)
    w = conv2d_weight(tensors, (weight_format, activation), group_size, sizes, owner)
    pads = (padding[0], padding[1], padding[2], padding[3])
    return conv2d_direct(x, w, (stride[0], stride[1]), pads, (dilation[0], dilation[1]))


def _conv2d_fake(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_group_scale: Tensor | None,
    weight_group_zero: Tensor | None,
    bias: Tensor | None,
    weight_format: str,
    activation: str,
    in_channels: int,
    out_channels: int,
    group_size: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    owner = "lowbit::conv2d"
    check_tensor(x, owner)
    check_channels(x.shape, in_channels, owner)
    height, width = output_size(x.shape, kernel_size, stride, padding, dilation, owner)
    return _new_image(x, out_channels, height, width, suggests_channels_last(x))


def _register() -> None:
    # A compiler must hand over the strides that eager mode has: they decide the output's.
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    tags = (torch.Tag.pt2_compliant_tag, strides)
    for name, schema, implementation, fake in (
        ("lowbit::linear", _LINEAR, _linear, _linear_fake),
        ("lowbit::conv2d", _CONV2D, _conv2d, _conv2d_fake),
    ):
        torch.library.define(name, schema, tags=tags)
        torch.library.impl(name, "CPU", implementation)
        torch.library.register_fake(name, fake)


_register()
