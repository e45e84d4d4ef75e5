"""The small network on Fashion-MNIST, trained in float32 first."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.fuse import fuse
from lowbit.qat.fashion.data import load as load_images
from lowbit.qat.fashion.network import Network
from lowbit.qat.fashion.training import as_run, train

OVERRIDES = {"stem.conv": "w8a8", "head": "w8a8"}
"""As when it is trained for few bits: the first and the last layer keep 8."""

EPOCHS, RATE, SEED = 4, 2e-3, 0
IMAGES = 1000
"""Training images to calibrate with."""


def load() -> nn.Module:
    """The float model. Trained at the first call, some minutes; kept in the temporary folder."""
    path = Path(tempfile.gettempdir()) / f"lowbit-fashion-{EPOCHS}-{RATE}-{SEED}.pt"
    torch.manual_seed(SEED)
    model = Network()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, load_images("train"), EPOCHS, RATE, SEED)
        torch.save(model.state_dict(), path)
    return fuse(model.eval())


def calibration() -> list[Tensor]:
    """Batches float32 [50, 1, 28, 28] of training images."""
    return [as_run(x) for x in torch.split(load_images("train").first(IMAGES).pixels, 50)]


def tests() -> list[Tensor]:
    """All test images."""
    return [as_run(x) for x in torch.split(load_images("test").pixels, 500)]


def score(wanted: Tensor, found: Tensor) -> float:
    """Points of accuracy lost, of logits [10000, 10]."""
    labels = load_images("test").labels
    right = [float((logits.argmax(1) == labels).double().mean()) for logits in (wanted, found)]
    return 100 * (right[0] - right[1])
