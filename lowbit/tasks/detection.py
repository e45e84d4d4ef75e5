"""Detection: do the boxes of the float model come out again?

Boxes are matched as in the evaluation of COCO (Lin et al., "Microsoft COCO: Common Objects in
Context", 2014), with the float model's boxes in the place of the truth: the candidate's boxes, best
score first, each take the free box of the same label with which their IoU is largest, if that is at
least .5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.tasks.task import Meter, Task


@dataclass(frozen=True)
class Detection(Task):
    """Matched boxes, their IoU, and the shift of their scores.

    The output is one mapping per image (a list of them, or one alone) with `boxes` [B, 4] as x1,
    y1, x2, y2, `scores` [B] and `labels` [B]; or one mapping with a leading axis for the images.

    The figures: `matched_boxes`, share of the float model's boxes that are matched, 0..1;
    `box_precision`, share of the candidate's boxes that match one; `mean_iou` of the matched pairs;
    `score_shift`, the mean absolute difference of a pair's scores.

    Attributes:
        score: boxes of a lower score do not count, on either side.
        iou: what a pair has to reach.
    """

    score: float = 0.25
    iou: float = 0.5
    name: ClassVar[str] = "detection"
    elementwise: ClassVar[bool] = False
    objective: ClassVar[str] = "matched_boxes"

    def __post_init__(self) -> None:
        if not 0.0 < self.iou <= 1.0:
            raise ValueError(f"iou is a share above 0 and at most 1, not {self.iou}")

    def meter(self) -> Meter:
        """A new meter."""
        return _Meter(self)


class _Meter:
    def __init__(self, settings: Detection) -> None:
        self._settings = settings
        self._expected = self._found = self._matched = 0
        self._iou = self._shift = 0.0

    def update(self, reference: Any, output: Any, batch: Any) -> None:
        expected, actual = list(_images(reference)), list(_images(output))
        if len(expected) != len(actual):
            raise ValueError(
                f"detections of {len(expected)} images in the reference, of {len(actual)} in the "
                "candidate"
            )
        for truth, found in zip(expected, actual, strict=True):
            self._add(self._kept(truth), self._kept(found))

    def _kept(self, image: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The boxes that count, best first; of equal scores the first first."""
        boxes, scores, labels = image
        order = scores.argsort(descending=True, stable=True)
        order = order[scores[order] >= self._settings.score]
        return boxes[order], scores[order], labels[order]

    def _add(
        self, truth: tuple[Tensor, Tensor, Tensor], found: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        overlap = box_iou(found[0], truth[0])
        overlap[found[2][:, None] != truth[2][None, :]] = -1.0
        for row in range(len(found[1]) if len(truth[1]) else 0):
            iou, best = overlap[row].max(dim=0)
            if float(iou) >= self._settings.iou:
                self._matched += 1
                self._iou += float(iou)
                self._shift += abs(float(found[1][row]) - float(truth[1][best]))
                overlap[:, best] = -1.0
        self._expected += len(truth[1])
        self._found += len(found[1])

    def result(self) -> dict[str, float]:
        return {
            "matched_boxes": _share(self._matched, self._expected),
            "box_precision": _share(self._matched, self._found),
            "mean_iou": _share(self._iou, self._matched),
            "score_shift": _share(self._shift, self._matched),
        }


def _share(value: float, count: int) -> float:
    return value / count if count else math.nan


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [A, 4] and [B, 4] (x1, y1, x2, y2): [A, B].

    Boxes without an area have no overlap with anything.
    """
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(dim=1) for box in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return torch.where(union > 0, shared / union, 0.0)


def _images(output: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Boxes float64 [B, 4], scores float64 [B] and labels [B] of each image."""
    if isinstance(output, (list, tuple)) and all(isinstance(item, Mapping) for item in output):
        for item in output:
            yield from _images(item)
        return
    keys = ("boxes", "scores", "labels")
    if not (isinstance(output, Mapping) and all(key in output for key in keys)):
        raise ValueError(
            "a detection is a mapping with 'boxes', 'scores' and 'labels', or a list of them; "
            f"found a {type(output).__name__}"
        )
    boxes, scores, labels = (torch.as_tensor(output[key]).detach() for key in keys)
    shapes_fit = boxes.shape == (*scores.shape, 4) and labels.shape == scores.shape
    if not shapes_fit or scores.ndim not in (1, 2):
        raise ValueError(
            "the detections of an image have boxes [B, 4], scores [B] and labels [B]; found "
            f"{list(boxes.shape)}, {list(scores.shape)} and {list(labels.shape)}"
        )
    if scores.ndim == 1:
        yield boxes.double(), scores.double(), labels
    else:
        yield from zip(boxes.double(), scores.double(), labels, strict=True)
