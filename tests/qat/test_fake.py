"""Fake quantization: its values are what codes mean, its gradients are the published ones."""

from __future__ import annotations

import pytest
import torch

from lowbit.formats import FORMATS
from lowbit.qat import fake
from lowbit.quantizers import (
    dequantize_weight,
    effective_scales,
    quantize_weight,
    round_to_scales,
    split_scales,
)
from lowbit.schemes import Scheme

LEARNED = ("int8", "int4", "int2", "ternary")


def weights(n=6, k=70, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def scales(w, scheme):
    groups = -(-w.shape[1] // scheme.group_size) if scheme.group_size else 1
    generator = torch.Generator().manual_seed(1)
    return torch.rand(w.shape[0], groups, generator=generator) / FORMATS[scheme.weight].max_value


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("weight", LEARNED)
def test_learned_values_are_those_of_codes_at_these_scales(weight, group_size):
    scheme, w = Scheme(weight, group_size=group_size), weights()
    initial = scales(w, scheme)
    log_scale = 0.3 * torch.randn(initial.shape, generator=torch.Generator().manual_seed(2))
    found = fake.fake_learned(w, initial, log_scale, scheme, None)
    unit = fake.unit_scales(initial, log_scale)
    torch.testing.assert_close(unit, initial * log_scale.exp())
    codes = round_to_scales(w, unit, FORMATS[weight], group_size)
    torch.testing.assert_close(found, dequantize_weight(codes), rtol=1e-6, atol=0)
    # No other level of the unit is nearer to a weight.
    lowest, highest = FORMATS[weight].produced
    levels = FORMATS[weight].value(torch.arange(lowest, highest + 1)).tolist()
    spread = effective_scales(*split_scales(unit, group_size))
    spread = spread.repeat_interleave(group_size or 70, dim=1)[:, :70]
    least = torch.stack([(w - level * spread).abs() for level in levels]).amin(0)
    assert ((w - found).abs() <= least * (1 + 1e-3) + 1e-3 * spread.abs()).all()


@pytest.mark.parametrize("weight", LEARNED)
def test_gradients_of_learned_scales_are_those_of_lsq(weight):
    scheme, fmt = Scheme(weight), FORMATS[weight]
    w = weights().requires_grad_()
    initial = scales(w, scheme)
    initial[1] *= -1  # int4's least-squares scales may be negative
    log_scale = torch.full_like(initial, 0.1, requires_grad=True)
    outside = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    fake.fake_learned(w, initial, log_scale, scheme, None).backward(outside)
    s = fake.unit_scales(initial, log_scale.detach())[:, 0]
    for n in range(w.shape[0]):
        total = 0.0
        for k in range(w.shape[1]):
            ratio = float(w[n, k].detach() / s[n])
            inside = fmt.min_value <= ratio <= fmt.max_value
            codes = range(fmt.produced[0], fmt.produced[1] + 1)
            level = min((fmt.mul * c + fmt.add for c in codes), key=lambda v: abs(v - ratio))
            back = outside[n, k] * w[n, k] > 0
            assert w.grad[n, k] == (outside[n, k] if inside or back else 0)
            total += float(outside[n, k]) * (level - ratio if inside else level)
        lsq = total / (w.shape[1] * fmt.max_value) ** 0.5
        assert float(log_scale.grad[n, 0] * s[n]) == pytest.approx(lsq, rel=1e-4, abs=1e-5)


def test_a_small_step_of_sgd_moves_a_scale_as_far_as_in_lsq():
    scheme, w = Scheme("int4"), weights()
    initial = scales(w, scheme)
    log_scale = torch.zeros_like(initial, requires_grad=True)
    fake.fake_learned(w, initial, log_scale, scheme, None).square().sum().backward()
    rate = 1e-6
    moved = fake.unit_scales(initial, log_scale.detach() - rate * log_scale.grad) - initial
    lsq = -rate * log_scale.grad * initial  # the gradient is LSQ's over the scale
    torch.testing.assert_close(moved, lsq, rtol=0.02, atol=1e-7)


def test_padding_has_no_part_in_a_scale():
    scheme, w = Scheme("int4"), weights(k=64)
    valid = torch.arange(64) % 2 == 0
    log_scale = torch.zeros(6, 1, requires_grad=True)
    initial = scales(w, scheme)
    fake.fake_learned(w * valid, initial, log_scale, scheme, valid)[:, valid].sum().backward()
    dense = torch.zeros(6, 1, requires_grad=True)
    fake.fake_learned(w[:, valid], initial, dense, scheme, None).sum().backward()
    torch.testing.assert_close(log_scale.grad, dense.grad)


@pytest.mark.parametrize("weight", LEARNED)
def test_a_scale_of_zero_makes_zeros_and_no_nan(weight):
    scheme, w = Scheme(weight), weights().requires_grad_()
    log_scale = torch.zeros(6, 1, requires_grad=True)
    y = fake.fake_learned(w, torch.zeros(6, 1), log_scale, scheme, None)
    y.sum().backward()
    assert not y.any()
    assert w.grad.isfinite().all()
    assert not log_scale.grad.any()


def test_initial_scales_of_zero_take_the_usual_size():
    given = torch.tensor([[0.0], [-2.0], [3.0], [0.0]])
    assert fake.initial_scales(given).tolist() == [[2.0], [-2.0], [3.0], [2.0]]
    assert (fake.initial_scales(torch.zeros(2, 4)) > 0).all()


@pytest.mark.parametrize("group_size", [None, 32])
def test_binary_weights(group_size):
    scheme = Scheme("binary", group_size=group_size)
    w = weights()
    w[0, :3] = torch.tensor([0.0, 9.0, -9.0])
    w.requires_grad_()
    y = fake.fake_binary(w, scheme, None)
    torch.testing.assert_close(y, dequantize_weight(quantize_weight(w.detach(), scheme)))
    assert (y[0, 0] > 0) == (w[0, 0] >= 0)
    outside = torch.ones_like(w)
    outside[0, 1] = -1.0  # a step would raise 9 and lower -9
    (grad,) = torch.autograd.grad(y, w, outside, retain_graph=True)
    assert grad[0, :3].tolist() == [1.0, 0.0, 0.0]
    (grad,) = torch.autograd.grad(y, w, -outside)
    assert grad[0, :3].tolist() == [-1.0, 1.0, -1.0]  # back towards zero


@pytest.mark.parametrize(("activation", "largest"), [("int8", 127), ("int16", 32639)])
def test_rounded_activations(activation, largest):
    x = weights(5, 40)
    x[2] = 0
    x.requires_grad_()
    y = fake.fake_activation(x, activation, (-1,))
    scale = x.detach().abs().amax(1, keepdim=True) / largest
    codes = torch.where(scale > 0, x.detach() / scale, 0.0).round()
    torch.testing.assert_close(y, codes * scale, rtol=1e-6, atol=0)
    assert not y[2].any()
    y.sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ["int8", "int16", "binary"])
def test_a_unit_with_nan_is_nan_and_the_others_are_not(activation, bad):
    x = weights(3, 8)
    x[1, 2] = bad
    y = fake.fake_activation(x, activation, (-1,))
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


def test_binary_activations():
    x = torch.tensor([[-1.0, 0.0, 0.5, 12.5], [1.0, 1.0, -1.0, 1.0]], requires_grad=True)
    y = fake.fake_activation(x, "binary", (-1,))
    assert y.tolist() == [[-3.5, 3.5, 3.5, 3.5], [1.0, 1.0, -1.0, 1.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]  # 12.5 is far from its sign's change
