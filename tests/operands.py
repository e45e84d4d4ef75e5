"""Calls of `_core` by raw address, with operands that end where readable memory ends.

Every array lies at the end of its own pages, followed by a page that may not be touched: a kernel
that reads or writes past an operand crashes the test, and pytest's fault handler names it. Outputs
are filled with a pattern first, and the memory before them is checked afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
import oracle

from lowbit import _core

FORMAT_INDEX = {name: i for i, name in enumerate(_core.FORMATS)}
ACTIVATION_INDEX = {name: i for i, name in enumerate(_core.ACTIVATIONS)}

TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)

PATTERN = 0xA5  # unwritten memory: as a float32, an ordinary small negative number
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """A copy of an array whose last byte is followed by an untouchable page."""

    def __init__(self, array: np.ndarray):
        page = mmap.PAGESIZE
        size = array.nbytes + -array.nbytes % page or page
        self._map = mmap.mmap(-1, size + page)
        buffer = np.frombuffer(self._map, np.uint8)
        start = size - array.nbytes
        buffer[:size] = PATTERN
        self.before = buffer[:start]
        self.array = buffer[start:size].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.address = buffer.ctypes.data + start
        fence = ctypes.c_void_p(buffer.ctypes.data + size)
        if _libc.mprotect(fence, ctypes.c_size_t(page), PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    @classmethod
    def output(cls, shape: tuple[int, ...]) -> Guarded:
        """A float32 array to be written, filled with the pattern."""
        return cls(np.full((*shape, 4), PATTERN, np.uint8).view(np.float32)[..., 0])

    def check_before(self) -> None:
        """Fail if the memory before the array was written."""
        assert (self.before == PATTERN).all(), "written before the start of the output"


def address(guarded: Guarded | None) -> int:
    return guarded.address if guarded else 0


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a layer as the oracle takes them: codes [N, K] or [N, kh, kw, cin_g]."""

    codes: np.ndarray
    fmt: str
    scale: np.ndarray
    group_scale: np.ndarray | None = None
    group_zero: np.ndarray | None = None
    group_size: int | None = None
    bias: np.ndarray | None = None

    def astuple(self) -> tuple:
        """Arguments of `oracle.linear` and `oracle.conv2d` after x."""
        return (
            self.codes,
            self.fmt,
            self.scale,
            self.group_scale,
            self.group_zero,
            self.group_size,
            self.bias,
        )


def random_weights(
    rng: np.random.Generator,
    fmt: str,
    shape: tuple[int, ...],
    group_size: int | None = None,
    zeros: bool = False,
    bias: bool = True,
    kind: str = "uniform",
) -> Weights:
    """Weights of a Linear layer (shape [N, K]) or a convolution (shape [N, kh, kw, cin_g])."""
    codes = oracle.random_codes(rng, fmt, shape, kind)
    n, k = shape[0], codes[0].size
    if len(shape) == 4:
        k = shape[1] * shape[2] * oracle.tap_channels(fmt, shape[3])
    scale = oracle.random_scale(rng, n)
    group_scale = group_zero = None
    if group_size:
        group_scale, group_zero = oracle.random_groups(rng, n, k, group_size, zeros)
    offsets = rng.normal(size=n).astype(np.float32) if bias else None
    return Weights(codes, fmt, scale, group_scale, group_zero, group_size, offsets)


def core_linear(
    x: np.ndarray,
    weights: Weights,
    activation: str,
    threads: int = 1,
    fixed: tuple[float, int] = (0.0, 0),
) -> np.ndarray:
    """`_core.linear` of x float32 [M, K] and weights [N, K]: float32 [M, N].

    Args:
        fixed: scale and zero point of static activations; a scale of 0: dynamic ones.
    """
    (m, k), n = x.shape, len(weights.codes)
    y = Guarded.output((m, n))
    operands, fields = _operands(oracle.pack(weights.codes, weights.fmt), weights)
    x = Guarded(x)
    if fixed != (0.0, 0):
        bias = Guarded.output((n,))
        kinds = (FORMAT_INDEX[weights.fmt], ACTIVATION_INDEX[activation])
        sizes = (n, k, weights.group_size or 0)
        _core.linear_static_bias(bias.address, *fixed, threads, *kinds, *sizes, *fields)
        bias.check_before()
        fields[-1] = bias.address
    _core.linear(
        x.address,
        m,
        y.address,
        FORMAT_INDEX[weights.fmt],
        ACTIVATION_INDEX[activation],
        n,
        k,
        weights.group_size or 0,
        *fields,
        threads,
        0,
        *fixed,
    )
    del operands
    y.check_before()
    return y.array.copy()


def core_conv2d(
    x: np.ndarray,
    weights: Weights,
    activation: str,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    threads: int = 1,
    x_channels_last: bool = True,
    y_channels_last: bool = True,
    fixed: tuple[float, int] = (0.0, 0),
) -> np.ndarray:
    """`_core.conv2d` of x float32 [B, H, W, C], arguments as in `oracle.conv2d`.

    Args:
        x_channels_last: whether the kernel reads NHWC; otherwise it is handed x as NCHW.
        y_channels_last: whether it writes NHWC; what is returned is NHWC in any case.
        fixed: as for `core_linear`.
    """
    batch, height, width, channels = x.shape
    out_channels, kernel_h, kernel_w, _ = weights.codes.shape
    top, bottom, left, right = padding
    out_height = oracle.output_size(height, kernel_h, stride[0], top + bottom, dilation[0])
    out_width = oracle.output_size(width, kernel_w, stride[1], left + right, dilation[1])
    y_shape = (batch, out_height, out_width, out_channels)
    y = Guarded.output(y_shape if y_channels_last else tuple(y_shape[i] for i in TO_NCHW))
    packed = oracle.pack_conv(weights.codes, weights.fmt, groups)
    operands, fields = _operands(packed, weights, oracle.conv_blocks(out_channels, groups))
    x = Guarded(x if x_channels_last else x.transpose(TO_NCHW))
    geometry = (batch, height, width, channels, out_channels, out_height, out_width)
    geometry += (kernel_h, kernel_w, *stride, top, left, *dilation, groups)
    if fixed != (0.0, 0):
        bias = Guarded.output((out_channels,))
        kinds = (FORMAT_INDEX[weights.fmt], ACTIVATION_INDEX[activation], weights.group_size or 0)
        _core.conv2d_static_bias(bias.address, *fixed, threads, geometry, *kinds, *fields)
        bias.check_before()
        fields[-1] = bias.address
    _core.conv2d(
        x.address,
        y.address,
        geometry,
        FORMAT_INDEX[weights.fmt],
        ACTIVATION_INDEX[activation],
        weights.group_size or 0,
        *fields,
        threads,
        x_channels_last,
        y_channels_last,
        0,
        *fixed,
    )
    del operands
    y.check_before()
    return (y.array if y_channels_last else y.array.transpose(TO_NHWC)).copy()


def _operands(packed: np.ndarray, weights: Weights, blocks: int = 1) -> tuple[list, list[int]]:
    """The weights in guarded memory, and their addresses in the order that `_core` takes."""
    group_scale, group_zero = (
        None if values is None else oracle.pack_groups(values, blocks)
        for values in (weights.group_scale, weights.group_zero)
    )
    arrays = (packed, weights.scale, group_scale, group_zero, weights.bias)
    guarded = [None if array is None else Guarded(array) for array in arrays]
    return guarded, [address(g) for g in guarded]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal shapes and equal bits, NaN being equal to NaN."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == np.float32
    # The payload of a NaN is nobody's business.
    bits = [
        np.where(np.isnan(v), np.float32(np.nan), v).view(np.uint32) for v in (actual, expected)
    ]
    different = np.argwhere(bits[0] != bits[1])
    if len(different):
        at = tuple(different[0])
        raise AssertionError(
            f"{len(different)} of {actual.size} outputs differ, first at {list(map(int, at))}: "
            f"{actual[at]!r} is not {expected[at]!r}"
        )
