"""Observers against plain NumPy over all values at once."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import observers
from lowbit.observers import Affine, affine, make

NAMES = ("minmax", "moving_average", "percentile", "mse", "entropy")
HISTOGRAMS = ("percentile", "mse", "entropy")
FLT_MIN = 2.0**-126


def sample(kind, n=40_000, seed=0):
    rng = np.random.default_rng(seed)
    x = {
        "normal": lambda: rng.normal(size=n),
        "relu": lambda: np.maximum(rng.normal(size=n), 0),
        "skewed": lambda: rng.gamma(1.5, size=n) - 0.4,
        "laplace": lambda: rng.laplace(size=n) * 1e-3,
        "outlier": lambda: np.append(rng.normal(size=n - 1), 70.0),
        "negative": lambda: -np.abs(rng.normal(size=n)) - 1,
    }[kind]()
    return x.astype(np.float32)


KINDS = ("normal", "relu", "skewed", "laplace", "outlier", "negative")


def fed(name, x, parts=4, **options):
    observer = make(name, **options)
    for part in np.array_split(x, parts):
        observer.observe(torch.from_numpy(part))
    return observer


def squared_error(x, scale, zero, least=-128, most=127):
    q = np.clip(np.rint(x.astype(np.float64) / scale) + zero, least, most)
    return float((((q - zero) * scale - x) ** 2).sum())


# --- Ranges to codes -----------------------------------------------------------------------------


@given(
    st.floats(-1e30, 1e30, allow_subnormal=False),
    st.floats(-1e30, 1e30, allow_subnormal=False),
)
def test_affine_codes_cover_the_range_and_zero(a, b):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    scale, zero = affine(min(a, b), max(a, b))
    assert np.float32(scale) == scale
    assert scale >= FLT_MIN
    assert isinstance(zero, int)
    assert -128 <= zero <= 127
    step = 0.5000001 * scale  # the zero point is rounded
    assert (-128 - zero) * scale <= low + step
    assert (127 - zero) * scale >= high - step
    if high - low > 1e-30:  # and not more
        assert 255 * scale <= (high - low) * (1 + 1e-6)


def test_affine_uses_all_codes_of_a_relu():
    assert affine(0.0, 2.55) == Affine(float(np.float32(0.01)), -128)
    assert affine(0.5, 2.55) == affine(0.0, 2.55)  # widened to 0
    assert affine(-2.55, 0.0) == Affine(float(np.float32(0.01)), 127)


@pytest.mark.parametrize(("activation", "largest"), [("int8", 127), ("int16", 32639)])
def test_symmetric_codes(activation, largest):
    scale, zero = affine(-3.0, 2.0, activation, symmetric=True)
    assert zero == 0
    assert scale == float(np.float32(3.0 / largest))


def test_int16_is_symmetric():
    assert affine(0.0, 1.0, "int16").zero == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_but_zeros(symmetric):
    assert affine(0.0, 0.0, "int8", symmetric) == (1.0, 0)


def test_scales_stay_normal():
    for symmetric in (False, True):
        assert affine(0.0, 1e-44, "int8", symmetric).scale == FLT_MIN
        assert math.isfinite(affine(-3e38, 3e38, "int8", symmetric).scale)


# --- Each observer ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_minmax(kind):
    x = sample(kind)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = float(np.float32((high - low) / 255))
    assert fed("minmax", x).parameters() == (scale, max(-128, -128 - round(low / scale)))
    symmetric = float(np.float32(max(-low, high) / 127))
    assert fed("minmax", x, symmetric=True).parameters() == (symmetric, 0)


def test_moving_average_of_a_few_batches_is_their_mean():
    parts = [sample("skewed", 100, seed) for seed in range(7)]
    low = np.mean([p.min() for p in parts], dtype=np.float64)
    high = np.mean([p.max() for p in parts], dtype=np.float64)
    found = fed("moving_average", np.concatenate(parts), parts=7).parameters()
    scale = (high - low) / 255
    assert found.scale == pytest.approx(scale, rel=1e-6)
    assert found.zero == round(-128 - low / scale)


def test_moving_average_of_many_batches_is_exponential():
    tops = np.random.default_rng(1).uniform(1, 9, 300).astype(np.float32)
    expected = float(np.mean(tops[:100], dtype=np.float64))
    for top in tops[100:]:
        expected = 0.99 * expected + 0.01 * float(top)
    observer = make("moving_average")
    for top in tops:
        observer.observe(torch.tensor([0.0, float(top)]))
    assert observer.parameters().scale == pytest.approx(expected / 255, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [500, 40_000])
def test_percentile(kind, size):
    x = np.sort(sample(kind, size))
    rank = size // 10_000
    low, high = (float(v) for v in (x[rank], x[-1 - rank]))
    found = fed("percentile", x, symmetric=True).parameters().scale * 127
    exact = max(-low, high)
    assert exact * (1 - 1e-6) <= found
    assert found <= exact + float(np.abs(x).max()) / 2048 * (1 + 1e-6)  # an edge of a bin
    scale, zero = fed("percentile", x).parameters()
    slack = float(np.abs(x).max()) / 2048 + scale
    assert (127 - zero) * scale == pytest.approx(max(high, 0.0), abs=slack)
    assert (-128 - zero) * scale == pytest.approx(min(low, 0.0), abs=slack)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_about_the_best_there_is(kind, symmetric):
    x = sample(kind, 10_000)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    best = math.inf
    for a in np.linspace(0.05, 1, 60):
        if symmetric:
            scale = a * max(-low, high) / 127
            best = min(best, squared_error(x, scale, 0))
            continue
        for b in np.linspace(0.05, 1, 60) if low and high else [a]:
            scale = (b * high - a * low) / 255
            best = min(best, squared_error(x, scale, round(-128 - a * low / scale)))
    error = squared_error(x, *fed("mse", x, symmetric=symmetric).parameters())
    assert error <= 1.01 * best
    minmax = fed("minmax", x, symmetric=symmetric)
    assert error <= squared_error(x, *minmax.parameters()) * 1.0001


def test_mse_of_int16_clamps_next_to_nothing():
    x = sample("normal")
    found = fed("mse", x, activation="int16").parameters()
    error = squared_error(x, *found, -32639, 32639)
    minmax = fed("minmax", x, activation="int16").parameters()
    assert error <= 1.001 * squared_error(x, *minmax, -32639, 32639)


def divergence(counts, levels):
    """Of a list of counts, the outer two with what was clamped: (within, with clamped)."""
    within, total = counts
    expanded = [0.0] * len(within)
    for level in range(levels):
        members = [i for i in range(len(within)) if i * levels // len(within) == level]
        filled = [i for i in members if within[i] > 0]
        for i in filled:
            expanded[i] = sum(within[j] for j in members) / len(filled)
    share = 1e-6 / len(within)
    p = [(c / sum(total) + share) / (1 + 1e-6) for c in total]
    q = [(c / sum(expanded) + share) / (1 + 1e-6) for c in expanded]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("kind", ["relu", "outlier", "skewed"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_has_the_least_divergence(kind, symmetric, monkeypatch):
    """Against lists and loops, on a histogram that these can cope with."""
    monkeypatch.setattr(observers, "BINS", 2048)
    monkeypatch.setattr(observers, "_HALF", 1024)
    monkeypatch.setattr(observers.Entropy, "_thresholds", 8)
    x = sample(kind, 5000)
    observer = fed("entropy", x, symmetric=symmetric)
    largest = float(np.abs(x).max())
    width = 2.0 ** math.floor(math.log2(largest) + 1) / 1024
    bins = np.floor(x[x != 0].astype(np.float64) / width).astype(int).tolist()
    reach = max(max(bins) + 1, -min(bins), -math.floor(min(0.0, float(x.min())) / width))
    lowest, highest = (-reach, reach) if symmetric else (min(0, *bins), max(bins) + 1)
    levels = 255 if symmetric else 256
    chances = {}
    for step in range(8, 0, -1):
        t = math.ceil(reach * step / 8)
        first, last = max(lowest, -t), min(highest, t)
        if last - first < levels:
            break
        within = [0] * (last - first)
        total = [0] * (last - first)
        for b in bins:
            if first <= b < last:
                within[b - first] += 1
            total[min(max(b, first), last - 1) - first] += 1
        chances[t] = divergence((within, total), levels)
    best = min(chances, key=chances.__getitem__)
    low, high = max(float(x.min()), -best * width), min(float(x.max()), best * width)
    assert observer.parameters() == affine(low, high, "int8", symmetric)
    assert len(chances) > 2


def test_entropy_of_int16_clamps_nothing():
    x = sample("outlier")
    both = [fed(name, x, activation="int16").parameters() for name in ("entropy", "minmax")]
    assert both[0] == both[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_binary_is_the_mean_magnitude(name, kind):
    x = sample(kind)
    found = fed(name, x, activation="binary").parameters()
    assert found.zero == 0
    assert found.scale == pytest.approx(np.abs(x.astype(np.float64)).mean(), rel=1e-6)


# --- Histograms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [999, 1 << 17])
def test_a_histogram_is_that_of_all_values(kind, chunk, monkeypatch):
    monkeypatch.setattr(observers, "_CHUNK", chunk)
    x = sample(kind) * np.repeat([1e-6, 1, 30, 1e-3], 10_000).astype(np.float32)  # it has to grow
    state = fed("mse", x, parts=7).statistics
    width = 2.0 ** int(state["exponent"])
    assert width == 2.0 ** (math.floor(math.log2(np.abs(x).max())) + 1) / 4096
    edges = np.arange(-4096, 4097) * width
    values = x[x != 0].astype(np.float64)
    expected, _ = np.histogram(values, edges)
    expected[-1] -= np.count_nonzero(values == edges[-1])
    np.testing.assert_array_equal(state["histogram"].numpy(), expected)
    assert int(state["zeros"]) == np.count_nonzero(x == 0)
    assert (float(state["low"]), float(state["high"])) == (x.min(), x.max())


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("activation", ["int8", "int16", "binary"])
def test_batches_and_their_order_make_no_difference(name, activation):
    x = sample("skewed", 9000) * np.linspace(0.01, 3, 9000, dtype=np.float32)
    once = fed(name, x, 1, activation=activation).parameters()
    for other in (fed(name, x[::-1].copy(), 13, activation=activation),
                  fed(name, np.sort(x), 900, activation=activation)):  # fmt: skip
        assert other.parameters().zero == once.zero
        assert other.parameters().scale == pytest.approx(once.scale, rel=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_do_not_grow(name):
    observer = make(name)
    observer.observe(torch.randn(100))
    sizes = {key: value.nbytes for key, value in observer.statistics.items()}
    for step in range(50):
        observer.observe(torch.randn(100) * 1.5**step)
    assert {key: value.nbytes for key, value in observer.statistics.items()} == sizes
    assert sum(sizes.values()) < 66_000
    assert observer.seen == 5100


# --- What they are fed -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["int8", "int16", "binary"])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30, 3e38])
def test_any_magnitude(name, activation, scale):
    x = torch.tensor([-1.0, 0.25, 0.0, 1.0]) * scale
    observer = make(name, activation)
    for _ in range(3):
        observer.observe(x)
    found = observer.parameters()
    assert math.isfinite(found.scale)
    assert found.scale >= FLT_MIN
    assert observer.seen == 12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["int8", "int16", "binary"])
def test_zeros_first(name, activation):
    a, b = make(name, activation), make(name, activation)
    a.observe(torch.zeros(50))
    assert a.parameters() == (1.0, 0)
    small = torch.linspace(0, 1e-3, 50)
    a.observe(small)
    b.observe(small)
    b.observe(torch.zeros(50))
    assert a.parameters() == b.parameters()


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_shapes_and_strides(name):
    x = torch.randn(4, 6, 8).bfloat16()
    forms = [x, x.float(), x.double(), x.permute(2, 0, 1), x.flatten(), x.float().requires_grad_()]
    found = []
    for form in forms:
        observer = make(name)
        observer.observe(form)
        found.append(observer.parameters())
    assert len(set(found)) == 1
    observer.observe(torch.empty(0, 3))
    assert observer.seen == x.numel()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_not_finite(name, activation, bad):
    observer = make(name, activation)
    observer.observe(torch.randn(9))
    before = copy.deepcopy(observer.statistics)
    with pytest.raises(ValueError, match="1 of 3 values are NaN or Inf"):
        observer.observe(torch.tensor([1.0, bad, 2.0], dtype=torch.float64))
    assert all(torch.equal(before[key], observer.statistics[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen(name):
    with pytest.raises(ValueError, match="seen no value"):
        make(name).parameters()


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown observer 'best'; use one of minmax"):
        make("best")
    with pytest.raises(ValueError, match="unknown activation format 'int4'"):
        make("minmax", "int4")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_by_themselves(name, again):
    first, whole = make(name), make(name)
    x = torch.randn(3, 500)
    for part in x:
        whole.observe(part)
    first.observe(x[0])
    second = again(first)
    for part in x[1:]:
        second.observe(part)
    assert second.parameters() == whole.parameters()
    assert first.seen == 500
