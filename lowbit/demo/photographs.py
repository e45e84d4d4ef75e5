"""The demo's photographs, as the network takes them, and the names of the classes.

The photographs are those that scikit-image and matplotlib ship inside their packages: nothing is
downloaded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.demo.packages import check_packages

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
    check_packages()
    import numpy as np
    from PIL import Image

    spec = importlib.util.find_spec(photo.package)
    assert spec is not None  # check_packages found it
    assert spec.origin is not None
    with Image.open(Path(spec.origin).parent / photo.file) as image:
        rgb = image.convert("RGB")
    views = []
    for fraction in (1.0, 7 / 8, 3 / 4):
        side = min(rgb.size) * fraction
        left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
        box = (left, top, left + side, top + side)
        crop = rgb.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
        views.append(torch.from_numpy(np.array(crop, dtype=np.float32)).permute(2, 0, 1))
    x = (torch.stack(views) - MEAN) / STD
    return torch.cat([x, x.flip(3)]).contiguous(memory_format=torch.channels_last)
