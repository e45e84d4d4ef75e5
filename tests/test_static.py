"""Static activations in the kernels equal the oracle bit for bit, on every instruction set.

`_core.linear_static_bias` and `_core.conv2d_static_bias` are tested through the outputs that need
them, and against the definition in exact arithmetic.
"""

from fractions import Fraction
from functools import lru_cache

import numpy as np
import oracle
import oracle_static
import pytest
from operands import (
    ACTIVATION_INDEX,
    FORMAT_INDEX,
    assert_same_bits,
    core_conv2d,
    core_linear,
    random_weights,
)

from lowbit import _core

SCALES = {"int8": 0.021, "int16": 0.00011, "binary": 0.7}
ZEROS = {"int8": (0, -128, 127, 5), "int16": (0,), "binary": (0,)}
GROUPS = ((None, False), (32, False), (64, True))


@lru_cache(maxsize=512)
def linear_case(fmt, activation, m, n, k, group_size=None, zeros=False, zero=0, kind="uniform"):
    rng = np.random.default_rng([m, n, k, zero + 128])
    weights = random_weights(rng, fmt, (n, k), group_size, zeros, bias=n % 2 == 0, kind=kind)
    x = rng.normal(size=(m, k)).astype(np.float32)
    fixed = SCALES[activation], zero
    return x, weights, fixed, oracle_static.linear(x, *weights.astuple(), activation, fixed)


@lru_cache(maxsize=512)
def conv_case(fmt, activation, x_shape, shape, zero, group_size=None, zeros=False, **window):
    rng = np.random.default_rng([*x_shape, *shape, zero + 128])
    weights = random_weights(rng, fmt, shape, group_size, zeros)
    x = rng.normal(size=x_shape).astype(np.float32)
    fixed = SCALES[activation], zero
    expected = oracle_static.conv2d(x, *weights.astuple(), activation, fixed, **window)
    return x, weights, fixed, expected


def test_linear(kernel):
    for zero in ZEROS[kernel.activation]:
        for m, n, k in ((1, 17, 65), (2, 70, 32), (7, 33, 160), (26, 70, 97), (1, 16, 777)):
            for group_size, zeros in GROUPS:
                x, weights, fixed, expected = linear_case(
                    kernel.fmt, kernel.activation, m, n, k, group_size, zeros, zero
                )
                y = core_linear(x, weights, kernel.activation, threads=m % 3 + 1, fixed=fixed)
                assert_same_bits(y, expected)


# images NHWC, weights [N, kh, kw, C / groups], arguments of the convolution
CONVOLUTIONS = (
    ((2, 6, 5, 7), (20, 3, 3, 7), {"padding": (1, 1, 1, 1)}),
    ((1, 7, 6, 3), (16, 3, 3, 3), {"stride": (2, 2), "padding": (0, 1, 0, 1)}),
    ((2, 5, 5, 40), (33, 1, 1, 40), {}),
    ((1, 5, 6, 33), (18, 3, 3, 33), {"padding": (2, 1, 0, 3), "dilation": (2, 1)}),
    ((1, 6, 6, 34), (10, 3, 2, 17), {"groups": 2, "padding": (1, 1, 1, 0)}),
    ((2, 6, 7, 20), (20, 3, 3, 1), {"groups": 20, "padding": (1, 1, 1, 1)}),
    ((1, 9, 8, 35), (35, 5, 5, 1), {"groups": 35, "padding": (2, 2, 2, 2), "stride": (2, 2)}),
    ((1, 6, 6, 32), (32, 3, 3, 4), {"groups": 8, "padding": (1, 1, 1, 1)}),
    ((1, 6, 6, 12), (24, 3, 3, 3), {"groups": 4, "padding": (1, 1, 1, 1)}),
    ((1, 2, 2, 5), (6, 3, 3, 5), {"padding": (3, 3, 3, 3)}),  # windows of nothing but padding
)


@pytest.mark.parametrize("number", range(len(CONVOLUTIONS)))
def test_convolutions(kernel, number):
    x_shape, shape, window = CONVOLUTIONS[number]
    layouts = [(True, True), (True, False)]
    if kernel.activation != "binary":
        layouts += [(False, True), (False, False)]
    for zero in ZEROS[kernel.activation]:
        for group_size, zeros in GROUPS if zero in (0, 127) else GROUPS[:1]:
            x, weights, fixed, expected = conv_case(
                kernel.fmt, kernel.activation, x_shape, shape, zero, group_size, zeros, **window
            )
            for i, (x_last, y_last) in enumerate(layouts):
                y = core_conv2d(
                    x,
                    weights,
                    kernel.activation,
                    **window,
                    threads=i % 3 + 1,
                    x_channels_last=x_last,
                    y_channels_last=y_last,
                    fixed=fixed,
                )
                assert_same_bits(y, expected)


SMALL = [0, -0.0, 1e-45, 1e-38, 1, -1, 0.5, -0.5, 1.5, 2.5, 127, -128, 127.5, -128.5, 128.5]
LARGE = [254.4, 254.5, 255.5, -255.5, 2**22, -(2**22) - 1, 2**31, -(2**31), 1e30, 3.4e38, -3.4e38]
EXTREMES = np.array([*SMALL, *LARGE], np.float32)


@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 2.0**126, 0.0078125, 1e-30])
def test_what_does_not_fit_is_saturated(isa, activation, scale):
    """Ties, infinite quotients, values beyond every integer; at any place of a vector."""
    rng = np.random.default_rng(0)
    x = np.stack([np.roll(np.tile(EXTREMES, 3), shift) for shift in range(20)])
    weights = random_weights(rng, "int8", (5, x.shape[1]), kind="extreme")
    for zero in ZEROS[activation]:
        fixed = scale, zero
        expected = oracle_static.linear(x, *weights.astuple(), activation, fixed)
        assert_same_bits(core_linear(x, weights, activation, fixed=fixed), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(isa, activation, bad):
    """Wherever it stands, and the other rows and images do not notice."""
    rng = np.random.default_rng(0)
    fixed = SCALES[activation], ZEROS[activation][-1]
    weights = random_weights(rng, "int4", (19, 40))
    x = rng.normal(size=(41, 40)).astype(np.float32)
    clean = core_linear(x, weights, activation, fixed=fixed)
    x[np.arange(40), np.arange(40)] = bad
    y = core_linear(x, weights, activation, threads=2, fixed=fixed)
    assert np.isnan(y[:40]).all()
    assert_same_bits(y[40], clean[40])

    for channels, groups in ((5, 1), (40, 1), (20, 20), (32, 8)):
        weights = random_weights(rng, "int4", (channels, 3, 3, channels // groups))
        images = rng.normal(size=(3, 6, 7, channels)).astype(np.float32)
        window = {"padding": (1, 1, 1, 1), "groups": groups, "fixed": fixed}
        clean = core_conv2d(images, weights, activation, **window)
        images[1, 5, 6, -1] = bad
        for x_last in (True,) if activation == "binary" else (True, False):
            for threads in (1, 2, 3):
                y = core_conv2d(
                    images, weights, activation, **window, threads=threads, x_channels_last=x_last
                )
                assert np.isnan(y[1]).all()
                assert_same_bits(y[[0, 2]], clean[[0, 2]])


def test_lowest_products(isa, fmt):
    """-128 times the lowest weight, which nothing dynamic multiplies."""
    rng = np.random.default_rng(0)
    for m, k in ((1, 36), (3, 168), (7, 516), (30, 70)):
        for kind in ("lowest", "highest", "extreme"):
            weights = random_weights(rng, fmt, (35, k), kind=kind)
            x = np.full((m, k), -3e38, np.float32)
            x[0, ::3] *= -1
            for zero in (0, 127):
                expected = oracle_static.linear(x, *weights.astuple(), "int8", (0.5, zero))
                y = core_linear(x, weights, "int8", fixed=(0.5, zero))
                assert_same_bits(y, expected)


def test_depth_beyond_a_chunk(isa):
    """The sum of more than 65,536 weights is one of several parts."""
    rng = np.random.default_rng(0)
    weights = random_weights(rng, "int8", (3, 70_000))
    x = rng.normal(size=(2, 70_000)).astype(np.float32)
    expected = oracle_static.linear(x, *weights.astuple(), "int8", (0.02, -100))
    assert_same_bits(core_linear(x, weights, "int8", fixed=(0.02, -100)), expected)


def test_rows_threads_and_batches_do_not_matter(kernel):
    rng = np.random.default_rng(3)
    zero = ZEROS[kernel.activation][-1]
    weights = random_weights(rng, kernel.fmt, (130, 300))
    x = rng.normal(size=(9, 300)).astype(np.float32)
    fixed = SCALES[kernel.activation], zero
    whole = core_linear(x, weights, kernel.activation, threads=3, fixed=fixed)
    for i in range(9):
        alone = core_linear(x[i : i + 1], weights, kernel.activation, fixed=fixed)
        assert_same_bits(alone, whole[i : i + 1])
    weights = random_weights(rng, kernel.fmt, (40, 3, 3, 33))
    images = rng.normal(size=(5, 9, 9, 33)).astype(np.float32)
    window = {"padding": (1, 1, 1, 1), "fixed": fixed}
    whole = core_conv2d(images, weights, kernel.activation, **window, threads=2)
    for i in range(5):
        alone = core_conv2d(images[i : i + 1], weights, kernel.activation, **window)
        assert_same_bits(alone, whole[i : i + 1])


def test_a_static_layer_is_near_the_real_one():
    """Without the oracle's own formula: sums of what codes mean, in exact arithmetic."""
    rng = np.random.default_rng(0)
    weights = random_weights(rng, "int4", (6, 3, 3, 10), 32, zeros=True)
    x = rng.uniform(-1, 2, size=(1, 4, 4, 10)).astype(np.float32)
    scale, zero = 3 / 255, -43
    y = core_conv2d(x, weights, "int8", padding=(1, 1, 1, 1), fixed=(scale, zero))
    matrix = oracle.conv_matrix(weights.codes, "int4")
    real = oracle.conv_matrix(np.ones_like(weights.codes), "int4")[0] == 1
    values = oracle.dequantize_weight(
        matrix, "int4", weights.scale, weights.group_scale, weights.group_zero, 32
    )[:, real].reshape(6, 3, 3, 10)
    codes, _ = oracle_static.quantize(x, "int8", scale, zero)
    meant = np.pad((codes - zero) * float(np.float32(scale)), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for row, column, n in ((0, 0, 0), (1, 2, 3), (3, 3, 5)):
        window = meant[0, row : row + 3, column : column + 3]
        pairs = zip(window.ravel(), values[n].ravel(), strict=True)
        exact = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(float(weights.bias[n])))
        size = float(np.abs(window * values[n]).sum())
        assert abs(float(exact) - float(y[0, row, column, n])) < 1e-5 * size


OPERANDS = (FORMAT_INDEX["int8"], ACTIVATION_INDEX["int8"], 1, 4, 0)


@pytest.mark.parametrize(
    ("scale", "zero", "activation", "message"),
    [
        (-1.0, 0, "int8", "activation scale -1"),
        (float("nan"), 0, "int8", "activation scale nan"),
        (float("inf"), 0, "int8", "activation scale inf"),
        (1e-39, 0, "int8", "too small or too large"),
        (2.0**127, 0, "int8", "too small or too large"),
        (0.0, 3, "int8", "activation scale 0"),
        (1.0, 128, "int8", "zero point 128 is not in -128..127"),
        (1.0, -129, "int8", "zero point -129 is not in -128..127"),
        (1.0, 1, "int16", "zero point 1 must be 0"),
        (1.0, -1, "binary", "zero point -1 must be 0"),
    ],
)
def test_bad_parameters(rng, scale, zero, activation, message):
    weights = random_weights(rng, "int8", (3, 4))
    x = np.zeros((1, 4), np.float32)
    with pytest.raises(ValueError, match=message):
        core_linear(x, weights, activation, fixed=(scale, zero))
    weights = random_weights(rng, "int8", (3, 1, 1, 4))
    with pytest.raises(ValueError, match=message):
        core_conv2d(x.reshape(1, 1, 1, 4), weights, activation, fixed=(scale, zero))


def test_the_bias_needs_a_scale():
    with pytest.raises(ValueError, match="an activation scale"):
        _core.linear_static_bias(64, 0.0, 0, 1, *OPERANDS, 64, 64, 0, 0, 0)
    with pytest.raises(ValueError, match="address of the output is 0"):
        _core.linear_static_bias(0, 1.0, 0, 1, *OPERANDS, 64, 64, 0, 0, 0)
