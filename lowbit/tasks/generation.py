"""Generation: are the images the same to an eye?

PSNR, and the structural similarity of Wang, Bovik, Sheikh and Simoncelli ("Image Quality
Assessment: From Error Visibility to Structural Similarity", 2004) with their Gaussian window of
11 x 11, sigma 1.5. Banding, which neither notices, shows in the number of distinct levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.tasks.outputs import pair
from lowbit.tasks.task import Meter, Task

_NAMES = ("sample", "images", "image")
_WINDOW, _SIGMA = 11, 1.5


@dataclass(frozen=True)
class Generation(Task):
    """PSNR, SSIM and distinct levels of images.

    The output named `sample`, `images` or `image`, or else the only floating tensor, is [N, C, H,
    W] with H and W at least 11.

    The figures are means over the images: `psnr_db`; `ssim`, -1..1; `distinct_levels`, how many of
    256 levels over the range a channel of the candidate uses; `levels_kept`, the same over the
    float model's number.

    Attributes:
        data_range: largest minus smallest value that an image may have (1 for 0..1, 2 for -1..1).
            None takes each reference image's own.
    """

    data_range: float | None = None
    name: ClassVar[str] = "generation"

    def __post_init__(self) -> None:
        if self.data_range is not None and not 0.0 < self.data_range < math.inf:
            raise ValueError(f"data_range has to be more than 0, not {self.data_range}")

    def meter(self) -> Meter:
        """A new meter."""
        return _Meter(self.data_range)


class _Meter:
    def __init__(self, data_range: float | None) -> None:
        self._range = data_range
        self._images = 0
        self._psnr = self._ssim = self._levels = self._kept = 0.0

    def update(self, reference: Any, output: Any, batch: Any) -> None:
        expected, actual = pair(reference, output, _NAMES, "generation")
        if expected.ndim != 4 or min(expected.shape[2:]) < _WINDOW or expected.shape[1] == 0:
            raise ValueError(
                f"generated images are [N, C, H, W] with H and W at least {_WINDOW}, not "
                f"{list(expected.shape)}"
            )
        for ref, out in zip(expected, actual, strict=True):
            low, high = float(ref.min()), float(ref.max())
            span = self._range if self._range is not None else high - low
            self._images += 1
            self._psnr += _psnr_db(ref, out, span)
            self._ssim += _ssim(ref, out, span)
            levels = [_distinct_levels(image, low, span) for image in (ref, out)]
            self._levels += levels[1]
            self._kept += levels[1] / levels[0]

    def result(self) -> dict[str, float]:
        sums = {
            "psnr_db": self._psnr,
            "ssim": self._ssim,
            "distinct_levels": self._levels,
            "levels_kept": self._kept,
        }
        return {name: _mean(total, self._images) for name, total in sums.items()}


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan


def _psnr_db(ref: Tensor, out: Tensor, span: float) -> float:
    noise = float((ref - out).square().mean())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(span * span / noise) if span > 0.0 else -math.inf


def _ssim(ref: Tensor, out: Tensor, span: float) -> float:
    """Mean over channels and over the places where the window fits into the image, [C, H, W]."""
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights = weights / weights.sum()

    def smooth(x: Tensor) -> Tensor:
        across = functional.conv2d(x[:, None], weights.view(1, 1, 1, -1))
        return functional.conv2d(across, weights.view(1, 1, -1, 1))[:, 0]

    means = smooth(ref), smooth(out)
    variances = smooth(ref * ref) - means[0] ** 2, smooth(out * out) - means[1] ** 2
    covariance = smooth(ref * out) - means[0] * means[1]
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    top = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    bottom = (means[0] ** 2 + means[1] ** 2 + c1) * (variances[0] + variances[1] + c2)
    return float(torch.where(bottom == 0, 1.0, top / bottom).mean())


def _distinct_levels(image: Tensor, low: float, span: float) -> float:
    """How many of 256 levels over low..low + span a channel has, mean over the channels."""
    if span <= 0.0:
        return float(_mean(sum(len(channel.unique()) for channel in image), len(image)))
    levels = ((image - low) * (255.0 / span)).round().clamp(0, 255)
    return _mean(sum(len(channel.unique()) for channel in levels), len(image))
