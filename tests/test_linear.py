"""`_core.linear` equals the oracle bit for bit: every format, activation type and instruction set.

A case is built and solved by the oracle once and kept for the next instruction set.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import Weights, assert_same_bits, core_linear, random_weights

from lowbit import _core

RAGGED = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65)
ROWS = (*range(1, 14), 20, 24, 25, 31)  # past the largest tile of any kernel, and past two
GROUPINGS = (
    *("channel", "g32", "g64", "g96", "g128", "whole"),
    *("g32-zeros", "g64-zeros", "g128-zeros", "whole-zeros"),
)

FORMATS = tuple(oracle.FORMATS)
LARGEST = oracle.LARGEST_CODE
DENORMAL = 1e-41


def group_size_of(grouping: str, k: int) -> int | None:
    name = grouping.removesuffix("-zeros")
    if name == "channel":
        return None
    return -(-k // 32) * 32 + 32 if name == "whole" else int(name[1:])


@lru_cache(maxsize=256)
def case(fmt, activation, m, n, k, grouping="channel", bias=True, kind="uniform"):
    """Random operands and what the oracle makes of them."""
    rng = np.random.default_rng([m, n, k, len(grouping), bias])
    size = group_size_of(grouping, k)
    weights = random_weights(rng, fmt, (n, k), size, grouping.endswith("zeros"), bias, kind)
    x = rng.normal(size=(m, k)).astype(np.float32)
    return x, weights, oracle.linear(x, *weights.astuple(), activation)


def check(kernel, *args, threads=1, **kwargs):
    x, weights, expected = case(kernel.fmt, kernel.activation, *args, **kwargs)
    assert_same_bits(core_linear(x, weights, kernel.activation, threads), expected)


def check_rows(kernel, x, weights):
    expected = oracle.linear(x, *weights.astuple(), kernel.activation)
    assert_same_bits(core_linear(x, weights, kernel.activation), expected)


# --- shapes --------------------------------------------------------------------------------------


def test_every_row_count(kernel):
    for m in ROWS:
        for n in (1, 17, 64, 130):
            check(kernel, m, n, 65, bias=m % 2 == 0)


@pytest.mark.parametrize("m", [1, 7])
def test_ragged_channels_and_depths(kernel, m):
    for n in RAGGED:
        for k in RAGGED:
            check(kernel, m, n, k)


@pytest.mark.parametrize("k", [777, 1000])
def test_long_rows(kernel, k):
    for m, n in ((1, 40), (3, 65), (8, 16)):
        check(kernel, m, n, k, bias=False)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groups(kernel, grouping):
    for m, n, k in (
        (1, 17, 1),
        (1, 70, 64),
        (2, 5, 65),
        (7, 33, 160),
        (1, 16, 777),
        (9, 65, 97),
        (26, 70, 97),
    ):
        check(kernel, m, n, k, grouping, bias=m != 2)


@pytest.mark.parametrize("grouping", ["g32", "g64", "g128", "g32-zeros", "g64-zeros", "g128-zeros"])
def test_groups_at_every_few_rows(kernel, grouping):
    """Whole groups and a shorter one, an odd panel and a ragged one."""
    for m in range(1, 8):
        check(kernel, m, 71, 300, grouping)


@pytest.mark.parametrize("grouping", ["g128", "g128-zeros"])
def test_many_long_groups(kernel, grouping):
    check(kernel, 31, 50, 17 * 128 + 5, grouping)


def test_threads(kernel):
    """More threads than there is work for, too."""
    for threads in (2, 3, 7):
        check(kernel, 1, 200, 64, threads=threads)
        check(kernel, 20, 33, 100, "g32-zeros", threads=threads)
        check(kernel, 1, 1, 8, threads=threads)


# (m, n, k) with work for three threads: channels that are shared unequally, one channel, rows that
# each thread quantizes by itself, rows whose codes are shared, rows of its own for each thread.
SHARED = ((1, 1000, 3200), (2, 1000, 1601), (5, 700, 901), (40, 65, 1300), (65, 1, 50_000))
SHARED += ((6, 200, 16_000), (96, 17, 2100), (101, 63, 515), (200, 130, 130))


@pytest.mark.parametrize(("m", "n", "k"), SHARED)
def test_every_number_of_threads(kernel, m, n, k):
    """However the work is shared, the bits are those of one thread."""
    rng = np.random.default_rng([m, n, k])
    weights = random_weights(rng, kernel.fmt, (n, k))
    x = rng.normal(size=(m, k)).astype(np.float32)
    x[-1] = 0
    alone = core_linear(x, weights, kernel.activation)
    for threads in (2, 3, 5):
        assert_same_bits(core_linear(x, weights, kernel.activation, threads), alone)


def test_wide_layer(kernel):
    m = 2 if kernel.isa == "scalar" else 16
    check(kernel, m, 512, 512, threads=2)
    check(kernel, m, 512, 512, "g64-zeros", threads=2)


def test_no_rows(kernel):
    check(kernel, 0, 5, 40)


@settings(max_examples=300)
@given(data=st.data())
def test_any_shape(isa, data):
    def draw(strategy):
        return data.draw(strategy)

    fmt, activation = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(oracle.ACTIVATIONS))
    m, n, k = (draw(st.integers(1, limit)) for limit in (20, 150, 300))
    group_size = draw(st.sampled_from((None, 32, 64, 128)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("uniform", "produced", "extreme")))
    zeros, bias = draw(st.booleans()), draw(st.booleans())
    weights = random_weights(rng, fmt, (n, k), group_size, zeros, bias, kind)
    x = rng.normal(size=(m, k)) * 10.0 ** rng.integers(-20, 20, (m, 1))
    x = x.astype(np.float32)
    threads = draw(st.integers(1, 3))
    expected = oracle.linear(x, *weights.astuple(), activation)
    assert_same_bits(core_linear(x, weights, activation, threads), expected)


# --- values --------------------------------------------------------------------------------------


def extreme_activations(activation: str, k: int) -> np.ndarray:
    """Rows of scale 1 whose codes push 8- and 16-bit intermediates to their ends.

    For int16, 127*256 - 128 splits into (127, -128), the one byte below -127.
    """
    top = LARGEST.get(activation, 1)
    alternating = np.where(np.arange(k) % 2 == 0, top, -top)
    in_pairs = np.where(np.arange(k) % 4 < 2, top, -top)
    rows = [np.full(k, top), np.full(k, -top), alternating, -alternating, in_pairs]
    if activation == "int16":
        low = np.full(k, 127 * 256 - 128)
        low[0] = top
        rows += [low, -low, np.where(np.arange(k) % 2 == 0, low, -top)]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("kind", ["lowest", "highest", "extreme"])
def test_extreme_codes(kernel, kind, rng):
    for k in (1, 31, 64, 777):
        x = extreme_activations(kernel.activation, k)
        weights = random_weights(rng, kernel.fmt, (35, k), kind=kind)
        check_rows(kernel, x, weights)
        weights = random_weights(rng, kernel.fmt, (35, k), 32, zeros=True, kind=kind)
        check_rows(kernel, x, weights)


@lru_cache(maxsize=3)
def deep_case(fmt, activation, grouping):
    """So deep that a sum of 128 * 127 leaves int32. Narrower formats only have long sums here."""
    k, n = (140_000, 17) if fmt == "int8" else (70_000, 3)
    group_size = {"channel": None, "halves": -(-k // 64) * 32, "whole": -(-k // 32) * 32}[grouping]
    rng = np.random.default_rng(k)
    weights = random_weights(rng, fmt, (n, k), group_size, zeros=True)
    weights.codes[0], weights.codes[1] = 0, oracle.FORMATS[fmt].max_code
    top = LARGEST.get(activation, 1)
    x = np.array([[top], [-top]], np.float32).repeat(k, axis=1)
    return x, weights, oracle.linear(x, *weights.astuple(), activation)


@pytest.mark.parametrize("grouping", ["channel", "halves", "whole"])
def test_sums_beyond_int32(kernel, grouping):
    x, weights, expected = deep_case(kernel.fmt, kernel.activation, grouping)
    assert_same_bits(core_linear(x, weights, kernel.activation, threads=2), expected)


def special_rows(rng: np.random.Generator, k: int) -> np.ndarray:
    """Rows that need care, each between ordinary ones."""

    def ordinary():
        return rng.normal(size=k)

    def with_value(value):
        row = ordinary()
        row[rng.integers(k)] = value
        return row

    flt_min = float(oracle.FLT_MIN)
    special = [
        np.zeros(k),
        np.full(k, -0.0),
        with_value(np.nan),
        with_value(-np.nan),
        with_value(np.inf),
        with_value(-np.inf),
        np.full(k, np.nan),
        with_value(-0.0),
        with_value(1e38),
        with_value(3.4e38),
        np.full(k, 3.4e38),  # a sum of these overflows
        np.where(np.arange(k) % 2 == 0, -0.0, 1.0),
        ordinary() * DENORMAL,
        ordinary() * 1e-38,
        np.full(k, flt_min * 127),  # the smallest scale of int8
        np.full(k, np.nextafter(np.float32(flt_min * 127), np.float32(0))),
        np.full(k, flt_min * 32639),
        np.full(k, np.nextafter(np.float32(flt_min * 32639), np.float32(0))),
        np.where(np.arange(k) == 0, 1.0, DENORMAL),
    ]
    rows = [
        row for pair in zip(special, [ordinary() for _ in special], strict=True) for row in pair
    ]
    with np.errstate(over="ignore"):
        return np.array(rows).astype(np.float32)


@pytest.mark.parametrize("k", [1, 33, 100, 777, 1601, 2100])
def test_special_rows_beside_ordinary_ones(kernel, k, rng):
    x = special_rows(rng, k)
    with np.errstate(invalid="ignore", over="ignore"):
        check_rows(kernel, x, random_weights(rng, kernel.fmt, (21, k)))
        check_rows(kernel, x, random_weights(rng, kernel.fmt, (21, k), bias=False))
        check_rows(kernel, x, random_weights(rng, kernel.fmt, (21, k), 32, zeros=True))


def test_not_finite_rows_are_nan_and_zero_rows_the_bias(kernel, rng):
    """What a user is promised, said without the oracle."""
    x = rng.normal(size=(6, 50)).astype(np.float32)
    x[1, 3], x[3, 49], x[4] = np.nan, -np.inf, 0
    weights = random_weights(rng, kernel.fmt, (20, 50))
    y = core_linear(x, weights, kernel.activation)
    assert np.isnan(y[[1, 3]]).all()
    assert np.isfinite(y[[0, 2, 4, 5]]).all()
    assert_same_bits(y[4], weights.bias)
    finite = np.ascontiguousarray(x[[0, 2, 4, 5]])
    assert_same_bits(y[[0, 2, 4, 5]], core_linear(finite, weights, kernel.activation))


@pytest.mark.parametrize("position", range(0, 70, 3))
def test_not_finite_is_seen_at_every_position(isa, position):
    x = np.ones((1, 70), np.float32)
    x[0, position] = np.inf if position % 2 else np.nan
    weights = random_weights(np.random.default_rng(0), "int8", (3, 70))
    for activation in oracle.ACTIVATIONS:
        assert np.isnan(core_linear(x, weights, activation)).all()


def near_ties(activation: str, amax: float) -> np.ndarray:
    """One row of values whose quotient by the scale is nearest to half an integer, from both sides.

    Among them are products x * (1/scale) that round to a tie in float32 although they are none: a
    fused multiply-add in the kernel would round these differently.
    """
    largest = LARGEST[activation]
    scale = np.float32(amax) / np.float32(largest)
    codes = np.arange(-largest, largest, 1 if largest == 127 else 61)
    x = ((codes + 0.5) * np.float64(scale)).astype(np.float32)
    x = np.concatenate(
        [np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))]
    )
    return np.append(x, np.float32(amax)).astype(np.float32)[None]


@pytest.mark.parametrize("activation", ["int8", "int16"])
def test_codes_are_rounded_twice_as_written(isa, activation):
    """Each code is read from the output: a weight matrix of one 1 at position k, 0 elsewhere."""
    rounded_twice = 0
    for amax in (1.0, 3.0, 0.7, 1e-3, 12345.678, 1e30):
        x = near_ties(activation, amax)
        k = x.shape[1]
        act_codes, act_scale = oracle.quantize_activation(x, activation)
        exact = np.rint(x.astype(np.float64) * np.float64(np.float32(1) / act_scale[0]))
        rounded_twice += int((exact != act_codes).sum())
        for start in range(0, k, 256):
            size = min(256, k - start)
            values = np.zeros((size, k), np.uint8)
            values[np.arange(size), np.arange(start, start + size)] = 1
            one = Weights(values + np.uint8(128), "int8", np.ones(size, np.float32))
            expected = act_codes[0, start : start + size].astype(np.float32) * act_scale[0]
            assert_same_bits(core_linear(x, one, activation)[0], expected)
    assert rounded_twice > 0, "the rows must contain the case that this test is about"


def test_half_precision_scales_of_every_kind(isa, rng):
    """float16 group scales: subnormal, largest, zero, negative, infinite, NaN."""
    special = [6e-8, 6.1e-5, 65504, 0.0, -0.0, -1.5, np.inf, -np.inf, np.nan, 1.0]
    group_scale = np.array([special, special[::-1]], np.float16)
    n, k = 2, 32 * len(special)
    for with_zeros in (False, True):
        for finite in (False, True):
            scales = np.nan_to_num(group_scale, posinf=3, neginf=-3) if finite else group_scale
            weights = random_weights(rng, "int4", (n, k), 32, with_zeros)
            weights = Weights(weights.codes, "int4", weights.scale, scales, weights.group_zero, 32)
            x = rng.normal(size=(3, k)).astype(np.float32)
            for activation in oracle.ACTIVATIONS:
                expected = oracle.linear(x, *weights.astuple(), activation)
                assert_same_bits(core_linear(x, weights, activation), expected)


def test_channel_scales_of_every_kind(kernel, rng):
    """Outputs that overflow, underflow to a denormal or to zero, or cancel to zero."""
    scale = np.float32([1e-45, 1e-38, -1.0, 0.0, -0.0, 1e38, 3e38, np.inf, np.nan, 1.0])
    weights = random_weights(rng, kernel.fmt, (len(scale), 40), bias=False)
    x = rng.normal(size=(7, 40)).astype(np.float32)
    x[3:] *= np.float32([[1e-30], [1e30], [1e-36], [1e37]])
    for bias in (None, np.zeros(len(scale), np.float32), np.full(len(scale), -0.0, np.float32)):
        check_rows(kernel, x, Weights(weights.codes, kernel.fmt, scale, bias=bias))


def test_repeated_calls_give_the_same_bits(kernel):
    x, weights, _ = case(kernel.fmt, kernel.activation, 13, 70, 97, "g32")
    first = core_linear(x, weights, kernel.activation)
    for _ in range(3):
        assert_same_bits(core_linear(x, weights, kernel.activation), first)


def test_calls_from_several_python_threads_at_once(isa):
    """The GIL is released during a call: memory that a thread keeps must be its own."""
    args = [
        (fmt, activation, m, n, k, grouping)
        for fmt in FORMATS
        for activation in oracle.ACTIVATIONS
        for m, n, k, grouping in ((1, 130, 200, "channel"), (9, 40, 333, "g32-zeros"))
    ]
    cases = [(case(*arg), arg[1]) for arg in args]

    def solve(i):
        (x, weights, expected), activation = cases[i % len(cases)]
        assert_same_bits(core_linear(x, weights, activation, threads=1 + i % 2), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(solve, range(4 * len(cases))))


def test_denormal_rows_under_flush_to_zero(kernel, rng):
    """The caller's floating-point mode changes no code: a row too small to divide by is zero."""
    x = np.full((3, 40), DENORMAL, np.float32)
    x[1] = rng.normal(size=40)
    weights = random_weights(rng, kernel.fmt, (20, 40))
    expected = oracle.linear(x, *weights.astuple(), kernel.activation)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals to zero")
    try:
        actual = core_linear(x, weights, kernel.activation)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)


# --- arguments -----------------------------------------------------------------------------------


BAD_ARGUMENTS = {
    "format": ({"format": -1}, "format"),
    "format-too-large": ({"format": len(FORMATS)}, "format"),
    "activation": ({"activation": 99}, "activation"),
    "m": ({"m": -1}, "m >= 0"),
    "n": ({"n": -1}, "negative"),
    "k": ({"k": -1}, "negative"),
    "group-size": ({"group_size": -32}, "group_size"),
    "group-size-not-of-32": ({"group_size": 33}, "group_size"),
    "groups-without-scales": ({"group_size": 32}, "group_scale"),
    "x": ({"x": 0}, "address of x"),
    "y": ({"y": 0}, "address of x or y"),
    "packed": ({"packed": 0}, "address of the weights"),
    "scale": ({"scale": 0}, "address of the weights"),
    "threads": ({"threads": 0}, "threads"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused(change, message):
    x, y = np.zeros((2, 64), np.float32), np.zeros((2, 16), np.float32)
    packed, scale = np.zeros((1, 16, 64), np.uint8), np.ones(16, np.float32)
    arguments = {
        "x": x.ctypes.data,
        "m": 2,
        "y": y.ctypes.data,
        "format": 0,
        "activation": 0,
        "n": 16,
        "k": 64,
        "group_size": 0,
        "packed": packed.ctypes.data,
        "scale": scale.ctypes.data,
        "group_scale": 0,
        "group_zero": 0,
        "bias": 0,
        "threads": 1,
    }
    _core.linear(*arguments.values())
    with pytest.raises(ValueError, match=message):
        _core.linear(*{**arguments, **change}.values())


@pytest.mark.parametrize("flush", [False, True], ids=["subnormals", "flushed"])
def test_every_float16_group_scale_is_exact(isa, flush):
    """All finite ones: also subnormals of float16, also where those of float32 are flushed."""
    scale = np.arange(65536, dtype=np.uint16).view(np.float16)
    scale = scale[np.isfinite(scale)]
    n, groups = len(scale), oracle.pack_groups(scale[:, None])
    packed = _core.pack(np.full((n, 32), 9, np.uint8), "int4")  # every weight is 1
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 127.0  # so that its scale is 1
    y = np.empty((1, n), np.float32)
    ones = np.ones(n, np.float32)
    torch.set_flush_denormal(flush)
    try:
        addresses = [a.ctypes.data for a in (packed, ones, groups)]
        _core.linear(x.ctypes.data, 1, y.ctypes.data, 1, 0, n, 32, 32, *addresses, 0, 0, 1)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(y[0], 127 * scale.astype(np.float32))
