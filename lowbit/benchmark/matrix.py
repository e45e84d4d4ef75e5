"""The matrix of a layer's benchmark: every shape, M (rows or images), number of threads, and for
linears the place of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.benchmark.measure import MAX_COPIES
from lowbit.benchmark.run import STREAM_M, Options
from lowbit.benchmark.runner import SavedCase
from lowbit.benchmark.shapes import HELD_KINDS, LinearShape, Shape, kind, parse

SHAPES = (
    "4096x4096",
    "4096x14336",
    "11008x4096",
    "768x3072",
    "3072x768",
    "1024x1024",
    "384x1536",
)
M = (1, 4, 8, 32, 128, 512)
THREADS = (1, 2)
FORMATS = ("w8a8", "w4a8", "w2a8", "w1a8", "w1a1", "w8a16", "w4a16")
GROUPED_FORMATS = ("w8a8-g128", "w4a8-g128", "w4a8-g32", "w2a8-g128", "w2a8-g32", "w1a8-g128")
WEIGHTS = ("memory", "cache")

RAGGED_SHAPES = ("1000x777", "1024x1", "33x1024")
"""Neither whole vectors nor whole panels: timed against the shape that is, without peers."""

CONV_SHAPES = (
    # ResNet's, and neighbours
    "64x64k3@56",
    "128x128k3@28",
    "256x256k3@14",
    "128x128k3s2@56",
    "96x96k3@35",
    "256x64k1@56",
    "64x256k1@56",
    "512x128k1@28",
    "1024x256k1@14",
    "512x1024k1s2@28",
    "512x512k3@7",
    "2048x512k1@7",
    "320x1280k1@7",
    "3x64k7s2@224",
    "3x32k3s2@224",
    # EfficientNet's
    "96x96k3g96@112",
    "96x96k3s2g96@112",
    "240x240k5g240@28",
    "240x240k5s2g240@28",
    "672x672k5g672@14",
    # ResNeXt's, and dilated as in DeepLab
    "128x128k3g2@28",
    "256x256k3g4@14",
    "128x128k3g32@56",
    "128x128k3d2@28",
    "256x256k3d4@28",
)
CONV_HELD = tuple(s for s in CONV_SHAPES if kind("conv", s) in HELD_KINDS)
"""What is raced on an older instruction set."""
CONV_BATCHES = (1, 8)
CONV_FORMATS = ("w8a8", "w4a8", "w2a8", "w1a8", "w1a1")
CONV_QUICK = ("64x64k3@56", "256x64k1@56", "512x512k3@7", "3x32k3s2@224", "240x240k5g240@28")


@dataclass(frozen=True)
class MatrixCase(SavedCase):
    """One group of the matrix.

    Attributes:
        shape, m, threads, op: as in `Options`.
        weights: "memory" or "cache", where the weights come from.
        formats: lowbit's recipes.
        peers: engines to race; None for all.
        isa: forces an ISA; None keeps the one in use.
        seconds: for the rounds.
    """

    shape: str
    m: int
    threads: int
    weights: str
    formats: tuple[str, ...] = FORMATS
    peers: tuple[str, ...] | None = None
    isa: str | None = None
    seconds: float = 3.0
    op: str = "linear"

    def __str__(self) -> str:
        if self.op == "conv":
            return f"{self.shape} batch {self.m} T={self.threads}"
        return f"{self.shape} M={self.m} T={self.threads} {self.weights}"

    @property
    def parsed(self) -> Shape:
        """The shape."""
        return parse(self.op, self.shape)

    def beside(self, other: MatrixCase) -> bool:
        """Whether the two differ in M alone, and can share a process."""
        return dataclasses.replace(self, m=other.m) == other

    @property
    def cost(self) -> float:
        """Roughly how many seconds it takes: to build, in many copies or one, and to time.

        Measured with all peers on one machine.
        """
        weights, macs = self.parsed.weights / 1e6, self.parsed.macs(self.m)
        building = 35.0 + weights / 2 if self.weights == "memory" else 3.0 + weights / 6
        return building + max(self.seconds, 5e-9 * macs / math.sqrt(self.threads))

    def options(self, batch: Sequence[MatrixCase]) -> dict[str, Any]:
        """The options of the process for cases that differ in M alone."""
        options: dict[str, Any] = {
            "op": self.op,
            "shapes": [self.shape],
            "m": [case.m for case in batch],
            "threads": [self.threads],
            "formats": self.formats,
            "isa": self.isa,
            "budget_seconds": self.seconds,
            "probe_seconds": min(Options.probe_seconds, self.seconds / 10),
            "padded": self.parsed.kind == "ragged",
        }
        if self.peers is not None:
            options["peers"] = self.peers
        if self.weights == "cache":
            options["rotate_bytes"] = 0
        return options


def cases(
    shapes: Iterable[str] = SHAPES,
    ms: Iterable[int] = M,
    threads: Iterable[int] = THREADS,
    weights: Sequence[str] = WEIGHTS,
    **common: Any,
) -> list[MatrixCase]:
    """All cases of the subsets given; `common` holds the other fields of `MatrixCase`.

    Weights come from memory only where it makes a difference (few rows) and can be arranged: the
    narrowest weights of a layer, in as many copies as are allowed, must exceed the caches.
    """
    found = []
    for count in threads:
        for shape in shapes:
            for place in weights:
                for m in ms:
                    case = MatrixCase(shape, m, count, place, **common)
                    if place == "cache" or (m <= STREAM_M and _rotates(case)):
                        found.append(case)
    return found


def ragged_cases(
    ms: Iterable[int] = M, threads: Iterable[int] = THREADS, **common: Any
) -> list[MatrixCase]:
    """Ragged linears, in every recipe, against lowbit alone."""
    common |= {"formats": FORMATS, "peers": ()}
    return cases(RAGGED_SHAPES, ms, threads, ("cache",), **common)


def conv_cases(
    shapes: Iterable[str] = CONV_SHAPES,
    batches: Iterable[int] = CONV_BATCHES,
    threads: Iterable[int] = THREADS,
    **common: Any,
) -> list[MatrixCase]:
    """All cases of convolutions; `common` holds the other fields of `MatrixCase`."""
    common = {"formats": CONV_FORMATS} | common
    return cases(shapes, batches, threads, ("cache",), op="conv", **common)


def _rotates(case: MatrixCase) -> bool:
    narrowest = case.parsed.weights // 8
    enough = MAX_COPIES * narrowest >= Options.rotate_bytes
    return isinstance(case.parsed, LinearShape) and enough
