"""The operators of `torch.ops.lowbit` for any PyTorch program: linear, conv2d, conv_transpose2d.

Each has one eager implementation, which checks its input, hands addresses to the extension and
returns a tensor of the input's dtype and memory format. The layers of `lowbit.nn` call it without
the dispatcher where nothing has to see the call (`runs_directly`), and through `torch.ops`
otherwise: under `torch.compile`, `torch.export`, tracing, dispatch modes, functorch transforms,
the profiler, and for tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowbit import _core
from lowbit.inputs import (
    check_channels,
    check_features,
    check_tensor,
    output_size,
    suggests_channels_last,
    transposed_size,
)
from lowbit.packed import PackedWeight, conv2d_weight, linear_weight
from lowbit.phases import Part, parts, window

_float32, _get_num_threads = torch.float32, torch.get_num_threads

_LINEAR = (
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_group_scale, "
    "Tensor? weight_group_zero, Tensor? bias, str weight_format, str activation, "
    "int in_features, int out_features, int group_size, str epilogue='none', "
    "Tensor? activation_scale=None, Tensor? activation_zero=None) -> Tensor"
)
_CONV2D = (
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_group_scale, "
    "Tensor? weight_group_zero, Tensor? bias, str weight_format, str activation, "
    "int in_channels, int out_channels, int group_size, int[2] kernel_size, int[2] stride, "
    "int[4] padding, int[2] dilation, int groups, str epilogue='none', "
    "Tensor? activation_scale=None, Tensor? activation_zero=None) -> Tensor"
)


_CONV_TRANSPOSE2D = (
    "(Tensor x, Tensor[] weight_packed, Tensor[] weight_scale, Tensor[] weight_group_scale, "
    "Tensor[] weight_group_zero, Tensor[] bias, str weight_format, str activation, "
    "int in_channels, int out_channels, int group_size, int[2] kernel_size, int[2] stride, "
    "int[2] padding, SymInt[2] output_padding, int[2] dilation, int groups, "
    "Tensor? activation_scale=None, Tensor? activation_zero=None) -> Tensor"
)

# Of a bias alone, by the index of the epilogue; all other outputs are the kernels'.
_EPILOGUES = (torch.clone, F.relu, F.relu6, F.hardswish)


def linear_direct(x: Tensor, w: PackedWeight) -> Tensor:
    """y = x W^T + bias in the numerics of the formats; x [..., K], plain, strided, on the CPU.

    What follows by the weight's epilogue is applied to float32 outputs.

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
                x.data_ptr(),
                m,
                y.data_ptr(),
                *w.call,
                _get_num_threads(),
                w.epilogue,
                *w.activation_parameters,
            )
        elif w.bias is not None:
            y.copy_(_EPILOGUES[w.epilogue](w.bias))
        else:
            y.zero_()  # any epilogue of 0 is 0
    return y if dtype is _float32 else y.to(dtype)


def conv2d_direct(
    x: Tensor,
    w: PackedWeight,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    channels_last: bool | None = None,
) -> Tensor:
    """Convolution of x [N, C, H, W], plain, strided, on the CPU; then the weight's epilogue.

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
    nchw = x.is_contiguous() and not x.is_neg()  # the kernel takes both memory formats
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
            *w.call,
            _get_num_threads(),
            not nchw,
            channels_last,
            w.epilogue,
            *w.activation_parameters,
        )
    return y if dtype is _float32 else y.to(dtype)


def conv_transpose2d_direct(
    x: Tensor,
    weights: Sequence[PackedWeight],
    geometry: Sequence[Part],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
    owner: str,
) -> Tensor:
    """Transposed convolution of x [N, C, H, W], plain, strided, on the CPU.

    Args:
        weights: of each part in `geometry`, see `lowbit.phases`; its output channels are [groups,
            phases, channels of a group].

    Returns:
        [N, out_channels, out_h, out_w] in x's dtype, channels_last if x is.
    """
    dtype, shape = x.dtype, x.shape
    groups, first = weights[0].groups, weights[0]
    check_channels(shape, first.channels, owner)
    size = transposed_size(shape, kernel_size, stride, padding, output_padding, dilation, owner)
    if dtype is not _float32:
        check_tensor(x, owner)
        x = x.to(_float32)
    channels_last = suggests_channels_last(x)
    out_channels = first.out_features // geometry[0].count
    y = _new_image(x, out_channels, *size, channels_last)
    if not y.numel():
        return y.to(dtype)
    if sum(part.count for part in geometry) < stride[0] * stride[1]:
        # Some outputs read no input: the bias is left, or NaN where the image has NaN or Inf.
        y.copy_(0 * x.abs().amax((1, 2, 3), keepdim=True))
        if first.bias is not None:
            y += first.bias.view(groups, geometry[0].count, -1)[:, 0].reshape(1, -1, 1, 1)
    outputs = torch.unflatten(y, 1, (groups, -1))
    for part, w in zip(geometry, weights, strict=True):
        rows = window(part.rows, shape[2], size[0], stride[0], padding[0])
        columns = window(part.columns, shape[3], size[1], stride[1], padding[1])
        if rows is None or columns is None:
            continue
        (top, bottom), (left, right) = rows.padding, columns.padding
        z = conv2d_direct(x, w, (1, 1), (top, left, bottom, right), part.dilation, channels_last)
        if z.shape == y.shape and stride == (1, 1):
            y = z  # the only part, and all of it
            break
        phases = torch.unflatten(z, 1, (groups, part.count, -1)).unbind(2)
        for phase, (row, column) in zip(phases, product(rows.slices, columns.slices), strict=True):
            (top, i, height), (left, j, width) = row, column
            to = outputs[..., top :: stride[0], left :: stride[1]]
            to[..., :height, :width] = phase[..., i : i + height, j : j + width]
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
    epilogue: str = "none",
    activation_scale: Tensor | None = None,
    activation_zero: Tensor | None = None,
) -> Tensor:
    owner = "lowbit::linear"
    tensors = (weight_packed, weight_scale, weight_group_scale, weight_group_zero, bias)
    _plain_input(x, owner)
    w = linear_weight(
        tensors,
        (weight_format, activation),
        group_size,
        (in_features, out_features),
        owner,
        epilogue,
        (activation_scale, activation_zero),
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
    epilogue: str = "none",
    activation_scale: Tensor | None = None,
    activation_zero: Tensor | None = None,
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
    epilogue: str = "none",
    activation_scale: Tensor | None = None,
    activation_zero: Tensor | None = None,
) -> Tensor:
    owner = "lowbit::conv2d"
    tensors = (weight_packed, weight_scale, weight_group_scale, weight_group_zero, bias)
    _plain_input(x, owner)
    sizes = (in_channels, out_channels, (kernel_size[0], kernel_size[1]), groups)
    formats, fixed = (weight_format, activation), (activation_scale, activation_zero)
    w = conv2d_weight(tensors, formats, group_size, sizes, owner, epilogue, fixed)
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
    epilogue: str = "none",
    activation_scale: Tensor | None = None,
    activation_zero: Tensor | None = None,
) -> Tensor:
    owner = "lowbit::conv2d"
    check_tensor(x, owner)
    check_channels(x.shape, in_channels, owner)
    height, width = output_size(x.shape, kernel_size, stride, padding, dilation, owner)
    return _new_image(x, out_channels, height, width, suggests_channels_last(x))


def _conv_transpose2d(
    x: Tensor,
    weight_packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_group_scale: Sequence[Tensor],
    weight_group_zero: Sequence[Tensor],
    bias: Sequence[Tensor],
    weight_format: str,
    activation: str,
    in_channels: int,
    out_channels: int,
    group_size: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation_scale: Tensor | None = None,
    activation_zero: Tensor | None = None,
) -> Tensor:
    owner = "lowbit::conv_transpose2d"
    _plain_input(x, owner)
    kernel, strides, pads, more, dilations = (
        (pair[0], pair[1]) for pair in (kernel_size, stride, padding, output_padding, dilation)
    )
    transposed_size(x.shape, kernel, strides, pads, more, dilations, owner)
    geometry = parts(kernel, strides, dilations, groups == in_channels == out_channels)
    lists = (weight_packed, weight_scale, weight_group_scale, weight_group_zero, bias)
    count = len(geometry)
    if any(len(tensors) != count for tensors in lists[:2]) or any(
        len(tensors) not in (0, count) for tensors in lists[2:]
    ):
        raise ValueError(f"{owner}: takes {count} tensors of each kind, one for each part, or none")
    weights = []
    formats, fixed = (weight_format, activation), (activation_scale, activation_zero)
    for i, part in enumerate(geometry):
        group_scale, group_zero, offset = (t[i] if t else None for t in lists[2:])
        tensors = (weight_packed[i], weight_scale[i], group_scale, group_zero, offset)
        sizes = (in_channels, out_channels * part.count, part.kernel_size, groups)
        weights.append(conv2d_weight(tensors, formats, group_size, sizes, owner, activation=fixed))
    return conv_transpose2d_direct(
        x, weights, geometry, kernel, strides, pads, more, dilations, owner
    )


def _conv_transpose2d_fake(
    x: Tensor,
    weight_packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_group_scale: Sequence[Tensor],
    weight_group_zero: Sequence[Tensor],
    bias: Sequence[Tensor],
    weight_format: str,
    activation: str,
    in_channels: int,
    out_channels: int,
    group_size: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation_scale: Tensor | None = None,
    activation_zero: Tensor | None = None,
) -> Tensor:
    owner = "lowbit::conv_transpose2d"
    check_tensor(x, owner)
    check_channels(x.shape, in_channels, owner)
    height, width = transposed_size(
        x.shape, kernel_size, stride, padding, output_padding, dilation, owner
    )
    return _new_image(x, out_channels, height, width, suggests_channels_last(x))


def _vmap(name: str) -> Callable[..., tuple[Tensor, int]]:
    """The batching rule of an operator: rows and images do not depend on each other."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        operator = getattr(torch.ops.lowbit, name)
        leaves, spec = tree_flatten(arguments)
        dims, _ = tree_flatten(in_dims)
        if any(dim is not None for dim in dims[1:]):  # each has weights of its own
            outputs = []
            for i in range(info.batch_size):
                own = [
                    leaf if dim is None else leaf.select(dim, i)
                    for leaf, dim in zip(leaves, dims, strict=True)
                ]
                outputs.append(operator(*tree_unflatten(own, spec)))
            return torch.stack(outputs), 0
        x, *rest = arguments
        x = x.movedim(dims[0], 0)
        if name == "linear":
            return operator(x, *rest), 0
        y = operator(x.flatten(0, 1), *rest)
        return torch.unflatten(y, 0, tuple(x.shape[:2])), 0

    return rule


def _register() -> None:
    # A compiler must hand over the strides that eager mode has: they decide the output's.
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    tags = (torch.Tag.pt2_compliant_tag, strides)
    for name, schema, implementation, fake in (
        ("lowbit::linear", _LINEAR, _linear, _linear_fake),
        ("lowbit::conv2d", _CONV2D, _conv2d, _conv2d_fake),
        (
            "lowbit::conv_transpose2d",
            _CONV_TRANSPOSE2D,
            _conv_transpose2d,
            _conv_transpose2d_fake,
        ),
    ):
        torch.library.define(name, schema, tags=tags)
        torch.library.impl(name, "CPU", implementation)
        torch.library.register_fake(name, fake)
        torch.library.register_vmap(name, _vmap(name.removeprefix("lowbit::")))


_register()
