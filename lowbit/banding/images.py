"""What the network gets: a smooth ramp and photographs, as a camera's mosaic."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

PHOTOS = {"astronaut": "astronaut.png", "rocket": "rocket.jpg", "cat": "chelsea.png"}
"""Photographs that scikit-image ships inside its package, by name."""

LOW, HIGH = 0.30, 0.50  # the ramp's: a sky, in 0..1


def ramp(height: int, width: int, low: float = LOW, high: float = HIGH) -> torch.Tensor:
    """A grey ramp from left to right.

    Returns:
        float32 `[3, height, width]` in low..high, equal in all rows and channels.
    """
    return torch.linspace(low, high, width).expand(3, height, width).contiguous()


def photo(name: str, side: int) -> torch.Tensor:
    """The central square of a photograph.

    Args:
        name: one of `PHOTOS`.
        side: its pixels across, as they are: nothing is scaled.

    Returns:
        float32 `[3, side, side]` in 0..1.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
        ValueError: the photograph is smaller.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the photographs are scikit-image's: pip install 'lowbit[demo]'", name="skimage"
        )
    import numpy as np
    from PIL import Image

    with Image.open(Path(spec.origin).parent / "data" / PHOTOS[name]) as image:
        rgb = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)) / 255
    return centre(rgb.permute(2, 0, 1), side)


def centre(image: torch.Tensor, side: int) -> torch.Tensor:
    """The central square of `[..., H, W]`.

    Raises:
        ValueError: the image is smaller.
    """
    height, width = image.shape[-2:]
    if min(height, width) < side or side < 1:
        raise ValueError(f"no square of {side} pixels in an image of {height} x {width}")
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side].contiguous()


def mosaic(image: torch.Tensor) -> torch.Tensor:
    """What a sensor behind a Bayer filter sees: rows of G R G R, then of B G B G.

    Args:
        image: `[..., 3, H, W]`.

    Returns:
        The same shape; of each pixel one channel is left, the others are 0.
    """
    seen = torch.zeros_like(image)
    seen[..., 1, ::2, ::2] = image[..., 1, ::2, ::2]
    seen[..., 0, ::2, 1::2] = image[..., 0, ::2, 1::2]
    seen[..., 2, 1::2, ::2] = image[..., 2, 1::2, ::2]
    seen[..., 1, 1::2, 1::2] = image[..., 1, 1::2, 1::2]
    return seen
