"""The oracle itself, against rational arithmetic, element-by-element loops and torch."""

import ctypes
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import Guarded, assert_same_bits

FLOAT32_MAX = float(np.finfo(np.float32).max)
DENORMAL = float(np.finfo(np.float32).smallest_subnormal)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def to_float32(value: Fraction) -> np.float32:
    """Round a rational to the nearest float32, half to even; zero is +0."""
    if value == 0:
        return np.float32(0)
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(value / unit) * unit  # Fraction rounds half to even
    if abs(rounded) >= Fraction(2) ** 128:
        return np.float32(np.inf if value > 0 else -np.inf)
    if rounded == 0:
        return np.float32(0.0 if value > 0 else -0.0)
    return np.float32(float(rounded))


def exact_fma(a: float, b: float, c: float) -> np.float32:
    return to_float32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def assert_same_float(actual, expected):
    """Equal as bits, NaN being equal to NaN."""
    actual, expected = np.float32(actual), np.float32(expected)
    if np.isnan(expected):
        assert np.isnan(actual)
    else:
        assert actual.view(np.uint32) == expected.view(np.uint32), (actual, expected)


# --- fma -----------------------------------------------------------------------------------------


@given(finite, finite, finite)
def test_fma_rounds_once(a, b, c):
    expected = exact_fma(a, b, c)
    if expected == 0:  # rational arithmetic has no signed zero: test_fma_signed_zero
        assert oracle.fma(a, b, c) == 0
    else:
        assert_same_float(oracle.fma(a, b, c), expected)


def test_fma_where_rounding_twice_is_wrong():
    # c + a*b = c + 2**-24 - 2**-70, just below half a unit of c, which float64 rounds to the tie.
    c = np.float32(1 + 2.0**-23)
    a, b = np.float32(1 + 2.0**-23), np.float32((1 - 2.0**-23) * 2.0**-24)
    assert np.float32(np.float64(a) * np.float64(b) + np.float64(c)) == np.float32(1 + 2.0**-22)
    assert oracle.fma(a, b, c) == c == exact_fma(a, b, c)


def test_fma_near_ties_matches_rationals():
    rng = np.random.default_rng(1)
    # Products a hair off half a unit in the last place of c: what double rounding gets wrong.
    c = (1 + rng.integers(0, 2**23, 3000) * 2.0**-23).astype(np.float32)
    a = (1 + rng.integers(-3, 4, 3000) * 2.0**-23).astype(np.float32)
    b = ((1 + rng.integers(-3, 4, 3000) * 2.0**-23) * 2.0**-24).astype(np.float32)
    sign = rng.choice([-1, 1], 3000).astype(np.float32)
    actual = oracle.fma(a, sign * b, c)
    expected = np.array([exact_fma(*v) for v in zip(a, sign * b, c, strict=True)])
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))
    twice = (a.astype(np.float64) * (sign * b) + c).astype(np.float32)
    assert (twice != expected).any(), (
        "the sample must contain cases that double rounding gets wrong"
    )


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-20, 1.0, 1e20, 1e38])
def test_fma_every_magnitude_matches_rationals(scale):
    rng = np.random.default_rng(2)
    a, b, c = (rng.normal(size=500).astype(np.float32) for _ in range(3))
    c = (c * scale).astype(np.float32)
    b = (b * scale).astype(np.float32)
    actual = oracle.fma(a, b, c)
    for args, value in zip(zip(a, b, c, strict=True), actual, strict=True):
        expected = exact_fma(*args)
        assert value == expected, args


def test_fma_overflows_and_underflows():
    big = np.float32(FLOAT32_MAX)
    assert oracle.fma(big, 2, 0) == np.inf
    assert oracle.fma(big, -2, 0) == -np.inf
    assert oracle.fma(big, 2, -big) == big  # the intermediate does not overflow
    assert oracle.fma(DENORMAL, 0.5, 0) == 0  # half way: to even
    assert oracle.fma(DENORMAL, 0.75, 0) == np.float32(DENORMAL)
    assert oracle.fma(DENORMAL, 0.5, DENORMAL) == np.float32(2 * DENORMAL)


def test_fma_signed_zero():
    for a, b, c, negative in [
        (0.0, 1.0, 0.0, False),
        (-0.0, 1.0, 0.0, False),
        (-0.0, 1.0, -0.0, True),
        (0.0, -1.0, -0.0, True),
        (0.0, 1.0, -0.0, False),
        (2.0, 3.0, -6.0, False),
        (-DENORMAL, 0.25, 0.0, True),
        (-DENORMAL, 0.25, -0.0, True),
    ]:
        result = oracle.fma(a, b, c)
        assert result == 0
        assert bool(np.signbit(result)) == negative, (a, b, c)


def test_fma_not_finite():
    inf, nan = np.inf, np.nan
    for args in [(nan, 1, 1), (1, nan, 1), (1, 1, nan), (inf, 0, 1), (inf, 1, -inf), (0, inf, 0)]:
        assert np.isnan(oracle.fma(*args)), args
    for args in [(inf, 1, 1), (1, 2, inf), (inf, 2, inf), (-inf, -1, 0)]:
        assert oracle.fma(*args) == inf, args


@given(st.integers(-(2**53), 2**53))
def test_integers_become_float32_with_one_rounding(i):
    assert np.int64(i).astype(np.float32) == to_float32(Fraction(i))
    assert np.full(9, i, np.int64).astype(np.float32)[-1] == to_float32(Fraction(i))


# --- activation quantization ---------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "largest"), [("int8", 127), ("int16", 32639)])
def test_integer_codes_step_by_step(activation, largest, rng):
    x = (rng.normal(size=(7, 33)) * 10.0 ** rng.integers(-30, 30, (7, 1))).astype(np.float32)
    codes, scale = oracle.quantize_activation(x, activation)
    for i, row in enumerate(x):
        expected = to_float32(Fraction(float(max(abs(row)))) / largest)
        assert_same_float(scale[i], expected)
        inverse = to_float32(1 / Fraction(float(expected)))
        for value, code in zip(row, codes[i], strict=True):
            product = to_float32(Fraction(float(value)) * Fraction(float(inverse)))
            assert code == round(Fraction(float(product)))
    assert np.abs(codes).max(axis=1).tolist() == [largest] * 7


@given(st.floats(min_value=float(np.float32(1e-36)), max_value=FLOAT32_MAX, width=32))
def test_integer_codes_never_exceed_the_largest(amax):
    for activation, largest in oracle.LARGEST_CODE.items():
        codes, scale = oracle.quantize_activation(np.float32([[amax, -amax]]), activation)
        if scale[0] != 0:
            assert codes.tolist() == [[largest, -largest]]


def test_ties_round_to_even():
    x = np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127]])
    codes, scale = oracle.quantize_activation(x, "int8")
    assert scale.tolist() == [1]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


@pytest.mark.parametrize("activation", ["int8", "int16"])
def test_rows_too_small_to_divide_by_are_zero(activation):
    largest = oracle.LARGEST_CODE[activation]
    smallest = np.float32(oracle.FLT_MIN) * np.float32(largest)
    x = np.float32([[smallest, 0], [np.nextafter(smallest, 0), 0], [DENORMAL, 0], [0, -0.0]])
    codes, scale = oracle.quantize_activation(x, activation)
    assert scale.tolist() == [float(oracle.FLT_MIN), 0, 0, 0]
    assert codes.tolist() == [[largest, 0], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_touches_its_row_only(bad, activation):
    x = np.float32([[1, 2, -3], [1, bad, 3], [0, 0, 0]])
    codes, scale = oracle.quantize_activation(x, activation)
    alone, alone_scale = oracle.quantize_activation(x[[0, 2]], activation)
    assert np.isnan(scale[1])
    assert not codes[1].any()
    np.testing.assert_array_equal(codes[[0, 2]], alone)
    np.testing.assert_array_equal(scale[[0, 2]], alone_scale)


def test_binary_signs_and_scale():
    codes, scale = oracle.quantize_activation(np.float32([[1, -3, 0.0, -0.0]]), "binary")
    assert codes.tolist() == [[1, -1, 1, 1]]
    assert scale.tolist() == [1]
    codes, scale = oracle.quantize_activation(np.zeros((2, 0), np.float32), "binary")
    assert codes.shape == (2, 0)
    assert scale.tolist() == [0, 0]
    with np.errstate(over="ignore"):
        _, scale = oracle.quantize_activation(np.full((1, 32), FLOAT32_MAX, np.float32), "binary")
    assert scale.tolist() == [np.inf]


@pytest.mark.parametrize("count", [0, 1, 7, 15, 16, 17, 31, 100])
def test_strided_sum_adds_in_the_stated_order(count, rng):
    row = np.exp(rng.normal(0, 3, count)).astype(np.float32)
    lanes = [np.float32(0)] * 16
    for i, value in enumerate(row):
        lanes[i % 16] = np.float32(lanes[i % 16] + value)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [np.float32(lanes[i] + lanes[i + half]) for i in range(half)]
    assert_same_float(oracle.strided_sum(row[None])[0], lanes[0])


def test_images_have_one_scale_in_the_order_h_w_c(activation, rng):
    x = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    codes, scale = oracle.quantize_activation(x, activation)
    flat, flat_scale = oracle.quantize_activation(x.reshape(3, -1), activation)
    np.testing.assert_array_equal(codes.reshape(3, -1), flat)
    np.testing.assert_array_equal(scale, flat_scale)


def test_int16_splits_into_signed_bytes():
    codes = np.arange(-32639, 32640)
    hi, lo = oracle.split_int16(codes)
    np.testing.assert_array_equal(256 * hi + lo, codes)
    assert (hi.min(), hi.max(), lo.min(), lo.max()) == (-127, 127, -128, 127)


# --- layout --------------------------------------------------------------------------------------


def test_pack_follows_its_definition_and_unpacks(fmt, rng):
    f = oracle.FORMATS[fmt]
    for n, k in [(1, 1), (16, f.depth), (17, f.depth + 1), (35, 100)]:
        codes = oracle.random_codes(rng, fmt, (n, k))
        packed = oracle.pack(codes, fmt)
        expected = np.zeros_like(packed)
        for i in range(n):
            for step in range(packed.shape[1]):
                for plane in range(f.planes):
                    for j in range(4):
                        index = step * f.depth + 4 * plane + j
                        if index < k:
                            field = int(codes[i, index]) << (f.bits * plane)
                            expected[i // 16, step, 4 * (i % 16) + j] |= field
        np.testing.assert_array_equal(packed, expected)
        np.testing.assert_array_equal(oracle.unpack(packed, fmt, n, k), codes)


def test_pack_refuses_codes_that_do_not_fit():
    with pytest.raises(ValueError, match="4 bits"):
        oracle.pack(np.full((1, 8), 16, np.uint8), "int4")


def test_tap_channels():
    assert [oracle.tap_channels("int8", c) for c in (1, 3, 4, 5, 8)] == [1, 3, 4, 8, 8]
    assert [oracle.tap_channels("binary", c) for c in (3, 31, 32, 33)] == [3, 31, 32, 64]


def test_random_codes_cover_their_kinds(fmt, rng):
    f = oracle.FORMATS[fmt]
    uniform = oracle.random_codes(rng, fmt, (64, 64))
    assert set(uniform.ravel()) == set(range(f.max_code + 1))
    produced = f.value(oracle.random_codes(rng, fmt, (64, 64), "produced"))
    assert set(produced.ravel()) == set(oracle.PRODUCED_VALUES[fmt])
    extreme = oracle.random_codes(rng, fmt, (64, 64), "extreme")
    assert set(extreme.ravel()) == {0, f.max_code}
    assert set(oracle.random_codes(rng, fmt, (9,), "lowest")) == {0}
    assert set(oracle.random_codes(rng, fmt, (9,), "highest")) == {f.max_code}


# --- layers --------------------------------------------------------------------------------------


def linear_by_loops(x, codes, fmt, scale, group_scale, group_zero, group_size, bias, activation):
    """The definition of a layer, one element at a time, over the rationals."""
    f = oracle.FORMATS[fmt]
    act_codes, act_scale = oracle.quantize_activation(x, activation)
    y = np.zeros((len(x), len(codes)), np.float32)
    for m, n in np.ndindex(y.shape):
        values = [f.mul * int(c) + f.add for c in codes[n]]
        acts = [int(a) for a in act_codes[m]]
        size = group_size or len(acts)
        total = np.float32(0)
        for g, start in enumerate(range(0, len(acts), size)):
            group = slice(start, start + size)
            acc = sum(v * a for v, a in zip(values[group], acts[group], strict=True))
            if group_size is None:
                total = to_float32(Fraction(acc))
                continue
            total = exact_fma(group_scale[n, g], to_float32(Fraction(acc)), total)
            if group_zero is not None:
                act_sum = to_float32(Fraction(sum(acts[group])))
                total = exact_fma(group_zero[n, g], act_sum, total)
        output_scale = to_float32(Fraction(float(act_scale[m])) * Fraction(float(scale[n])))
        y[m, n] = exact_fma(total, output_scale, 0 if bias is None else bias[n])
    return y


@pytest.mark.parametrize("grouping", ["channel", "groups", "zeros"])
def test_linear_is_its_definition(fmt, activation, grouping, rng):
    m, n, k, group_size = 3, 5, 70, None if grouping == "channel" else 32
    x = rng.normal(size=(m, k)).astype(np.float32)
    codes = oracle.random_codes(rng, fmt, (n, k))
    group_scale = group_zero = None
    if group_size:
        group_scale, group_zero = oracle.random_groups(rng, n, k, group_size, grouping == "zeros")
    bias = rng.normal(size=n).astype(np.float32)
    args = (x, codes, fmt, oracle.random_scale(rng, n), group_scale, group_zero, group_size)
    for b in (None, bias):
        actual = oracle.linear(*args, b, activation)
        expected = linear_by_loops(*args, b, activation)
        np.testing.assert_array_equal(actual, expected)


def test_linear_is_near_the_float_layer(rng):
    x = rng.normal(size=(8, 256)).astype(np.float32)
    codes = oracle.random_codes(rng, "int4", (16, 256))
    group_scale, group_zero = oracle.random_groups(rng, 16, 256, 64, zeros=True)
    weights = (codes, "int4", oracle.random_scale(rng, 16), group_scale, group_zero, 64)
    expected = x.astype(np.float64) @ oracle.dequantize_weight(*weights).T
    for activation, tolerance in (("int8", 2e-2), ("int16", 1e-4)):
        actual = oracle.linear(x, *weights, activation=activation)
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < tolerance


def test_zero_row_is_the_bias(activation, fmt, rng):
    codes = oracle.random_codes(rng, fmt, (5, 40))
    bias = rng.normal(size=5).astype(np.float32)
    scale = oracle.random_scale(rng, 5)
    y = oracle.linear(
        np.zeros((1, 40), np.float32), codes, fmt, scale, None, None, None, bias, activation
    )
    np.testing.assert_array_equal(y[0], bias)


@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "padding", "dilation", "groups"),
    [
        (3, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
        (40, 7, (3, 2), (2, 1), (0, 1, 2, 3), (1, 2), 1),
        (8, 8, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 8),
        (8, 24, (3, 3), (1, 1), (0, 0, 0, 0), (2, 2), 8),
        (12, 6, (5, 5), (3, 3), (4, 4, 4, 4), (1, 1), 3),
        (16, 4, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ],
)
def test_conv2d_is_torchs_convolution_of_the_codes(
    fmt, channels, out, kernel, stride, padding, dilation, groups, rng
):
    x = rng.integers(-127, 128, (2, 9, 8, channels)).astype(np.float32)
    x[:, 0, 0, 0] = 127  # scale 1: the codes are the values
    codes = oracle.random_codes(rng, fmt, (out, *kernel, channels // groups))
    values = oracle.FORMATS[fmt].value(codes).transpose(0, 3, 1, 2)
    top, bottom, left, right = padding
    image = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float64))
    expected = torch.nn.functional.conv2d(
        torch.nn.functional.pad(image, (left, right, top, bottom)),
        torch.from_numpy(values.astype(np.float64)),
        None,
        stride,
        0,
        dilation,
        groups,
    ).numpy()
    scale = np.ones(out, np.float32)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    actual = oracle.conv2d(x, codes, fmt, scale, **geometry)
    np.testing.assert_array_equal(actual.transpose(0, 3, 1, 2), expected)
    nchw = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(oracle.conv2d_nchw(nchw, codes, fmt, scale, **geometry), expected)


def test_conv2d_of_one_tap_is_linear(fmt, activation, rng):
    """1 x 1 images and taps that need no padding: the matrix of a Linear layer, groups included."""
    k = 64
    x = rng.normal(size=(4, k)).astype(np.float32)
    codes = oracle.random_codes(rng, fmt, (6, k))
    scale = oracle.random_scale(rng, 6)
    groups = (*oracle.random_groups(rng, 6, k, 32, zeros=True), 32)
    bias = rng.normal(size=6).astype(np.float32)
    expected = oracle.linear(x, codes, fmt, scale, *groups, bias, activation)
    actual = oracle.conv2d(
        x[:, None, None], codes[:, None, None], fmt, scale, *groups, bias, activation
    )
    np.testing.assert_array_equal(actual[:, 0, 0], expected)
    packed = oracle.pack_conv(codes[:, None, None], fmt)
    np.testing.assert_array_equal(packed, oracle.pack(codes, fmt))


def test_padding_of_a_convolution_counts_nothing(fmt, activation, rng):
    """A pixel that only padding reaches gives the bias, for binary activations too."""
    x = rng.normal(size=(1, 1, 1, 8)).astype(np.float32)
    codes = oracle.random_codes(rng, fmt, (3, 1, 1, 8))
    bias = np.float32([1, -2, 3])
    y = oracle.conv2d(
        x,
        codes,
        fmt,
        np.ones(3, np.float32),
        bias=bias,
        activation=activation,
        padding=(1, 1, 1, 1),
    )
    assert y.shape == (1, 3, 3, 3)
    corner = [y[0, i, j].tolist() for i, j in ((0, 0), (0, 1), (2, 2), (1, 2))]
    assert corner == [bias.tolist()] * 4
    assert y[0, 1, 1].tolist() != bias.tolist()


# --- operands in guarded memory ------------------------------------------------------------------


def test_memory_after_an_operand_cannot_be_touched():
    code = (
        "import ctypes, sys, numpy; sys.path.insert(0, sys.argv[1])\n"
        "from operands import Guarded\n"
        "guarded = Guarded(numpy.arange(3, dtype=numpy.float32))\n"
        "ctypes.string_at(guarded.address, 12)\n"
        "print('inside', flush=True)\n"
        "ctypes.string_at(guarded.address, 13)\n"
    )
    command = [sys.executable, "-c", code, str(Path(oracle.__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "inside", result.stderr
    assert result.returncode == -signal.SIGSEGV


def test_memory_before_an_output_is_checked():
    guarded = Guarded.output((3,))
    guarded.array[:] = 0
    guarded.check_before()
    ctypes.memset(guarded.address - 1, 0, 1)
    with pytest.raises(AssertionError, match="before"):
        guarded.check_before()


def test_comparison_tells_bits_apart():
    a = np.float32([0.0, np.nan, 1.0])
    assert_same_bits(a, np.float32([0.0, -np.nan, 1.0]))
    for other in ([-0.0, np.nan, 1.0], [0.0, 1.0, 1.0], [0.0, np.nan, 1 + 2.0**-23]):
        with pytest.raises(AssertionError, match="1 of 3 outputs differ"):
            assert_same_bits(a, np.float32(other))
