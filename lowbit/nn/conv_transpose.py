"""2-D transposed convolution with packed weights: ordinary ones, whose outputs alternate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit.inputs import check_channels, runs_directly, transposed_size
from lowbit.nn.conv import Conv2d
from lowbit.nn.floats import autocast
from lowbit.nn.layer import DequantizedWeight, LowbitLayer, is_compiling
from lowbit.nn.loading import FLOAT_WEIGHT
from lowbit.packed import ACTIVATION_NAMES, ActivationTensors
from lowbit.phases import Pair, Part, parts
from lowbit.schemes import Scheme

_Size = int | tuple[int, int]


class ConvTranspose2d(LowbitLayer):
    """Drop-in replacement of `nn.ConvTranspose2d` for inference.

    Takes [N, C, H, W] or [C, H, W], contiguous or channels_last, in float32, bfloat16, float16 or
    float64, and returns what `nn.ConvTranspose2d` returns: same dtype, channels_last if the input
    is. Outputs at the same distance (modulo stride) are an ordinary convolution of the input; each
    such convolution has the scales of its own weights. Those with kernels of one size are
    one `Conv2d` of `parts`: of a kernel that the stride divides, all.

    The state dict has the tensors of each part: `parts.0.weight_packed`, ...; static activations
    are the same for all parts.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode, device: as for `nn.ConvTranspose2d`. The weight is zero.
        scheme: a recipe such as "w4a8", a `Scheme`, or its dict. Groups of weights run over
            (kernel row, kernel column, channel) of a part.
        dtype: of the float layer that this one stands for; nothing but `weight` has it.

    Raises:
        ValueError: an invalid scheme or size.
    """

    parts: nn.ModuleList

    _float = nn.ConvTranspose2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Size = 0,
        output_padding: _Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _Size = 1,
        padding_mode: str = "zeros",
        scheme: str | Scheme | Mapping[str, Any] = "w8a8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scheme = Scheme.parse(scheme)
        # The float layer checks the arguments and brings them to their usual form.
        twin = nn.ConvTranspose2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            False,
            dilation,
            padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(twin.kernel_size)
        self.stride = _pair(twin.stride)
        self.padding = _pair(twin.padding)  # type: ignore[arg-type]
        self.dilation = _pair(twin.dilation)
        self.transposed = True
        self.output_padding = _pair(twin.output_padding)
        self.groups = groups
        self.padding_mode = padding_mode
        if min(*self.stride, *self.dilation) < 1 or min(*self.padding, *self.output_padding) < 0:
            raise ValueError(
                f"{self.label}: stride {self.stride} and dilation {self.dilation} must be at least "
                f"1, padding {self.padding} and output_padding {self.output_padding} at least 0"
            )
        if min(*self.kernel_size, in_channels, out_channels) < 1:
            raise ValueError(
                f"{self.label}: in_channels {in_channels}, out_channels {out_channels} and "
                f"kernel_size {self.kernel_size} must be at least 1"
            )
        # The weights are in the order of these phases.
        self._packed_for = (self.stride, self.dilation)
        self.parts = nn.ModuleList(
            Conv2d(
                in_channels,
                out_channels * part.count,
                part.kernel_size,
                dilation=part.dilation,
                groups=groups,
                bias=bias,
                scheme=self.scheme,
                device=device,
                dtype=dtype,
            )
            for part in self._geometry()
        )

    @staticmethod
    def _arguments(module: Any) -> dict[str, Any]:
        sizes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        names = (*sizes, "output_padding", "groups", "padding_mode")
        return {name: getattr(module, name) for name in names}

    def quantize_from(self, weight: Tensor, bias: Tensor | None) -> None:
        for part, conv in zip(self._geometry(), self._convolutions(), strict=True):
            # As the part has its channels: [groups, phases, N / groups, C / groups, taps].
            taps = [self._split(weight)[at].transpose(1, 2) for at in part.taps()]
            repeated = None
            if bias is not None:
                repeated = bias.view(self.groups, 1, -1).repeat(1, part.count, 1).flatten()
            conv.quantize_from(torch.stack(taps, 1).flatten(0, 2), repeated)

    def dequantize(self) -> nn.ConvTranspose2d:
        """A float layer whose weights are what the codes mean."""
        bias = self.bias
        layer = nn.ConvTranspose2d(**self._arguments(self), bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.as_subclass(Tensor))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(self.weight_dtype, copy=True))
        return layer.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The weights that the codes mean, in the float layer's shape and dtype; computed anew."""
        with torch.no_grad():
            device = self._device()
            weight = torch.empty(self.weight_shape, dtype=self.weight_dtype, device=device)
            for part, conv in zip(self._geometry(), self._convolutions(), strict=True):
                values = torch.unflatten(
                    conv.weight.as_subclass(Tensor), 0, (self.groups, part.count, -1)
                )
                for phase, at in enumerate(part.taps()):
                    self._split(weight)[at] = values[:, phase].transpose(1, 2)
            return weight.as_subclass(DequantizedWeight)

    @property
    def weight_dtype(self) -> torch.dtype:
        """dtype of the float layer's weight: of `weight` and of `dequantize()`."""
        return self._first.weight_dtype

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    @property
    def bias(self) -> Tensor | None:
        """float32 [out_channels], or None."""
        bias = self._first.bias
        if bias is None:
            return None
        return torch.unflatten(bias, 0, (self.groups, self._geometry()[0].count, -1))[
            :, 0
        ].flatten()

    @property
    def packed_bytes(self) -> int:
        """Bytes that the layer's tensors take, in memory as in a file."""
        return sum(conv.packed_bytes for conv in self._convolutions())

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The layer's output for an input [N, C, H, W] or [C, H, W].

        Args:
            output_size: height and width, or the whole shape, where several are possible; in
                place of `output_padding`.

        Raises:
            TypeError, ValueError, RuntimeError: an input or an output size that no float layer
                would take either, or an input that is not on the CPU, or that wants gradients
                while the layer is training.
        """
        direct = not is_compiling() and runs_directly(input)
        x = input if direct and not input.requires_grad else self._check_input(input)
        unbatched = isinstance(x, Tensor) and x.dim() == 3
        known = self._sizes_are_known(x)
        x = x.unsqueeze(0) if unbatched else x
        if known:
            check_channels(x.shape, self.in_channels, self.label)
        window = self._window()
        if output_size is not None:
            more = self._output_padding(x.shape, output_size, (2, 3 if unbatched else 4))
            window = (*window[:3], more, window[4])
        self._refuse_uncalibrated()
        if direct:
            weights = [conv._operands() for conv in self._convolutions()]
            y = ops.conv_transpose2d_direct(x, weights, self._geometry(), *window, self.label)
        else:
            if known:
                transposed_size(x.shape, *window, self.label)
            fixed = self._activation_tensors() if self.scheme.static else ()
            y = torch.ops.lowbit.conv_transpose2d(
                x,
                *self.operator_tensors(),
                self.scheme.weight,
                self.scheme.activation,
                self.in_channels,
                self.out_channels,
                self.scheme.group_size or 0,
                *window,
                self.groups,
                *fixed,
            )
            y = autocast(y)
        return y.squeeze(0) if unbatched else y

    def _activation_tensors(self) -> ActivationTensors:
        return self._first._activation_tensors()

    def set_activation(self, scale: float, zero: int = 0) -> None:
        for conv in self._convolutions():
            conv.set_activation(scale, zero)

    @property
    def activation_scale(self) -> Tensor:
        """float32 []: of static activations."""
        return self._first.activation_scale

    @property
    def activation_zero(self) -> Tensor:
        """int32 []: of static activations."""
        return self._first.activation_zero

    def operator_tensors(self) -> list[list[Tensor]]:
        """The tensors of all parts in the order of the operator's arguments; of none, no list."""
        lists = []
        for tensors in zip(
            *(conv.operator_tensors() for conv in self._convolutions()), strict=True
        ):
            there = [tensor for tensor in tensors if tensor is not None]
            if len(there) not in (0, len(tensors)):
                raise ValueError(f"{self.label}: some parts lack tensors of others")
            lists.append(there)
        return lists

    def _window(self) -> tuple[Pair, Pair, Pair, Pair, Pair]:
        """kernel_size, stride, padding, output_padding and dilation, as they are now."""
        stride, dilation = _pair(self.stride), _pair(self.dilation)
        if (stride, dilation) != self._packed_for:
            raise ValueError(
                f"{self.label}: stride and dilation cannot change from {self._packed_for} to "
                f"{(stride, dilation)}: the weights are packed for them; convert the float layer "
                "again"
            )
        return (
            self.kernel_size,
            stride,
            _pair(self.padding),
            _pair(self.output_padding),
            dilation,
        )

    def _output_padding(
        self, shape: Sequence[int], output_size: Sequence[int], lengths: Pair
    ) -> Pair:
        """The output padding that makes an output of this size."""
        wanted, found = list(output_size), list(shape[-2:])
        if len(wanted) not in lengths:
            raise ValueError(
                f"{self.label}: output_size {wanted} must have {lengths[0]} or {lengths[1]} numbers"
            )
        kernel, stride, padding, _, dilation = self._window()
        least = [
            (found[d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel[d] - 1) + 1
            for d in (0, 1)
        ]
        height, width = (w - size for w, size in zip(wanted[-2:], least, strict=True))
        if not (0 <= height < stride[0] and 0 <= width < stride[1]):
            most = [least[0] + stride[0] - 1, least[1] + stride[1] - 1]
            raise ValueError(
                f"{self.label}: output_size {wanted} is not possible for an input of {found}: "
                f"height and width must lie between {least} and {most}"
            )
        return height, width

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """The parts load their tensors; a float weight is refused as they would."""
        if f"{prefix}weight" in state_dict:
            error_msgs.append(f"{self.label} (keys '{prefix}...'): {FLOAT_WEIGHT}")
            return
        for name in ACTIVATION_NAMES:
            found = [
                value
                for i in range(len(self.parts))
                if isinstance(value := state_dict.get(f"{prefix}parts.{i}.{name}"), Tensor)
                and not value.is_meta
            ]
            if any(value.shape == () and not torch.equal(value, found[0]) for value in found):
                error_msgs.append(
                    f"{self.label} (keys '{prefix}...'): the parts differ in {name}; the state "
                    "dict was changed"
                )
                return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _geometry(self) -> tuple[Part, ...]:
        depthwise = self.groups == self.in_channels == self.out_channels
        return parts(self.kernel_size, *self._packed_for, depthwise)

    def _convolutions(self) -> Iterator[Conv2d]:
        return iter(self.parts)  # type: ignore[arg-type]

    @property
    def _first(self) -> Conv2d:
        return next(self._convolutions())

    def _device(self) -> torch.device:
        return self._first.weight_packed.device

    def _split(self, weight: Tensor) -> Tensor:
        """A float layer's weight as a view [groups, C / groups, N / groups, kh, kw]."""
        return torch.unflatten(weight, 0, (self.groups, -1))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _sizes(self) -> str:
        described = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        ]
        none, one = (0, 0), (1, 1)
        usual = {"padding": none, "dilation": one, "output_padding": none, "groups": 1}
        for name, default in usual.items():
            value = getattr(self, name)
            if value != default:
                described.append(f"{name}={value}")
        return ", ".join(described)


def _pair(value: int | tuple[int, ...]) -> Pair:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width
