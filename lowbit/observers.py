"""Observers: what static activations learn from example data, a scale and a zero point.

An observer sees the values of one tensor, batch by batch, and keeps statistics of a fixed size: at
most a histogram of `BINS` bins, 64 KiB. Bins are a power of two wide and grow by merging pairs, so
that the histogram of a stream is that of all its values at once, however they were cut into
batches; sums are float64. Observers can be copied and pickled; `statistics` is all their state.

Codes (`Affine`): int8 q = clamp(rne(x / scale) + zero, -128, 127), int16 the same up to +-32639
with zero = 0, binary the sign, whose scale is the mean |x| for every observer: the scale of least
squared error for signs (Rastegari et al., "XNOR-Net", 2016).
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

BINS = 8192
"""Bins of a histogram, half of them for negative values."""

ONE_BEYOND = 10_000
"""The percentile observer clamps one of this many values at each end: 99.99 per cent."""

DECAY = 0.01
"""Weight of a new batch in the moving average, once there were 1 / DECAY of them."""

_HALF = BINS // 2
_CHUNK = 1 << 17  # values at a time: temporaries stay in the cache
_LARGEST = {"int8": 127, "int16": 32639, "binary": 1}
_FLT_MIN = float(torch.finfo(torch.float32).tiny)


class Affine(NamedTuple):
    """What a code q means: (q - zero) * scale.

    Attributes:
        scale: a float32 value, normal and positive.
        zero: the code of 0; 0 for int16, binary and symmetric int8.
    """

    scale: float
    zero: int


def affine(low: float, high: float, activation: str = "int8", symmetric: bool = False) -> Affine:
    """The codes that spread over a range, which is widened to hold 0.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-
    Only Inference", 2018: 0 has a code of its own, so that padding and ReLU's zeros are exact, and
    the outputs of a ReLU use all 256 codes.

    Args:
        low, high: the range; what is outside is clamped. Empty (both 0): scale 1.
        activation: "int8" or "int16".
        symmetric: for int8, zero = 0 and codes from -127 to 127. int16 always is.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return Affine(1.0, 0)
    if activation != "int8" or symmetric:
        return Affine(_float32(max(-low, high) / _LARGEST[activation]), 0)
    scale = _float32((high - low) / 255)
    zero = -128 - round(low / scale)
    return Affine(scale, max(-128, min(127, zero)))


class Observer:
    """What all observers share: they are fed by `observe` and asked by `parameters`.

    Attributes:
        activation: "int8", "int16" or "binary".
        symmetric: whether int8 codes are symmetric: zero = 0.
        statistics: all that it has learned, tensors by name, changed in place.
    """

    name: ClassVar[str]

    def __init__(self, activation: str = "int8", symmetric: bool = False) -> None:
        if activation not in _LARGEST:
            raise ValueError(
                f"unknown activation format {activation!r}; use one of {', '.join(_LARGEST)}"
            )
        self.activation = activation
        self.symmetric = symmetric
        self.statistics: dict[str, Tensor] = {"count": torch.zeros((), dtype=torch.int64)}
        if activation == "binary":
            self.statistics |= self._start_magnitudes()
        else:
            self.statistics |= self._start()

    @property
    def seen(self) -> int:
        """How many values were observed."""
        return int(self.statistics["count"])

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Adds the values of a tensor of any shape and floating dtype, seen as float32.

        Raises:
            ValueError: one of them is NaN or Inf (as float32). None of them counts then.
        """
        x = x.detach().float().cpu().reshape(-1)
        if x.numel() == 0:
            return
        low, high = (float(bound) for bound in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = x.numel() - int(x.isfinite().sum())
            raise ValueError(f"{bad} of {x.numel()} values are NaN or Inf")
        if self.activation == "binary":
            self._add_magnitudes(x)
        else:
            self._add(x, low, high)
        self.statistics["count"] += x.numel()

    def parameters(self) -> Affine:
        """Scale and zero point for the values so far; 0 is always among what codes can mean.

        Raises:
            ValueError: there were none.
        """
        if self.seen == 0:
            raise ValueError("the observer has seen no value: run the model on data first")
        if self.activation == "binary":
            mean = self._mean_magnitude()
            return Affine(_float32(mean) if mean > 0 else 1.0, 0)
        return affine(*self._range(), self.activation, self.symmetric)

    def _start(self) -> dict[str, Tensor]:
        """The statistics at the beginning."""
        raise NotImplementedError

    def _add(self, x: Tensor, low: float, high: float) -> None:
        """Adds float32 values [n], n > 0, all finite, the least and the largest of them known."""
        raise NotImplementedError

    def _range(self) -> tuple[float, float]:
        """The range to spread the codes over."""
        raise NotImplementedError

    def _start_magnitudes(self) -> dict[str, Tensor]:
        return {"magnitude": torch.zeros((), dtype=torch.float64)}

    def _add_magnitudes(self, x: Tensor) -> None:
        self.statistics["magnitude"] += x.double().abs().sum()

    def _mean_magnitude(self) -> float:
        return float(self.statistics["magnitude"]) / self.seen


class MinMax(Observer):
    """The range of all values: nothing is clamped, and one outlier costs resolution.

    The simplest choice, e.g. of Krishnamoorthi, "Quantizing deep convolutional networks for
    efficient inference: A whitepaper", 2018, and of TFLite's converter.
    """

    name = "minmax"

    def _start(self) -> dict[str, Tensor]:
        return _bounds()

    def _add(self, x: Tensor, low: float, high: float) -> None:
        _widen(self.statistics, low, high)

    def _range(self) -> tuple[float, float]:
        return float(self.statistics["low"]), float(self.statistics["high"])


class MovingAverage(Observer):
    """The average range of a batch: outliers of single batches are clamped.

    Jacob et al. (2018, section 3.1) smooth the ranges exponentially, with a weight of `DECAY` for
    the new batch in torch's observers, where the first of a few batches then decides nearly alone.
    Here the n-th batch has the weight max(DECAY, 1 / n): the plain mean of up to 1 / DECAY batches.
    A batch is what one call of the layer sees.
    """

    name = "moving_average"

    def _start(self) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64)
        return {"low": zero.clone(), "high": zero.clone(), "batches": zero.long()}

    def _add(self, x: Tensor, low: float, high: float) -> None:
        weight = self._weight_of_next()
        for name, bound in (("low", low), ("high", high)):
            self.statistics[name] += weight * (bound - self.statistics[name])

    def _range(self) -> tuple[float, float]:
        return float(self.statistics["low"]), float(self.statistics["high"])

    def _start_magnitudes(self) -> dict[str, Tensor]:
        return {**super()._start_magnitudes(), "batches": torch.zeros((), dtype=torch.int64)}

    def _add_magnitudes(self, x: Tensor) -> None:
        mean = self.statistics["magnitude"]
        mean += self._weight_of_next() * (x.double().abs().mean() - mean)

    def _mean_magnitude(self) -> float:
        return float(self.statistics["magnitude"])

    def _weight_of_next(self) -> float:
        self.statistics["batches"] += 1
        return max(DECAY, 1 / int(self.statistics["batches"]))


class _HistogramObserver(Observer):
    """Keeps the least and the largest value, the number of zeros, and a histogram of the others.

    Bin b holds the values in [(b - BINS / 2) * width, (b + 1 - BINS / 2) * width), where width is
    2 ** exponent. Zeros are left out, since every code represents them exactly.
    """

    def _start(self) -> dict[str, Tensor]:
        return {
            **_bounds(),
            "zeros": torch.zeros((), dtype=torch.int64),
            "exponent": torch.tensor(-126),
            "histogram": torch.zeros(BINS, dtype=torch.int64),
        }

    def _add(self, x: Tensor, low: float, high: float) -> None:
        state = self.statistics
        _widen(state, low, high)
        # The least power of two above the largest magnitude is where the histogram has to end.
        largest = max(-low, high)
        needed = math.frexp(largest)[1] - (_HALF.bit_length() - 1) if largest > 0 else -126
        while int(state["exponent"]) < needed:
            if not state["histogram"].any():
                state["exponent"].fill_(needed)
                break
            pairs = state["histogram"].view(-1, 2).sum(dim=1)
            state["histogram"].zero_()[_HALF // 2 : _HALF // 2 + _HALF] = pairs
            state["exponent"] += 1
        # A product by a power of two is exact but for underflow, in float32 as in any other.
        inverse = 2.0 ** -int(state["exponent"])
        for part in torch.split(x, _CHUNK):
            bins = (part * inverse).floor_().add_(_HALF).to(torch.int32)
            state["histogram"] += torch.bincount(bins, minlength=BINS)
        zeros = x.numel() - int(torch.count_nonzero(x))
        state["histogram"][_HALF] -= zeros
        state["zeros"] += zeros

    def _values(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Centers (float64) and counts (float64) of the bins that hold values, and the width."""
        counts = self.statistics["histogram"].numpy()
        width = 2.0 ** int(self.statistics["exponent"])
        (used,) = counts.nonzero()
        return (used - _HALF + 0.5) * width, counts[used].astype(np.float64), width

    def _bounds(self) -> tuple[float, float]:
        """The range of all values, 0 among them."""
        low, high = float(self.statistics["low"]), float(self.statistics["high"])
        return min(low, 0.0), max(high, 0.0)


class Percentile(_HistogramObserver):
    """Clamps the outermost values: of `ONE_BEYOND`, one below and one above.

    Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical
    Evaluation", 2020, section 3.3. The bounds are edges of bins, outside of the value at the rank.
    """

    name = "percentile"

    def _range(self) -> tuple[float, float]:
        low, high = self._bounds()
        state = self.statistics
        counts = state["histogram"].numpy().copy()
        counts[_HALF] += int(state["zeros"])
        width = 2.0 ** int(state["exponent"])
        beyond = self.seen // ONE_BEYOND
        first = int(np.searchsorted(np.cumsum(counts), beyond, side="right"))
        last = BINS - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), beyond, side="right"))
        return max(low, (first - _HALF) * width), min(high, (last + 1 - _HALF) * width)


class MSE(_HistogramObserver):
    """The range with the least mean squared error of rounding and clamping together.

    Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference", 2019;
    Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-
    deployment", 2019. Searched on a grid of fractions of the range seen, for both ends at once,
    and again on a finer one around the best. A bin's values count as its center; where bins are
    wider than the steps, their error is that of uniform values, step ** 2 / 12.
    """

    name = "mse"
    _grid: ClassVar[int] = 16

    def _range(self) -> tuple[float, float]:
        low, high = self._bounds()
        if self.symmetric or self.activation != "int8":  # one threshold for both ends
            low, high = 0.0, max(-low, high)
        values = self._values()
        best, spread = (1.0, 1.0), 1.0
        for _ in range(3):
            low_parts = self._around(best[0], spread) if low < 0 else [1.0]
            high_parts = self._around(best[1], spread) if high > 0 else [1.0]
            pairs = [(a, b) for a in low_parts for b in high_parts]
            errors = [self._error(low * a, high * b, *values) for a, b in pairs]
            best = pairs[int(np.argmin(errors))]
            spread /= self._grid / 2
        return low * best[0], high * best[1]

    def _around(self, center: float, spread: float) -> list[float]:
        """Fractions of the range, the largest first: where errors are equal, it is taken."""
        steps = range(self._grid)
        top = min(1.0, center + spread / 2)
        parts = [top - spread * step / self._grid for step in steps]
        return [part for part in parts if part > 0]

    def _error(
        self, low: float, high: float, centers: np.ndarray, counts: np.ndarray, width: float
    ) -> float:
        """Sum of squared errors of the values, quantized with this range."""
        scale, zero = affine(low, high, self.activation, self.symmetric)
        least, most = _limits(self.activation)
        codes = np.rint(centers / scale) + zero
        inside = np.clip(codes, least, most)
        errors = (centers - (inside - zero) * scale) ** 2
        if width > scale:
            errors = np.where(codes == inside, scale * scale / 12, errors)
        return float(np.dot(errors, counts))


class Entropy(_HistogramObserver):
    """The range whose codes tell most of the distribution: least Kullback-Leibler divergence.

    Migacz, "8-bit Inference with TensorRT", 2017: for thresholds t, the histogram of the values
    within [-t, t] (those outside count in its outermost bins) against the same after the bins of
    each code became equal. Here, for affine codes, the range is what the values have of [-t, t].
    Zeros are left out, as there. int16 has more codes than there are bins: nothing is clamped.
    """

    name = "entropy"
    _thresholds: ClassVar[int] = 128

    def _range(self) -> tuple[float, float]:
        low, high = self._bounds()
        counts = self.statistics["histogram"].numpy().astype(np.float64)
        if self.activation != "int8" or not counts.any():
            return low, high
        width = 2.0 ** int(self.statistics["exponent"])
        levels = 255 if self.symmetric else 256
        start, stop = _HALF + math.floor(low / width), _HALF + math.floor(high / width) + 1
        reach = max(_HALF - start, stop - _HALF)
        if self.symmetric:
            start, stop = _HALF - reach, _HALF + reach
        best, least = reach, math.inf
        for step in range(self._thresholds, 0, -1):
            reached = math.ceil(reach * step / self._thresholds)
            first, last = max(start, _HALF - reached), min(stop, _HALF + reached)
            if last - first < levels:
                break
            divergence = _divergence(counts, first, last, levels)
            if divergence < least:
                best, least = reached, divergence
        return max(low, -best * width), min(high, best * width)


OBSERVERS: dict[str, type[Observer]] = {
    cls.name: cls for cls in (MinMax, MovingAverage, Percentile, MSE, Entropy)
}
"""The observers by name."""


def make(name: str, activation: str = "int8", symmetric: bool = False) -> Observer:
    """A new observer.

    Args:
        name: "minmax", "moving_average", "percentile", "mse" or "entropy".
        activation: "int8", "int16" or "binary".
        symmetric: for int8: no zero point, codes from -127 to 127.

    Raises:
        ValueError: an unknown name or activation.
    """
    if name not in OBSERVERS:
        raise ValueError(f"unknown observer {name!r}; use one of {', '.join(OBSERVERS)}")
    return OBSERVERS[name](activation, symmetric)


def _bounds() -> dict[str, Tensor]:
    return {"low": torch.tensor(torch.inf).double(), "high": torch.tensor(-torch.inf).double()}


def _widen(statistics: dict[str, Tensor], low: float, high: float) -> None:
    statistics["low"].clamp_(max=low)
    statistics["high"].clamp_(min=high)


def _limits(activation: str) -> tuple[int, int]:
    largest = _LARGEST[activation]
    return (-128 if activation == "int8" else -largest), largest


def _float32(scale: float) -> float:
    """The nearest float32, a normal one."""
    return max(float(np.float32(scale)), _FLT_MIN)


def _divergence(counts: np.ndarray, first: int, last: int, levels: int) -> float:
    """KL divergence of bins [first, last) from the same at a number of levels, nats.

    Levels that no value has say nothing, and bins that only clamped values are in would make it
    infinite: a little of each bin's mass is spread over the others.
    """
    p = counts[first:last].copy()
    kept = p.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    level = np.arange(last - first) * levels // (last - first)
    sums = np.bincount(level, kept, levels)
    used = np.bincount(level, kept > 0, levels)
    q = np.where(kept > 0, (sums / np.maximum(used, 1))[level], 0.0)
    if not kept.any():
        return math.inf
    p, q = _smooth(p), _smooth(q)
    return float(np.dot(p, np.log(p / q)))


def _smooth(counts: np.ndarray, share: float = 1e-6) -> np.ndarray:
    shares: np.ndarray = counts / counts.sum()
    smoothed: np.ndarray = (shares + share / len(shares)) / (1 + share)
    return smoothed
