"""Which observer keeps EfficientNet-Lite0 at a static scheme, and how torch's INT8 does beside it.

Every side sees the same calibration images and is tested on others, in two ways: on photographs
that calibration did not see (three calibrate, three test, and the other way round), and on other
crops of the photographs that it did see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from lowbit import baselines
from lowbit.calibration.deploy import convert
from lowbit.calibration.prepare import prepare
from lowbit.calibration.run import calibrate
from lowbit.convert import quantize
from lowbit.demo.network import load_model
from lowbit.demo.photographs import PHOTOS, Photo, load_views, random_crops
from lowbit.observers import OBSERVERS
from lowbit.quality import Quality, QualityMeter
from lowbit.schemes import Scheme

Progress = Callable[[str, float], None]

BATCH = 8
SPLITS = {"photographs": "other photographs", "crops": "other crops"}


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        scheme: a static scheme.
        crops: random crops of each photograph to calibrate on.
        test_crops: other random crops of each to test on, beside the demo's six views.
        observers: names, see `lowbit.observers`.
        symmetric: whether symmetric activations are tried, too.
        graph: whether the network captured as a graph is tried, too.
    """

    scheme: str = "w8a8-static"
    crops: int = 10
    test_crops: int = 30
    observers: tuple[str, ...] = tuple(OBSERVERS)
    symmetric: bool = True
    graph: bool = False


@dataclass(frozen=True)
class Calibrations:
    """What was found.

    Attributes:
        options: what was compared.
        qualities: split -> side -> quality of all test images against float32.
        calibration_images: split -> how many images each side was calibrated on.
    """

    options: Options
    qualities: dict[str, dict[str, Quality]]
    calibration_images: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {
            "scheme": self.options.scheme,
            "calibration_images": self.calibration_images,
            "qualities": {
                split: {name: quality.to_dict() for name, quality in sides.items()}
                for split, sides in self.qualities.items()
            },
        }

    def __str__(self) -> str:
        return self._table("simple")

    def page(self, command: str) -> str:
        """The table and what it says, as Markdown."""
        counts = {split: next(iter(sides.values())).rows for split, sides in self.qualities.items()}
        shown = "; ".join(
            f"{SPLITS[split]}: {count} test images, {self.calibration_images[split]} to calibrate"
            for split, count in counts.items()
        )
        graph = (
            " Static schemes run layer by layer, or, in the rows so called, captured as a graph, "
            "whose codes flow between layers."
        )
        best = {split: self._best(split) for split in self.qualities}
        return "\n".join(
            [
                "# Which observer?",
                "",
                f"Written by `{command}`.",
                "",
                "EfficientNet-Lite0, ImageNet weights, batch norms folded, on the photographs of "
                "`lowbit demo`: its six views and random crops (squares of 60 to 100 % of the "
                "shorter side, half of them mirrored). Against float32: SQNR of the 1000 outputs "
                "in dB, the share of images with the same first guess, and the mean KL divergence "
                "of the softmax in nats. Every side was calibrated on the same images, in batches "
                f"of {BATCH}, and tested on others. Other photographs: calibrated on three of the "
                "six, tested on the other three, and the other way round. Other crops: calibrated "
                f"on random crops of all six, tested on the views and on other crops. ({shown}.)"
                f"{graph if self.options.graph else ''}",
                "",
                self._table("github"),
                "",
                "Best SQNR: "
                + "; ".join(
                    f"{name} ({quality.sqnr_db:.1f} dB) on {SPLITS[split]}"
                    for split, (name, quality) in best.items()
                )
                + ".",
                "",
            ]
        )

    def _best(self, split: str) -> tuple[str, Quality]:
        sides = self.qualities[split]
        static = [name for name in sides if name.startswith(self.options.scheme)]
        name = max(static, key=lambda name: sides[name].figures()["sqnr_db"])
        return name, sides[name]

    def _table(self, form: str) -> str:
        headers = [""]
        for split in self.qualities:
            headers += [f"{SPLITS[split]}: SQNR, dB", "same first guess, %", "KL, nats"]
        names = next(iter(self.qualities.values()))
        rows = [
            [name, *(cell for sides in self.qualities.values() for cell in _cells(sides[name]))]
            for name in names
        ]
        return tabulate(rows, headers, tablefmt=form, disable_numparse=True)


def _cells(quality: Quality) -> list[str]:
    assert quality.top1_agreement is not None
    assert quality.kl_divergence is not None
    share = 100 * quality.top1_agreement
    return [f"{quality.sqnr_db:.2f}", f"{share:.1f}", f"{quality.kl_divergence:.4f}"]


def run(options: Options | None = None, progress: Progress | None = None) -> Calibrations:
    """Calibrates the network in every way, and tests it.

    Args:
        options: what is compared.
        progress: called with the stage and the share of it that is done.

    Raises:
        ModuleNotFoundError: a package of the demo is not installed.
        ValueError: a scheme that is not static, an unknown observer.
    """
    options = options or Options()
    model = load_model()
    data = {photo.name: _images(photo, options) for photo in PHOTOS}
    qualities, images = {}, {}
    for split in SPLITS:
        meters: dict[str, QualityMeter] = {}
        images[split] = 0
        for calibration, test in _folds(split, data):
            images[split] = sum(len(batch) for batch in calibration)
            with torch.inference_mode():
                expected = [model(batch) for batch in test]
            for name, side in _sides(model, options, calibration):
                if progress is not None:
                    progress(f"{SPLITS[split]}: {name}", 0.0)
                meter = meters.setdefault(name, QualityMeter("classification"))
                with torch.inference_mode():
                    for batch, wanted in zip(test, expected, strict=True):
                        meter.update(wanted, side(batch))
        qualities[split] = {name: meter.result() for name, meter in meters.items()}
    return Calibrations(options, qualities, images)


def _images(photo: Photo, options: Options) -> dict[str, torch.Tensor]:
    test = torch.cat([load_views(photo), random_crops(photo, options.test_crops, seed=1)])
    return {"calibration": random_crops(photo, options.crops, seed=0), "test": test}


def _folds(
    split: str, data: Mapping[str, Mapping[str, torch.Tensor]]
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """(calibration batches, test batches)."""
    names = list(data)
    halves = [names[::2], names[1::2]]
    folds = [(names, names)] if split == "crops" else [(halves[0], halves[1]), tuple(halves[::-1])]
    for learned, tested in folds:
        # Batches of several photographs.
        calibration = torch.stack([data[name]["calibration"] for name in learned], dim=1)
        test = torch.cat([data[name]["test"] for name in tested])
        yield _batches(calibration.flatten(0, 1)), _batches(test)


def _batches(images: torch.Tensor) -> list[torch.Tensor]:
    parts = torch.split(images, BATCH)
    return [part.contiguous(memory_format=torch.channels_last) for part in parts]


def _sides(
    model: nn.Module, options: Options, calibration: list[torch.Tensor]
) -> Iterator[tuple[str, nn.Module]]:
    ways = [("", False, False)]
    ways += [(", graph", False, True)] if options.graph else []
    ways += [(", symmetric", True, False)] if options.symmetric else []
    for way, symmetric, graph in ways:
        for observer in options.observers:
            prepared = prepare(
                model,
                options.scheme,
                calibration[0],
                observer=observer,
                symmetric=symmetric,
                graph=graph,
            )
            converted = convert(calibrate(prepared, calibration))
            yield f"{options.scheme}, {observer}{way}", converted
    dynamic = Scheme.parse(options.scheme).name.replace("-static", "")
    yield f"{dynamic}, dynamic", quantize(model, dynamic)
    found = baselines.torch_int8(model, calibration, budget_seconds=0.1)
    if found.model is not None:
        yield f"torch INT8 ({found.method})", found.model
