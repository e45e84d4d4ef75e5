"""Coordinate descent: each weight in turn moves to the level that is best for all the others.

Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023 (cyclic
coordinate descent on the layer's quadratic), begun from GPTQ's rounding, alternating with a
least-squares fit of the scales to the codes. The first scales are searched for as well: shrunken
ranges, each row keeping the one that ends with the smaller loss. No step raises the loss of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.quantizers import QuantizedWeight, register_with_data
from lowbit.rounding.gptq import compensate, start_grid
from lowbit.rounding.hqq import fit
from lowbit.rounding.quadratic import (
    Grid,
    Problem,
    choose,
    grid_loss,
    make_grid,
    nearest_levels,
    padded_units,
    refit,
    round_by,
    values_of,
)

_AFFINE = ("int2", "int4")  # whose groups get a zero each, which begins as HQQ's
_FACTORS = (1.0, 0.9, 0.8, 1.1)
_ROUNDS = 3  # of fit and descent
_SWEEPS = 2


@register_with_data("descent")
def descent(
    w: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None, hessian: Tensor
) -> QuantizedWeight:
    """Coordinate descent after GPTQ, scales fitted; see `lowbit.quantizers.DataQuantizer`."""
    return round_by(lambda p: solve(p, _start(p)), w, fmt, group_size, valid, hessian)


def _start(problem: Problem) -> Grid:
    """The grid to begin with."""
    fmt, group_size = problem.fmt, problem.group_size
    if fmt.name not in _AFFINE or group_size is None:
        return start_grid(problem)
    x, mask = padded_units(problem)
    return fit(x, mask, problem.weights(), fmt, group_size, problem.valid)


def solve(problem: Problem, start: Grid) -> tuple[Tensor, Grid]:
    """Levels [B, R, K] and their grid."""
    levels, grid = compensate(problem, start), start
    loss = grid_loss(problem, levels, grid)
    for factor in _FACTORS[1:]:
        zero = start.zero
        scaled = make_grid(start.scale * factor, problem.group_size, zero)
        other = compensate(problem, scaled)
        other_loss = grid_loss(problem, other, scaled)
        wins = other_loss < loss
        grid = choose(wins, scaled, grid)
        levels = torch.where(wins.view(*levels.shape[:2], 1), other, levels)
        loss = torch.minimum(loss, other_loss)
    for _ in range(_ROUNDS):
        grid = refit(problem, levels, grid)
        levels = descend(problem, levels, grid, _SWEEPS)
    return levels, refit(problem, levels, grid)


def descend(problem: Problem, levels: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """Levels [B, R, K] after so many sweeps over K, or fewer if none moves any more."""
    scale, h = problem.spread(grid.scale), problem.hessian
    zero = None if grid.zero is None else problem.spread(grid.zero)
    levels = levels.clone()
    values = values_of(levels, scale, zero)
    slope = (values - problem.w) @ h  # half the gradient of the loss
    for _ in range(sweeps):
        moved = False
        for k in range(levels.shape[2]):
            at_zero = None if zero is None else zero[:, :, k]
            best = values[:, :, k] - slope[:, :, k] / h[:, k, k, None]
            level = nearest_levels(best, scale[:, :, k], at_zero, problem.fmt)
            value = values_of(level, scale[:, :, k], at_zero)
            step = value - values[:, :, k]
            if not step.any():
                continue
            moved = True
            levels[:, :, k], values[:, :, k] = level, value
            slope += step[..., None] * h[:, k, None, :]
        if not moved:
            break
    return levels
