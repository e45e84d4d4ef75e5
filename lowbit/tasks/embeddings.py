"""Embeddings: do the vectors point where they pointed, and is what was near still near?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.tasks.outputs import pair
from lowbit.tasks.task import Meter, Task

_NAMES = (
    "sentence_embedding",
    "embeddings",
    "text_embeds",
    "image_embeds",
    "pooler_output",
)


@dataclass(frozen=True)
class Embeddings(Task):
    """Mean cosine, and Spearman's rank correlation of the similarities.

    The output named `sentence_embedding`, `embeddings`, `text_embeds`, `image_embeds` or
    `pooler_output`, or else the only floating tensor, is [N, D].

    The figures: `mean_cosine` between a vector and the float model's, mean over the vectors;
    `rank_correlation`, Spearman's, between the cosines of all pairs of the float model's vectors
    and those of the candidate's: whether a search would still find the same neighbours. NaN with
    fewer than three vectors.

    Attributes:
        most: vectors that the rank correlation is taken over, the first ones; they are kept.
    """

    most: int = 1000
    name: ClassVar[str] = "embeddings"

    def __post_init__(self) -> None:
        if self.most < 3:
            raise ValueError(f"a rank correlation needs at least 3 vectors, not {self.most}")

    def meter(self) -> Meter:
        """A new meter."""
        return _Meter(self.most)


class _Meter:
    def __init__(self, most: int) -> None:
        self._most = most
        self._cosines, self._count = 0.0, 0
        self._kept: tuple[list[Tensor], list[Tensor]] = ([], [])

    def update(self, reference: Any, output: Any, batch: Any) -> None:
        both = pair(reference, output, _NAMES, "embeddings")
        if both[0].ndim != 2:
            raise ValueError(f"embeddings are [N, D], not {list(both[0].shape)}")
        units = [vectors / vectors.norm(dim=1, keepdim=True) for vectors in both]
        room = max(0, self._most - self._count)
        for kept, unit in zip(self._kept, units, strict=True):
            kept.append(unit[:room])
        self._cosines += float((units[0] * units[1]).sum())
        self._count += len(both[0])

    def result(self) -> dict[str, float]:
        sides = [torch.cat(kept) if kept else torch.empty(0, 1) for kept in self._kept]
        rows, columns = torch.triu_indices(len(sides[0]), len(sides[0]), offset=1)
        similarities = [(side @ side.T)[rows, columns] for side in sides]
        return {
            "mean_cosine": self._cosines / self._count if self._count else math.nan,
            "rank_correlation": spearman(*similarities),
        }


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two series [N]; ties get their mean rank. NaN for N < 2, for
    a constant series, or with a NaN."""
    if len(a) < 2 or bool(a.isnan().any() | b.isnan().any()):
        return math.nan
    ranks = [_ranks(series) for series in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum()) * float((centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0.0 else math.nan


def _ranks(series: Tensor) -> Tensor:
    values = series.sort().values
    below = torch.searchsorted(values, series)  # ranks 1 + below .. upto are the ties'
    upto = torch.searchsorted(values, series, right=True)
    return (1 + below + upto).double() / 2
