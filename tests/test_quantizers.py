"""Quantizers: the codes and scales they choose, for every format."""

import numpy as np
import oracle
import pytest
import torch

from lowbit import _core, quantizers
from lowbit.formats import FORMATS
from lowbit.quantizers import dequantize_weight, quantize_weight
from lowbit.schemes import Scheme

CASES = [
    pytest.param(
        Scheme(weight, group_size=group, quantizer=quantizer), id=f"{weight}-{quantizer}-g{group}"
    )
    for weight, quantizer in [
        ("int8", "minmax"),
        ("int8", "mse"),
        ("int4", "minmax"),
        ("int4", "mse"),
        ("int2", "minmax"),
        ("int2", "mse"),
        ("ternary", "minmax"),
        ("ternary", "mse"),
        ("binary", "mean"),
    ]
    for group in (None, 32)
]
all_cases = pytest.mark.parametrize("scheme", CASES)


def values(q):
    return q.format.mul * q.codes.to(torch.int64) + q.format.add


def unit_scales(q):
    """The effective scale of every weight, float32 [N, K]."""
    scale = q.scale[:, None].expand(q.codes.shape)
    if q.group_scale is not None:
        spread = q.group_scale.float().repeat_interleave(q.group_size, 1)
        scale = scale * spread[:, : q.codes.shape[1]]
    return scale


def error(w, q):
    return (w.double() - dequantize_weight(q).double()).square().sum(1)


def test_formats_are_the_extensions():
    for name, fmt in FORMATS.items():
        other = oracle.FORMATS[name]
        assert (fmt.bits, fmt.mul, fmt.add) == (other.bits, other.mul, other.add)
        assert (fmt.planes, fmt.depth) == (other.planes, other.depth)
        produced = oracle.PRODUCED_VALUES[name]
        assert (fmt.min_value, fmt.max_value) == (produced[0], produced[-1])
        assert fmt.packed_shape(17, 65) == oracle.packed_shape(name, 17, 65)


@all_cases
def test_shapes_dtypes_and_produced_values(scheme):
    w = torch.randn(21, 75)
    q = quantize_weight(w, scheme)
    assert q.codes.shape == w.shape
    assert q.codes.dtype == torch.uint8
    assert q.scale.shape == (21,)
    assert q.scale.dtype == torch.float32
    assert q.group_zero is None
    if scheme.group_size:
        assert q.group_scale.shape == (21, 3)
        assert q.group_scale.dtype == torch.float16
    else:
        assert q.group_scale is None
    assert set(values(q).flatten().tolist()) <= set(oracle.PRODUCED_VALUES[scheme.weight])
    assert torch.isfinite(q.scale).all()


@all_cases
def test_codes_are_nearest_to_the_stored_scale(scheme):
    w = torch.randn(9, 70)
    q = quantize_weight(w, scheme)
    scale = unit_scales(q).double()
    chosen = (w.double() - scale * values(q)).abs()
    for level in oracle.PRODUCED_VALUES[scheme.weight]:
        other = (w.double() - scale * level).abs()
        assert (chosen <= other + 1e-6 * scale.abs()).all()


@all_cases
def test_dequantize_is_the_oracles(scheme):
    q = quantize_weight(torch.randn(5, 70), scheme)
    want = oracle.dequantize_weight(
        q.codes.numpy(),
        scheme.weight,
        q.scale.numpy(),
        None if q.group_scale is None else q.group_scale.numpy(),
        None,
        scheme.group_size,
    )
    np.testing.assert_allclose(dequantize_weight(q).numpy(), want, rtol=1e-6)


def test_dequantize_with_zeros():
    rng = np.random.default_rng(1)
    codes = oracle.random_codes(rng, "int4", (4, 70))
    scale = oracle.random_scale(rng, 4)
    group_scale, group_zero = oracle.random_groups(rng, 4, 70, 32, zeros=True)
    q = quantizers.QuantizedWeight(
        torch.from_numpy(codes),
        torch.from_numpy(scale),
        torch.from_numpy(group_scale),
        torch.from_numpy(group_zero),
        FORMATS["int4"],
        32,
    )
    want = oracle.dequantize_weight(codes, "int4", scale, group_scale, group_zero, 32)
    np.testing.assert_allclose(dequantize_weight(q).numpy(), want, rtol=1e-5, atol=1e-6)


@all_cases
def test_padding_has_code_0_and_no_influence(scheme):
    w = torch.randn(6, 96)
    valid = torch.arange(96) % 24 < 19
    noisy = torch.where(valid, w, torch.full_like(w, 1e9))
    q = quantize_weight(torch.where(valid, w, 0.0), scheme, valid)
    loud = quantize_weight(noisy, scheme, valid)
    assert (q.codes[:, ~valid] == 0).all()
    assert torch.equal(q.codes, loud.codes)
    assert torch.equal(q.scale, loud.scale)
    if scheme.group_size is None:  # the valid weights alone give the same
        alone = quantize_weight(w[:, valid].contiguous(), scheme)
        torch.testing.assert_close(q.scale, alone.scale, rtol=1e-5, atol=0)
        assert (q.codes[:, valid] != alone.codes).float().mean() < 0.01


@all_cases
def test_a_group_of_padding_alone(scheme):
    valid = torch.arange(96) < 30
    q = quantize_weight(torch.randn(3, 96), scheme, valid)
    assert (q.codes[:, 30:] == 0).all()
    assert torch.isfinite(dequantize_weight(q)).all()


@all_cases
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -1e-39])
def test_rows_that_are_zero_or_too_small(scheme, value):
    w = torch.randn(3, 64)
    w[1] = value
    q = quantize_weight(w, scheme)
    assert q.scale[1] == 0
    assert (dequantize_weight(q)[1] == 0).all()
    assert torch.isfinite(dequantize_weight(q)).all()
    assert len(q.codes[1].unique()) == 1


def test_a_zero_group_in_a_channel():
    w = torch.randn(2, 96)
    w[0, 32:64] = 0
    for weight in FORMATS:
        q = quantize_weight(w, Scheme(weight, group_size=32))
        assert q.group_scale[0, 1] == 0
        assert (dequantize_weight(q)[0, 32:64] == 0).all()


@all_cases
@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_extreme_magnitudes(scheme, size):
    w = (torch.rand(4, 64) * 2 - 1) * size
    unit = (w / size).contiguous()
    q, small = quantize_weight(w, scheme), quantize_weight(unit, scheme)
    assert torch.isfinite(q.scale).all()
    assert (q.codes != small.codes).float().mean() < 0.02


def test_minmax_int8_is_the_textbook_formula():
    w = torch.randn(8, 50)
    q = quantize_weight(w, Scheme("int8"))
    scale = w.abs().amax(1) / 127
    assert torch.equal(q.scale, scale)
    assert torch.equal(values(q), torch.round(w / scale[:, None]).to(torch.int64))


def test_minmax_clips_nothing():
    w = torch.randn(50, 64)
    for weight in ("int8", "int4", "int2", "ternary"):
        fmt = FORMATS[weight]
        q = quantize_weight(w, Scheme(weight, quantizer="minmax"))
        step = q.scale[:, None] * fmt.mul
        assert ((w - dequantize_weight(q)).abs() <= step / 2 * 1.00001).all()


@pytest.mark.parametrize("weight", ["int8", "int4", "int2", "ternary"])
@pytest.mark.parametrize("spread", ["normal", "heavy"])
def test_mse_is_close_to_an_exhaustive_search(weight, spread):
    w = torch.randn(12, 160)
    if spread == "heavy":
        w = w * torch.randn(12, 160).abs() ** 2
    fmt = FORMATS[weight]
    found = error(w, quantize_weight(w, Scheme(weight, quantizer="mse")))
    rtn = error(w, quantize_weight(w, Scheme(weight, quantizer="minmax")))
    assert (found <= rtn * 1.0001).all()
    best = torch.full_like(found, torch.inf)
    amax = w.abs().amax(1)
    for sign in (1, -1):
        for step in range(1, 500):
            scale = (
                sign * amax * step / 500 / (1 if weight in ("ternary", "int2") else 4)
            ).double()
            codes = ((w / scale[:, None] - fmt.add) / fmt.mul).round().clamp(*fmt.produced)
            e = (w - scale[:, None] * (fmt.mul * codes + fmt.add)).square().sum(1)
            best = torch.minimum(best, e)
    if weight != "int8":  # with 255 levels the search above is too coarse to be a bound
        assert (found <= best * 1.05).all()
        assert found.sum() <= best.sum() * 1.02


@pytest.mark.parametrize("weight", ["int4", "int2", "ternary"])
def test_mse_finds_weights_that_are_levels_already(weight):
    levels = torch.tensor(oracle.PRODUCED_VALUES[weight], dtype=torch.float32)
    picked = levels[torch.randint(len(levels), (16, 128))]
    picked[:, : len(levels)] = levels  # the whole range is used
    w = picked * torch.rand(16, 1) * 0.1
    q = quantize_weight(w, Scheme(weight))
    torch.testing.assert_close(dequantize_weight(q), w, rtol=1e-5, atol=0)


def test_int4_uses_the_extra_level_on_either_side():
    w = torch.arange(-7, 9, dtype=torch.float32)[None]  # one more level above zero
    q = quantize_weight(w, Scheme("int4"))
    torch.testing.assert_close(dequantize_weight(q), w)
    assert q.scale[0] < 0


def test_binary_is_sign_and_mean():
    w = torch.tensor([[1.0, -3.0, 0.0, -0.0]])
    q = quantize_weight(w, Scheme("binary"))
    assert q.codes.tolist() == [[1, 0, 1, 1]]
    assert q.scale.tolist() == [1.0]


def test_largest_group_scale_is_one():
    w = torch.randn(20, 256) * torch.logspace(-6, 6, 20)[:, None]
    for weight in FORMATS:
        q = quantize_weight(w, Scheme(weight, group_size=64))
        assert (q.group_scale.abs().amax(1) == 1).all()
        assert (q.scale > 0).all()


def test_groups_are_rounded_by_themselves():
    w = torch.randn(7, 96)
    for weight in ("int8", "int4", "binary"):
        q = quantize_weight(w, Scheme(weight, group_size=32))
        for g in range(3):
            alone = quantize_weight(w[:, 32 * g : 32 * g + 32].contiguous(), Scheme(weight))
            torch.testing.assert_close(
                q.scale * q.group_scale[:, g].float(), alone.scale, rtol=1e-3, atol=0
            )


@all_cases
def test_rows_do_not_depend_on_each_other_or_on_chunks(scheme, monkeypatch):
    w = torch.randn(11, 70)
    whole = quantize_weight(w, scheme)
    monkeypatch.setattr(quantizers, "_CHUNK", 1)
    by_row = quantize_weight(w, scheme)
    assert torch.equal(whole.codes, by_row.codes)
    assert torch.equal(whole.scale, by_row.scale)


@all_cases
def test_deterministic_over_threads(scheme, use_threads):
    w = torch.randn(3, 40000)
    results = []
    for threads in (1, 2, 1):
        use_threads(threads)
        results.append(quantize_weight(w, scheme))
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes)
        assert torch.equal(results[0].scale, other.scale)


@all_cases
@pytest.mark.parametrize("shape", [(0, 40), (5, 0), (0, 0), (1, 1)])
def test_empty_and_tiny(scheme, shape):
    q = quantize_weight(torch.ones(shape), scheme)
    assert q.codes.shape == shape
    assert q.scale.shape == shape[:1]
    torch.testing.assert_close(dequantize_weight(q), torch.ones(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad):
    w = torch.zeros(4, 8)
    w[2, 3] = bad
    w[0, 0] = bad
    with pytest.raises(ValueError, match="2 of 32 weights are NaN or Inf"):
        quantize_weight(w, Scheme("int8"))


@pytest.mark.parametrize(
    ("w", "valid", "message"),
    [
        (torch.zeros(3), None, "float32 matrix"),
        (torch.zeros(3, 4).half(), None, r"torch\.float16"),
        (torch.zeros(3, 4, device="meta"), None, "meta"),
        (torch.zeros(3, 4), torch.ones(3, dtype=torch.bool), r"valid must be bool \[4\]"),
        (torch.zeros(3, 4), torch.ones(4), "valid must be bool"),
    ],
)
def test_bad_arguments(w, valid, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(w, Scheme("int8"), valid)


def test_register(monkeypatch):
    monkeypatch.setattr(quantizers, "_REGISTRY", dict(quantizers._REGISTRY))

    @quantizers.register("halves", ["int4"])
    def halves(w, fmt, group_size, valid):
        scale = torch.full((len(w),), 0.5)
        codes = quantizers.nearest_codes(w, scale[:, None], fmt).to(torch.uint8)
        return quantizers.QuantizedWeight(codes, scale, None, None, fmt, group_size)

    scheme = Scheme.parse("w4a8-halves")
    q = quantize_weight(torch.tensor([[1.0, -0.5, 9.0]]), scheme)
    assert dequantize_weight(q).tolist() == [[1.0, -0.5, 3.5]]
    with pytest.raises(ValueError, match="no quantizer 'halves' for int8"):
        Scheme("int8", quantizer="halves")


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "ternary"])
def test_fit_scales_counts_the_nearest_levels(isa, name):
    """The kernel behind "mse" against float64, on lengths with every kind of tail."""
    fmt = FORMATS[name]
    low, high = fmt.produced
    levels = fmt.mul * np.arange(low, high + 1) + fmt.add
    rng = np.random.default_rng(3)
    for length in (0, 1, 15, 16, 17, 33, 100):
        units, masks = 6, 2
        mask = (rng.random((masks, length)) < 0.8).astype(np.float32)
        x = rng.standard_normal((units, length)).astype(np.float32) * np.tile(mask, (3, 1))
        scale = rng.uniform(0.02, 0.5, units).astype(np.float32)
        out = np.full((units, 3), np.nan, np.float32)
        addresses = [a.ctypes.data for a in (x, mask, scale, out)]
        shape = (units, masks, length)
        sizes = (addresses[2], fmt.index, int(low), int(high), addresses[3], 2)
        _core.fit_scales(addresses[0], addresses[1], *shape, *sizes)
        for unit in range(units):
            w, m, s = x[unit].astype(float), mask[unit % masks].astype(float), float(scale[unit])
            v = m * levels[np.abs(w[:, None] - s * levels).argmin(axis=1)] if length else w
            expected = [((w - s * v) ** 2).sum(), (v * w).sum(), (v * v).sum()]
            np.testing.assert_allclose(out[unit], expected, rtol=1e-4, atol=1e-5)


def test_fit_scales_gives_the_same_bits_on_every_isa_and_thread_count(use_isa, use_threads):
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(70, 333, generator=generator)
    results = []
    for built in _core.isas():
        if built["usable"]:
            use_isa(built["name"])
            for count in (1, 3):
                use_threads(count)
                results.append(quantize_weight(w, Scheme("int4", group_size=64)))
    assert len(results) >= 2
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.scale, results[0].scale)
        assert torch.equal(other.group_scale, results[0].group_scale)
