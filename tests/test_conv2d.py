"""`_core.conv2d` equals the oracle bit for bit: every format, activation and instruction set."""

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operands import assert_same_bits, core_conv2d, core_linear, random_weights

from lowbit import _core

FORMATS = tuple(oracle.FORMATS)


@dataclass(frozen=True)
class Conv:
    """A convolution and the images it is given."""

    channels: int
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 2
    size: tuple[int, int] = (7, 6)

    @property
    def geometry(self) -> dict:
        return {
            key: value
            for key, value in asdict(self).items()
            if key in ("stride", "padding", "dilation", "groups")
        }

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out, *self.kernel, self.channels // self.groups)

    @property
    def output_size(self) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        return tuple(
            oracle.output_size(*args)
            for args in zip(
                self.size,
                self.kernel,
                self.stride,
                (top + bottom, left + right),
                self.dilation,
                strict=True,
            )
        )


SAME = (1, 1, 1, 1)
CONVS = {
    # dense; 40 channels fill a tap of every format only with padding, 32 without
    "dense": Conv(40, 19, padding=SAME),
    "dense-whole-taps": Conv(32, 16, padding=SAME),
    "dense-unpadded": Conv(33, 33),
    "dense-large": Conv(64, 70, padding=SAME, batch=1, size=(14, 14)),
    # rows of outputs that tiles fill, or nearly: receptive fields are read where they are
    "lines": Conv(40, 70, padding=SAME, size=(5, 12)),
    "lines-one": Conv(33, 20, kernel=(4, 3), padding=(0, 0, 1, 1), size=(4, 18)),
    "lines-short": Conv(36, 67, padding=SAME, batch=3, size=(7, 5)),
    "lines-stride": Conv(64, 66, stride=(2, 2), padding=SAME, size=(9, 23)),
    "lines-stride-past-kernel": Conv(40, 9, kernel=(2, 2), stride=(3, 4), size=(8, 46)),
    "lines-dilation": Conv(35, 80, padding=(2, 2, 4, 4), dilation=(2, 4), size=(6, 11)),
    "lines-groups": Conv(70, 76, padding=SAME, groups=2, size=(4, 17)),
    "lines-pointwise-stride": Conv(40, 70, kernel=(1, 1), stride=(2, 2), size=(7, 24)),
    "lines-many": Conv(32, 40, padding=SAME, batch=1, size=(30, 24)),
    "stride": Conv(40, 17, stride=(2, 2), padding=SAME),
    "stride-uneven": Conv(36, 5, kernel=(3, 2), stride=(1, 3), padding=(0, 0, 1, 1)),
    "stride-past-kernel": Conv(32, 5, kernel=(2, 2), stride=(3, 4), size=(9, 9)),
    "dilation": Conv(32, 18, padding=(2, 2, 2, 2), dilation=(2, 2)),
    "dilation-uneven": Conv(40, 3, kernel=(2, 3), padding=(1, 0, 0, 2), dilation=(3, 1)),
    "asymmetric-padding": Conv(34, 9, padding=(0, 1, 2, 0)),
    "tensorflow-same": Conv(32, 9, stride=(2, 2), padding=(0, 1, 0, 1), size=(8, 8)),
    "kernel-beyond-image": Conv(32, 6, kernel=(5, 7), padding=(3, 3, 4, 4), size=(2, 3)),
    "padding-beyond-kernel": Conv(8, 6, kernel=(2, 2), padding=(4, 3, 5, 4), size=(3, 3)),
    # rows of the kernel that lie outside the image for all pixels of a tile, and whole kernels
    "rows-outside": Conv(32, 20, padding=(4, 4, 4, 4), dilation=(4, 4), size=(9, 13)),
    "rows-outside-merged": Conv(4, 20, kernel=(5, 4), padding=(7, 2, 1, 1), size=(9, 13)),
    "rows-outside-stride": Conv(40, 35, padding=(8, 9, 3, 2), stride=(2, 1), size=(5, 8)),
    "lines-outside": Conv(32, 64, padding=(9, 7, 1, 1), dilation=(3, 1), size=(4, 12)),
    "lines-outside-stride": Conv(
        40, 64, kernel=(4, 3), padding=(3, 8, 2, 2), stride=(2, 2), dilation=(1, 2), size=(5, 23)
    ),
    "one-pixel": Conv(64, 20, padding=SAME, size=(1, 1)),
    "one-output": Conv(16, 20, kernel=(7, 6)),
    "row-kernel": Conv(32, 12, kernel=(1, 5), padding=(0, 0, 2, 2)),
    "column-kernel": Conv(32, 12, kernel=(5, 1), padding=(2, 2, 0, 0)),
    # 1 x 1
    "pointwise": Conv(96, 40, kernel=(1, 1)),
    "pointwise-ragged": Conv(37, 21, kernel=(1, 1)),
    "pointwise-stride": Conv(48, 24, kernel=(1, 1), stride=(2, 2)),
    "pointwise-padded": Conv(32, 8, kernel=(1, 1), padding=SAME),
    "pointwise-stride-down": Conv(
        70, 11, kernel=(1, 1), padding=(1, 2, 0, 3), stride=(3, 1), size=(8, 19)
    ),
    # pixels that share a set of the cache, images that leave it
    "pointwise-far": Conv(1024, 5, kernel=(1, 1), batch=1, size=(18, 29)),
    # as many pixels as make channels the rows where they come and leave channels first
    "planes": Conv(37, 41, kernel=(1, 1), size=(14, 14)),
    "planes-whole": Conv(64, 48, kernel=(1, 1), size=(16, 15)),
    "planes-few-channels": Conv(6, 3, kernel=(1, 1), batch=3, size=(11, 19)),
    "planes-many-blocks": Conv(40, 70, kernel=(1, 1), batch=1, size=(29, 31)),
    "planes-stride": Conv(40, 20, kernel=(1, 1), stride=(2, 1), size=(28, 15)),
    # the first layer: fewer channels than a step, merged taps
    "first": Conv(3, 24, stride=(2, 2), padding=SAME, size=(16, 16)),
    "first-7x7": Conv(3, 16, kernel=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3), size=(15, 15)),
    "first-dilated": Conv(3, 8, padding=(2, 2, 2, 2), dilation=(2, 2)),
    "first-asymmetric": Conv(3, 8, stride=(2, 2), padding=(0, 1, 0, 1), size=(8, 9)),
    "first-many-tiles": Conv(3, 67, padding=SAME, batch=3, size=(13, 17)),
    "first-one-pixel": Conv(3, 33, padding=SAME, size=(1, 1)),
    "first-past-kernel": Conv(2, 7, kernel=(2, 2), stride=(3, 5), size=(9, 11)),
    "first-kernel-beyond-image": Conv(3, 6, kernel=(5, 7), padding=(3, 3, 4, 4), size=(2, 3)),
    "first-four-channels": Conv(4, 9, padding=SAME),
    "first-deep": Conv(3, 5, kernel=(37, 36), padding=(18, 18, 18, 18), batch=1, size=(4, 5)),
    # as many outputs a row as fill vectors, computed as rows of channels where they come and leave
    # channels first
    "first-planes": Conv(3, 24, stride=(2, 2), padding=SAME, size=(15, 32)),
    "first-planes-7x7": Conv(
        3, 67, kernel=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3), batch=3, size=(9, 31)
    ),
    "first-planes-four": Conv(4, 9, padding=(1, 0, 2, 0), size=(5, 16)),
    "first-planes-grey": Conv(1, 33, kernel=(2, 5), padding=(0, 1, 2, 2), size=(6, 48)),
    "first-planes-stride-4": Conv(
        2, 7, kernel=(8, 8), stride=(4, 4), padding=(2, 2, 3, 1), batch=1, size=(17, 64)
    ),
    "first-planes-past-kernel": Conv(3, 5, kernel=(1, 2), stride=(3, 3), size=(8, 47)),
    "grey": Conv(1, 10, padding=SAME),
    "grey-pointwise": Conv(1, 5, kernel=(1, 1)),
    "seven-channels": Conv(7, 5, padding=SAME),
    "fifteen-channels": Conv(15, 5, padding=SAME),
    "thirty-one-channels": Conv(31, 5, padding=SAME),
    # depthwise
    "depthwise": Conv(40, 40, padding=SAME, groups=40),
    "depthwise-stride": Conv(17, 17, stride=(2, 2), padding=SAME, groups=17),
    "depthwise-5x5": Conv(64, 64, kernel=(5, 5), padding=(2, 2, 2, 2), groups=64),
    "depthwise-7x7-dilated": Conv(
        16, 16, kernel=(7, 7), padding=(6, 6, 6, 6), dilation=(2, 2), groups=16
    ),
    "depthwise-asymmetric": Conv(70, 70, padding=(0, 2, 1, 0), stride=(2, 1), groups=70),
    "depthwise-wide": Conv(150, 150, padding=SAME, groups=150, batch=1),
    "depthwise-two": Conv(2, 2, padding=SAME, groups=2),
    "depthwise-pointwise": Conv(33, 33, kernel=(1, 1), groups=33),
    "depthwise-beyond-image": Conv(20, 20, kernel=(9, 9), padding=(4, 4, 4, 4), groups=20),
    # wide enough to be computed plane by plane where they come and leave channels first
    "depthwise-planes": Conv(20, 20, padding=SAME, groups=20, batch=3, size=(9, 17)),
    "depthwise-planes-whole": Conv(16, 16, padding=SAME, groups=16, size=(6, 32)),
    "depthwise-planes-unpadded": Conv(3, 3, kernel=(3, 4), groups=3, size=(4, 19)),
    "depthwise-planes-column": Conv(33, 33, kernel=(3, 1), groups=33, size=(5, 16)),
    "depthwise-planes-stride": Conv(
        35, 35, stride=(2, 2), padding=(0, 1, 0, 1), groups=35, size=(10, 38)
    ),
    "depthwise-planes-stride-4": Conv(5, 5, stride=(5, 4), padding=SAME, groups=5, size=(13, 67)),
    "depthwise-planes-past-kernel": Conv(
        4, 4, kernel=(3, 2), stride=(4, 3), groups=4, batch=1, size=(14, 53)
    ),
    "depthwise-planes-5x5": Conv(
        18, 18, kernel=(5, 5), padding=(2, 2, 2, 2), groups=18, size=(7, 24)
    ),
    "depthwise-planes-5x8": Conv(
        8, 8, kernel=(5, 8), stride=(2, 2), padding=(3, 1, 5, 4), groups=8, size=(8, 33)
    ),
    "depthwise-planes-7x7": Conv(
        17, 17, kernel=(7, 7), padding=(3, 3, 3, 3), groups=17, size=(5, 21)
    ),
    # grouped
    "multiplier": Conv(12, 24, padding=SAME, groups=12),
    "multiplier-seventeen": Conv(3, 51, padding=SAME, groups=3),
    "grouped": Conv(64, 32, padding=SAME, groups=2),
    "grouped-ragged": Conv(99, 39, padding=SAME, groups=3),
    "grouped-merged": Conv(12, 20, padding=SAME, groups=4, stride=(2, 1)),
    "grouped-pointwise": Conv(80, 36, kernel=(1, 1), groups=4),
    "grouped-narrowing": Conv(16, 8, padding=SAME, groups=8),
}


@lru_cache(maxsize=512)
def case(fmt, activation, conv, group_size=None, zeros=False, bias=True, kind="uniform"):
    """Random operands and what the oracle makes of them, kept for the next instruction set."""
    rng = np.random.default_rng(conv.channels)
    weights = random_weights(rng, fmt, conv.weight_shape, group_size, zeros, bias, kind)
    x = rng.normal(size=(conv.batch, *conv.size, conv.channels)).astype(np.float32)
    return x, weights, oracle.conv2d(x, *weights.astuple(), activation, **conv.geometry)


def check(kernel, conv, *args, call=None, **kwargs):
    """`call`: arguments of `core_conv2d` that must not change the result."""
    x, weights, expected = case(kernel.fmt, kernel.activation, conv, *args, **kwargs)
    actual = core_conv2d(x, weights, kernel.activation, **conv.geometry, **call or {})
    assert_same_bits(actual, expected)


MEMORY_FORMATS = [
    {"x_channels_last": x, "y_channels_last": y} for x in (True, False) for y in (True, False)
]


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_shapes(kernel, conv):
    for memory_format in MEMORY_FORMATS:
        check(kernel, conv, call=memory_format)
    check(kernel, conv, bias=False, call={"threads": 3})


GROUPED_SCALES = ["dense", "stride", "pointwise-ragged", "kernel-beyond-image", "first-7x7"]
GROUPED_SCALES += ["depthwise-7x7-dilated", "multiplier", "grouped", "grouped-merged"]


@pytest.mark.parametrize("name", GROUPED_SCALES)
def test_groups_of_scales(kernel, name):
    """Groups run over K with its padded taps, and need not align with taps."""
    for group_size, zeros in ((32, False), (32, True), (64, True), (96, False), (4096, True)):
        check(kernel, CONVS[name], group_size, zeros)


@pytest.mark.parametrize("width", range(1, 17))
def test_row_counts(kernel, width):
    """Numbers of pixels around the rows of a tile, for the dense, merged and depthwise paths."""
    for channels, groups in ((32, 1), (3, 1), (18, 18)):
        out = channels if groups > 1 else 10
        check(kernel, Conv(channels, out, padding=SAME, groups=groups, size=(2, width)))


def test_threads(kernel):
    names = "dense-large first depthwise-wide grouped-ragged pointwise planes planes-many-blocks"
    for name in names.split():
        for threads in (2, 5):
            for memory_format in MEMORY_FORMATS:
                check(kernel, CONVS[name], call={"threads": threads, **memory_format})


def test_no_images(kernel):
    for name in ("dense", "first", "depthwise", "grouped"):
        check(kernel, Conv(**{**vars(CONVS[name]), "batch": 0}))


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=300)
@given(data=st.data())
def test_any_geometry(isa, data):
    def draw(strategy):
        return data.draw(strategy)

    fmt, activation = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(oracle.ACTIVATIONS))
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    depthwise = draw(st.integers(0, 3)) == 0
    channels = draw(st.sampled_from((1, 2, 3, 4, 8, 17, 32, 40))) * groups
    conv = Conv(
        channels=channels,
        out=channels if depthwise else draw(st.integers(1, 20)) * groups,
        kernel=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        stride=draw(pairs),
        padding=draw(st.tuples(*[st.integers(0, 4)] * 4)),
        dilation=draw(pairs),
        groups=channels if depthwise else groups,
        batch=draw(st.integers(1, 3)),
        size=draw(st.tuples(st.integers(1, 8), st.integers(1, 8))),
    )
    assume(min(conv.output_size) >= 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    group_size = draw(st.sampled_from((None, None, 32, 64)))
    kind = draw(st.sampled_from(("uniform", "produced", "extreme")))
    zeros, bias = draw(st.booleans()), draw(st.booleans())
    weights = random_weights(rng, fmt, conv.weight_shape, group_size, zeros, bias, kind)
    x = rng.normal(size=(conv.batch, *conv.size, channels)).astype(np.float32)
    call = {"threads": draw(st.integers(1, 3)), **draw(st.sampled_from(MEMORY_FORMATS))}
    expected = oracle.conv2d(x, *weights.astuple(), activation, **conv.geometry)
    assert_same_bits(core_conv2d(x, weights, activation, **conv.geometry, **call), expected)


# --- values --------------------------------------------------------------------------------------

PATHS = ["dense", "pointwise-ragged", "first", "depthwise", "multiplier", "grouped-merged"]
PATHS += ["planes"]


@lru_cache(maxsize=len(PATHS) * 3)
def extreme_cases(fmt, activation, name, kind):
    """(x, weights, expected) with codes and activations at their ends."""
    conv = CONVS[name]
    rng = np.random.default_rng(len(name))
    top = oracle.LARGEST_CODE.get(activation, 1)
    low = 127 * 256 - 128 if activation == "int16" else top  # splits into (127, -128)
    shape = (conv.batch, *conv.size, conv.channels)
    cases = []
    for x in (np.full(shape, top), np.full(shape, -top), rng.choice([top, -top, low, -low], shape)):
        x[:, 0, 0, 0] = top  # scale 1
        x = x.astype(np.float32)
        for size in (None, 32):
            weights = random_weights(rng, fmt, conv.weight_shape, size, zeros=True, kind=kind)
            expected = oracle.conv2d(x, *weights.astuple(), activation, **conv.geometry)
            cases.append((x, weights, expected))
    return cases


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["lowest", "highest", "extreme"])
def test_extreme_codes(kernel, name, kind):
    geometry = CONVS[name].geometry
    for x, weights, expected in extreme_cases(kernel.fmt, kernel.activation, name, kind):
        for last in (True, False):
            call = {"x_channels_last": last, "y_channels_last": last}
            y = core_conv2d(x, weights, kernel.activation, **geometry, **call)
            assert_same_bits(y, expected)


def special_images(rng: np.random.Generator, size: tuple[int, int], channels: int) -> np.ndarray:
    """Images that need care, with ordinary ones between, float32 [14, H, W, C]."""
    ordinary = rng.normal(size=(*size, channels))
    flt_min = float(oracle.FLT_MIN)
    images = [ordinary.copy() for _ in range(14)]
    images[1][0, 0, 0] = np.nan
    images[3][-1, -1, -1] = np.inf
    images[5][2, 3, -1] = -np.inf
    images[6][:] = 0
    images[7][:] = -0.0
    images[8][0, 1, 0] = 1e38
    images[9] *= 1e-41
    images[10][:] = flt_min * 127
    images[11][:] = flt_min * 0.999 * 127
    images[12][:] = 3.4e38
    return np.array(images).astype(np.float32)


@lru_cache(maxsize=len(PATHS) * 2)
def special_case(fmt, activation, name, group_size):
    conv = CONVS[name]
    rng = np.random.default_rng(len(name))
    x = special_images(rng, conv.size, conv.channels)
    weights = random_weights(rng, fmt, conv.weight_shape, group_size, zeros=True)
    return x, weights, oracle.conv2d(x, *weights.astuple(), activation, **conv.geometry)


@pytest.mark.parametrize("name", PATHS)
def test_special_images_beside_ordinary_ones(kernel, name):
    geometry = CONVS[name].geometry
    for group_size in (None, 64):
        x, weights, expected = special_case(kernel.fmt, kernel.activation, name, group_size)
        for memory_format in MEMORY_FORMATS:
            y = core_conv2d(x, weights, kernel.activation, **geometry, **memory_format)
            assert_same_bits(y, expected)
    # What a user is promised, said without the oracle.
    assert np.isnan(y[[1, 3, 5]]).all()
    assert np.isfinite(y[[0, 2, 4, 13]]).all()
    assert_same_bits(y[6], np.broadcast_to(weights.bias, y[6].shape).copy())
    assert_same_bits(y[[0]], core_conv2d(x[[0]], weights, kernel.activation, **geometry))


def test_border_pixels_of_padding_alone_are_the_bias(kernel):
    """Padding counts nothing, with binary activations too; the border is wider than the kernel."""
    for groups in (1, 32):
        conv = Conv(32, 32, kernel=(2, 2), padding=(3, 3, 3, 3), groups=groups, size=(2, 2))
        x, weights, _ = case(kernel.fmt, kernel.activation, conv)
        y = core_conv2d(x, weights, kernel.activation, **conv.geometry)
        for row, column in ((0, 0), (1, 3), (-1, -1), (3, 0)):
            np.testing.assert_array_equal(y[:, row, column], np.tile(weights.bias, (2, 1)))


@pytest.mark.parametrize("kernel_size", [1, 2])
@pytest.mark.parametrize("call", MEMORY_FORMATS)
def test_pixels_that_no_tap_reads_still_set_the_scale(kernel, rng, kernel_size, call):
    """A stride can leave pixels out: they belong to the image all the same."""
    conv = Conv(32, 4, kernel=(kernel_size,) * 2, stride=(4, 4), size=(7, 7), batch=1)
    weights = random_weights(rng, kernel.fmt, conv.weight_shape)
    x = rng.normal(size=(1, 7, 7, 32)).astype(np.float32)
    x[0, 6, 6, 5] = 50
    expected = oracle.conv2d(x, *weights.astuple(), kernel.activation, **conv.geometry)
    actual = core_conv2d(x, weights, kernel.activation, **conv.geometry, **call)
    assert_same_bits(actual, expected)
    x[0, 6, 6, 5] = np.nan
    assert np.isnan(core_conv2d(x, weights, kernel.activation, **conv.geometry, **call)).all()


def test_pointwise_on_one_pixel_is_linear(kernel, rng):
    weights = random_weights(rng, kernel.fmt, (30, 64), 32, zeros=True)
    x = rng.normal(size=(5, 64)).astype(np.float32)
    expected = core_linear(x, weights, kernel.activation)
    as_conv = type(weights)(weights.codes[:, None, None], *weights.astuple()[1:])
    actual = core_conv2d(x[:, None, None], as_conv, kernel.activation)
    assert_same_bits(actual[:, 0, 0], expected)


def test_deep_sums_beyond_int32(kernel):
    """One tap of as many channels as it takes to leave int32 (int8 weights)."""
    channels = 140_000
    x = np.full((1, 1, 1, channels), oracle.LARGEST_CODE.get(kernel.activation, 1), np.float32)
    weights = deep_weights(kernel.fmt, channels)
    expected = oracle.conv2d(x, *weights.astuple(), kernel.activation)
    assert_same_bits(core_conv2d(x, weights, kernel.activation), expected)


@lru_cache(maxsize=1)
def deep_weights(fmt, channels):
    weights = random_weights(np.random.default_rng(0), fmt, (3, 1, 1, channels))
    weights.codes[0], weights.codes[1] = 0, oracle.FORMATS[fmt].max_code
    return weights


# --- arguments -----------------------------------------------------------------------------------

GEOMETRY = {
    "batch": 1,
    "height": 4,
    "width": 4,
    "channels": 4,
    "out_channels": 2,
    "out_height": 4,
    "out_width": 4,
    "kernel_h": 3,
    "kernel_w": 3,
    "stride_h": 1,
    "stride_w": 1,
    "pad_top": 1,
    "pad_left": 1,
    "dilation_h": 1,
    "dilation_w": 1,
    "groups": 1,
}


@pytest.mark.parametrize(
    "change",
    [{name: -1} for name in GEOMETRY]
    + [{name: 0} for name in ("stride_h", "stride_w", "dilation_h", "dilation_w", "groups")]
    + [{"groups": 3}, {"groups": 2, "out_channels": 3}],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()),
)
def test_bad_geometry_is_refused(change):
    memory = np.zeros(1 << 16, np.float32)
    y = np.zeros(1 << 12, np.float32)
    rest = (0, 0, 0, memory.ctypes.data, memory.ctypes.data, 0, 0, 0, 1)
    _core.conv2d(memory.ctypes.data, y.ctypes.data, tuple(GEOMETRY.values()), *rest)
    changed = tuple({**GEOMETRY, **change}.values())
    with pytest.raises(ValueError, match=r"geometry|negative|address"):
        _core.conv2d(memory.ctypes.data, y.ctypes.data, changed, *rest)
