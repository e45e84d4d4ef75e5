"""The numerics of static activations, stated in plain NumPy: what `oracle.py` says, but for these.

One scale and one zero point, found by calibration, for all rows or images: code q means
`scale * (q - zero)`. Sums are those of codes; what the zero point adds to them is known beforehand
and taken off the bias. What pads a convolution means 0: its code is the zero point.
"""

from __future__ import annotations

import math

import numpy as np
import oracle

RANGES = {"int8": (-128, 127), "int16": (-32639, 32639)}


def quantize(
    x: np.ndarray, activation: str, scale: float, zero: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes int64 of x float32 [M, ...]; the scale float32 [M], NaN where x[i] has NaN or Inf."""
    assert x.dtype == np.float32
    assert zero == 0 or activation == "int8"
    if activation == "binary":
        codes = np.where(x >= 0, 1, -1)
    else:
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / np.float32(scale)
            low, high = RANGES[activation]
            codes = np.clip(np.rint(x * inverse).astype(np.float64) + zero, low, high)
    finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    codes = np.where(finite.reshape(-1, *[1] * (x.ndim - 1)), codes, 0).astype(np.int64)
    return codes, np.where(finite, np.float32(scale), np.float32(np.nan))


def bias(
    codes: np.ndarray,
    real: np.ndarray,
    fmt: str,
    scale: np.ndarray,
    group_scale: np.ndarray | None,
    group_zero: np.ndarray | None,
    group_size: int | None,
    offset: np.ndarray | None,
    fixed: tuple[float, int],
) -> np.ndarray:
    """The bias float32 [N] that takes the zero point back, of weight codes [N, K].

    Args:
        real: bool [K], False where K is padding.
        offset: the layer's own bias, or None for 0.
        fixed: scale and zero point of the activations.
    """
    n, k = codes.shape
    offset = np.zeros(n, np.float32) if offset is None else offset
    act_scale, zero = np.float32(fixed[0]), fixed[1]
    if zero == 0:
        return offset
    values = oracle.FORMATS[fmt].value(codes) * real
    total = np.zeros(n, np.float64)
    size = group_size or max(k, 1)
    for g in range(-(-k // size)):
        part = slice(g * size, (g + 1) * size)
        value = values[:, part].sum(axis=1).astype(np.float64)
        if group_size:
            value = group_scale[:, g].astype(np.float64) * value
        if group_zero is not None:
            value = value + group_zero[:, g].astype(np.float64) * float(real[part].sum())
        total = total + value
    with np.errstate(all="ignore"):
        each = (act_scale * scale).astype(np.float64)
        return (offset.astype(np.float64) - each * (float(zero) * total)).astype(np.float32)


def linear(
    x: np.ndarray,
    codes: np.ndarray,
    fmt: str,
    scale: np.ndarray,
    group_scale: np.ndarray | None,
    group_zero: np.ndarray | None,
    group_size: int | None,
    offset: np.ndarray | None,
    activation: str,
    fixed: tuple[float, int],
) -> np.ndarray:
    """A Linear layer: as `oracle.linear`, `offset` being its bias."""
    act_codes, act_scale = quantize(x, activation, *fixed)
    groups = (group_scale, group_zero, group_size)
    real = np.ones(codes.shape[1], bool)
    offset = bias(codes, real, fmt, scale, *groups, offset, fixed)
    return oracle.scaled_sum(act_codes, act_scale, codes, fmt, scale, *groups, offset)


def conv2d(
    x: np.ndarray,
    codes: np.ndarray,
    fmt: str,
    scale: np.ndarray,
    group_scale: np.ndarray | None,
    group_zero: np.ndarray | None,
    group_size: int | None,
    offset: np.ndarray | None,
    activation: str,
    fixed: tuple[float, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """A Conv2d layer, NHWC: as `oracle.conv2d`, `offset` being its bias."""
    zero = fixed[1]
    act_codes, act_scale = quantize(x, activation, *fixed)
    tap = oracle.tap_channels(fmt, codes.shape[3])
    real = np.arange(math.prod(codes.shape[1:3]) * tap) % tap < codes.shape[3]
    # im2col pads with 0: it is given what codes mean. Codes come out again, border included.
    columns = oracle.im2col(
        act_codes - zero, fmt, codes.shape[1:3], stride, padding, dilation, groups
    )
    columns += zero * real
    batch, out_h, out_w, _, k = columns.shape
    matrix = oracle.conv_matrix(codes, fmt)
    row_scale = np.repeat(act_scale, out_h * out_w)
    outputs = []
    for g, part in enumerate(np.split(np.arange(len(codes)), groups)):
        own = (
            None if group_scale is None else group_scale[part],
            None if group_zero is None else group_zero[part],
            group_size,
        )
        own_bias = None if offset is None else offset[part]
        own_bias = bias(matrix[part], real, fmt, scale[part], *own, own_bias, fixed)
        rows = columns[:, :, :, g].reshape(batch * out_h * out_w, k)
        outputs.append(
            oracle.scaled_sum(rows, row_scale, matrix[part], fmt, scale[part], *own, own_bias)
        )
    return np.concatenate(outputs, axis=1).reshape(batch, out_h, out_w, len(codes))
