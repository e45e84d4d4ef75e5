"""An endless stream of crops to learn from: more photographs, and others of their crops each time.

GCompris, a suite for children, has some 250 photographs of animals, buildings and things. They are
calibrated with and learned from; none is tested or chosen by.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lowbit.benchmark.quality.photographs import BATCH, CALIBRATION, file_of, jittered
from lowbit.demo.photographs import MEAN, SIZE, STD

if TYPE_CHECKING:
    from PIL import Image

_RESOURCES = (
    "categorization",
    "details",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
)
GCOMPRIS = tuple(
    ("gcompris-qt-data", f"/usr/share/gcompris-qt/rcc/{name}.rcc") for name in _RESOURCES
)
"""Files of resources, which hold their photographs as WebP, one after the other."""

_WEBP = re.compile(rb"RIFF(.{4})WEBP", re.DOTALL)
_SMALLEST = 180  # pixels of a photograph's shorter side
_LARGEST = 640  # pixels of the longer side: larger photographs are reduced first
_SIDE = 0.3  # of the shorter side, at least
_ASPECT = 4 / 3  # width over height, or the other way round, at most


class Stream:
    """Each call gives another crop of every photograph, in batches float32 [8, 3, 224, 224].

    Crops have sides of 0.3 to 1 of the shorter side and are stretched by up to 4 / 3 (Szegedy et
    al., "Going deeper with convolutions", 2015), half of them are mirrored, and brightness,
    contrast and saturation vary.

    Args:
        photographs: RGB images.
        seed: the same seed gives the same batches.
    """

    def __init__(self, photographs: Sequence[Image.Image], seed: int = 0) -> None:
        self._photographs, self._random = photographs, np.random.default_rng(seed)

    def __call__(self) -> Iterator[Tensor]:
        """One pass; channels_last."""
        order = self._random.permutation(len(self._photographs))
        for part in range(0, len(order), BATCH):
            crops = [self._crop(self._photographs[i]) for i in order[part : part + BATCH]]
            x = (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() - MEAN) / STD
            x = jittered(x, torch.Generator().manual_seed(int(self._random.integers(1 << 31))))
            yield x.contiguous(memory_format=torch.channels_last)

    def _crop(self, image: Image.Image) -> np.ndarray:
        """uint8 [224, 224, 3]."""
        from PIL.Image import Resampling

        share, x, y, stretch, mirror = self._random.random(5)
        side = min(image.size) * (_SIDE + (1 - _SIDE) * share)
        aspect = _ASPECT ** (2 * stretch - 1)
        width = min(side * aspect**0.5, image.width)
        height = min(side / aspect**0.5, image.height)
        left, top = (image.width - width) * x, (image.height - height) * y
        box = (left, top, left + width, top + height)
        crop = np.array(image.resize((SIZE, SIZE), Resampling.BILINEAR, box=box))
        return crop[:, ::-1] if mirror < 0.5 else crop


def photographs() -> list[Image.Image]:
    """Those to calibrate with, and GCompris's; errors as for `photographs.calibration`."""
    from PIL import Image

    found: list[Image.Image] = []
    for file in CALIBRATION:
        with Image.open(file_of(*file)) as opened:
            found.append(opened.convert("RGB"))
    for file in GCOMPRIS:
        found += webp_photographs(file_of(*file).read_bytes())
    for image in found:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BICUBIC)
    return found


def webp_photographs(data: bytes) -> list[Image.Image]:
    """The WebP images in a file of others that are neither transparent nor small."""
    from PIL import Image, UnidentifiedImageError

    found: list[Image.Image] = []
    for match in _WEBP.finditer(data):
        size = int.from_bytes(match[1], "little") + 8
        try:
            image = Image.open(io.BytesIO(data[match.start() : match.start() + size]))
            image.load()
        except (UnidentifiedImageError, OSError):  # bytes that look like a header
            continue
        if image.mode == "RGB" and min(image.size) >= _SMALLEST:
            found.append(image)
    return found
