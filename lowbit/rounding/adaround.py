"""AdaRound: learns for each weight whether to round down or up.

Nagel, Amjad, van Baalen, Louizos, Blankevoort: "Up or Down? Adaptive Rounding for Post-Training
Quantization", 2020. A soft rounding (a rectified sigmoid) minimises the layer's output error, and a
regularizer drives it to one of the two sides, the harder the later. The error is taken from the
second moments of the inputs, which is what the mean over all samples comes to, so that no step
draws samples and the result depends on no seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.quantizers import QuantizedWeight, register_with_data
from lowbit.rounding.gptq import start_grid
from lowbit.rounding.quadratic import Grid, Problem, grid_loss, round_by

STEPS = 300
_RATE = 3e-2
_WARM_UP = 0.2  # of the steps, without the regularizer
_BETA = (20.0, 2.0)
_STRENGTH = 0.05  # of the regularizer; the error counts 1 for a weight rounded to nearest
_ZETA, _GAMMA = 1.1, -0.1  # how far the sigmoid is stretched, equations 23 and 24


@register_with_data("adaround")
def adaround(
    w: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None, hessian: Tensor
) -> QuantizedWeight:
    """AdaRound at the scales of the format's default quantizer; see `DataQuantizer`."""

    def solve(problem: Problem) -> tuple[Tensor, Grid]:
        grid = start_grid(problem)
        return learn(problem, grid), grid

    return round_by(solve, w, fmt, group_size, valid, hessian)


def learn(problem: Problem, grid: Grid, steps: int = STEPS) -> Tensor:
    """Levels [B, R, K], each one of the two nearest to its weight; no row is worse than RTN."""
    fmt = problem.fmt
    low, high = fmt.produced
    scale = problem.spread(grid.scale)
    none = scale == 0
    step = torch.where(none, 1.0, scale * fmt.mul)
    exact = torch.where(none, 0.0, problem.w / scale.where(~none, torch.ones_like(scale)))
    exact = ((exact - fmt.add) / fmt.mul).clamp(low, high)  # in codes
    floor = exact.floor().clamp(max=high - 1)
    rest = (exact - floor).clamp(0.0, 1.0)
    nearest = (rest >= 0.5).float()
    start = ((rest - _GAMMA) / (_ZETA - _GAMMA)).logit(eps=1e-4)
    # One loss for all rows, each weighed by what rounding to nearest loses.
    plain = grid_loss(problem, (floor + nearest) * fmt.mul + fmt.add, grid)
    weight = (problem.w.shape[2] / plain.clamp_min(1e-30)).view(*start.shape[:2], 1)

    v, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    offset = (floor * fmt.mul + fmt.add) * scale - problem.w
    for index in range(steps):
        sigmoid = v.sigmoid()
        stretched = sigmoid * (_ZETA - _GAMMA) + _GAMMA
        h = stretched.clamp(0.0, 1.0)
        slope = ((offset + h * step) @ problem.hessian) * (2 * weight * step)
        progress = index / steps
        if progress >= _WARM_UP:
            done = (progress - _WARM_UP) / (1 - _WARM_UP)
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - done)
            side = 2 * h - 1
            slope -= _STRENGTH * 2 * beta * side.abs().pow(beta - 1) * side.sign()
        inside = (stretched > 0) & (stretched < 1)
        slope *= sigmoid * (1 - sigmoid) * (_ZETA - _GAMMA) * inside
        # Adam (Kingma and Ba, 2015).
        first.mul_(0.9).add_(slope, alpha=0.1)
        second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        rate = _RATE * (1 - 0.999 ** (index + 1)) ** 0.5 / (1 - 0.9 ** (index + 1))
        v.addcdiv_(first, second.sqrt().add_(1e-12), value=-rate)
    learned = ((v.sigmoid() * (_ZETA - _GAMMA) + _GAMMA) >= 0.5).float()
    loss = grid_loss(problem, (floor + learned) * fmt.mul + fmt.add, grid)
    up = torch.where((loss < plain).view(*start.shape[:2], 1), learned, nearest)
    return torch.where(none, _level_of_zero(fmt), (floor + up) * fmt.mul + fmt.add)


def _level_of_zero(fmt: Format) -> float:
    """The level that stands for weights of a unit whose scale is 0."""
    return float(round((0 - fmt.add) / fmt.mul) * fmt.mul + fmt.add)
