"""Trains the network in float32, then for each scheme, deploys, and compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from lowbit.fuse import fuse
from lowbit.qat.fashion.data import FOLDER, Images, load
from lowbit.qat.fashion.network import FIRST, LAST, Network
from lowbit.qat.fashion.result import FLOAT, Result, Row
from lowbit.qat.fashion.training import accuracy, as_run, predictions, train
from lowbit.qat.prepare import convert, prepare_qat
from lowbit.report import summary
from lowbit.schemes import Scheme
from lowbit.timing import Ratio, alternate, ratio

BATCHES = (1, 100)
"""Images a call, for the timing."""

_OVERRIDES = {FIRST: "w8a8", LAST: "w8a8"}


@dataclass(frozen=True)
class Options:
    """What is trained, and for how long.

    Attributes:
        schemes: of the layers between the first and the last.
        float_epochs, epochs: passes over the training images in float32 and for each scheme.
        float_rate, rate: Adam's largest learning rates.
        width: channels of the first layer.
        seed: of the first weights and of the order of the images.
        train_images, test_images: how many; None for all.
        seconds: for the timing of each batch size.
    """

    schemes: tuple[str, ...] = ("w4a8", "w2a8", "w1a8", "w1a1")
    float_epochs: float = 4.0
    epochs: float = 3.0
    float_rate: float = 2e-3
    rate: float = 1e-3
    width: int = 16
    seed: int = 0
    train_images: int | None = None
    test_images: int | None = None
    seconds: float = 5.0


def run(options: Options, folder: Path = FOLDER, checkpoints: Path | None = None) -> Result:
    """Trains, deploys, tests and times.

    Args:
        folder: of the images, see `lowbit.qat.fashion.data.load`.
        checkpoints: a folder for the trained weights. What is there already is not trained again:
            a call that was interrupted is taken up by the next one.

    Raises:
        FileNotFoundError: the images are not there; the message says how to get them.
        ValueError: an unknown scheme, or checkpoints of other options.
    """
    images = load("train", folder).first(options.train_images)
    tests = load("test", folder).first(options.test_images)
    for scheme in options.schemes:  # an unknown one is an error before the training
        Scheme.parse(scheme)
    torch.manual_seed(options.seed)
    model = Network(options.width)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def fit(name: str, side: nn.Module, epochs: float, rate: float) -> None:
        path = None if checkpoints is None else checkpoints / f"{name}.pt"
        made = {"epochs": epochs, "rate": rate, "float": [options.float_epochs, options.float_rate]}
        made |= {"seed": options.seed, "images": len(images)}
        if path is not None and path.exists():
            saved = torch.load(path)
            if saved["options"] != made:
                raise ValueError(f"{path} was trained with {saved['options']}, not with {made}")
            side.load_state_dict(saved["state"])
            side.eval()
            return
        train(side, images, epochs, rate, options.seed, name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"options": made, "state": side.state_dict()}, path)

    fit(FLOAT, model, options.float_epochs, options.float_rate)
    best = accuracy(predictions(model, tests), tests)
    deployed: dict[str, nn.Module] = {FLOAT: fuse(model)}
    rows = [Row(FLOAT, best, best, best, len(tests), summary(model).bytes_after)]
    for scheme in options.schemes:
        side = prepare_qat(model, scheme, overrides=_OVERRIDES)
        before = accuracy(predictions(side, tests), tests)
        fit(scheme, side, options.epochs, options.rate)
        trained = predictions(side, tests)
        deployed[scheme] = convert(side)
        found = predictions(deployed[scheme], tests)
        rows.append(
            Row(
                scheme,
                before,
                accuracy(trained, tests),
                accuracy(found, tests),
                int((trained == found).sum()),
                summary(deployed[scheme]).bytes_after,
            )
        )
    return Result(
        tuple(rows),
        {size: _time(deployed, tests.first(size), options.seconds) for size in BATCHES},
        asdict(options) | {"train_images": len(images), "test_images": len(tests)},
        torch.get_num_threads(),
    )


def _time(sides: dict[str, nn.Module], images: Images, seconds: float) -> dict[str, Ratio]:
    """How many times faster than float32 each side answers these images at once."""
    x = as_run(images.pixels)

    def call(model: nn.Module) -> Callable[[], object]:
        return lambda: model(x)

    with torch.inference_mode():
        calls = {name: call(model) for name, model in sides.items()}
        timings = alternate(calls, budget_seconds=seconds, warmup=5)
    return {name: ratio(timings[FLOAT], timing) for name, timing in timings.items()}
