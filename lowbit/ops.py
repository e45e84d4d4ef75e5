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
from lowbit.packed import PackedWeight, conv2d_weight, linear_weight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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


# Bound once: these are asked at every call of every layer.
_float32, _strided, _get_num_threads = torch.float32, torch.strided, torch.get_num_threads
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_functorch = torch._C._are_functorch_transforms_active
_autocast = torch._C._is_any_autocast_enabled
_profiler = torch._C._autograd._profiler_enabled
_tracing_state = torch._C._get_tracing_state


def runs_directly(x: object) -> bool:
    """Whether x is an ordinary CPU tensor and nothing in this thread intercepts operators."""
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.is_cpu
        and x.layout is _strided
        and not x.is_nested
        and not (_dispatch_modes() or _function_mode() or _functorch())
        and not (_autocast() or _profiler() or _tracing_state())
    )


def check_tensor(x: object, owner: str) -> None:
    """Refuses what no operator of this file takes.

    Raises:
        TypeError: x is not a tensor, or its dtype is not float32, bfloat16, float16 or float64.
        RuntimeError: x is on a device other than the CPU (meta, which computes shapes only, is
            let through), or sparse, or nested.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: the input is a {type(x).__name__}, not a tensor; pass a Tensor")
    if x.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"{owner}: the input is on {x.device}, but this layer runs on the CPU; move it with "
            "x.cpu()"
        )
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise RuntimeError(
            f"{owner}: the input is a {kind} tensor; convert it to a dense one, e.g. with "
            "x.to_dense()"
        )
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{owner}: the input has dtype {x.dtype}; convert it to float32, bfloat16 or float16, "
            "e.g. with x.float()"
        )


def check_features(shape: Sequence[int], features: int, owner: str) -> None:
    """Raises ValueError where the last dimension of a Linear's input does not fit."""
    if len(shape) == 0 or shape[-1] != features:
        raise ValueError(
            f"{owner}: the input has shape {list(shape)}, but its last dimension must be "
            f"in_features = {features}"
        )


def check_channels(shape: Sequence[int], channels: int, owner: str) -> None:
    """Raises ValueError where the channels of a Conv2d's batched input do not fit."""
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"{owner}: the input has shape {list(shape)}, but it must be [N, C, H, W] or "
            f"[C, H, W] with C = in_channels = {channels}"
        )


def output_size(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    owner: str,
) -> tuple[int, int]:
    """Height and width that a convolution makes of an input of this shape [N, C, H, W].

    Args:
        padding: top, left, bottom, right.

    Raises:
        ValueError: a stride or dilation below 1, a negative padding, or a padded input that is
            smaller than the kernel or empty.
    """
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"{owner}: stride {list(stride)} and dilation {list(dilation)} must be at least 1, "
            f"padding {list(padding)} at least 0"
        )
    height = shape[2] + padding[0] + padding[2] - dilation[0] * (kernel_size[0] - 1) - 1
    width = shape[3] + padding[1] + padding[3] - dilation[1] * (kernel_size[1] - 1) - 1
    if height < 0 or width < 0 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(
            f"{owner}: an input of {shape[2]} x {shape[3]} with padding {list(padding)} (top, "
            f"left, bottom, right) is empty or smaller than the kernel {list(kernel_size)} with "
            f"dilation {list(dilation)}; use a larger input or more padding"
        )
    return height // stride[0] + 1, width // stride[1] + 1


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch's convolution answers x [N, C, H, W] in channels_last memory format.

    The rule of c10's `is_channels_last_strides_2d`: strides that do not decide mean contiguous.
    """
    strides, sizes = x.stride(), x.shape
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return True


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
    y = x.new_empty((*shape[:-1], w.out_features))
    size = y.numel()
    if size:
        if w.depth:
            m = size // w.out_features
            _core.linear(x.data_ptr(), m, y.data_ptr(), *w.operands, _get_num_threads())
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
) -> Tensor:
    """Convolution of x [N, C, H, W], plain, strided, on the CPU.

    Args:
        padding: top, left, bottom, right; the padding contributes nothing.

    Returns:
        [N, out_channels, out_h, out_w] in x's dtype, channels_last if x is, else contiguous.
    """
    dtype, shape = x.dtype, x.shape
    if len(shape) != 4 or shape[1] != w.channels:
        check_channels(shape, w.channels, w.owner)
    height, width = output_size(shape, w.kernel_size, stride, padding, dilation, w.owner)
    channels_last = suggests_channels_last(x)
    if dtype is not _float32:
        check_tensor(x, w.owner)
        x = x.to(_float32)
    if not x.is_contiguous(memory_format=torch.channels_last) or x.is_neg():
        x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    n, c, h, wd = shape
    # The kernel reads and writes NHWC.
    y = x.new_empty((n, height, width, w.out_features))
    if y.numel():
        sizes = (n, h, wd, c, w.out_features, height, width)
        geometry = (*sizes, *w.kernel_size, *stride, *padding[:2], *dilation, w.groups)
        _core.conv2d(x.data_ptr(), y.data_ptr(), geometry, *w.operands, _get_num_threads())
    if channels_last:
        y = y.permute(0, 3, 1, 2)
    elif n == 0 or w.out_features == 1 or height * width == 1:
        # The same bytes; the strides of an ordinary contiguous tensor.
        y = y.view(n, w.out_features, height, width)
    else:
        y = y.permute(0, 3, 1, 2).contiguous()
    return y if y.dtype is dtype else y.to(dtype)


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
    if suggests_channels_last(x):
        return x.new_empty((x.shape[0], height, width, out_channels)).permute(0, 3, 1, 2)
    return x.new_empty((x.shape[0], out_channels, height, width))


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
