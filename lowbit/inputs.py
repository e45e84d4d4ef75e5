"""What the operators ask of their input: whether they take it, and in which memory format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _asks(name: str) -> Callable[[], bool]:
    """A question to torch's internals; where a torch lacks it, the answer is the careful one."""
    answer: Any = torch._C
    for part in name.split("."):
        answer = getattr(answer, part, None)
    return answer if callable(answer) else lambda: True


_strided = torch.strided

# Whether something in this thread intercepts operators. Bound once: asked at every call of every
# layer.
QUESTIONS: tuple[Callable[[], Any], ...] = (
    _asks("_len_torch_dispatch_stack"),
    _asks("_is_torch_function_mode_enabled"),
    _asks("_are_functorch_transforms_active"),
    _asks("_is_any_autocast_enabled"),
    _asks("_autograd._profiler_enabled"),
    _asks("_get_tracing_state"),
)


def runs_directly(x: object) -> bool:
    """Whether x is an ordinary CPU tensor and nothing in this thread intercepts operators."""
    if not (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.is_cpu
        and x.layout is _strided
        and not x.is_nested
    ):
        return False
    for intercepted in QUESTIONS:  # noqa: SIM110  any() would cost more than the questions
        if intercepted():
            return False
    return True


def differentiates(x: Tensor) -> bool:
    """Whether a transform of torch.func (grad, jacrev, jvp) asks for derivatives with respect to x.

    It takes those of an operator that has none for 0.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            tangent = unpack_dual(x).tangent  # type: ignore[no-untyped-call]
            if x.requires_grad or tangent is not None:
                return True
        x = functorch.get_unwrapped(x)
    return False


def check_tensor(x: object, owner: str) -> None:
    """Refuses what no operator takes.

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


def check_channels(shape: Sequence[int], channels: int, owner: str, dims: int = 2) -> None:
    """Raises ValueError where a convolution's batched input has other dimensions or channels."""
    if len(shape) != dims + 2 or shape[1] != channels:
        sizes = "C, H, W" if dims == 2 else "C, L"
        raise ValueError(
            f"{owner}: the input has shape {list(shape)}, but it must be [N, {sizes}] or "
            f"[{sizes}] with C = in_channels = {channels}"
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


def transposed_size(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    owner: str,
) -> tuple[int, int]:
    """Height and width that a transposed convolution makes of an input of this shape [N, C, H, W].

    Raises:
        ValueError: a stride or dilation below 1, a negative padding, an output padding that is not
            smaller than stride or dilation, or an empty input or output.
    """
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"{owner}: stride {list(stride)} and dilation {list(dilation)} must be at least 1, "
            f"padding {list(padding)} at least 0"
        )
    limits = [max(s, d) for s, d in zip(stride, dilation, strict=True)]
    if not (0 <= output_padding[0] < limits[0] and 0 <= output_padding[1] < limits[1]):
        raise ValueError(
            f"{owner}: output_padding {list(output_padding)} must be at least 0 and smaller than "
            f"stride {list(stride)} or dilation {list(dilation)}"
        )
    height, width = (
        (shape[2 + d] - 1) * stride[d]
        - 2 * padding[d]
        + dilation[d] * (kernel_size[d] - 1)
        + output_padding[d]
        + 1
        for d in (0, 1)
    )
    if height < 1 or width < 1 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(
            f"{owner}: an input of {shape[2]} x {shape[3]} would give an output of {height} x "
            f"{width} with padding {list(padding)}; use a larger input or less padding"
        )
    return height, width


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
