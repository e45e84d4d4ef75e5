"""Fashion-MNIST (Xiao et al., 2017): 60,000 images of clothes to train with, 10,000 to test."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has it."""

CLASSES = 10
SIZE = 28
MEAN, STD = 0.2860, 0.3530  # of the training images, in 0..1

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_UBYTE = 8  # IDX's code of the type


@dataclass(frozen=True)
class Images:
    """Images with their classes.

    Attributes:
        pixels: float32 [N, 1, H, W], normalized.
        labels: int64 [N], 0..9.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Images:
        """The first `count` of them; None: all."""
        return Images(self.pixels[:count], self.labels[:count])


def load(split: str, folder: Path = FOLDER) -> Images:
    """The images of "train" or "test".

    Args:
        folder: holds the four IDX files under their usual names, compressed (.gz) or not.

    Raises:
        FileNotFoundError: they are not there; the message says how to get them.
        ValueError: a file is damaged, or the two do not belong together.
    """
    pixels, labels = (_read(_find(folder, name)) for name in _FILES[split])
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
        raise ValueError(
            f"{folder}: {split} images {list(pixels.shape)} and labels {list(labels.shape)} do "
            "not belong together"
        )
    images = torch.from_numpy(pixels).unsqueeze(1).float() / 255
    return Images((images - MEAN) / STD, torch.from_numpy(labels).long())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} has no {name}.gz: install Fashion-MNIST (Debian, Ubuntu: apt install "
        "dataset-fashion-mnist; elsewhere the four files of "
        "github.com/zalandoresearch/fashion-mnist, data/fashion) and name its folder with --data"
    )


def _read(path: Path) -> np.ndarray:
    """An array of bytes in IDX: two zeros, type, dimensions, their sizes (big-endian), data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _UBYTE)):
        raise ValueError(f"{path} is no IDX file of bytes")
    begin = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:begin], dtype=">u4").astype(np.int64).tolist()
    if len(shape) != content[3] or len(content) - begin != math.prod(shape):
        raise ValueError(f"{path} is damaged: {len(content)} bytes are not {shape} and a header")
    return np.frombuffer(content, dtype=np.uint8, offset=begin).reshape(shape).copy()
