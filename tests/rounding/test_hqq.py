"""Half-quadratic quantization: what it minimises, and weights whose grid is known."""

import pytest
import torch

from lowbit.quantizers import dequantize_weight, quantize_weight
from lowbit.schemes import Scheme


def weights(rows=16, k=128, seed=0):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def lp_error(q, w):
    return float((dequantize_weight(q) - w).abs().pow(0.7).sum())


@pytest.mark.parametrize("fmt", ["int8", "int4", "int2"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_its_own_error_is_the_smaller_one(fmt, group_size):
    w = weights() + 0.3 * (group_size is not None)
    plain = quantize_weight(w, Scheme(fmt, group_size=group_size))
    q = quantize_weight(w, Scheme(fmt, group_size=group_size, quantizer="hqq"))
    assert lp_error(q, w) <= 1.001 * lp_error(plain, w)  # float16 group scales come afterwards
    assert (q.group_zero is not None) == (group_size is not None)


def test_it_finds_the_grid_that_weights_lie_on():
    scale = torch.rand(8, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    random = torch.Generator().manual_seed(2)
    levels = torch.randint(-8, 8, (8, 2, 32), generator=random).float()
    levels[:, :, 0], levels[:, :, 1] = -8, 7  # the whole range is used
    w = ((levels + torch.tensor([3.0, -2.0])[:, None]) * scale[..., None]).flatten(1)
    q = quantize_weight(w, Scheme("int4", group_size=32, quantizer="hqq"))
    torch.testing.assert_close(dequantize_weight(q), w, rtol=2e-3, atol=2e-3)
    symmetric = quantize_weight(w, Scheme("int4", group_size=32))
    assert (dequantize_weight(symmetric) - w).abs().max() > 0.1


def test_padding_and_zeros():
    w = weights(4, 64)
    valid = torch.arange(64) % 32 < 20
    w[:, ~valid] = 0
    w[2] = 0
    for group_size in (None, 32):
        q = quantize_weight(w, Scheme("int4", group_size=group_size, quantizer="hqq"), valid)
        assert not q.codes[:, ~valid].any()
        assert dequantize_weight(q).isfinite().all()
        assert float(dequantize_weight(q)[2].abs().max()) == 0.0


def test_a_shift_of_a_group_is_followed():
    w = weights(8, 96) * 0.1 + torch.tensor([2.0, 0.0, -5.0]).repeat_interleave(32)
    q = quantize_weight(w, Scheme("int2", group_size=32, quantizer="hqq"))
    plain = quantize_weight(w, Scheme("int2", group_size=32))
    assert (dequantize_weight(q) - w).std() < 0.6 * (dequantize_weight(plain) - w).std()


def test_no_form_for_three_levels_or_two():
    for fmt in ("ternary", "binary"):
        with pytest.raises(ValueError, match="no quantizer 'hqq'"):
            Scheme(fmt, quantizer="hqq")
