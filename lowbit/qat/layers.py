"""Layers that train with the rounding of the lowbit layers which they will become."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.utils import _pair, _single

import lowbit.nn as lnn
from lowbit.formats import FORMATS
from lowbit.inputs import check_channels, check_features
from lowbit.nn.conv import matrix_to_weight, weight_to_matrix
from lowbit.nn.floats import autocast, float_bias
from lowbit.norms import fold_channels
from lowbit.qat.fake import (
    apply,
    fake_activation,
    fake_binary,
    fake_learned,
    initial_scales,
    unit_scales,
)
from lowbit.quantizers import (
    QuantizedWeight,
    effective_scales,
    find,
    quantize_weight,
    round_to_scales,
)
from lowbit.schemes import Scheme

_Layer = TypeVar("_Layer", bound="QATLayer")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLT_MIN = torch.finfo(torch.float32).tiny


class QATLayer(nn.Module):
    """What the layers share. Each is also the float layer that it was, with all its attributes.

    In training mode the forward computes in float32 with the values that the deployed layer's
    codes mean: weights rounded at learned scales (binary: latent weights by their sign),
    activations at their scale of each row or image. In eval mode it runs the deployed layer itself;
    where gradients are wanted they are those of the training forward.

    A batch norm that was folded in is `norm`, trains as any other, and is folded into the scales
    and the bias, not into the weights: codes do not depend on it. A factor of a channel commutes
    with rounding, and so this is exact, in training with the statistics of the batch as in eval
    mode with the running ones. (Folding before rounding, as in Jacob et al., 2018, needs a second
    convolution for the batch's statistics, and lets them move the weights over the levels.)
    Freeze the statistics with `layer.norm.eval()`.

    Attributes:
        scheme: the `Scheme`.
        norm: the batch norm behind this layer, or None.
        initial_scale: buffer float32 [N, G], the scales at the beginning; None for binary weights.
        log_scale: parameter float32 [N, G]: the scales are `initial_scale * exp(log_scale)`; None
            for binary weights, whose scale is the mean of |w|.
    """

    float_class: ClassVar[type[nn.Module]]
    lowbit_class: ClassVar[Any]

    scheme: Scheme
    norm: nn.Module | None
    initial_scale: Tensor | None
    log_scale: nn.Parameter | None
    weight: Any
    bias: Any

    # Set by prepare_qat: the layer's name in its model, for error messages.
    _fqn: str | None = None
    # The layer that eval mode runs, what it was made of, and copies of that. No state.
    _deployed: tuple[Any, list[Any], list[Tensor]] | None = None

    def __init__(
        self, *args: Any, scheme: str | Scheme | Mapping[str, Any] = "w8a8", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.take_over(self, scheme)

    @classmethod
    def from_float(
        cls: type[_Layer],
        module: nn.Module,
        scheme: str | Scheme | Mapping[str, Any] = "w8a8",
        norm: nn.Module | None = None,
    ) -> _Layer:
        """A layer to train with the weights, hooks and attributes of a float one, copied.

        Args:
            module: the float layer; untouched.
            scheme: a recipe such as "w4a8-g128", a `Scheme`, or its dict.
            norm: a batch norm behind it, with running statistics, to be folded in; taken over, not
                copied.

        Raises:
            TypeError: the module is no float layer of this kind.
            ValueError: an invalid scheme, or a static one; weights with NaN or Inf, or not on the
                CPU.
        """
        kind = cls.float_class
        if not isinstance(module, kind) or isinstance(module, QATLayer):
            raise TypeError(
                f"{cls.__name__}.from_float takes a torch.nn.{kind.__name__}, not "
                f"{type(module).__name__}"
            )
        return cls.take_over(copy.deepcopy(module), scheme, norm)

    @classmethod
    def take_over(
        cls: type[_Layer],
        module: nn.Module,
        scheme: str | Scheme | Mapping[str, Any],
        norm: nn.Module | None = None,
    ) -> _Layer:
        """Makes a float layer one to train, in place: every reference to it is one to this.

        Args, raises: as for `from_float`.
        """
        parsed = Scheme.parse(scheme)
        if parsed.static:
            raise ValueError(
                f"{parsed.name}: training fits activations that are quantized as they come; train "
                f"{parsed.name.replace('-static', '')}, or calibrate the float model with "
                "lowbit.quantize(model, scheme, calibration=batches)"
            )
        weight = module._parameters["weight"]
        assert weight is not None
        scales = None
        if parsed.weight != "binary":
            matrix, valid = _matrix(weight.detach().float(), parsed.weight)
            q = quantize_weight(matrix, parsed, valid)
            scales = initial_scales(effective_scales(q.scale, q.group_scale))
        module.__class__ = cls
        assert isinstance(module, cls)
        module.scheme = parsed
        module.norm = norm
        module.register_buffer("initial_scale", scales)
        log_scale = None
        if scales is not None:
            log_scale = nn.Parameter(torch.zeros_like(scales), requires_grad=weight.requires_grad)
        module.register_parameter("log_scale", log_scale)
        return module

    @property
    def label(self) -> str:
        """How error messages name this layer."""
        name = f" '{self._fqn}'" if self._fqn else f"({super().extra_repr()})"
        return f"lowbit.qat.{type(self).__name__}{name}"

    # --- Forward -------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output for an input of a shape and dtype that the float layer takes.

        Raises:
            ValueError: an input of another shape; in eval mode, weights that are NaN or Inf.
            RuntimeError: in eval mode, a layer or an input that is not on the CPU.
        """
        self._check(input)
        if self.training:
            return self._fake_forward(input)
        with torch.no_grad():
            y: Tensor = self.deployed()(input)
        if torch.is_grad_enabled() and (
            input.requires_grad or any(p.requires_grad for p in self.parameters())
        ):
            y = apply(_ValueOf, self._fake_forward(input), y)
        return y

    def _fake_forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = self._compute(x.float(), self._fake_weight(), self.bias).to(dtype)
            if self.norm is not None:
                y = self.norm(y)
        return autocast(y)

    def _fake_weight(self) -> Tensor:
        matrix, valid = _matrix(self.weight.float(), self.scheme.weight)
        if self.log_scale is None:
            matrix = fake_binary(matrix, self.scheme, valid)
        else:
            assert self.initial_scale is not None
            matrix = fake_learned(matrix, self.initial_scale, self.log_scale, self.scheme, valid)
        if valid is None:
            return matrix
        return matrix_to_weight(matrix, tuple(self.weight.shape), self.scheme.weight)

    def _check(self, x: Any) -> None:
        """Raises ValueError for an input of a shape that the layer does not take."""
        raise NotImplementedError

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer's function, of x after fake quantization."""
        raise NotImplementedError

    def _settings(self) -> tuple[Any, ...]:
        """Attributes other than tensors that the output depends on."""
        return (self.scheme, getattr(self.norm, "eps", None))

    # --- Deployment ----------------------------------------------------------------------------

    def deploy(self) -> nn.Module:
        """The layer of `lowbit.nn` that this one trains to be, its batch norm folded in; new.

        Raises:
            ValueError: weights, scales or the batch norm's statistics are NaN or Inf.
            RuntimeError: the layer is not on the CPU.
        """
        if self.weight.device.type != "cpu":
            raise RuntimeError(
                f"{self.label}: deployed layers, which eval mode runs, are on the CPU, and this "
                f"one is on {self.weight.device}; move the model with .cpu()"
            )
        self._check_finite()
        with torch.no_grad():
            q = self._quantized()
            bias = float_bias(self)
            if self.norm is not None:
                factor, shift = fold_channels(self.norm, bias)
                scale = (q.scale.double() * factor).float()
                scale = torch.where(scale.abs() < _FLT_MIN, 0.0, scale)
                q = QuantizedWeight(q.codes, scale, q.group_scale, None, q.format, q.group_size)
                bias = shift.float()
            layer: Any = self.lowbit_class.like(self, self.scheme)
            layer.set_quantized_weight(q)
            layer.bias = bias
        layer._fqn = self._fqn
        return layer.eval()  # type: ignore[no-any-return]

    def _quantized(self) -> QuantizedWeight:
        """Codes and scales of the weight matrix, without the norm."""
        scheme, fmt = self.scheme, FORMATS[self.scheme.weight]
        matrix, valid = _matrix(self.weight.detach().float(), scheme.weight)
        if self.log_scale is None:
            assert scheme.quantizer is not None  # resolved by Scheme
            return find(scheme.quantizer, scheme.weight)(matrix, fmt, scheme.group_size, valid)
        assert self.initial_scale is not None
        scales = unit_scales(self.initial_scale, self.log_scale)
        return round_to_scales(matrix, scales, fmt, scheme.group_size, valid)

    def deployed(self) -> Any:
        """The layer that eval mode runs: `deploy()`, kept until what it depends on changes.

        Contents are compared, bit by bit: version counters do not see every change (`p.data`,
        NumPy views, other processes).
        """
        settings = list(self._settings())
        tensors = self._tensors()
        if self._deployed is not None:
            layer, old_settings, copies = self._deployed
            if (
                settings == old_settings
                and len(tensors) == len(copies)
                and all(map(_same_bits, tensors, copies))
            ):
                return layer
        layer = self.deploy()
        copies = [tensor.detach().clone() for tensor in tensors]
        self.__dict__["_deployed"] = (layer, settings, copies)
        return layer

    def _tensors(self) -> list[Tensor]:
        """The tensors that the deployed layer is made of."""
        tensors = [*self.parameters(), *self.buffers()]
        return [tensor for tensor in tensors if tensor.is_floating_point()]

    def _check_finite(self) -> None:
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if tensor.is_floating_point() and not tensor.isfinite().all():
                bad = int((~tensor.isfinite()).sum())
                raise ValueError(
                    f"{self.label}: {bad} of {tensor.numel()} numbers of '{name}' are NaN or Inf: "
                    "the training has diverged; load an earlier checkpoint and lower its rate"
                )

    # --- State ---------------------------------------------------------------------------------

    def train(self: _Layer, mode: bool = True) -> _Layer:
        """As for every module; training mode drops what eval mode keeps."""
        if mode:
            self.__dict__.pop("_deployed", None)
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_deployed", None)
        return state

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.name}"


class Linear(QATLayer, nn.Linear):
    """`nn.Linear` that trains as the `lowbit.nn.Linear` that it will be.

    Takes [..., in_features] and returns [..., out_features] in the same dtype, float32 within.
    With a batch norm folded in, it takes [M, in_features] alone.
    """

    float_class = nn.Linear
    lowbit_class = lnn.Linear

    def _check(self, x: Any) -> None:
        check_features(x.shape, self.in_features, self.label)
        if self.norm is not None and x.dim() != 2:
            raise ValueError(
                f"{self.label}: the input has shape {list(x.shape)}, but the batch norm "
                "folded in normalises the features of [M, in_features]; prepare with fuse=False"
            )

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = fake_activation(x, self.scheme.activation, (-1,))
        return F.linear(x, weight, None if bias is None else bias.float())


class _Convolution(QATLayer):
    """What `Conv1d` and `Conv2d` share."""

    dims: ClassVar[int]

    in_channels: int
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    def _check(self, x: Any) -> None:
        shape = x.shape if x.dim() != self.dims + 1 else (1, *x.shape)
        check_channels(shape, self.in_channels, self.label, self.dims)

    def _settings(self) -> tuple[Any, ...]:
        window = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        return (*super()._settings(), *window)

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":  # the pixels that it is padded by are quantized with it
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = _single(0) if self.dims == 1 else _pair(0)
        dims = tuple(range(-self.dims - 1, 0))
        x = fake_activation(x, self.scheme.activation, dims)
        convolve: Any = F.conv1d if self.dims == 1 else F.conv2d
        bias = None if bias is None else bias.float()
        y: Tensor = convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return y


class Conv1d(_Convolution, nn.Conv1d):
    """`nn.Conv1d` that trains as the `lowbit.nn.Conv1d` that it will be.

    Takes [N, C, L] or [C, L] and returns what `nn.Conv1d` does, in the same dtype, float32 within.
    """

    float_class = nn.Conv1d
    lowbit_class = lnn.Conv1d
    dims = 1


class Conv2d(_Convolution, nn.Conv2d):
    """`nn.Conv2d` that trains as the `lowbit.nn.Conv2d` that it will be.

    Takes [N, C, H, W] or [C, H, W] and returns what `nn.Conv2d` does, in the same dtype, float32
    within.
    """

    float_class = nn.Conv2d
    lowbit_class = lnn.Conv2d
    dims = 2


LAYERS: dict[type[nn.Module], type[QATLayer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
}
"""The float classes that can be trained, and what they become."""


class _ValueOf(Function):
    """A value that was computed without gradients, with the gradients of another computation."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def _matrix(weight: Tensor, weight_format: str) -> tuple[Tensor, Tensor | None]:
    """A float layer's weight as [N, K] of the packed layout, and what of K is no padding."""
    if weight.dim() == 2:
        return weight, None
    return weight_to_matrix(weight, weight_format)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.detach().view(bits), b.view(bits))
