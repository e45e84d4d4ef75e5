"""Training and testing a classifier."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.qat.fashion.data import Images

BATCH = 128
_WARM_UP = 0.1  # of the steps


def train(
    model: nn.Module, images: Images, epochs: float, rate: float, seed: int, title: str = "train"
) -> None:
    """Trains with Adam, cross-entropy, images mirrored at random, in place; leaves eval mode.

    The rate rises linearly over a tenth of the steps and falls to zero as a cosine. The same seed
    gives the same weights (on one machine, with the same number of threads).

    Args:
        epochs: passes over the images; may be a fraction.
        rate: Adam's largest learning rate.
        title: of the progress bar, which a terminal shows.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    steps = max(1, round(epochs * len(images) / BATCH))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = torch.empty(0, dtype=torch.long)
    model.train()
    with tqdm(total=steps, desc=title, unit="step", disable=None, leave=False) as bar:
        for _ in range(steps):
            if len(order) < min(BATCH, len(images)):
                order = torch.randperm(len(images), generator=random)
            chosen, order = order[:BATCH], order[BATCH:]
            x = images.pixels[chosen]
            mirrored = torch.rand(len(x), generator=random) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(as_run(x)), images.labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.update()
    model.eval()


def predictions(model: nn.Module, images: Images, title: str = "test") -> Tensor:
    """The model's classes, int64 [N], in eval mode."""
    model.eval()
    batches = tqdm(torch.split(images.pixels, 500), title, unit="batch", disable=None, leave=False)
    with torch.inference_mode():
        return torch.cat([model(as_run(x)).argmax(1) for x in batches])


def accuracy(found: Tensor, images: Images) -> float:
    """Per cent of the images whose class was found."""
    return 100 * float((found == images.labels).double().mean())


def _rate(step: int, steps: int) -> float:
    share = step / steps
    if share < _WARM_UP:
        return (step + 1) / (steps * _WARM_UP + 1)
    return 0.5 * (1 + math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP)))


def as_run(x: Tensor) -> Tensor:
    """channels_last, in which convolutions are quickest, float ones and lowbit's."""
    return x.contiguous(memory_format=torch.channels_last)
