"""Fake quantization: what the kernels' codes and scales mean, in float32, with gradients.

The values are those of the deployed layer; the gradients are straight-through estimators (Bengio et
al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013), since the true ones
are zero almost everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lowbit.formats import FORMATS, Format
from lowbit.quantizers import (
    dequantize_weight,
    effective_scales,
    find,
    group_units,
    split_scales,
    unit_codes,
)
from lowbit.schemes import Scheme

_LARGEST = {"int8": 127, "int16": 32639}
_FLT_MIN = torch.finfo(torch.float32).tiny

# Beyond this many scales (means of |x|) a binary value's gradient is clipped: what lies so far
# from zero will not change its sign soon.
CLIP_ACTIVATION = 2.0
CLIP_WEIGHT = 3.0


def fake_activation(x: Tensor, activation: str, dims: tuple[int, ...]) -> Tensor:
    """Activations as the kernels see them: codes times the scale of their unit.

    int8 and int16: one scale a unit, from its largest magnitude, so that nothing is clipped; the
    gradient passes unchanged. binary: sign(x) times the mean of |x| (Rastegari et al., "XNOR-Net",
    2016); the gradient passes where |x| is at most `CLIP_ACTIVATION` times that mean, as that of a
    hard tanh (Courbariaux et al., "Binarized Neural Networks", 2016). Scales count as constants.

    Args:
        x: float32, any shape.
        activation: "int8", "int16" or "binary".
        dims: the dimensions of a unit (a row, an image).
    """
    if activation == "binary":
        return apply(_BinaryActivation, x, dims)
    return apply(_RoundActivation, x, dims, _LARGEST[activation])


def unit_scales(initial: Tensor, log_scale: Tensor) -> Tensor:
    """Learned scales float32 [N, G]: the initial ones times the exponential of what is learned."""
    with torch.no_grad():
        return (initial.double() * log_scale.double().exp()).float()


def fake_learned(
    w: Tensor, initial: Tensor, log_scale: Tensor, scheme: Scheme, valid: Tensor | None
) -> Tensor:
    """Weights at the nearest levels of learned scales, for int8, int4, int2 and ternary.

    Gradients are those of Esser et al., "Learned Step Size Quantization", 2020: the weight's
    passes where it is within the outermost levels; the scale's is the levels' distance from the
    weights there, and the outermost level elsewhere, times 1 / sqrt(weights * largest level).
    Two things differ. A weight beyond the outermost level has its gradient, too, where a step
    brings it back: without, it would stay there for good. And what is learned is the logarithm of
    the scale, so that a scale keeps its sign and a step of any optimizer changes it in proportion;
    its gradient is LSQ's over the scale, with which SGD moves the scale as far as LSQ does.

    Args:
        w: float32 [N, K], K as in the packed layout.
        initial, log_scale: [N, G], see `unit_scales`.
        scheme: names the weight format and the group size.
        valid: bool [K], False at padding; None without.
    """
    x, mask = group_units(w, scheme.group_size, valid)
    with torch.no_grad():
        stored = split_scales(unit_scales(initial, log_scale), scheme.group_size)
        scale = effective_scales(*stored)
        counts = mask.sum(dim=-1)
    y = apply(_Learned, x, log_scale, scale, counts, FORMATS[scheme.weight])
    return y.flatten(1)[:, : w.shape[1]]


def fake_binary(w: Tensor, scheme: Scheme, valid: Tensor | None) -> Tensor:
    """Weights as sign(w) times their mean |w| (XNOR-Net), of latent float weights.

    The gradient is that of a hard tanh of slope 1, clipped where |w| is beyond `CLIP_WEIGHT` times
    the scale and a step would take it further: so latent weights stay where their sign can still
    change, which BinaryConnect (Courbariaux et al., 2015) has by clipping them after each step.

    Args:
        w, scheme, valid: as for `fake_learned`; the scale is that of the scheme's quantizer.
    """
    return apply(_BinaryWeight, w, scheme, valid)


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """`function.apply`, which torch has no types for."""
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _RoundActivation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], largest: int) -> Tensor:
        scale = x.abs().amax(dims, keepdim=True) / largest
        inverse = torch.where(scale < _FLT_MIN, 0.0, 1 / scale)
        return (x * inverse).round_().mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


class _BinaryActivation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        magnitude = x.abs()
        scale = magnitude.mean(dims, keepdim=True)
        ctx.save_for_backward(magnitude <= CLIP_ACTIVATION * scale)
        return torch.where(x >= 0, scale, -scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


class _Learned(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, scale: Tensor, counts: Tensor, fmt: Format
    ) -> Tensor:
        value = unit_codes(x, scale, fmt).mul_(fmt.mul).add_(fmt.add)
        zero = scale.abs() < _FLT_MIN
        divisor = torch.where(zero, 1.0, scale)
        ratio = x / divisor[..., None]
        inside = (ratio >= fmt.min_value) & (ratio <= fmt.max_value)
        # How the output changes with the scale, over the scale.
        slope = torch.where(inside, value - ratio, value)
        norm = (counts.clamp_min(1) * fmt.max_value).rsqrt() / torch.where(zero, torch.inf, scale)
        ctx.save_for_backward(~inside, x, slope, norm)
        ctx.dtype = log_scale.dtype
        return value.mul_(scale[..., None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        beyond, x, slope, norm = ctx.saved_tensors
        grad_scale = (grad * slope).sum(dim=-1) * norm
        return _clipped(grad, beyond, x), grad_scale.to(ctx.dtype), None, None, None


class _BinaryWeight(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scheme: Scheme, valid: Tensor | None) -> Tensor:
        assert scheme.quantizer is not None  # resolved by Scheme
        quantizer = find(scheme.quantizer, scheme.weight)
        value = dequantize_weight(quantizer(w, FORMATS[scheme.weight], scheme.group_size, valid))
        ctx.save_for_backward(w.abs() > CLIP_WEIGHT * value.abs(), w)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _clipped(grad, *ctx.saved_tensors), None, None


def _clipped(grad: Tensor, beyond: Tensor, w: Tensor) -> Tensor:
    """The gradient of w, without what would take it further from zero where it is beyond."""
    further = grad * w.sign() < 0  # a step goes against the gradient
    return torch.where(beyond & further, 0.0, grad)


def initial_scales(unit_scale: Tensor) -> Tensor:
    """Scales to begin with [N, G]: a quantizer's; where it found none, their usual size.

    A scale of 0 belongs to weights that are all zero. It could never be learned.
    """
    sizes = unit_scale.abs()
    used = sizes[sizes > 0]
    usual = float(used.median()) if used.numel() else 1 / math.sqrt(max(1, unit_scale.shape[1]))
    return torch.where(sizes > 0, unit_scale, usual)
