"""A program run step by step by torch and the layers themselves: what `_core.Program` must equal.

Every value is quantized and dequantized where the program does it, so that the result has the same
bits; it is slow, and meant for looking inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.nn import Conv2d
from lowbit.nn.base import QuantizedLayer
from lowbit.observers import Affine
from lowbit.static.program import Program

_TINY, _HUGE = (float(getattr(torch.finfo(torch.float32), name)) for name in ("tiny", "max"))

_EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def quantize(v: Tensor, affine: Affine) -> Tensor:
    """Codes int8 of float32 v."""
    inverse = np.float32(1) / np.float32(affine.scale)
    rounded = (v * float(inverse)).round()
    return (rounded.double() + affine.zero).clamp(-128, 127).to(torch.int8)


def dequantize(q: Tensor, affine: Affine) -> Tensor:
    """float32(q - zero) * scale."""
    return (q.int() - affine.zero).float() * float(np.float32(affine.scale))


def run(program: Program, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """Outputs float32 [N, H, W, C] of inputs [N, H, W, C], by their positions.

    An image with a NaN or an infinity in one of its inputs has NaN outputs.
    """
    return _Run(program).run(inputs)


class _Run:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.codes: dict[int, Tensor] = {}
        self.layers = iter(program.held)

    def run(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in inputs]).all(0)
        mask = finite.view(-1, 1, 1, 1)
        outputs = {}
        for step in self.program.steps:
            if step["op"] == "quantize":
                clean = torch.where(mask, inputs[step["input"]], torch.zeros(()))
                self._store(step, clean)
                continue
            y = getattr(self, "_" + step["op"])(step)
            if "output" in step:
                outputs[step["output"]] = torch.where(mask, y, torch.tensor(torch.nan))
        return outputs

    def _affine(self, index: int) -> Affine:
        return self.program.values[index].affine

    def _real(self, index: int) -> Tensor:
        return dequantize(self.codes[index], self._affine(index))

    def _store(self, step: dict[str, Any], v: Tensor) -> None:
        self.codes[step["to"]] = quantize(v, self._affine(step["to"]))

    def _size(self, step: dict[str, Any]) -> tuple[int, int]:
        value = self.program.values[step["to"]]
        return value.height, value.width

    def _dequantize(self, step: dict[str, Any]) -> Tensor:
        return self._real(step["x"])

    def _conv(self, step: dict[str, Any]) -> Tensor | None:
        layer: QuantizedLayer = next(self.layers)[0]
        y: Tensor
        x = self._real(step["x"])
        if isinstance(layer, Conv2d):
            y = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            y = layer(x)
        if step["residual"] >= 0:
            y = y + self._real(step["residual"])
        if step["table"] is not None:
            inv, low, codes = step["table"]
            entries = torch.frombuffer(bytearray(codes), dtype=torch.int8)
            index = (y * inv).round().clamp(low, low + len(entries) - 1)
            self.codes[step["to"]] = entries[index.long() - low]
            return None
        if layer.epilogue == "none":
            y = _EPILOGUES[step["epilogue"]](y)
        if "output" in step:
            return y
        self._store(step, y)
        return None

    def _add(self, step: dict[str, Any]) -> None:
        b, affine = self.codes[step["b"]], self._affine(step["b"])
        scale = float(np.float32(affine.scale))
        product = (b.int() - affine.zero).double() * scale  # exact
        self._store(step, _EPILOGUES[step["epilogue"]](_add_once(product, self._real(step["a"]))))

    def _mul(self, step: dict[str, Any]) -> None:
        (sa, za), (sb, zb) = self._affine(step["a"]), self._affine(step["b"])
        with np.errstate(over="ignore", under="ignore"):
            scale = float(np.float32(sa) * np.float32(sb))
        if not _TINY <= scale <= _HUGE / 65536:  # no step: torch's product
            self._store(step, self._real(step["a"]) * self._real(step["b"]))
            return
        product = (self.codes[step["a"]].int() - za) * (self.codes[step["b"]].int() - zb)
        self._store(step, product.float() * scale)

    def _concat(self, step: dict[str, Any]) -> None:
        to = self._affine(step["to"])
        parts = [
            self.codes[x] if self._affine(x) == to else quantize(self._real(x), to)
            for x in step["xs"]
        ]
        self.codes[step["to"]] = torch.cat(parts, 3)

    def _lut(self, step: dict[str, Any]) -> None:
        table = torch.frombuffer(bytearray(step["table"]), dtype=torch.int8)
        self.codes[step["to"]] = table[self.codes[step["x"]].int() & 255]

    def _max_pool(self, step: dict[str, Any]) -> None:
        windows, _ = self._windows(step, float("-inf"))
        self.codes[step["to"]] = windows.amax(-1).to(torch.int8)

    def _avg_pool(self, step: dict[str, Any]) -> None:
        affine = self._affine(step["x"])
        total, inside = self._windows(step, affine.zero)
        count = inside["padded" if step["include_pad"] else "real"]
        total = (total - affine.zero).sum(-1)
        self._store(step, (total * float(np.float32(affine.scale))) / count.unsqueeze(-1))

    def _windows(self, step: dict[str, Any], outside: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes as floats [N, out_h, out_w, C, taps], and how many taps of each window count."""
        q = self.codes[step["x"]].float().permute(0, 3, 1, 2)
        dilation = step.get("dilation", (1, 1))
        out = self._size(step)
        spans, real, padded = [], [], []
        for i in range(2):
            extent, padding = q.shape[2 + i], step["padding"][i]
            starts = torch.arange(out[i]) * step["stride"][i]
            taps = starts[:, None] + torch.arange(step["kernel"][i]) * dilation[i]
            spans.append(taps)
            real.append(((taps >= padding) & (taps < extent + padding)).sum(1))
            padded.append((taps < extent + 2 * padding).sum(1))
        bottom, right = (
            max(0, int(spans[i].max()) + 1 - q.shape[2 + i] - step["padding"][i]) for i in range(2)
        )
        top, left = step["padding"]
        q = F.pad(q, (left, right, top, bottom), value=outside)
        windows = q[:, :, spans[0][:, None, :, None], spans[1][None, :, None, :]]
        counts = {"real": real[0][:, None] * real[1], "padded": padded[0][:, None] * padded[1]}
        return windows.flatten(-2).permute(0, 2, 3, 1, 4), counts

    def _adaptive_avg_pool(self, step: dict[str, Any]) -> None:
        affine = self._affine(step["x"])
        q = self.codes[step["x"]].int() - affine.zero
        rows, columns = (
            [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
            for size, out in zip(q.shape[1:3], self._size(step), strict=True)
        )
        scale = float(np.float32(affine.scale))
        means = [
            [
                (q[:, top:bottom, left:right].sum((1, 2)).float() * scale)
                / ((bottom - top) * (right - left))
                for left, right in columns
            ]
            for top, bottom in rows
        ]
        self._store(step, torch.stack([torch.stack(row, 1) for row in means], 1))

    def _pad(self, step: dict[str, Any]) -> None:
        q, (height, width) = self.codes[step["x"]], self._size(step)
        top, left = step["top"], step["left"]
        sides = (0, 0, left, width - left - q.shape[2], top, height - top - q.shape[1])
        self.codes[step["to"]] = F.pad(q, sides, value=step["code"])

    def _view(self, step: dict[str, Any]) -> None:
        value = self.program.values[step["to"]]
        q = self.codes[step["x"]].contiguous()
        self.codes[step["to"]] = q.view(len(q), value.height, value.width, value.channels)

    def _resize(self, step: dict[str, Any]) -> None:
        q, (height, width) = self.codes[step["x"]], self._size(step)
        by_rows = q.repeat_interleave(height // q.shape[1], 1)
        self.codes[step["to"]] = by_rows.repeat_interleave(width // q.shape[2], 2)


def _add_once(product: Tensor, addend: Tensor) -> Tensor:
    """product (exact in float64) + addend (float32), rounded to float32 once.

    Boldo and Melquiond, "When double rounding is odd", 2004: the float64 sum is rounded to odd
    first.
    """
    other = addend.double()
    total = product + other
    part = total - product
    error = (product - (total - part)) + (other - part)
    even = (total.view(torch.int64) & 1) == 0
    toward = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where((error != 0) & even, torch.nextafter(total, toward), total).float()
