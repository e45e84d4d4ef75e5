"""GPTQ: rounds weight after weight, and lets those not yet rounded make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2023; the closed form is that of Hassibi and Stork, "Second Order
Derivatives for Network Pruning: Optimal Brain Surgeon", 1993. With activation order (the largest
diagonal of H first), damping, blocks of columns, and scales chosen beforehand for all groups, so
that any order suits them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.quantizers import DEFAULTS, QuantizedWeight, effective_scales, find, register_with_data
from lowbit.rounding.quadratic import (
    Grid,
    Problem,
    make_grid,
    nearest_levels,
    round_by,
    values_of,
)

_BLOCK = 64  # columns whose effect on all later ones is one product of matrices


@register_with_data("gptq")
def gptq(
    w: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None, hessian: Tensor
) -> QuantizedWeight:
    """GPTQ at the scales of the format's default quantizer; see `DataQuantizer`."""

    def solve(problem: Problem) -> tuple[Tensor, Grid]:
        grid = start_grid(problem)
        return compensate(problem, grid), grid

    return round_by(solve, w, fmt, group_size, valid, hessian)


def start_grid(problem: Problem) -> Grid:
    """The scales that the format's default quantizer chooses."""
    fmt = problem.fmt
    quantizer = find(DEFAULTS[fmt.name], fmt.name)
    q = quantizer(problem.weights(), fmt, problem.group_size, problem.valid)
    return make_grid(effective_scales(q.scale, q.group_scale), problem.group_size)


def compensate(problem: Problem, grid: Grid) -> Tensor:
    """GPTQ's levels [B, R, K] on a grid."""
    w = problem.w.clone()
    order, factor = problem.elimination
    scale = problem.spread(grid.scale)
    zero = None if grid.zero is None else problem.spread(grid.zero)
    along = order[:, None].expand_as(w)
    w, scale = w.gather(2, along), scale.gather(2, along)
    zero = None if zero is None else zero.gather(2, along)
    levels = torch.empty_like(w)
    k = w.shape[2]
    for begin in range(0, k, _BLOCK):
        end = min(begin + _BLOCK, k)
        errors = w.new_empty(*w.shape[:2], end - begin)
        for i in range(begin, end):
            at_zero = None if zero is None else zero[:, :, i]
            level = nearest_levels(w[:, :, i], scale[:, :, i], at_zero, problem.fmt)
            levels[:, :, i] = level
            error = w[:, :, i] - values_of(level, scale[:, :, i], at_zero)
            error = error / factor[:, i, i, None]
            errors[:, :, i - begin] = error
            w[:, :, i:end] -= error[..., None] * factor[:, None, i, i:end]
        w[:, :, end:] -= errors @ factor[:, begin:end, end:]
    return torch.empty_like(levels).scatter_(2, along, levels)
