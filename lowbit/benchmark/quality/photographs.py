"""EfficientNet-Lite0 over crops of photographs that packages ship."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.demo.photographs import MEAN, PHOTOS, SIZE, STD

# Other photographs than the demo's, which are tested: (package, file in it).
CALIBRATION = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/moon.png"),
    ("skimage", "data/retina.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
CROPS = 8
"""Of each photograph to calibrate with."""
TEST_CROPS = 40
"""Of each photograph to test with."""
BATCH = 8
_CALIBRATION_SIDE, _TEST_SIDE = 0.3, 0.7  # of the shorter side, at least


def load() -> nn.Module:
    """The float model, batch norms folded, eval mode."""
    from lowbit.demo.network import load_model

    return load_model()


def calibration(files: Sequence[tuple[str, str]] = CALIBRATION) -> list[Tensor]:
    """Batches float32 [8, 3, 224, 224], channels_last, of all photographs or of some."""
    random = torch.Generator().manual_seed(0)
    x = torch.cat([_crops(_path(*file), CROPS, _CALIBRATION_SIDE, random) for file in files])
    return _batches(x[torch.randperm(len(x), generator=random)])


def tests() -> list[Tensor]:
    """Batches of crops of the demo's six photographs."""
    random = torch.Generator().manual_seed(1)
    x = [_crops(_path(p.package, p.file), TEST_CROPS, _TEST_SIDE, random) for p in PHOTOS]
    return _batches(torch.cat(x))


def score(wanted: Tensor, found: Tensor) -> float:
    """Per cent of the images with the same first guess, of logits [N, 1000]."""
    return 100 * float((wanted.argmax(1) == found.argmax(1)).double().mean())


def _path(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = {"sklearn": "scikit-learn", "skimage": "scikit-image"}.get(package, package)
        raise ModuleNotFoundError(f"pip install {name}: its photographs are used", name=package)
    return Path(spec.origin).parent / file


def _crops(path: Path, count: int, smallest: float, random: torch.Generator) -> Tensor:
    """Random squares of a photograph, half of them mirrored: float32 [count, 3, 224, 224]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        rgb = image.convert("RGB")
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


def _batches(x: Tensor) -> list[Tensor]:
    return [part.contiguous(memory_format=torch.channels_last) for part in torch.split(x, BATCH)]
