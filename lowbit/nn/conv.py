"""1-D and 2-D convolutions with packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import _core, ops
from lowbit.direct import prepare_conv2d
from lowbit.inputs import check_channels, output_size
from lowbit.nn.base import QuantizedLayer
from lowbit.packed import (
    DYNAMIC,
    ActivationTensors,
    PackedWeight,
    Tensors,
    conv2d_weight,
    conv_weight_layout,
)
from lowbit.quantizers import quantize_weight
from lowbit.schemes import Scheme

_Size = int | tuple[int, ...]


def weight_to_matrix(weight: Tensor, weight_format: str) -> tuple[Tensor, Tensor]:
    """A weight [N, C, *kernel] as [N, K] of the packed layout; bool [K]: what is no padding."""
    channels = weight.shape[1]
    tap = _core.tap_channels(weight_format, channels)
    matrix = F.pad(weight.movedim(1, -1), (0, tap - channels)).flatten(1)
    valid = torch.arange(matrix.shape[1], device=weight.device) % tap < channels
    return matrix, valid


def matrix_to_weight(matrix: Tensor, shape: tuple[int, ...], weight_format: str) -> Tensor:
    """The inverse of `weight_to_matrix`, for a weight of this shape."""
    tap = _core.tap_channels(weight_format, shape[1])
    weight = matrix.view(shape[0], *shape[2:], tap)[..., : shape[1]]
    return weight.movedim(-1, 1).contiguous()


class Convolution(QuantizedLayer):
    """What `Conv1d` and `Conv2d` share. To the kernels, all are 2-D: a signal is one row high."""

    _float: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]
    _dims: ClassVar[int]
    # Whether the output is channels_last; None: if the input is.
    _channels_last: ClassVar[bool | None] = None

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        scheme: str | Scheme | Mapping[str, Any] = "w8a8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        scheme = Scheme.parse(scheme)
        # The float layer checks the arguments and brings them to their usual form.
        twin = self._float(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias=False,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(twin.kernel_size)
        self.stride = tuple(twin.stride)
        self.padding = twin.padding if isinstance(twin.padding, str) else tuple(twin.padding)
        self.dilation = tuple(twin.dilation)
        self.transposed = False
        self.output_padding = (0,) * self._dims
        self.groups = groups
        self.padding_mode = padding_mode
        self.scheme = scheme
        self._layout()
        if min(*self.stride, *self.dilation) < 1 or min(self._pads()) < 0:
            raise ValueError(
                f"{self.label}: stride {self.stride} and dilation {self.dilation} must be at "
                f"least 1, padding {self.padding} at least 0"
            )
        self._create_buffers(scheme, bias, device, dtype)

    def quantize_from(self, weight: Tensor, bias: Tensor | None) -> None:
        matrix, valid = weight_to_matrix(weight.float(), self.scheme.weight)
        self.set_quantized_weight(quantize_weight(matrix, self.scheme, valid))
        self.bias = bias

    @staticmethod
    def _arguments(module: Any) -> dict[str, Any]:
        sizes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        return {name: getattr(module, name) for name in (*sizes, "groups", "padding_mode")}

    def dequantize(self) -> nn.Module:
        """A float layer whose weights are what the codes mean, its epilogue behind it if any."""
        arguments = self._arguments(self)
        return self._dequantized(
            self._float(**arguments, bias=self.bias is not None, device="meta")
        )

    def _run(self, x: Tensor, w: PackedWeight) -> Tensor:
        images = self._to_images(x)
        padding = self._pads()
        if self.padding_mode != "zeros":
            images, padding = self._pad(images), (0, 0, 0, 0)
        stride, dilation = self._two(self.stride), self._two(self.dilation)
        y = ops.conv2d_direct(images, w, stride, padding, dilation, self._channels_last)
        return self._from_images(y, x.dim() <= self._dims + 1)

    def _dispatch(self, x: Any) -> Tensor:
        x = self._check_input(x)
        images, known = self._to_images(x), self._sizes_are_known(x)
        if known:
            check_channels(images.shape, self.in_channels, self.label)
        if self._channels_last is False:
            images = images.contiguous()
        padding = self._pads()
        if self.padding_mode != "zeros":
            images, padding = self._pad(images), (0, 0, 0, 0)
        kernel, stride, dilation = map(self._two, (self.kernel_size, self.stride, self.dilation))
        if known:
            output_size(images.shape, kernel, stride, padding, dilation, self.label)
        sizes = (self.in_channels, self.out_channels, self.scheme.group_size or 0)
        window = (kernel, stride, padding, dilation, self.groups, self.epilogue)
        y = self._call_operator(torch.ops.lowbit.conv2d, images, *sizes, *window)
        return self._from_images(y, isinstance(x, Tensor) and x.dim() <= self._dims + 1)

    def _two(self, value: int | tuple[int, ...], beside: int = 1) -> tuple[int, int]:
        """An attribute as (height, width); `beside` is the height where the layer has none."""
        values = (value,) * self._dims if isinstance(value, int) else value
        height, width = values if self._dims == 2 else (beside, *values)
        return height, width

    def _to_images(self, x: Any) -> Any:
        """The input as images [N, C, H, W]."""
        raise NotImplementedError

    def _from_images(self, y: Tensor, unbatched: bool) -> Tensor:
        """The output in the dimensions of the input."""
        raise NotImplementedError

    def _pads(self) -> tuple[int, int, int, int]:
        """Top, left, bottom, right. What "same" cannot halve goes to the bottom and the right."""
        if not isinstance(self.padding, str):
            height, width = self._two(self.padding, 0)
            return height, width, height, width
        if self.padding == "valid":
            return 0, 0, 0, 0
        kernel, dilation = self._two(self.kernel_size), self._two(self.dilation)
        height, width = (d * (size - 1) for d, size in zip(dilation, kernel, strict=True))
        return height // 2, width // 2, height - height // 2, width - width // 2

    def _pad(self, x: Tensor) -> Tensor:
        """The image padded by its own pixels."""
        if self._sizes_are_known(x):
            check_channels(x.shape, self.in_channels, self.label)
        top, left, bottom, right = self._pads()
        try:
            return F.pad(x, [left, right, top, bottom], mode=self.padding_mode)
        except RuntimeError as error:
            raise ValueError(
                f"{self.label}: {self.padding_mode} padding {self._pads()} (top, left, bottom, "
                f"right) does not fit an input of {list(x.shape)}: {error}"
            ) from error

    def _layout(self) -> tuple[int, int, int]:
        return conv_weight_layout(
            self.scheme.weight,
            self.in_channels,
            self.out_channels,
            self._two(self.kernel_size),
            self.groups,
            self.label,
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _sizes(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        ]
        none, one = (0,) * self._dims, (1,) * self._dims
        usual = {"padding": none, "dilation": one, "groups": 1, "padding_mode": "zeros"}
        for name, default in usual.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)

    def _matrix_to_weight(self, matrix: Tensor) -> Tensor:
        return matrix_to_weight(matrix, self.weight_shape, self.scheme.weight)

    def _check_operands(
        self, tensors: Tensors, activation: ActivationTensors = DYNAMIC
    ) -> PackedWeight:
        return conv2d_weight(
            tensors,
            (self.scheme.weight, self.scheme.activation),
            self.scheme.group_size or 0,
            (self.in_channels, self.out_channels, self._two(self.kernel_size), self.groups),
            self.label,
            self.epilogue,
            activation,
        )


class Conv2d(Convolution):
    """Drop-in replacement of `nn.Conv2d` for inference.

    Takes [N, C, H, W] or [C, H, W], contiguous or channels_last, in float32, bfloat16, float16 or
    float64, and returns what `nn.Conv2d` returns: same dtype, channels_last if the input is. The
    arithmetic is float32 and integer, each image by itself.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device: as for `nn.Conv2d`. The weight is zero.
        scheme: a recipe such as "w4a8", a `Scheme`, or its dict. Groups of weights run over
            (kernel row, kernel column, channel).
        dtype: of the float layer that this one stands for; nothing but `weight` has it.

    Raises:
        ValueError: an invalid scheme or size.
    """

    _float = nn.Conv2d
    _dims = 2

    def _prepare(self, w: PackedWeight) -> _core.Direct | None:
        if self.padding_mode != "zeros":
            return None
        names = ("stride", "padding", "dilation", "padding_mode", "epilogue")
        settings = {name: getattr(self, name) for name in names}
        stride, dilation = self._two(self.stride), self._two(self.dilation)
        return prepare_conv2d(w, settings, stride, self._pads(), dilation)

    def _to_images(self, x: Any) -> Any:
        return x.unsqueeze(0) if isinstance(x, Tensor) and x.dim() == 3 else x

    def _from_images(self, y: Tensor, unbatched: bool) -> Tensor:
        return y.squeeze(0) if unbatched else y


class Conv1d(Convolution):
    """Drop-in replacement of `nn.Conv1d` for inference: `Conv2d` on signals one row high.

    Takes [N, C, L] or [C, L] in float32, bfloat16, float16 or float64, and returns what `nn.Conv1d`
    returns: same dtype, contiguous. The arithmetic is float32 and integer, each signal by itself.
    A transposed [N, L, C] is read as it lies, without a copy.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device: as for `nn.Conv1d`. The weight is zero.
        scheme: a recipe such as "w4a8", a `Scheme`, or its dict. Groups of weights run over
            (kernel position, channel).
        dtype: of the float layer that this one stands for; nothing but `weight` has it.

    Raises:
        ValueError: an invalid scheme or size.
    """

    _float = nn.Conv1d
    _dims = 1
    _channels_last = False

    def _prepare(self, w: PackedWeight) -> _core.Direct | None:
        return None  # it would take [N, C, L] for an image [C, H, W]

    def _to_images(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            x = x.unsqueeze(0) if x.dim() == 2 else x
        if self._sizes_are_known(x):
            check_channels(x.shape, self.in_channels, self.label, dims=1)
        return x.unsqueeze(2)

    def _from_images(self, y: Tensor, unbatched: bool) -> Tensor:
        return y[0, :, 0] if unbatched else y.squeeze(2)
