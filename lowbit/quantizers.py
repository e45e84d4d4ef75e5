"""Quantizers: from float weights to codes and scales.

A quantizer looks at each unit of weights that shares a scale (an output channel, or a group of
`group_size` weights along K), chooses its scale, and rounds to the nearest level:

    minmax  the smallest scale that clips nothing (round to nearest, "RTN")
    mse     the scale with the least squared error, found on a grid
    mean    binary: the mean of |w|, exactly the scale with the least squared error

Everything is deterministic, works on a bounded number of rows at a time, and treats each unit by
itself. `register` adds a quantizer under a new name; `lowbit.rounding` has those that look at more
than the weights of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit import _core
from lowbit.formats import FORMATS, Format

if TYPE_CHECKING:
    from lowbit.schemes import Scheme

DEFAULTS = {"int8": "minmax", "int4": "mse", "int2": "mse", "ternary": "mse", "binary": "mean"}

_FLT_MIN = torch.finfo(torch.float32).tiny
_CHUNK = 1 << 18  # weights at a time: 1 MiB of float32 stays in the cache over the grid search


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as codes and scales.

    Without groups a weight is `scale[n] * v`, with groups `scale[n] * (group_scale[n, g] * v +
    group_zero[n, g])`, where v is the value of its code.

    Attributes:
        codes: uint8 [N, K].
        scale: float32 [N].
        group_scale: float16 [N, ceil(K / group_size)], or None without groups.
        group_zero: like `group_scale`, or None for zero.
        format: what the codes mean.
        group_size: weights along K that share a group scale, or None.
    """

    codes: Tensor
    scale: Tensor
    group_scale: Tensor | None
    group_zero: Tensor | None
    format: Format
    group_size: int | None


Quantizer = Callable[[Tensor, Format, "int | None", "Tensor | None"], QuantizedWeight]
"""quantizer(w float32 [N, K], format, group_size, valid bool [K] or None)."""

DataQuantizer = Callable[[Tensor, Format, "int | None", "Tensor | None", Tensor], QuantizedWeight]
"""The same with a fifth argument, the Hessian: float32 [G, K, K], the mean of x x^T over inputs x
[K] of each of G blocks of N / G consecutive rows (a convolution's groups)."""

# Scales [R, G] of units x [R, G, L], zero where mask [G, L] is 0.
_ScaleRule = Callable[[Tensor, Tensor, Format], Tensor]

_REGISTRY: dict[str, tuple[Quantizer, frozenset[str]]] = {}
_WITH_DATA: dict[str, DataQuantizer] = {}


def register(
    name: str, formats: Collection[str] = tuple(FORMATS)
) -> Callable[[Quantizer], Quantizer]:
    """Decorator that makes a quantizer known as `name`, for these weight formats."""

    def add(quantizer: Quantizer) -> Quantizer:
        _REGISTRY[name] = (quantizer, frozenset(formats))
        return quantizer

    return add


def register_with_data(
    name: str, formats: Collection[str] = tuple(FORMATS)
) -> Callable[[DataQuantizer], DataQuantizer]:
    """Like `register`, for a quantizer that looks at the inputs of the layer."""

    def refuse(
        w: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None
    ) -> QuantizedWeight:
        free = [known for known, (_, names) in _REGISTRY.items() if fmt.name in names]
        free = [known for known in free if known not in _WITH_DATA]
        raise ValueError(
            f"quantizer {name!r} needs calibration data: lowbit.quantize(model, scheme, "
            f"calibration=batches); without data there are {', '.join(free)}"
        )

    def add(quantizer: DataQuantizer) -> DataQuantizer:
        _REGISTRY[name] = (refuse, frozenset(formats))
        _WITH_DATA[name] = quantizer
        return quantizer

    return add


def needs_data(name: str) -> bool:
    """Whether the quantizer of this name looks at the inputs of the layer."""
    return name in _WITH_DATA


def find(name: str, weight_format: str) -> Quantizer:
    """The quantizer of that name. One that needs data raises ValueError when it is called.

    Raises:
        ValueError: there is none, or it does not serve this weight format.
    """
    names = [known for known, (_, formats) in _REGISTRY.items() if weight_format in formats]
    if name not in names:
        raise ValueError(
            f"no quantizer {name!r} for {weight_format} weights; use one of {', '.join(names)}"
        )
    return _REGISTRY[name][0]


def quantize_weight(
    w: Tensor, scheme: Scheme, valid: Tensor | None = None, hessian: Tensor | None = None
) -> QuantizedWeight:
    """Quantizes a weight matrix as a scheme says.

    Args:
        w: float32 [N, K], on the CPU.
        scheme: names the weight format, the group size and the quantizer.
        valid: bool [K], False where a position is padding: it enters no statistics and gets code
            0. None if all are weights.
        hessian: for a quantizer that needs data, see `DataQuantizer`; others ignore it.

    Raises:
        ValueError: w is not a finite float32 matrix on the CPU, `valid` or `hessian` does not fit
            it, or the quantizer needs a Hessian and there is none.
    """
    if w.ndim != 2 or w.dtype != torch.float32 or w.device.type != "cpu":
        raise ValueError(
            f"weights must be a float32 matrix on the CPU, not {w.dtype} {tuple(w.shape)} on "
            f"{w.device}"
        )
    if valid is not None and (valid.dtype != torch.bool or valid.shape != w.shape[1:]):
        raise ValueError(f"valid must be bool [{w.shape[1]}], not {valid.dtype} {valid.shape}")
    if w.numel() and not torch.stack(torch.aminmax(w)).isfinite().all():  # passes NaN on
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{bad} of {w.numel()} weights are NaN or Inf; repair the checkpoint")
    assert scheme.quantizer is not None  # resolved by Scheme
    quantizer = find(scheme.quantizer, scheme.weight)
    fmt = FORMATS[scheme.weight]
    if hessian is not None and needs_data(scheme.quantizer):
        n, k = w.shape
        if hessian.dim() != 3 or hessian.shape[1:] != (k, k) or n % max(1, len(hessian)):
            raise ValueError(
                f"a Hessian of weights [{n}, {k}] is [G, {k}, {k}], G a divisor of {n}, not "
                f"{list(hessian.shape)}"
            )
        if not hessian.isfinite().all():
            raise ValueError("the Hessian has NaN or Inf")
        return _WITH_DATA[scheme.quantizer](w.detach(), fmt, scheme.group_size, valid, hessian)
    return quantizer(w.detach(), fmt, scheme.group_size, valid)


def dequantize_weight(q: QuantizedWeight) -> Tensor:
    """The weights that codes and scales mean: float32 [N, K]."""
    v = q.format.value(q.codes)
    if q.group_scale is not None and q.group_size is not None:
        k = v.shape[1]
        v *= q.group_scale.float().repeat_interleave(q.group_size, dim=1)[:, :k]
        if q.group_zero is not None:
            v += q.group_zero.float().repeat_interleave(q.group_size, dim=1)[:, :k]
    return v.mul_(q.scale[:, None])


def split_scales(unit_scale: Tensor, group_size: int | None) -> tuple[Tensor, Tensor | None]:
    """Splits scales float32 [N, G] of all units into channel scales and float16 group scales.

    The largest group scale of a channel becomes 1 or -1, far from both ends of float16. Scales
    below the smallest normal float32 become 0.
    """
    unit_scale = torch.where(unit_scale.abs() < _FLT_MIN, 0.0, unit_scale)
    if group_size is None:
        return unit_scale.flatten(), None
    scale = unit_scale.abs().amax(dim=1)
    return scale, (unit_scale / scale.clamp_min(_FLT_MIN)[:, None]).half()


def nearest_codes(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Codes, as float32, of the levels nearest to x for nonzero scales that broadcast."""
    if fmt.bits == 1:  # the sign, with w = 0 on a fixed side
        return (x >= 0).float()
    codes = (x / scale).sub_(fmt.add).div_(fmt.mul).round_()
    return codes.clamp_(*fmt.produced)


def group_units(w: Tensor, group_size: int | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [N, K] by the units that share a scale: [N, G, L], and a mask [G, L]: 0 at padding.

    Differentiable; what is padding is 0.
    """
    k = w.shape[1]
    length = group_size or k
    groups = -(-k // group_size) if group_size else 1
    mask = w.new_zeros(groups * length)
    mask[:k] = 1.0 if valid is None else valid.to(w.dtype)
    mask = mask.view(groups, length)
    x = torch.nn.functional.pad(w, (0, groups * length - k))
    return x.reshape(-1, groups, length) * mask, mask


def effective_scales(scale: Tensor, group_scale: Tensor | None) -> Tensor:
    """The scales of all units [N, G] as `split_scales` stores them, float16 rounding included."""
    return scale[:, None] if group_scale is None else scale[:, None] * group_scale.float()


def unit_codes(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Codes, as float32, of units x [N, G, L] at scales [N, G]; those of 0 where a scale is 0."""
    zero = (scale.abs() < _FLT_MIN)[..., None]
    x = torch.where(zero, 0.0, x)
    return nearest_codes(x, torch.where(zero, 1.0, scale[..., None]), fmt)


def round_to_scales(
    w: Tensor, unit_scale: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None = None
) -> QuantizedWeight:
    """The levels nearest to weights, at scales that are given.

    Args:
        w: float32 [N, K].
        unit_scale: float32 [N, G], G = ceil(K / group_size), or 1 without groups; may be negative.
        fmt, group_size, valid: as for a `Quantizer`.
    """
    return _round(w, fmt, group_size, valid, lambda x, mask, part: unit_scale[part])


def _round_with(rule: _ScaleRule) -> Quantizer:
    """The quantizer that takes its scales from `rule` and rounds to the nearest level."""

    def quantizer(
        w: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None
    ) -> QuantizedWeight:
        return _round(w, fmt, group_size, valid, lambda x, mask, part: rule(x, mask, fmt))

    return quantizer


def _round(
    w: Tensor,
    fmt: Format,
    group_size: int | None,
    valid: Tensor | None,
    scales: Callable[[Tensor, Tensor, slice], Tensor],
) -> QuantizedWeight:
    """Rounds to the nearest level; `scales(x, mask, rows)` are those of units x [R, G, L]."""
    n, k = w.shape
    groups = -(-k // group_size) if group_size else 1
    codes = w.new_empty((n, k), dtype=torch.uint8)
    scale = w.new_zeros(n)
    group_scale = w.new_zeros((n, groups), dtype=torch.float16) if group_size else None
    if k == 0:
        return QuantizedWeight(codes, scale, group_scale, None, fmt, group_size)
    rows = max(1, _CHUNK // k)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        x, mask = group_units(w[part], group_size, valid)
        channel, group = split_scales(scales(x, mask, part), group_size)
        scale[part] = channel
        if group is not None and group_scale is not None:
            group_scale[part] = group
        # Codes are chosen for the scale as stored.
        chosen = unit_codes(x, effective_scales(channel, group), fmt) * mask
        codes[part] = chosen.flatten(1)[:, :k].to(torch.uint8)
    return QuantizedWeight(codes, scale, group_scale, None, fmt, group_size)


def _minmax_scale(x: Tensor, mask: Tensor, fmt: Format) -> Tensor:
    low, high = torch.aminmax(x, dim=-1)
    return torch.maximum(low.clamp_max(0) / fmt.min_value, high.clamp_min(0) / fmt.max_value)


def _fit(x: Tensor, mask: Tensor, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """How well the nearest levels v at positive scales [R, G] fit x [R, G, L].

    Returns:
        Three [R, G]: the sums of (x - scale * v)^2, of v * x and of v * v.
    """
    x, mask, scale = x.contiguous(), mask.contiguous(), scale.contiguous()
    out = x.new_empty(*scale.shape, 3)
    _core.fit_scales(
        x.data_ptr(),
        mask.data_ptr(),
        scale.numel(),
        len(mask),
        x.shape[-1],
        scale.data_ptr(),
        fmt.index,
        *fmt.produced,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    error, product, power = out.unbind(-1)
    return error, product, power


def _mse_scale(x: Tensor, mask: Tensor, fmt: Format) -> Tensor:
    """Search of the clipping that loses least, then two steps of Lloyd's algorithm.

    The grid search over shrunken min-max ranges is OMSE's (Choukroun et al., "Low-bit
    Quantization of Neural Networks for Efficient Inference", 2019). A Lloyd step (Lloyd, "Least
    squares quantization in PCM", 1982) replaces the scale by the least-squares fit to the codes,
    which cannot raise the error. int4 has one level more below zero than above: there a negative
    scale is tried too, as in ggml's Q4_0, which gains 0.1 (channels) to 0.5 dB (groups of 32).
    """
    amax = x.abs().amax(dim=-1)
    x = x / torch.where(amax < _FLT_MIN, 1.0, amax)[..., None]  # no square can overflow
    scale, error = _least_error_scale(x, mask, fmt)
    if fmt.min_value != -fmt.max_value:
        mirrored, mirrored_error = _least_error_scale(-x, mask, fmt)
        scale = torch.where(mirrored_error < error, -mirrored, scale)
    return scale * amax


def _least_error_scale(x: Tensor, mask: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Positive scales of units x, of which the largest magnitude is 1 (or 0), and their errors."""
    widest = _minmax_scale(x, mask, fmt)
    widest = torch.where(widest > 0, widest, 1.0)
    best = widest.clone()
    least = torch.full_like(widest, torch.inf)

    def consider(scale: Tensor) -> None:
        error = _fit(x, mask, scale, fmt)[0]
        better = error < least
        best[better] = scale[better]
        least[better] = error[better]

    for step in range(_GRID_COARSE):
        consider(widest * _GRID_RATIO**-step)
    centre = best.clone()
    for step in range(1, _GRID_FINE):
        for sign in (1, -1):
            consider(centre * _GRID_RATIO ** (sign * step / _GRID_FINE / 2))
    for _ in range(2):
        _, product, power = _fit(x, mask, best, fmt)
        fit = product / power.clamp_min(1.0)
        consider(torch.where((power > 0) & (fit > 0), fit, best))
    return best, least


# Shrink factors 1 .. 1/40: the best ternary scale of a channel with an outlier of 30 sigma.
_GRID_COARSE = 32
_GRID_RATIO = 1.126
_GRID_FINE = 4  # then finer, between the neighbours of the best


def _mean_scale(x: Tensor, mask: Tensor, fmt: Format) -> Tensor:
    """Mean of |w|: Rastegari et al., "XNOR-Net", 2016, section 3.1."""
    total = x.abs().sum(dim=-1, dtype=torch.float64)
    return (total / mask.sum(dim=-1).clamp_min(1.0)).float()


register("minmax", [name for name in FORMATS if name != "binary"])(_round_with(_minmax_scale))
register("mse", [name for name in FORMATS if name != "binary"])(_round_with(_mse_scale))
register("mean", ["binary"])(_round_with(_mean_scale))
