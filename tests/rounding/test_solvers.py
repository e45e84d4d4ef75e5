"""The quantizers that minimise a quadratic form, against brute force and a second algorithm."""

import itertools

import numpy as np
import pytest
import torch

from lowbit.formats import FORMATS
from lowbit.quantizers import (
    DEFAULTS,
    dequantize_weight,
    find,
    needs_data,
    quantize_weight,
)
from lowbit.rounding.adaround import learn
from lowbit.rounding.descent import solve
from lowbit.rounding.gptq import compensate, start_grid
from lowbit.rounding.quadratic import grid_loss, make_problem
from lowbit.schemes import Scheme

WITH_DATA = ("gptq", "adaround", "descent")


def problem_of(fmt="int4", rows=6, k=8, blocks=1, group_size=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(rows * blocks, k, generator=random)
    mix = torch.randn(blocks, k, k, generator=random)
    x = torch.randn(blocks, 64, k, generator=random) @ mix
    return w, x.transpose(1, 2) @ x / 64


def loss(q, w, h):
    """Mean square of the output error, in float64, by NumPy."""
    error = (dequantize_weight(q) - w).double().numpy().reshape(len(h), -1, w.shape[1])
    return np.einsum("brk,bkl,brl->br", error, h.double().numpy(), error).sum()


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_output_error_is_smaller_than_rounding_to_nearest(name, fmt, group_size):
    w, h = problem_of(fmt, rows=8, k=72, group_size=group_size)
    plain = quantize_weight(w, Scheme(fmt, group_size=group_size))
    q = quantize_weight(w, Scheme(fmt, group_size=group_size, quantizer=name), None, h)
    assert q.codes.shape == w.shape
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) <= FORMATS[fmt].produced[1]
    assert int(q.codes.min()) >= FORMATS[fmt].produced[0]
    assert (q.group_scale is None) == (group_size is None)
    assert loss(q, w, h) < 0.9 * loss(plain, w, h)


@pytest.mark.parametrize("name", ["gptq", "adaround"])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int2", "ternary", "binary"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_with_inputs_that_are_independent_it_is_rounding_to_nearest(name, fmt, group_size):
    w, _ = problem_of(rows=8, k=72)
    plain = quantize_weight(w, Scheme(fmt, group_size=group_size))
    q = quantize_weight(
        w, Scheme(fmt, group_size=group_size, quantizer=name), None, torch.eye(72)[None]
    )
    torch.testing.assert_close(q.codes, plain.codes, rtol=0, atol=0)
    torch.testing.assert_close(dequantize_weight(q), dequantize_weight(plain), rtol=1e-3, atol=1e-6)


def brain_surgeon(w, h, scale, order, fmt):
    """Levels of one row: after each weight all others move to the least loss, by elimination."""
    w, inverse = w.astype(np.float64).copy(), np.linalg.inv(h)
    levels = np.zeros_like(w)
    left = list(order)
    for k in order:
        code = np.clip(np.round((w[k] / scale - fmt.add) / fmt.mul), *fmt.produced)
        levels[k] = code * fmt.mul + fmt.add
        error = (w[k] - levels[k] * scale) / inverse[k, k]
        left.remove(k)
        w[left] -= error * inverse[left, k]
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return levels


@pytest.mark.parametrize("fmt", ["int4", "int2", "ternary"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_gptq_is_optimal_brain_surgeon_weight_by_weight(fmt, blocks):
    w, h = problem_of(rows=4, k=70, blocks=blocks)  # more columns than one block of them
    problem = make_problem(w, FORMATS[fmt], None, None, h)
    grid = start_grid(problem)
    found = compensate(problem, grid)
    hessian = problem.hessian.double().numpy()
    for b, r in itertools.product(range(blocks), range(4)):
        order = np.argsort(-np.diagonal(hessian[b]), kind="stable")
        row = problem.w[b, r].numpy()
        wanted = brain_surgeon(row, hessian[b], float(grid.scale[b * 4 + r]), order, FORMATS[fmt])
        assert np.mean(wanted == found[b, r].numpy()) > 0.98  # but for ties in float32


def best_levels(problem, grid, choices):
    """The least loss of each row over all levels that `choices` [K] lists, by trying them all."""
    h = problem.hessian[0].double().numpy()
    found = []
    for r, row in enumerate(problem.w[0].double().numpy()):
        scale = float(grid.scale[r])
        tried = np.array(list(itertools.product(*choices[r]))) * scale - row
        found.append(np.einsum("tk,kl,tl->t", tried, h, tried).min())
    return np.array(found)


def test_descent_is_near_the_best_of_all_codes():
    w, h = problem_of(rows=12, k=7)
    fmt = FORMATS["ternary"]
    problem = make_problem(w, fmt, None, None, h)
    levels, grid = solve(problem, start_grid(problem))
    own = grid_loss(problem, levels, grid).double().numpy()
    best = best_levels(problem, grid, [[(-1, 0, 1)] * 7] * 12)
    assert (own >= best * (1 - 1e-4)).all()
    assert own.sum() < 1.15 * best.sum()


def test_no_single_step_improves_what_descent_found():
    w, h = problem_of(rows=5, k=24)
    problem = make_problem(w, FORMATS["int2"], None, None, h)
    levels, grid = solve(problem, start_grid(problem))
    before = grid_loss(problem, levels, grid)
    better = 0
    for k, step in itertools.product(range(24), (-2.0, 2.0)):
        moved = levels.clone()
        moved[:, :, k] = (moved[:, :, k] + step).clamp(-3, 3)
        better += int((grid_loss(problem, moved, grid) < before * 0.999).sum())
    assert better <= 2  # the last fit of the scales comes after the last sweep


def test_adaround_is_near_the_best_of_all_ways_up_and_down():
    w, h = problem_of(rows=12, k=8)
    fmt = FORMATS["int4"]
    problem = make_problem(w, fmt, None, None, h)
    grid = start_grid(problem)
    levels = learn(problem, grid)
    exact = (problem.w[0] / grid.scale).double().numpy().clip(-8, 7)
    floor = np.minimum(np.floor(exact), 6)
    assert ((levels[0].numpy() - floor) >= 0).all()
    assert ((levels[0].numpy() - floor) <= 1).all()
    own = grid_loss(problem, levels, grid).double().numpy()
    choices = [[(value, value + 1) for value in row] for row in floor]
    best = best_levels(problem, grid, choices)
    nearest = grid_loss(problem, torch.tensor(np.round(exact)).float()[None], grid).double().numpy()
    assert own.sum() < 1.25 * best.sum()
    assert own.sum() < 0.85 * nearest.sum()
    assert (own <= nearest * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", WITH_DATA)
def test_blocks_of_rows_have_inputs_of_their_own(name):
    w, h = problem_of(rows=2, k=9, blocks=6)
    scheme = Scheme("int4", quantizer=name)
    together = quantize_weight(w, scheme, None, h)
    for b in range(6):
        alone = quantize_weight(w[2 * b : 2 * b + 2], scheme, None, h[b : b + 1])
        assert float((alone.codes == together.codes[2 * b : 2 * b + 2]).float().mean()) > 0.9


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("group_size", [None, 32])
def test_padding_gets_code_0_and_changes_nothing(name, group_size):
    w, h = problem_of(rows=4, k=40)
    valid = torch.arange(64) % 32 < 20
    padded_w, padded_h = torch.zeros(4, 64), torch.zeros(1, 64, 64)
    padded_w[:, valid] = w
    padded_h[:, valid.nonzero(), valid.nonzero().T] = h
    q = quantize_weight(
        padded_w, Scheme("int4", group_size=group_size, quantizer=name), valid, padded_h
    )
    assert not q.codes[:, ~valid].any()
    if group_size is None:
        alone = quantize_weight(w, Scheme("int4", quantizer=name), None, h)
        torch.testing.assert_close(q.codes[:, valid], alone.codes, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_DATA)
def test_the_same_twice(name):
    w, h = problem_of(rows=8, k=40)
    scheme = Scheme("int2", group_size=32, quantizer=name)
    one, two = (quantize_weight(w, scheme, None, h) for _ in range(2))
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("fmt", ["int4", "int2", "binary"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_weights_and_inputs_that_are_zero(name, fmt, group_size):
    scheme = Scheme(fmt, group_size=group_size, quantizer=name)
    w, h = problem_of(rows=4, k=40)
    w[1] = 0
    h[:, 3] = 0
    h[:, :, 3] = 0
    q = quantize_weight(w, scheme, None, h)
    assert dequantize_weight(q).isfinite().all()
    assert float(dequantize_weight(q)[1].abs().max()) == 0.0
    q = quantize_weight(w, scheme, None, torch.zeros_like(h))  # no input at all
    assert dequantize_weight(q).isfinite().all()


def test_only_these_need_data():
    assert [name for name in (*WITH_DATA, "hqq", "mse", "minmax", "mean") if needs_data(name)] == [
        *WITH_DATA
    ]
    assert not needs_data("unheard of")
    assert not any(needs_data(name) for name in DEFAULTS.values())


def test_errors_say_what_is_missing():
    w, h = problem_of()
    scheme = Scheme("int4", quantizer="gptq")
    with pytest.raises(ValueError, match=r"'gptq' needs calibration data.*minmax, mse"):
        quantize_weight(w, scheme)
    with pytest.raises(ValueError, match="needs calibration data"):
        find("gptq", "int4")(w, FORMATS["int4"], None, None)
    with pytest.raises(ValueError, match=r"a Hessian of weights \[6, 8\] is \[G, 8, 8\]"):
        quantize_weight(w, scheme, None, h[:, :4, :4])
    with pytest.raises(ValueError, match="NaN"):
        quantize_weight(w, scheme, None, h * torch.nan)
