"""The demo's photographs, as the network takes them, and the names of the classes.

The photographs are those that scikit-image and matplotlib ship inside their packages: nothing is
downloaded.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowbit.demo.packages import check_packages

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 224
MEAN, STD = 127.0, 128.0  # of EfficientNet-Lite's training, in 0..255, all three channels


@dataclass(frozen=True)
class Photo:
    """A photograph that a package ships, and the ImageNet classes that describe what is in it.

    Attributes:
        name: what is in it, in a word.
        package: the package that ships it.
        file: path inside the package.
        classes: class names, first synonyms, that fit.
    """

    name: str
    package: str
    file: str
    classes: tuple[str, ...]


PHOTOS = (
    Photo("coffee", "skimage", "data/coffee.png", ("espresso", "cup", "coffee mug")),
    Photo("cat", "skimage", "data/chelsea.png", ("tabby", "tiger cat", "Egyptian cat")),
    Photo("rocket", "skimage", "data/rocket.jpg", ("missile", "projectile", "space shuttle")),
    Photo("cameraman", "skimage", "data/camera.png", ("tripod",)),
    Photo("motorcycle", "skimage", "data/motorcycle_left.png", ("moped", "motor scooter")),
    Photo(
        "officer",
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        ("military uniform", "suit"),
    ),
)


def class_names() -> list[str]:
    """The 1000 ImageNet classes in the order of the outputs, first synonyms."""
    path = Path(__file__).parents[1] / "data" / "imagenet_classes.txt"
    return [line.split(",")[0] for line in path.read_text(encoding="utf-8").splitlines()]


def load_views(photo: Photo) -> torch.Tensor:
    """Crops of one photograph as the network takes them.

    Returns:
        float32 `[views, 3, 224, 224]`, channels_last: the central square first, then squares of
        7/8 and 3/4 of its side, and the mirror images of these three.

    Raises:
        ModuleNotFoundError: the package that ships the photograph is not installed.
    """
    rgb = _open(photo)
    squares = []
    for fraction in (1.0, 7 / 8, 3 / 4):
        side = min(rgb.size) * fraction
        squares.append(((rgb.width - side) / 2, (rgb.height - side) / 2, side))
    x = _crops(rgb, squares)
    return torch.cat([x, x.flip(3)]).contiguous(memory_format=torch.channels_last)


def random_crops(photo: Photo, count: int, seed: int = 0) -> torch.Tensor:
    """Further crops of one photograph: squares anywhere, every second one mirrored.

    Args:
        photo: one of `PHOTOS`.
        count: how many.
        seed: the same seed gives the same crops.

    Returns:
        float32 `[count, 3, 224, 224]`, channels_last. Sides are 60 to 100 % of the shorter side.

    Raises:
        ModuleNotFoundError: the package that ships the photograph is not installed.
    """
    rgb = _open(photo)
    draw = random.Random(f"{photo.name} {seed}")
    squares = []
    for _ in range(count):
        side = min(rgb.size) * draw.uniform(0.6, 1)
        squares.append(
            (draw.uniform(0, rgb.width - side), draw.uniform(0, rgb.height - side), side)
        )
    x = _crops(rgb, squares)
    x[1::2] = x[1::2].flip(3)
    return x.contiguous(memory_format=torch.channels_last)


def _open(photo: Photo) -> Image:
    check_packages()
    from PIL import Image

    spec = importlib.util.find_spec(photo.package)
    assert spec is not None  # check_packages found it
    assert spec.origin is not None
    with Image.open(Path(spec.origin).parent / photo.file) as image:
        return image.convert("RGB")


def _crops(rgb: Image, squares: list[tuple[float, float, float]]) -> torch.Tensor:
    """float32 [squares, 3, 224, 224] of squares (left, top, side) in pixels."""
    import numpy as np
    from PIL.Image import Resampling

    crops = []
    for left, top, side in squares:
        box = (left, top, left + side, top + side)
        crop = rgb.resize((SIZE, SIZE), Resampling.BICUBIC, box=box)
        crops.append(torch.from_numpy(np.array(crop, dtype=np.float32)).permute(2, 0, 1))
    return (torch.stack(crops) - MEAN) / STD
