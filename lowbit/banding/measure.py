"""How far an image is from float32's, and how smooth it is where it should be.

Images are float32 `[3, H, W]` in 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BITS = 12
"""Of the codes that `levels` counts: finer than any display, coarser than float32's noise."""

PERIOD = 2
"""Pixels after which a Bayer mosaic repeats: what lies so far apart is compared."""


@dataclass(frozen=True)
class Measures:
    """One image against float32's.

    Attributes:
        psnr: peak signal to noise ratio, dB, for a peak of 1; inf where the images are equal.
        ssim: structural similarity, -1..1, of windows of 7 x 7 pixels, mean of the channels.
        levels: distinct levels of a row (see `levels`); None where the scene is not smooth.
        step: largest step in that row, in 1/255 (see `largest_step`); None likewise.
    """

    psnr: float
    ssim: float
    levels: int | None
    step: float | None


def levels(line: torch.Tensor, bits: int = BITS) -> int:
    """How many different codes of `bits` bits the values 0..1 of a line round to."""
    return len(torch.unique((line * (2**bits - 1)).round()))


def largest_step(line: torch.Tensor) -> float:
    """The largest difference of values `PERIOD` pixels apart, in 1/255; 0 for a shorter line."""
    if len(line) <= PERIOD:
        return 0.0
    return float((line[PERIOD:] - line[:-PERIOD]).abs().max() * 255)


def measure(reference: torch.Tensor, image: torch.Tensor, smooth: bool) -> Measures:
    """Compares an image with float32's.

    Args:
        smooth: whether the middle row, in the green channel, is to be looked at alone.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    from skimage.metrics import structural_similarity

    error = float((reference.double() - image.double()).square().mean())
    psnr = float("inf") if error == 0 else -10 * float(torch.log10(torch.tensor(error)))
    ssim = structural_similarity(  # type: ignore[no-untyped-call]
        reference.numpy(), image.numpy(), data_range=1.0, channel_axis=0
    )
    line = image[1, image.shape[1] // 2]
    return Measures(
        psnr,
        float(ssim),
        levels(line) if smooth else None,
        largest_step(line) if smooth else None,
    )
