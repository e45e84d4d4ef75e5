"""What the quantizers that look at data minimise: the error of a layer's outputs, a quadratic form.

With inputs x of second moments H = mean of x x^T, weights w of a row and their rounded values q,
the mean square of that row's output error is (q - w) H (q - w)^T. Rows of one block share H; a
convolution's groups are its blocks. Every row is a problem of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.quantizers import (
    DEFAULTS,
    QuantizedWeight,
    effective_scales,
    find,
    group_units,
    nearest_codes,
    split_scales,
)

_FLT_MIN = torch.finfo(torch.float32).tiny
_SYSTEM = 1 << 23  # float64 numbers of the least-squares problems that are solved at once

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean: Frantar et al., "GPTQ", 2023, section 3.3."""


@dataclass(frozen=True)
class Problem:
    """Weights to round, by blocks of rows, without what is padding.

    Attributes:
        w: float32 [B, R, K]: K real weights.
        hessian: float32 [B, K, K], damped: positive definite.
        fmt: the weight format.
        group_size: weights along K (padding counted) that share a scale, or None.
        unit: int64 [K]: which unit of scales each weight belongs to.
        units: how many units there are in a row.
        valid: bool [K with padding].
    """

    w: Tensor
    hessian: Tensor
    fmt: Format
    group_size: int | None
    unit: Tensor
    units: int
    valid: Tensor

    @cached_property
    def elimination(self) -> tuple[Tensor, Tensor]:
        """The order in which GPTQ rounds, largest diagonal of H first: int64 [B, K]; and U.

        U is upper triangular [B, K, K] with U^T U the inverse of H in that order.
        """
        h = self.hessian
        order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double()))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return order, factor.float()

    def spread(self, per_unit: Tensor) -> Tensor:
        """What each row has per unit [N, units], for each weight: [B, R, K]."""
        return per_unit[:, self.unit].view(self.w.shape)

    def loss(self, q: Tensor) -> Tensor:
        """Mean square of the output error of values q [B, R, K], for each row: [N]."""
        error = q - self.w
        return ((error @ self.hessian) * error).sum(dim=-1).flatten()

    def weights(self) -> Tensor:
        """The matrix [N, K with padding] that the weights came from."""
        return self._padded(self.w.flatten(0, 1))

    def _padded(self, x: Tensor) -> Tensor:
        result = x.new_zeros(len(x), len(self.valid))
        result[:, self.valid] = x
        return result

    def result(self, values: Tensor, grid: Grid) -> QuantizedWeight:
        """Codes of levels `values` [B, R, K] on a grid, as the packed layout takes them."""
        codes = ((values.flatten(0, 1) - self.fmt.add) / self.fmt.mul).to(torch.uint8)
        return QuantizedWeight(
            self._padded(codes),
            grid.channel.contiguous(),
            None if grid.group is None else grid.group.contiguous(),
            None if grid.group_zero is None else grid.group_zero.contiguous(),
            self.fmt,
            self.group_size,
        )


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of all units as they are stored, float16 rounding included.

    Attributes:
        channel: float32 [N].
        group: float16 [N, units], None without groups.
        group_zero: float16 [N, units], None if the grid is symmetric about zero.
    """

    channel: Tensor
    group: Tensor | None
    group_zero: Tensor | None

    @property
    def scale(self) -> Tensor:
        """float32 [N, units]."""
        return effective_scales(self.channel, self.group)

    @property
    def zero(self) -> Tensor | None:
        """float32 [N, units]."""
        if self.group_zero is None:
            return None
        return self.channel[:, None] * self.group_zero.float()


def make_problem(
    w: Tensor, fmt: Format, group_size: int | None, valid: Tensor | None, hessian: Tensor
) -> Problem:
    """The problem of a `DataQuantizer`'s arguments, its Hessian damped."""
    k = w.shape[1]
    if valid is None:
        valid = torch.ones(k, dtype=torch.bool)
    unit = torch.arange(k) // (group_size or max(k, 1))
    h = hessian[:, valid][:, :, valid].float()
    units = -(-k // group_size) if group_size else 1
    blocks = w[:, valid].float().view(len(h), -1, int(valid.sum()))
    return Problem(blocks, damp(h), fmt, group_size, unit[valid], units, valid)


def round_by(
    solve: Callable[[Problem], tuple[Tensor, Grid]],
    w: Tensor,
    fmt: Format,
    group_size: int | None,
    valid: Tensor | None,
    hessian: Tensor,
) -> QuantizedWeight:
    """The weight that levels and grid of a `DataQuantizer`'s problem make; `solve` finds them."""
    problem = make_problem(w, fmt, group_size, valid, hessian)
    if problem.w.numel() == 0:
        return find(DEFAULTS[fmt.name], fmt.name)(w, fmt, group_size, valid)
    return problem.result(*solve(problem))


def damp(h: Tensor, share: float = DAMPING) -> Tensor:
    """H [B, K, K] plus a share of its mean diagonal: positive definite, also where H is zero."""
    diagonal = h.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    added = torch.where(mean > 0, share * mean, 1.0)
    # A column that no input touches has a zero diagonal: it counts as the others do.
    added = torch.where(diagonal > 0, added, torch.where(mean > 0, mean, 1.0))
    return h + torch.diag_embed(added)


def make_grid(scale: Tensor, group_size: int | None, zero: Tensor | None = None) -> Grid:
    """The grid that stores unit scales [N, units] and zeros, which only groups have."""
    channel, group = split_scales(scale, group_size)
    group_zero = None
    if zero is not None and group is not None:
        group_zero = (zero / channel.clamp_min(_FLT_MIN)[:, None]).half()
        group_zero = torch.where(channel[:, None] > 0, group_zero, 0.0)
    return Grid(channel, group, group_zero)


def nearest_levels(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format) -> Tensor:
    """The levels v for which scale * v + zero is nearest to x; those of 0 where the scale is 0."""
    if zero is not None:
        x = x - zero
    none = scale.abs() < _FLT_MIN
    x = torch.where(none, 0.0, x)
    codes = nearest_codes(
        x * scale.sign() if fmt.bits == 1 else x, torch.where(none, 1.0, scale), fmt
    )
    return codes.mul_(fmt.mul).add_(fmt.add)


def values_of(levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """scale * levels + zero."""
    return levels * scale if zero is None else torch.addcmul(zero, levels, scale)


def refit(problem: Problem, levels: Tensor, grid: Grid) -> Grid:
    """The grid on which levels [B, R, K] have the least loss; a row that gains nothing keeps its.

    A least-squares problem in the row's scales (and zeros), under H.
    """
    parts = [grid.scale, *([] if grid.zero is None else [grid.zero])]
    before = torch.cat(parts, dim=1).view(*levels.shape[:2], -1)
    rows = max(1, _SYSTEM // (len(levels) * before.shape[2] ** 2))
    found = torch.cat(
        [
            _least_squares(problem, levels[:, part], problem.w[:, part], before[:, part])
            for part in (slice(at, at + rows) for at in range(0, levels.shape[1], rows))
        ],
        dim=1,
    ).flatten(0, 1)
    zero = None if grid.zero is None else found[:, problem.units :]
    new = make_grid(found[:, : problem.units], problem.group_size, zero)
    return better(problem, levels, new, grid)


def _least_squares(problem: Problem, levels: Tensor, w: Tensor, before: Tensor) -> Tensor:
    """Scales, then zeros if `before` has any, of some rows: [B, R, unknowns]."""
    units, unknowns = problem.units, before.shape[2]
    designs = [levels, *([torch.ones_like(levels)] if unknowns > units else [])]
    a = before.new_zeros(*before.shape, unknowns, dtype=torch.float64)
    y = torch.zeros_like(before, dtype=torch.float64)
    for u in range(units):
        columns = problem.unit == u
        for i, design in enumerate(designs):
            through = design[:, :, columns] @ problem.hessian[:, columns]  # [B, R, K]
            row = i * units + u
            y[:, :, row] = (through * w).sum(-1)
            for j, other in enumerate(designs):
                sums = through.new_zeros(*before.shape[:2], units)
                sums.index_add_(2, problem.unit, through * other)
                a[:, :, row, j * units : (j + 1) * units] = sums
    # What the data do not determine stays near what it was.
    ridge = 1e-6 * a.diagonal(dim1=2, dim2=3).mean(-1, keepdim=True) + _FLT_MIN
    a = a + torch.diag_embed(ridge.expand_as(y))
    found = torch.linalg.solve(a, y + ridge * before).float()
    return torch.where(found.isfinite().all(dim=-1, keepdim=True), found, before)


def better(problem: Problem, levels: Tensor, new: Grid, old: Grid) -> Grid:
    """Row by row the grid on which these levels have the smaller loss."""
    wins = grid_loss(problem, levels, new) < grid_loss(problem, levels, old)
    return choose(wins, new, old)


def choose(wins: Tensor, new: Grid, old: Grid) -> Grid:
    """`new` where `wins` bool [N], else `old`; one that has no zeros has zeros of 0."""

    def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None and b is None:
            return None
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        return torch.where(wins[:, None], a, b)

    channel = torch.where(wins, new.channel, old.channel)
    return Grid(channel, pick(new.group, old.group), pick(new.group_zero, old.group_zero))


def grid_loss(problem: Problem, levels: Tensor, grid: Grid) -> Tensor:
    """`Problem.loss` of levels [B, R, K] on a grid: [N]."""
    zero = None if grid.zero is None else problem.spread(grid.zero)
    return problem.loss(values_of(levels, problem.spread(grid.scale), zero))


def padded_units(problem: Problem) -> tuple[Tensor, Tensor]:
    """The weights by units [N, units, L], and their mask, as `group_units` gives them."""
    return group_units(problem.weights(), problem.group_size, problem.valid)
