"""HQQ: scales and zeros by half-quadratic splitting, without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(mobiusml.github.io/hqq_blog). What rounding loses is measured by an l_p norm with p < 1, which
cares little for outliers: it is split into a shrinkage of the error, which is exact, and a
least-squares step for the grid. Here that step fits the scale as well as the zero, and what is
kept is the grid with the least l_p error on the way. Groups get a zero (`weight_group_zero`) each;
without groups there is none, and the scale alone is fitted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.quantizers import (
    DEFAULTS,
    QuantizedWeight,
    effective_scales,
    find,
    group_units,
    register,
)
from lowbit.rounding.quadratic import Grid, make_grid, nearest_levels, values_of

_P = 0.7
_BETA, _KAPPA = 10.0, 1.01
_STEPS = 20
_CHUNK = 1 << 18  # weights at a time


@register("hqq", ("int8", "int4", "int2"))
def hqq(w: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None) -> QuantizedWeight:
    """Half-quadratic quantization; see `lowbit.quantizers.Quantizer`."""
    if w.numel() == 0:
        return find(DEFAULTS[fmt.name], fmt.name)(w, fmt, group_size, valid)
    rows = torch.split(w, max(1, _CHUNK // w.shape[1]))
    parts = [_rows(part, fmt, group_size, valid) for part in rows]
    codes, scales, groups, zeros = zip(*parts, strict=True)
    return QuantizedWeight(
        torch.cat(codes),
        torch.cat(scales),
        torch.cat(groups) if group_size else None,
        torch.cat(zeros) if group_size else None,
        fmt,
        group_size,
    )


def _rows(
    w: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x, mask = group_units(w, group_size, valid)
    grid = fit(x, mask, w, fmt, group_size, valid)
    zero = None if grid.zero is None else grid.zero[..., None]
    levels = nearest_levels(x, grid.scale[..., None], zero, fmt)
    codes = ((levels - fmt.add) / fmt.mul) * mask
    return (
        codes.flatten(1)[:, : w.shape[1]].to(torch.uint8),
        grid.channel,
        grid.group,
        grid.group_zero,
    )


def fit(
    x: Tensor,
    mask: Tensor,
    w: Tensor,
    fmt: Format,
    group_size: int | None,
    valid: Tensor | None,
) -> Grid:
    """The grid for units x [N, G, L] of weights w [N, K], `mask` [G, L] 0 at padding."""
    plain = find(DEFAULTS[fmt.name], fmt.name)(w, fmt, group_size, valid)
    scale = effective_scales(plain.scale, plain.group_scale)
    zero = torch.zeros_like(scale)
    best_scale, best_zero = scale, zero
    least = _error(x, mask, scale, zero, fmt)
    if group_size is not None:
        # The other beginning: the whole range of each group.
        low = torch.where(mask > 0, x, torch.inf).amin(dim=-1)
        high = torch.where(mask > 0, x, -torch.inf).amax(dim=-1)
        empty = mask.sum(dim=-1) == 0
        low, high = (torch.where(empty, 0.0, end) for end in (low, high))
        wide = (high - low) / (fmt.max_value - fmt.min_value)
        scale = torch.where(wide > 0, wide, scale)
        zero = torch.where(wide > 0, low - scale * fmt.min_value, 0.0)
    beta = _BETA
    for _ in range(_STEPS):
        error = _error(x, mask, scale, zero, fmt)
        wins = error < least
        least = torch.where(wins, error, least)
        best_scale = torch.where(wins, scale, best_scale)
        best_zero = torch.where(wins, zero, best_zero)
        v = nearest_levels(x, scale[..., None], zero[..., None], fmt)
        rest = x - values_of(v, scale[..., None], zero[..., None])
        # In units of the scale, so that the shrinkage does not depend on the size of the weights.
        unit = scale.abs().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        shrunk = _shrink(rest / unit, beta) * unit
        scale, zero = _line(v, x - shrunk, mask, scale, zero, group_size is not None)
        beta *= _KAPPA
    return make_grid(best_scale, group_size, best_zero if group_size else None)


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold of the l_p norm."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-8).pow(_P - 1) / beta).clamp_min(0.0)


def _line(
    v: Tensor, x: Tensor, mask: Tensor, scale: Tensor, zero: Tensor, affine: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, G] with the least squares of x - scale * v - zero."""
    count = mask.sum(dim=-1).clamp_min(1.0)
    v_mean, x_mean = torch.zeros_like(scale), torch.zeros_like(scale)
    if affine:
        v_mean, x_mean = (v * mask).sum(-1) / count, (x * mask).sum(-1) / count
    dv, dx = (v - v_mean[..., None]) * mask, (x - x_mean[..., None]) * mask
    power = (dv * dv).sum(-1)
    fitted = (dv * dx).sum(-1) / power.clamp_min(1e-12)
    scale = torch.where((power > 0) & (fitted.abs() > 0), fitted, scale)
    return scale, x_mean - scale * v_mean if affine else zero


def _error(x: Tensor, mask: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """The l_p error [N, G] of the nearest levels."""
    v = nearest_levels(x, scale[..., None], zero[..., None], fmt)
    rest = x - values_of(v, scale[..., None], zero[..., None])
    return (rest.abs().pow(_P) * mask).sum(-1)
