"""What a program of a static network computes, stated in plain NumPy and written to be read.

`Program` takes the very arguments of `lowbit._core.Program` and interprets the steps one by one, on
codes int8 [N, H, W, C]. Every operation is float32 with the roundings that are written; sums of
codes are exact integers. It shares no code with the package. Import it as `static.oracle`.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import oracle_static
from oracle import (
    FORMATS,
    conv_blocks,
    fma,
    im2col,
    scaled_sum,
    tap_channels,
    unpack,
    unpack_groups,
)

F32 = np.float32
FORMAT_NAMES = tuple(FORMATS)
LOWEST, HIGHEST = -128, 127


def quantize(v: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """Codes int8 of float32 v, which has no NaN: rne(v * (1 / scale)) + zero, saturated."""
    with np.errstate(all="ignore"):
        rounded = np.rint(v.astype(F32) * (F32(1) / F32(scale)))
    return np.clip(rounded.astype(np.float64) + zero, LOWEST, HIGHEST).astype(np.int8)


def dequantize(q: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """float32(q - zero) * scale."""
    return (q.astype(np.int64) - zero).astype(F32) * F32(scale)


def epilogue(y: np.ndarray, name: str) -> np.ndarray:
    """The activations that torch names so, in its order of operations."""
    zero, three, six = F32(0), F32(3), F32(6)
    if name == "relu":
        return np.where(zero > y, zero, y)
    if name == "relu6":
        y = np.where(zero > y, zero, y)
        return np.where(y > six, six, y)
    if name == "hardswish":
        return y * epilogue(y + three, "relu6") / six
    assert name == "none", name
    return y


def look_up(v: np.ndarray, table: tuple[float, int, bytes]) -> np.ndarray:
    """Codes of a function of v, tabulated: i = clamp(rne(v * inv), low, low + len - 1)."""
    inv, low, codes = table
    entries = np.frombuffer(bytes(codes), np.int8)
    with np.errstate(all="ignore"):
        index = np.clip(np.rint(v * F32(inv)), low, low + len(entries) - 1)
    return entries[index.astype(np.int64) - low]


class Program:
    """Interprets a program; arguments as of `lowbit._core.Program`."""

    def __init__(self, values, steps) -> None:
        self.values, self.steps = list(values), list(steps)

    def run(self, inputs, outputs, batch: int, threads: int = 1) -> None:
        """Reads float32 inputs from (address, channels_last), and writes outputs so."""
        arrays = {}
        for step in self.steps:
            if step["op"] == "quantize":
                c, h, w, _, _ = self.values[step["to"]]
                address, last = inputs[step["input"]]
                x = _memory(address, (batch, h, w, c) if last else (batch, c, h, w), F32)
                arrays[step["input"]] = x if last else x.transpose(0, 2, 3, 1)
        for index, y in self.interpret(arrays, batch).items():
            address, last = outputs[index]
            y = np.ascontiguousarray(y if last else y.transpose(0, 3, 1, 2))
            ctypes.memmove(address, y.ctypes.data, y.nbytes)

    def interpret(self, inputs: dict[int, np.ndarray], batch: int) -> dict[int, np.ndarray]:
        """Outputs float32 [N, H, W, C] of inputs float32 [N, H, W, C], by their indices.

        An image with a NaN or an infinity in any of its inputs has NaN outputs.
        """
        self.codes: dict[int, np.ndarray] = {}
        finite = np.ones(batch, bool)
        outputs = {}
        for x in inputs.values():
            finite &= np.isfinite(x.reshape(batch, math.prod(x.shape[1:]))).all(axis=1)
        for step in self.steps:
            if step["op"] == "quantize":
                x = np.where(finite[:, None, None, None], inputs[step["input"]], F32(0))
                self._store(step, x)
                continue
            result = getattr(self, "_" + step["op"])(step)
            if "output" in step:
                outputs[step["output"]] = np.where(finite[:, None, None, None], result, F32("nan"))
        return outputs

    # --- Values ----------------------------------------------------------------------------------

    def _scale(self, index: int) -> tuple[np.float32, int]:
        return F32(self.values[index][3]), int(self.values[index][4])

    def _real(self, index: int) -> np.ndarray:
        return dequantize(self.codes[index], *self._scale(index))

    def _store(self, step, v: np.ndarray) -> None:
        """Quantizes v to the step's value."""
        self._put(step, quantize(v, *self._scale(step["to"])))

    def _put(self, step, codes: np.ndarray) -> None:
        c, h, w, _, _ = self.values[step["to"]]
        assert codes.shape[1:] == (h, w, c), (step["op"], codes.shape, (h, w, c))
        self.codes[step["to"]] = codes

    def _sizes(self, step) -> tuple[int, int]:
        """Height and width of what the step makes."""
        if "to" in step:
            return self.values[step["to"]][1], self.values[step["to"]][2]
        return step["out_height"], step["out_width"]

    # --- Steps -----------------------------------------------------------------------------------

    def _dequantize(self, step) -> np.ndarray:
        return self._real(step["x"])

    def _conv(self, step):
        scale, zero = self._scale(step["x"])
        y = self._sums(step, scale, zero)
        residual = step.get("residual", -1)
        if residual >= 0:
            y = y + self._real(residual)
        if step.get("table") is not None:
            return self._put(step, look_up(y, step["table"]))
        y = epilogue(y, step["epilogue"])
        return y if "output" in step else self._store(step, y)

    def _sums(self, step, x_scale: np.float32, x_zero: int) -> np.ndarray:
        """The convolution's outputs float32 [N, out_h, out_w, out_channels]."""
        q = self.codes[step["x"]].astype(np.int64)
        channels = q.shape[3]
        n, kh, kw, sh, sw, top, left, dh, dw, groups = step["geometry"]
        fmt, codes, tensors, group_size = _weight(step, channels // groups)
        scale, group_scale, group_zero, bias = tensors
        out_h, out_w = self._sizes(step)
        # Enough of the zero point below and to the right for the last window.
        bottom = max(0, (out_h - 1) * sh + dh * (kh - 1) + 1 - top - q.shape[1])
        right = max(0, (out_w - 1) * sw + dw * (kw - 1) + 1 - left - q.shape[2])
        sides = ((0, 0), (top, bottom), (left, right), (0, 0))
        padded = np.pad(q, sides, constant_values=x_zero)
        columns = im2col(padded, fmt, (kh, kw), (sh, sw), (0, 0, 0, 0), (dh, dw), groups)
        columns = columns[:, :out_h, :out_w]
        tap = tap_channels(fmt, channels // groups)
        valid = np.arange(codes.shape[1]) % tap < channels // groups
        weights = (codes, valid, fmt, scale, group_scale, group_zero, group_size, bias)
        offsets = oracle_static.bias(*weights, (x_scale, x_zero))
        pixels = len(q) * out_h * out_w
        outputs = [
            scaled_sum(
                columns[:, :, :, g].reshape(pixels, codes.shape[1]),
                np.full(pixels, x_scale, F32),
                codes[part],
                fmt,
                scale[part],
                None if group_scale is None else group_scale[part],
                None if group_zero is None else group_zero[part],
                group_size,
                offsets[part],
            )
            for g, part in enumerate(np.split(np.arange(n), groups))
        ]
        return np.concatenate(outputs, axis=1).reshape(len(q), out_h, out_w, n)

    def _add(self, step) -> None:
        (sb, zb), b = self._scale(step["b"]), self.codes[step["b"]]
        sum_ = fma((b.astype(np.int64) - zb).astype(F32), sb, self._real(step["a"]))
        self._store(step, epilogue(sum_, step["epilogue"]))

    def _mul(self, step) -> None:
        (sa, za), (sb, zb) = self._scale(step["a"]), self._scale(step["b"])
        a, b = (self.codes[step[key]].astype(np.int64) for key in ("a", "b"))
        self._store(step, ((a - za) * (b - zb)).astype(F32) * (sa * sb))

    def _concat(self, step) -> None:
        scale = self._scale(step["to"])
        parts = [
            self.codes[i] if self._scale(i) == scale else quantize(self._real(i), *scale)
            for i in step["xs"]
        ]
        self._put(step, np.concatenate(parts, axis=3))

    def _lut(self, step) -> None:
        table = np.frombuffer(bytes(step["table"]), np.int8)
        assert len(table) == 256
        self._put(step, table[self.codes[step["x"]].view(np.uint8)])

    def _max_pool(self, step) -> None:
        assert self._scale(step["x"]) == self._scale(step["to"])
        q = self.codes[step["x"]]
        windows = self._windows(step, q.shape, step["dilation"])
        self._put(step, self._pooled(step, q, windows, lambda part, _: part.max(axis=(1, 2))))

    def _avg_pool(self, step) -> None:
        q = self.codes[step["x"]]
        windows = self._windows(step, q.shape, (1, 1))
        include = step["include_pad"]
        self._average(step, windows, lambda w: w.padded if include else w.inside)

    def _adaptive_avg_pool(self, step) -> None:
        q = self.codes[step["x"]]
        out_h, out_w = self._sizes(step)
        rows, columns = (
            [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
            for size, out in ((q.shape[1], out_h), (q.shape[2], out_w))
        )
        windows = [[_Window(range(*r), range(*c), 0) for c in columns] for r in rows]
        self._average(step, windows, lambda w: w.inside)

    def _average(self, step, windows, count) -> None:
        scale, zero = self._scale(step["x"])

        def mean(part, window):
            total = (part.astype(np.int64) - zero).sum(axis=(1, 2))
            return (total.astype(F32) * scale) / F32(count(window))

        self._store(step, self._pooled(step, self.codes[step["x"]], windows, mean))

    def _pad(self, step) -> None:
        q = self.codes[step["x"]]
        c, h, w, _, _ = self.values[step["to"]]
        assert self._scale(step["x"]) == self._scale(step["to"])
        padded = np.full((len(q), h, w, c), step["code"], np.int8)
        top, left = step["top"], step["left"]
        padded[:, top : top + q.shape[1], left : left + q.shape[2]] = q
        self._put(step, padded)

    def _view(self, step) -> None:
        c, h, w, _, _ = self.values[step["to"]]
        q = self.codes[step["x"]]
        self._put(step, np.ascontiguousarray(q).reshape(len(q), h, w, c))

    def _resize(self, step) -> None:
        q = self.codes[step["x"]]
        out_h, out_w = self._sizes(step)
        rows = np.arange(out_h) // (out_h // q.shape[1])
        columns = np.arange(out_w) // (out_w // q.shape[2])
        self._put(step, q[:, rows][:, :, columns])

    # --- Pooling ---------------------------------------------------------------------------------

    def _windows(self, step, shape, dilation) -> list[list[_Window]]:
        out_h, out_w = self._sizes(step)
        (kh, kw), (sh, sw), (top, left) = step["kernel"], step["stride"], step["padding"]
        rows = [_taps(i * sh - top, kh, dilation[0], shape[1], top) for i in range(out_h)]
        columns = [_taps(j * sw - left, kw, dilation[1], shape[2], left) for j in range(out_w)]
        return [[_Window(r, c, pr * pc) for c, pc in columns] for r, pr in rows]

    def _pooled(self, step, q, windows, function) -> np.ndarray:
        """function(codes [N, rows, columns, C], window) -> [N, C], for each window."""
        rows = [
            np.stack([function(q[:, list(w.rows)][:, :, list(w.columns)], w) for w in row], axis=1)
            for row in windows
        ]
        return np.stack(rows, axis=1)


class _Window:
    """Rows and columns inside the image, and how many positions count where padding does."""

    def __init__(self, rows, columns, padded: int) -> None:
        self.rows, self.columns, self.padded = rows, columns, padded
        self.inside = len(rows) * len(columns)


def _taps(start: int, kernel: int, dilation: int, size: int, padding: int):
    """Positions of one dimension that lie in the image; how many lie in it or its padding."""
    positions = range(start, start + kernel * dilation, dilation)
    return [p for p in positions if 0 <= p < size], len(
        [p for p in positions if p < size + padding]
    )


def _memory(address: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    """A copy of what lies at an address."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(address, count), dtype).reshape(shape)


def _weight(step, channels: int):
    """(format, codes uint8 [N, K], (scale, group_scale, group_zero, bias), group_size)."""
    index, _, group_size, packed, *addresses = step["weight"]
    n, kh, kw, groups = (step["geometry"][i] for i in (0, 1, 2, 9))
    fmt = FORMAT_NAMES[index]
    k = kh * kw * tap_channels(fmt, channels)
    blocks = conv_blocks(n, groups)
    rows = n // blocks
    f = FORMATS[fmt]
    shape = (blocks, -(-rows // 16), -(-k // f.depth), 64)
    codes = [unpack(part, fmt, rows, k) for part in _memory(packed, shape, np.uint8)]
    group_shape = (blocks * -(-rows // 16), -(-k // group_size) if group_size else 0, 16)
    kinds = ((F32, (n,)), (np.float16, group_shape), (np.float16, group_shape), (F32, (n,)))
    tensors = tuple(
        _memory(address, shape, dtype) if address else None
        for address, (dtype, shape) in zip(addresses, kinds, strict=True)
    )
    scale, *groups, bias = tensors
    groups = [None if v is None else unpack_groups(v, n, blocks) for v in groups]
    return fmt, np.concatenate(codes), (scale, *groups, bias), group_size
