"""Crops of all schemes side by side, with the contrast raised until bands can be seen."""

from __future__ import annotations

from pathlib import Path

import torch

from lowbit.banding.images import centre
from lowbit.banding.run import FLOAT, Result
from lowbit.figures import figure_class

GAIN = 16
"""A difference of 1/32 from float32 is black or white in the maps of differences."""

_ROWS = (("sky", 180), ("ramp", 180), ("rocket", 110))  # scene, pixels of the crop across


def stretched(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The image with the reference's range, 1st to 99th percentile, spread over 0..1.

    Each channel is moved first by what its mean differs from the reference's, so that a wrong tone
    does not hide steps; what leaves the range is clipped.
    """
    low, high = torch.quantile(reference, 0.01), torch.quantile(reference, 0.99)
    shift = (reference - image).mean((-2, -1), keepdim=True)
    return ((image + shift - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def difference(image: torch.Tensor, reference: torch.Tensor, gain: float = GAIN) -> torch.Tensor:
    """0.5 where the images are equal, and `gain` times their difference from there; clipped."""
    return (0.5 + gain * (image - reference)).clamp(0, 1)


def draw(result: Result, path: Path) -> None:
    """Draws crops of some scenes: with stretched contrast, and their differences from float32.

    Args:
        path: the file to write; PNG, SVG or PDF by its suffix.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure_of = figure_class()
    schemes = list(result.sizes)
    rows = [(scene, side, maps) for scene, side in _ROWS for maps in (False, True)]
    figure = figure_of(figsize=(2.3 * len(schemes), 2.42 * len(rows)), dpi=110)
    axes = figure.subplots(len(rows), len(schemes), squeeze=False)
    for line, (scene, side, maps) in zip(axes, rows, strict=True):
        by_scheme = result.images[scene]
        reference = centre(by_scheme[FLOAT], min(side, *by_scheme[FLOAT].shape[1:]))
        for cell, scheme in zip(line, schemes, strict=True):
            crop = centre(by_scheme[scheme], reference.shape[-1])
            shown = difference(crop, reference) if maps else stretched(crop, reference)
            cell.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            found = result.measures[scene][scheme]
            if not maps:
                db = "" if scheme == FLOAT else f", {found.psnr:.1f} dB"
                cell.set_title(f"{scheme}{db}", fontsize=10)
        what = f"difference x {GAIN}" if maps else "contrast raised"
        line[0].set_ylabel(f"{scene}, {what}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
