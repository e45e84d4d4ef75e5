"""Choosing a task by name, function or object; functions; and tasks inside `measure`."""

import math

import numpy as np
import pytest
import torch

from lowbit import tasks
from lowbit.quality import QualityMeter, measure
from lowbit.tasks.metric import METRICS, metric_of


def test_every_name_is_found():
    for name in tasks.TASKS:
        found = tasks.find(name)
        assert found == name or found.name == name
    assert tasks.find(None) is None
    assert tasks.find(tasks.Detection(iou=0.75)).iou == 0.75


@pytest.mark.parametrize(
    ("task", "error", "match"),
    [
        ("segmentation", ValueError, "unknown task 'segmentation'.*detection.*language"),
        (3, TypeError, "a task is a name, a function or a lowbit.tasks.Task, not 3"),
    ],
)
def test_what_is_no_task_is_refused(task, error, match):
    with pytest.raises(error, match=match):
        QualityMeter(task)


def test_a_function_is_averaged_over_all_its_numbers():
    def gap(reference, output):
        return (reference - output).abs().mean(dim=1)

    meter = QualityMeter(gap)
    sides = [(torch.rand(n, 4), torch.rand(n, 4)) for n in (1, 3)]
    for reference, output in sides:
        meter.update(reference, output)
    gaps = np.concatenate([np.abs((r - o).numpy()).mean(1) for r, o in sides])
    found = meter.result()
    assert found.metrics == {"gap": pytest.approx(gaps.mean())}
    assert found.rows == 0, "a function says what counts: it is no classification"
    assert found.figures()["gap"] == found.metrics["gap"]
    assert math.isfinite(found.sqnr_db)


def test_a_function_may_see_the_batch_and_give_several_figures():
    def figures(reference, output, batch):
        right = output.argmax(1) == batch["labels"]
        return {"right": right, "worst": float((reference - output).abs().max())}

    output = torch.eye(3)
    found = measure(torch.zeros(3, 3), output, figures, {"labels": torch.tensor([0, 1, 0])})
    assert found.metrics == {"right": pytest.approx(2 / 3), "worst": 1.0}
    assert metric_of("right").higher_is_better


def test_a_lambda_has_a_name():
    assert measure(torch.ones(2, 2), torch.ones(2, 2), lambda r, o: 1).metrics == {"lambda": 1.0}


def test_what_a_function_returns_has_to_be_numbers():
    with pytest.raises(ValueError, match="returned a str for 'words'"):
        measure(torch.ones(2), torch.ones(2), lambda r, o: {"words": "good"})


def test_metrics_say_how_they_are_shown():
    assert METRICS["top1_agreement"].text(0.987) == "98.7"
    assert METRICS["kl_divergence"].text(None) == "-"
    assert METRICS["ssim"].title == "SSIM"
    assert not METRICS["perplexity"].higher_is_better


def test_figures_leave_out_what_is_not_there():
    quality = measure(torch.rand(4, 3), torch.rand(4, 3))
    assert set(quality.figures()) == {
        "sqnr_db",
        "cosine",
        "max_abs_error",
        "top1_agreement",
        "kl_divergence",
        "probability_shift",
    }
