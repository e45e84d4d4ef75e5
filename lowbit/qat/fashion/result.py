"""What the training found, as text, as JSON, and as a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from lowbit.timing import Ratio

FLOAT = "float32"

GOALS = {"w4a8": 0.3, "w2a8": 1.0, "w1a8": 2.0, "w1a1": 5.0}
"""Points of accuracy that a scheme may lose."""


@dataclass(frozen=True)
class Row:
    """One scheme.

    Attributes:
        scheme: of all layers but the first and the last, which have w8a8; "float32" for the model
            that all began with.
        rounded: per cent of the test images that are right after rounding, without training.
        trained: the same after training, in eval mode.
        deployed: the same of the converted model.
        same: test images for which the converted model gives the trained one's answer.
        size: bytes of all parameters and buffers of the converted model.
    """

    scheme: str
    rounded: float
    trained: float
    deployed: float
    same: int
    size: int


@dataclass(frozen=True)
class Result:
    """All schemes, float32 first.

    Attributes:
        speed: images of a call -> scheme -> times faster than float32.
        options: what it was trained with, and the numbers of images.
        threads: of the timing.
    """

    rows: tuple[Row, ...]
    speed: dict[int, dict[str, Ratio]]
    options: dict[str, Any]
    threads: int

    def lost(self, row: Row) -> float:
        """Points of accuracy below float32."""
        return self.rows[0].deployed - row.deployed

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {
            "rows": [asdict(row) | {"lost": self.lost(row)} for row in self.rows],
            "speed": {
                str(size): {name: value.to_dict() for name, value in speeds.items()}
                for size, speeds in self.speed.items()
            },
            "options": self.options,
            "threads": self.threads,
        }

    def __str__(self) -> str:
        return f"{self._table('simple')}\n\n{self._notes()}"

    def page(self, command: str) -> str:
        """A page of Markdown.

        Args:
            command: what made it.
        """
        return (
            "# Quantization-aware training on Fashion-MNIST\n\n"
            f"Written by `{command}`.\n\n{self._table('github')}\n\n{self._notes()}\n"
        )

    def _table(self, style: str) -> str:
        headers = ["scheme", "rounded, %", "trained, %", "deployed, %", "lost", "goal", "same"]
        headers += ["bytes", "smaller"]
        headers += [f"x float32, batch {size}" for size in self.speed]
        first = self.rows[0]
        cells = []
        for row in self.rows:
            cell = [row.scheme, *(f"{x:.2f}" for x in (row.rounded, row.trained, row.deployed))]
            goal = GOALS.get(row.scheme)
            cell += [f"{self.lost(row):.2f}", "" if goal is None else f"{goal:.1f}", str(row.same)]
            cell += [f"{row.size:,}", f"{first.size / row.size:.1f}"]
            cell += [f"{speeds[row.scheme].median:.2f}" for speeds in self.speed.values()]
            cells.append(cell)
        return tabulate(
            cells, headers, style, colalign=("left",) + ("right",) * 10, disable_numparse=True
        )

    def _notes(self) -> str:
        given = self.options
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{given['train_images']:,} images to train, {given['test_images']:,} to test; "
            f"{given['float_epochs']:g} epochs in float32, then {given['epochs']:g} for each "
            "scheme from those weights (Adam, batches of 128, mirrored images, seed "
            f"{given['seed']}), in which float32 would have gained, too. The first and the last "
            "layer are w8a8. rounded: without training; "
            "lost: points of accuracy below float32, deployed; same: test images for which the "
            "deployed model answers as the trained one. Times are those of float32 (batch norms "
            f"folded, channels_last) over the scheme's, medians of alternating calls, {threads}."
        )
