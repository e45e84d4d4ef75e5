"""The networks on which mixed schemes are compared with uniform ones, their data and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.baselines import run
from lowbit.benchmark.quality import clothes, photographs, sentences
from lowbit.qat.fashion.data import load as load_images
from lowbit.qat.fashion.training import as_run
from lowbit.quality import QualityMeter


@dataclass(frozen=True)
class Data:
    """Batches of three kinds, of different photographs, sentences or images.

    Attributes:
        learn: that quantizers learn from.
        look: that the search looks at; no photograph is in two batches of it.
        tests: that the results are judged on.
    """

    learn: Sequence[Any]
    look: Sequence[Any]
    tests: Sequence[Any]


@dataclass(frozen=True)
class Figure:
    """A column of the table.

    Attributes:
        header: with its unit.
        spec: how the number is formatted.
        better: 1 where more is better, -1 where less is.
    """

    header: str
    spec: str
    better: int


@dataclass(frozen=True)
class Network:
    """A network, its data, its schemes, and what is measured of it.

    Attributes:
        title: of its section.
        text: what the data are.
        load: gives the float model.
        data: gives the data.
        forward: (model, batch) -> the outputs that are compared [N, D].
        task: of the search, see `lowbit.tasks`.
        schemes: to choose from: those that learn from data, and those that do not.
        uniform: to compare with, likewise; the first is what half of is searched for.
        measure: (reference, outputs) -> the figures in the order of `columns`.
        columns: the first is the smooth one that decides which of two models is better.
        target: of the last column, at half the bytes of the first uniform scheme.
    """

    title: str
    text: str
    load: Callable[[], nn.Module]
    data: Callable[[], Data]
    forward: Callable[[nn.Module, Any], Tensor]
    task: str
    schemes: tuple[tuple[str, ...], tuple[str, ...]]
    uniform: tuple[tuple[str, ...], tuple[str, ...]]
    measure: Callable[[Tensor, Tensor], Sequence[float]]
    columns: tuple[Figure, ...]
    target: float | None = None

    def figures(self, reference: Tensor, outputs: Tensor) -> dict[str, float]:
        """The figures of all test outputs, by header."""
        values = self.measure(reference.double(), outputs.double())
        return {c.header: float(v) for c, v in zip(self.columns, values, strict=True)}


def _photographs() -> Data:
    # Batches of two photographs each, four crops of both.
    seen = photographs.CALIBRATION[::3]
    return Data(
        photographs.calibration(tuple(f for f in photographs.CALIBRATION if f not in seen)),
        photographs.judging((*seen, *photographs.VALIDATION), 4),
        photographs.tests(),
    )


def _sentences() -> Data:
    found = sentences.calibration()
    return Data(found[0::2], found[1::2], sentences.tests())


def _clothes() -> Data:
    pixels = load_images("train").pixels[clothes.IMAGES : 3 * clothes.IMAGES]
    look = [as_run(x) for x in torch.split(pixels, 200)]
    return Data(clothes.calibration(), look, clothes.tests())


def _embedding(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return sentences.embedding(run(model, batch))


def _classified(reference: Tensor, outputs: Tensor) -> tuple[float, float]:
    meter = QualityMeter("classification")
    meter.update(reference, outputs)
    kl = meter.result().kl_divergence
    assert kl is not None
    return kl, photographs.score(reference, outputs)


def _clothed(reference: Tensor, outputs: Tensor) -> Sequence[float]:
    return *_classified(reference, outputs), clothes.score(reference, outputs)


def _embedded(reference: Tensor, outputs: Tensor) -> Sequence[float]:
    noise = ((outputs - reference) ** 2).sum() / (reference**2).sum()
    return float(noise), sentences.score(reference, outputs)


_KL = Figure("KL, nats", ".3g", -1)
_AGREEMENT = Figure("top-1 agreement, %", ".1f", 1)

# To choose from and to compare with: schemes that learn from data, and those that do not.
_MINILM = (
    ("w8a8", "w4a8-g32-descent", "w4a8-g64-descent", "w2a8-g32-descent"),
    ("w8a8", "w4a8-g32", "w4a8-g64", "w2a8-g32"),
)
_FASHION = (
    ("w8a8", "w4a8-descent", "w2a8-g32-descent", "w2a8-descent", "w1a8"),
    ("w8a8", "w4a8", "w2a8-g32", "w2a8", "w1a8"),
)

NETWORKS: Mapping[str, Network] = {
    "efficientnet": Network(
        "EfficientNet-Lite0",
        "480 crops of forty photographs to test with; quantizers learned from crops of twenty "
        "others, the search looked at 80 crops of a further twenty. int16 activations take no "
        "bytes, so the search chooses among schemes that have them.",
        photographs.load,
        _photographs,
        run,
        "classification",
        (
            ("w8a16", "w4a16-g32-descent", "w4a16-descent", "w2a16-g64-descent"),
            ("w8a16", "w4a16", "w4a16-g32", "w2a16-g32"),
        ),
        (
            ("w8a8", "w4a8-g32-descent", "w4a8-descent", "w4a16-descent", "w2a16-g64-descent"),
            ("w8a8", "w4a8", "w4a8-g32", "w2a8-g32"),
        ),
        _classified,
        (_KL, _AGREEMENT),
        93.0,
    ),
    "minilm": Network(
        "MiniLM-L6 (all-MiniLM-L6-v2)",
        "500 sentences of NumPy's docstrings to test with; quantizers learned from some 500 of "
        "Python's library, the search looked at another 500. The embedding is the mean over "
        "tokens; the token embeddings stay float32.",
        sentences.load,
        _sentences,
        _embedding,
        "embeddings",
        _MINILM,
        _MINILM,
        _embedded,
        (Figure("noise over signal", ".3g", -1), Figure("mean cosine", ".4f", 1)),
    ),
    "fashion": Network(
        "Fashion-MNIST, a convolution network of 66,000 weights",
        "10,000 test images; quantizers learned from 1,000 training images without their labels, "
        "the search looked at 2,000 others.",
        clothes.load,
        _clothes,
        run,
        "classification",
        _FASHION,
        _FASHION,
        _clothed,
        (_KL, _AGREEMENT, Figure("accuracy lost, points", ".2f", -1)),
    ),
}
