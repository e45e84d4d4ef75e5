"""Detections against a matching written with plain Python loops, and its edges."""

import math
import random

import pytest
import torch

from lowbit.quality import QualityMeter, measure
from lowbit.tasks import Detection
from lowbit.tasks.detection import box_iou


def _image(boxes, scores, labels):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def _random_image(rng, count):
    boxes = []
    for _ in range(count):
        x, y = rng.uniform(0, 60), rng.uniform(0, 60)
        boxes.append([x, y, x + rng.uniform(5, 40), y + rng.uniform(5, 40)])
    return _image(
        boxes, [rng.random() for _ in range(count)], [rng.randrange(2) for _ in range(count)]
    )


def _shaken(rng, image):
    moves = [[rng.uniform(-6, 6) for _ in range(4)] for _ in image["boxes"]]
    boxes = image["boxes"] + torch.tensor(moves).reshape(-1, 4)
    scores = (image["scores"] + torch.tensor([rng.uniform(-0.2, 0.2) for _ in boxes])).clamp(0, 1)
    return {"boxes": boxes, "scores": scores, "labels": image["labels"]}


def _area(box):
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _iou(a, b):
    shared = _area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    whole = _area(a) + _area(b) - shared
    return shared / whole if whole > 0 else 0.0


def _reference(truths, founds, threshold, least):
    """(matched, of the truth, of the found, IoU, shift): every pair looked at, one by one."""
    matched = expected = count = 0
    ious, shifts = [], []
    for truth, found in zip(truths, founds, strict=True):
        sides = []
        for side in (truth, found):
            rows = zip(*(side[key].tolist() for key in ("scores", "boxes", "labels")), strict=True)
            sides.append(sorted((r for r in rows if r[0] >= threshold), key=lambda r: -r[0]))
        free = list(sides[0])
        expected, count = expected + len(free), count + len(sides[1])
        for score, box, label in sides[1]:
            best = max(
                (t for t in free if t[2] == label), key=lambda t: _iou(t[1], box), default=None
            )
            if best is not None and _iou(best[1], box) >= least:
                free.remove(best)
                matched += 1
                ious.append(_iou(best[1], box))
                shifts.append(abs(score - best[0]))
    return matched, expected, count, ious, shifts


def test_against_the_loops():
    rng = random.Random(4)
    truths = [_random_image(rng, count) for count in (12, 0, 25, 7)]
    founds = [_shaken(rng, image) for image in truths]
    meter = QualityMeter("detection")
    for at in (slice(0, 1), slice(1, 4)):
        meter.update(truths[at], founds[at])
    matched, expected, count, ious, shifts = _reference(truths, founds, 0.25, 0.5)
    assert 5 < matched < min(expected, count), "the case must have both outcomes"
    found = meter.result()
    assert found.metrics == {
        "matched_boxes": pytest.approx(matched / expected),
        "box_precision": pytest.approx(matched / count),
        "mean_iou": pytest.approx(sum(ious) / matched, rel=1e-5),
        "score_shift": pytest.approx(sum(shifts) / matched, rel=1e-5),
    }
    assert (found.sqnr_db, found.cosine, found.max_abs_error, found.elements) == (None,) * 3 + (0,)


def test_settings_count():
    truth = _image([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.3], [1, 1])
    found = _image([[0, 0, 10, 6], [50, 50, 60, 60]], [0.8, 0.3], [1, 1])
    assert measure([truth], [found], "detection").metrics["matched_boxes"] == 1.0
    strict = measure([truth], [found], Detection(iou=0.7)).metrics
    assert (strict["matched_boxes"], strict["mean_iou"]) == (0.5, 1.0)
    sure = measure([truth], [found], Detection(score=0.5)).metrics
    assert (sure["matched_boxes"], sure["mean_iou"]) == (1.0, pytest.approx(0.6))


def test_another_label_is_no_match():
    truth, found = (_image([[0, 0, 9, 9]], [0.9], [label]) for label in (1, 2))
    figures = measure(truth, found, "detection").metrics
    assert (figures["matched_boxes"], figures["box_precision"]) == (0.0, 0.0)
    assert math.isnan(figures["mean_iou"])


def test_batched_tensors_are_images():
    rng = random.Random(1)
    images = [_random_image(rng, 6) for _ in range(3)]
    moved = [_shaken(rng, image) for image in images]
    stacked = [
        {key: torch.stack([image[key] for image in side]) for key in side[0]}
        for side in (images, moved)
    ]
    assert measure(*stacked, "detection") == measure(images, moved, "detection")


def test_no_boxes_at_all():
    empty, some = _image([], [], []), _image([[0, 0, 5, 5]], [0.9], [0])
    assert math.isnan(measure([empty], [empty], "detection").metrics["matched_boxes"])
    assert measure([some], [empty], "detection").metrics["matched_boxes"] == 0.0
    assert measure([empty], [some], "detection").metrics["box_precision"] == 0.0


def test_iou_of_boxes_without_area():
    line = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    assert float(box_iou(line, line)) == 0.0


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (torch.zeros(3), "'boxes', 'scores' and 'labels'.*found a Tensor"),
        ([{"boxes": torch.zeros(1, 4)}], "found a dict"),
        (_image([[0, 0, 1, 1]], [0.5, 0.5], [1, 1]), r"found \[1, 4\], \[2\] and \[2\]"),
        ([], "2 in the reference|of 1 images in the reference, of 0"),
    ],
)
def test_what_is_no_detection_is_refused(output, match):
    with pytest.raises(ValueError, match=match):
        measure([_image([[0, 0, 1, 1]], [0.9], [0])], output, "detection")


def test_an_impossible_iou_is_refused():
    with pytest.raises(ValueError, match="iou is a share above 0"):
        Detection(iou=1.5)
