"""2-D convolution with packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import _core, ops
from lowbit.direct import prepare_conv2d
from lowbit.inputs import check_channels, output_size
from lowbit.nn.base import QuantizedLayer
from lowbit.nn.floats import check_float_layer, float_bias
from lowbit.packed import PackedWeight, Tensors, conv2d_weight, conv_weight_layout
from lowbit.quantizers import quantize_weight
from lowbit.schemes import Scheme

_Size = int | tuple[int, int]


class Conv2d(QuantizedLayer):
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
        twin = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(twin.kernel_size)
        self.stride = _pair(twin.stride)
        self.padding = twin.padding if isinstance(twin.padding, str) else _pair(twin.padding)
        self.dilation = _pair(twin.dilation)
        self.transposed = False
        self.output_padding = (0, 0)
        self.groups = groups
        self.padding_mode = padding_mode
        self.scheme = scheme
        self._layout()
        if min(*self.stride, *self.dilation, *self._pads()) < 0 or 0 in self.stride + self.dilation:
            raise ValueError(
                f"{self.label}: stride {self.stride} and dilation {self.dilation} must be at "
                f"least 1, padding {self.padding} at least 0"
            )
        self._create_buffers(scheme, bias, device, dtype)

    @classmethod
    def like(
        cls,
        module: nn.Conv2d,
        scheme: str | Scheme | Mapping[str, Any] = "w8a8",
        device: torch.device | str = "cpu",
    ) -> Conv2d:
        """A layer with the sizes of a float one, whose weights are not read: its own are zero."""
        return cls(
            module.in_channels,
            module.out_channels,
            _pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=module.padding if isinstance(module.padding, str) else _pair(module.padding),
            dilation=_pair(module.dilation),
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            scheme=scheme,
            device=device,
            dtype=module.weight.dtype,
        )

    @classmethod
    def from_float(
        cls, module: nn.Conv2d, scheme: str | Scheme | Mapping[str, Any] = "w8a8"
    ) -> Conv2d:
        """A quantized layer with the weights of a float one, which stays as it is.

        Raises:
            TypeError: the module is no `nn.Conv2d`.
            ValueError: an invalid scheme; weights with NaN or Inf, or not on the CPU.
        """
        weight = check_float_layer(module, nn.Conv2d, "lowbit.nn.Conv2d")
        layer = cls.like(module, scheme)
        matrix, valid = layer._weight_to_matrix(weight.float())
        layer.set_quantized_weight(quantize_weight(matrix, layer.scheme, valid))
        layer.bias = float_bias(module)
        return layer.train(module.training)

    def dequantize(self) -> nn.Conv2d:
        """A float layer whose weights are what the codes mean."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        return self._dequantized(conv)

    def _run(self, x: Tensor, w: PackedWeight) -> Tensor:
        unbatched = x.dim() == 3
        if unbatched:
            x = x.unsqueeze(0)
        padding = self._pads()
        if self.padding_mode != "zeros":
            x, padding = self._pad(x), (0, 0, 0, 0)
        y = ops.conv2d_direct(x, w, _pair(self.stride), padding, _pair(self.dilation))
        return y.squeeze(0) if unbatched else y

    def _prepare(self, w: PackedWeight) -> _core.Direct | None:
        if self.padding_mode != "zeros":
            return None
        names = ("stride", "padding", "dilation", "padding_mode")
        settings = {name: getattr(self, name) for name in names}
        return prepare_conv2d(w, settings, _pair(self.stride), self._pads(), _pair(self.dilation))

    def _dispatch(self, x: Any) -> Tensor:
        x = self._check_input(x)
        unbatched = isinstance(x, Tensor) and x.dim() == 3
        if unbatched:
            x = x.unsqueeze(0)
        if isinstance(x, Tensor):
            check_channels(x.shape, self.in_channels, self.label)
        padding = self._pads()
        if self.padding_mode != "zeros":
            x, padding = self._pad(x), (0, 0, 0, 0)
        stride, dilation = _pair(self.stride), _pair(self.dilation)
        if isinstance(x, Tensor):
            output_size(x.shape, self.kernel_size, stride, padding, dilation, self.label)
        sizes = (self.in_channels, self.out_channels, self.scheme.group_size or 0)
        window = (self.kernel_size, stride, padding, dilation, self.groups)
        y = self._call_operator(torch.ops.lowbit.conv2d, x, *sizes, *window)
        return y.squeeze(0) if unbatched else y

    def _pads(self) -> tuple[int, int, int, int]:
        """Top, left, bottom, right. What "same" cannot halve goes to the bottom and the right."""
        if not isinstance(self.padding, str):
            height, width = _pair(self.padding)
            return height, width, height, width
        if self.padding == "valid":
            return 0, 0, 0, 0
        dilation = _pair(self.dilation)
        height = dilation[0] * (self.kernel_size[0] - 1)
        width = dilation[1] * (self.kernel_size[1] - 1)
        return height // 2, width // 2, height - height // 2, width - width // 2

    def _pad(self, x: Tensor) -> Tensor:
        """The image padded by its own pixels."""
        if isinstance(x, Tensor):
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
            self.kernel_size,
            self.groups,
            self.label,
        )

    def _sizes(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        ]
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, default in usual.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)

    def _weight_to_matrix(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [N, C, kh, kw] as [N, K] of the packed layout; bool [K], where K is no padding."""
        channels = weight.shape[1]
        tap = _core.tap_channels(self.scheme.weight, channels)
        matrix = F.pad(weight.permute(0, 2, 3, 1), (0, tap - channels)).flatten(1)
        valid = torch.arange(matrix.shape[1], device=weight.device) % tap < channels
        return matrix, valid

    def _matrix_to_weight(self, matrix: Tensor) -> Tensor:
        channels = self.in_channels // self.groups
        tap = _core.tap_channels(self.scheme.weight, channels)
        weight = matrix.view(self.out_channels, *self.kernel_size, tap)[..., :channels]
        return weight.permute(0, 3, 1, 2).contiguous()

    def _check_operands(self, tensors: Tensors) -> PackedWeight:
        return conv2d_weight(
            tensors,
            (self.scheme.weight, self.scheme.activation),
            self.scheme.group_size or 0,
            (self.in_channels, self.out_channels, self.kernel_size, self.groups),
            self.label,
        )


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width
