"""The numerics of lowbit, stated in plain NumPy and written to be read.

This file is the reference document of what a lowbit layer computes. It shares no code with the
package or its kernels; every kernel on every instruction set must equal it bit for bit. The
sections follow the order in which a layer computes:

1. weight formats: what an unsigned code means,
2. packed layout: where a code lies in `weight_packed`,
3. activation quantization: one scale per row (Linear) or per image (Conv2d),
4. exact integer sums, then float32 with one rounding where it is written,
5. `linear` and `conv2d`, which put these together,
6. random codes and scales for tests.

Two tricks keep it exact and quick. Integer sums are computed by a float64 matrix product: all
partial sums are integers below 2**53, so no order of summation can round. The float32 fused
multiply-add, which NumPy lacks, is computed in float64 and rounded to odd before the final
rounding (Boldo and Melquiond, "When double rounding is odd", 2004); `test_oracle.py` checks it
against rational arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# --- 1. Weight formats ---------------------------------------------------------------------------

LANES = 16  # output channels in one panel of the packed layout
VECTOR_BYTES = 64  # bytes in one step of a panel: four per output channel


@dataclass(frozen=True)
class Format:
    """A weight format: an unsigned `code` of `bits` bits stands for `mul * code + add`."""

    name: str
    bits: int
    mul: int
    add: int

    @property
    def planes(self) -> int:
        """Codes in one byte."""
        return 8 // self.bits

    @property
    def depth(self) -> int:
        """Consecutive k that one step of the packed layout holds for each output channel."""
        return 4 * self.planes

    @property
    def max_code(self) -> int:
        """The largest code that fits, whether or not a quantizer produces it."""
        return 2**self.bits - 1

    def value(self, codes: np.ndarray) -> np.ndarray:
        """The integers, int64, that unsigned `codes` stand for."""
        return self.mul * codes.astype(np.int64) + self.add


FORMATS = {
    fmt.name: fmt
    for fmt in (
        Format("int8", 8, 1, -128),
        Format("int4", 4, 1, -8),
        Format("int2", 2, 2, -3),
        Format("ternary", 2, 1, -1),
        Format("binary", 1, 2, -1),
    )
}
ACTIVATIONS = ("int8", "int16", "binary")

# The values that quantizers produce. int8 leaves out code 0 (-128) and ternary code 3 (2): both
# are legal in a kernel.
PRODUCED_VALUES = {
    "int8": tuple(range(-127, 128)),
    "int4": tuple(range(-8, 8)),
    "int2": (-3, -1, 1, 3),
    "ternary": (-1, 0, 1),
    "binary": (-1, 1),
}


def dequantize_weight(
    codes: np.ndarray,
    fmt: str,
    scale: np.ndarray,
    group_scale: np.ndarray | None = None,
    group_zero: np.ndarray | None = None,
    group_size: int | None = None,
) -> np.ndarray:
    """The real weights, float64 [N, K], that codes [N, K] and their scales stand for.

    `scale[n] * v` per channel, `scale[n] * (group_scale[n, g] * v + group_zero[n, g])` with groups.
    No kernel computes this: a layer multiplies integers first. It is what a layer's output is near.
    """
    value = FORMATS[fmt].value(codes).astype(np.float64)
    if group_size:
        group = np.arange(codes.shape[1]) // group_size
        value *= group_scale.astype(np.float64)[:, group]
        if group_zero is not None:
            value += group_zero.astype(np.float64)[:, group]
    return scale.astype(np.float64)[:, None] * value


# --- 2. Packed layout ----------------------------------------------------------------------------


def packed_shape(fmt: str, n: int, k: int) -> tuple[int, int, int]:
    """Shape of the packed weights of `n` output channels: (panels, steps, 64)."""
    return -(-n // LANES), -(-k // FORMATS[fmt].depth), VECTOR_BYTES


def _shifts(f: Format) -> np.ndarray:
    """How far each bit field of a byte is shifted, uint8 [planes, 1]."""
    return (f.bits * np.arange(f.planes, dtype=np.uint8))[:, None]


def pack(codes: np.ndarray, fmt: str) -> np.ndarray:
    """Pack codes uint8 [N, K] into uint8 [ceil(N/16), steps, 64].

    Channel n, the lane n % 16 of panel n // 16, owns bytes 4*lane .. 4*lane+3 of every step. Bit
    field p (bits p*bits and up) of its byte j holds the code of k = step*depth + 4*p + j.
    Positions past N or K are 0.
    """
    f = FORMATS[fmt]
    n, k = codes.shape
    if codes.size and int(codes.max()) > f.max_code:
        raise ValueError(f"a code does not fit {f.bits} bits")
    panels, steps, _ = packed_shape(fmt, n, k)
    padded = np.zeros((panels * LANES, steps * f.depth), np.uint8)
    padded[:n, :k] = codes
    fields = padded.reshape(panels, LANES, steps, f.planes, 4) << _shifts(f)
    words = np.bitwise_or.reduce(fields, axis=3)  # [panels, lanes, steps, 4]
    return np.ascontiguousarray(words.transpose(0, 2, 1, 3)).reshape(panels, steps, VECTOR_BYTES)


def unpack(packed: np.ndarray, fmt: str, n: int, k: int) -> np.ndarray:
    """The inverse of `pack`: codes uint8 [n, k]."""
    f = FORMATS[fmt]
    panels, steps, _ = packed_shape(fmt, n, k)
    words = packed.reshape(panels, steps, LANES, 1, 4)
    fields = (words >> _shifts(f)) & np.uint8(f.max_code)  # [panels, steps, lanes, planes, 4]
    codes = fields.transpose(0, 2, 1, 3, 4).reshape(panels * LANES, steps * f.depth)
    return np.ascontiguousarray(codes[:n, :k])


def conv_blocks(n: int, groups: int) -> int:
    """Matrices that a convolution's weights are packed as, one after the other.

    Groups whose output channels divide a panel share panels; any other has panels of its own.
    """
    return 1 if n // groups in (1, 2, 4, 8) else groups


def tap_channels(fmt: str, channels_per_group: int) -> int:
    """Channels that one kernel tap takes in the K index of a convolution.

    A tap is padded to whole steps, unless it has fewer channels than one step: then nothing is
    padded and the taps follow each other directly.
    """
    depth = FORMATS[fmt].depth
    if channels_per_group < depth:
        return channels_per_group
    return -(-channels_per_group // depth) * depth


def conv_matrix(codes: np.ndarray, fmt: str) -> np.ndarray:
    """Convolution codes [N, kh, kw, cin_g] as the matrix [N, K], K = kh * kw * tap_channels.

    The padded positions hold code 0. They meet activation code 0, so their value counts nothing.
    """
    padding = tap_channels(fmt, codes.shape[3]) - codes.shape[3]
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 0), (0, padding)))
    return padded.reshape(len(codes), math.prod(padded.shape[1:]))


def pack_conv(codes: np.ndarray, fmt: str, groups: int = 1) -> np.ndarray:
    """Pack convolution codes [N, kh, kw, cin_g].

    Each of `conv_blocks` parts is packed like a Linear layer; they are stacked along dim 0.
    """
    blocks = np.split(conv_matrix(codes, fmt), conv_blocks(len(codes), groups))
    return np.concatenate([pack(part, fmt) for part in blocks])


def pack_groups(values: np.ndarray, blocks: int = 1) -> np.ndarray:
    """Scales or zeros of groups [N, G] as the kernels read them: [panels, G, 16].

    Value [p, g, lane] is that of channel 16 * p + lane. Each of `blocks` parts has panels of its
    own, as `pack_conv` says; lanes without a channel hold 0.
    """
    panels = []
    for part in np.split(values, blocks):
        for first in range(0, len(part), LANES):
            panel = np.zeros((part.shape[1], LANES), values.dtype)
            channels = part[first : first + LANES]
            panel[:, : len(channels)] = channels.T
            panels.append(panel)
    return np.array(panels, values.dtype).reshape(-1, values.shape[1], LANES)


def unpack_groups(packed: np.ndarray, n: int, blocks: int = 1) -> np.ndarray:
    """The inverse of `pack_groups`: [n, G]."""
    rows = n // blocks
    parts = [
        np.concatenate(list(part.transpose(0, 2, 1)))[:rows] for part in np.split(packed, blocks)
    ]
    return np.ascontiguousarray(np.concatenate(parts))


# --- 3. Activation quantization ------------------------------------------------------------------

FLT_MIN = np.finfo(np.float32).tiny
# int16 takes two int8 passes, 256*hi + lo: 127*256 + 127 is the largest code with |hi| <= 127.
LARGEST_CODE = {"int8": 127, "int16": 127 * 256 + 127}


def quantize_activation(x: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantize each x[i], a row (Linear) or an image in the order (h, w, c) (Conv2d).

    Args:
        x: float32 [M, ...]; the scale is shared over all dimensions but the first.
        activation: "int8", "int16" or "binary".

    Returns:
        codes int64, shape of x, and scales float32 [M]; x[i] is about scales[i] * codes[i].

    A NaN or Inf in x[i] makes scales[i] NaN and its codes 0, hence its outputs NaN.
    """
    assert x.dtype == np.float32, "float16 and bfloat16 are converted first, exactly"
    rows = x.reshape(len(x), math.prod(x.shape[1:]))
    # Denormals and overflow are part of the definition: NumPy need not warn of them.
    with np.errstate(all="ignore"):
        codes, scale = (_to_signs if activation == "binary" else _to_integers)(rows, activation)
    finite = np.isfinite(rows).all(axis=1)
    scale = np.where(finite, scale, np.float32(np.nan))
    codes = np.where(finite[:, None], codes, 0).astype(np.int64)
    return codes.reshape(x.shape), scale


def _to_integers(rows: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric: the largest magnitude becomes the largest code. Too small to divide by is zero."""
    amax = np.abs(rows).max(axis=1, initial=np.float32(0))
    scale = amax / np.float32(LARGEST_CODE[activation])
    scale = np.where(scale < FLT_MIN, np.float32(0), scale)
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return np.rint(rows * inverse[:, None]), scale  # rint rounds half to even


def _to_signs(rows: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """+1 where x >= 0 (so -0.0 is +1), -1 elsewhere; the scale is the mean of |x|."""
    count = rows.shape[1]
    scale = strided_sum(np.abs(rows)) / np.float32(count) if count else np.zeros(len(rows), "f4")
    return np.where(rows >= 0, 1, -1), scale


def strided_sum(rows: np.ndarray) -> np.ndarray:
    """Sum each row of float32 [M, K] in the one order that every instruction set can follow.

    Lane j of 16 adds x[j], x[j+16], x[j+32], ... in ascending order from 0.0. Then the upper half
    of the lanes is added to the lower half until one is left.
    """
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % LANES)))
    lanes = np.zeros((len(rows), LANES), np.float32)
    for start in range(0, padded.shape[1], LANES):
        lanes = lanes + padded[:, start : start + LANES]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    return lanes[:, 0]


def split_int16(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split int16 activation codes into signed bytes (hi, lo) with codes == 256*hi + lo."""
    lo = (codes + 128) % 256 - 128
    return (codes - lo) // 256, lo


# --- 4. Sums -------------------------------------------------------------------------------------


def exact_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b of integers, exact, int64."""
    bound = int(np.abs(a).max(initial=0)) * int(np.abs(b).max(initial=0)) * a.shape[1]
    assert bound < 2**53, "a partial sum might not be exact in float64"
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 with a single rounding, broadcasting.

    The product of two float32 is exact in float64. Its sum with c is rounded to odd: of the two
    float64 around the exact sum, take the one whose last bit is set. With more than two extra bits,
    rounding that to float32 gives the same as rounding the exact sum.
    """
    a, b, c = (np.asarray(v, np.float32).astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        product = a * b
        total = product + c
        # Knuth's TwoSum: total + error is the exact sum.
        c_part = total - product
        error = (product - (total - c_part)) + (c - c_part)
        inexact = np.isfinite(total) & (error != 0)
        even = (total.view(np.int64) & 1) == 0
        neighbour = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(inexact & even, neighbour, total).astype(np.float32)


def scaled_sum(
    act_codes: np.ndarray,
    act_scale: np.ndarray,
    codes: np.ndarray,
    fmt: str,
    scale: np.ndarray,
    group_scale: np.ndarray | None,
    group_zero: np.ndarray | None,
    group_size: int | None,
    bias: np.ndarray | None,
) -> np.ndarray:
    """Outputs float32 [M, N] of quantized activations [M, K] and weight codes [N, K].

    Args:
        act_codes: int64 [M, K].
        act_scale: float32 [M].
        codes: uint8 [N, K].
        scale: float32 [N].
        group_scale: float16 [N, ceil(K / group_size)], or None for a scale per channel alone.
        group_zero: like group_scale, or None.
        bias: float32 [N], or None for 0.0.
    """
    values = FORMATS[fmt].value(codes).T  # [K, N]
    k, n = values.shape
    if not group_size:
        f = exact_matmul(act_codes, values).astype(np.float32)
    else:
        f = np.zeros((len(act_codes), n), np.float32)
        for g, start in enumerate(range(0, k, group_size)):
            part = slice(start, start + group_size)
            acc = exact_matmul(act_codes[:, part], values[part])
            f = fma(group_scale[:, g], acc.astype(np.float32), f)
            if group_zero is not None:
                act_sum = act_codes[:, part].sum(axis=1)[:, None]
                f = fma(group_zero[:, g], act_sum.astype(np.float32), f)
    with np.errstate(all="ignore"):
        output_scale = act_scale[:, None] * scale[None, :]  # float32
    return fma(f, output_scale, np.float32(0) if bias is None else bias)


# --- 5. Layers -----------------------------------------------------------------------------------


def linear(
    x: np.ndarray,
    codes: np.ndarray,
    fmt: str,
    scale: np.ndarray,
    group_scale: np.ndarray | None = None,
    group_zero: np.ndarray | None = None,
    group_size: int | None = None,
    bias: np.ndarray | None = None,
    activation: str = "int8",
) -> np.ndarray:
    """A Linear layer: x float32 [M, K] and weight codes [N, K] to float32 [M, N]."""
    act_codes, act_scale = quantize_activation(x, activation)
    return scaled_sum(
        act_codes, act_scale, codes, fmt, scale, group_scale, group_zero, group_size, bias
    )


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output extent of a convolution along one dimension; `padding` counts both sides together."""
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


def conv2d(
    x: np.ndarray,
    codes: np.ndarray,
    fmt: str,
    scale: np.ndarray,
    group_scale: np.ndarray | None = None,
    group_zero: np.ndarray | None = None,
    group_size: int | None = None,
    bias: np.ndarray | None = None,
    activation: str = "int8",
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """A Conv2d layer, NHWC: x float32 [B, H, W, C] to float32 [B, out_h, out_w, N].

    Args:
        x: one scale per image. For another padding mode than zeros, pad the float image first.
        codes: uint8 [N, kh, kw, C / groups].
        padding: (top, bottom, left, right), with activation code 0 for every activation type.
        groups: of channels; `group_size` is about the groups of scales, which run over the K index
            of `conv_matrix`, padded taps included.
    """
    act_codes, act_scale = quantize_activation(x, activation)
    columns = im2col(act_codes, fmt, codes.shape[1:3], stride, padding, dilation, groups)
    batch, out_h, out_w, _, k = columns.shape
    matrix = conv_matrix(codes, fmt)
    row_scale = np.repeat(act_scale, out_h * out_w)
    outputs = []
    for g, part in enumerate(np.split(np.arange(len(codes)), groups)):
        outputs.append(
            scaled_sum(
                columns[:, :, :, g].reshape(batch * out_h * out_w, k),
                row_scale,
                matrix[part],
                fmt,
                scale[part],
                None if group_scale is None else group_scale[part],
                None if group_zero is None else group_zero[part],
                group_size,
                None if bias is None else bias[part],
            )
        )
    return np.concatenate(outputs, axis=1).reshape(batch, out_h, out_w, len(codes))


def conv2d_nchw(x: np.ndarray, *args, **kwargs) -> np.ndarray:
    """`conv2d` for x [B, C, H, W]: the memory format changes no bit of the result."""
    return conv2d(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), *args, **kwargs).transpose(
        0, 3, 1, 2
    )


def im2col(
    act_codes: np.ndarray,
    fmt: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> np.ndarray:
    """Activation codes [B, H, W, C] that each output meets: [B, out_h, out_w, groups, K]."""
    batch, height, width, channels = act_codes.shape
    top, bottom, left, right = padding
    out_h = output_size(height, kernel[0], stride[0], top + bottom, dilation[0])
    out_w = output_size(width, kernel[1], stride[1], left + right, dilation[1])
    padded = np.pad(act_codes, ((0, 0), (top, bottom), (left, right), (0, 0)))
    per_group = channels // groups
    columns = np.zeros(
        (batch, out_h, out_w, groups, *kernel, tap_channels(fmt, per_group)), np.int64
    )
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            y, x = i * dilation[0], j * dilation[1]
            rows = slice(y, y + out_h * stride[0], stride[0])
            tap = padded[:, rows, x : x + out_w * stride[1] : stride[1]]
            columns[..., i, j, :per_group] = tap.reshape(batch, out_h, out_w, groups, per_group)
    return columns.reshape(*columns.shape[:4], math.prod(columns.shape[4:]))


# --- 6. Random operands for tests ----------------------------------------------------------------


def random_codes(
    rng: np.random.Generator, fmt: str, shape: tuple[int, ...], kind: str = "uniform"
) -> np.ndarray:
    """Codes uint8 of a format.

    Args:
        kind: "uniform" (every code that fits, also those that no quantizer produces), "produced"
            (only what quantizers produce), "lowest" (all 0), "highest" (all ones) or "extreme"
            (each the lowest or the highest).
    """
    f = FORMATS[fmt]
    if kind == "lowest":
        return np.zeros(shape, np.uint8)
    if kind == "highest":
        return np.full(shape, f.max_code, np.uint8)
    if kind == "extreme":
        return np.where(rng.integers(0, 2, shape) == 1, f.max_code, 0).astype(np.uint8)
    if kind == "produced":
        values = rng.choice(PRODUCED_VALUES[fmt], shape)
        return ((values - f.add) // f.mul).astype(np.uint8)
    return rng.integers(0, f.max_code + 1, shape, dtype=np.uint8)


def random_scale(rng: np.random.Generator, n: int) -> np.ndarray:
    """Channel scales float32 [n], over a few orders of magnitude."""
    return np.exp(rng.normal(-4, 2, n)).astype(np.float32)


def random_groups(
    rng: np.random.Generator, n: int, k: int, group_size: int, zeros: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """(group_scale, group_zero) float16 [n, ceil(k / group_size)], of either sign."""
    shape = (n, -(-k // group_size))
    scale = rng.normal(0, 1, shape).astype(np.float16)
    return scale, rng.normal(0, 4, shape).astype(np.float16) if zeros else None
