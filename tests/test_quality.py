"""Quality metrics against float64 NumPy formulas written another way, and the edges of each."""

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lowbit.quality import QualityMeter, floating_tensors, measure


def _pair(*shape, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(*shape, generator=generator)
    return reference, reference + noise * torch.randn(*shape, generator=generator)


def _softmax(scores):
    return np.array([[1 / sum(math.exp(b - a) for b in row) for a in row] for row in scores])


def test_element_metrics_match_numpy():
    reference, output = _pair(7, 3, 5)
    r, o = reference.numpy().astype(np.float64).ravel(), output.numpy().astype(np.float64).ravel()
    found = measure(reference, output)
    norm = np.linalg.norm
    assert found.sqnr_db == pytest.approx(20 * math.log10(norm(r) / norm(r - o)), rel=1e-12)
    assert found.cosine == pytest.approx(np.dot(r / norm(r), o / norm(o)), rel=1e-12)
    assert found.max_abs_error == np.abs(r - o).max()
    assert (found.elements, found.rows, found.top1_agreement) == (105, 0, None)


def test_classification_metrics_match_numpy():
    reference, output = _pair(40, 12, noise=0.8)
    r, o = reference.numpy().astype(np.float64), output.numpy().astype(np.float64)
    p, q = _softmax(r), _softmax(o)
    best = [max(range(12), key=row.__getitem__) for row in r]
    found = measure(reference, output)
    ranks = [int((row > row[c]).sum()) for row, c in zip(o, best, strict=True)]
    assert 0 < sum(rank == 0 for rank in ranks) < 40, "the case must have both outcomes"
    assert found.top1_agreement == sum(rank == 0 for rank in ranks) / 40
    assert found.top5_agreement == sum(rank < 5 for rank in ranks) / 40
    assert found.kl_divergence == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)))
    shifts = [abs(p[i, c] - q[i, c]) for i, c in enumerate(best)]
    assert found.probability_shift == pytest.approx(np.mean(shifts))


def test_equal_outputs():
    reference, _ = _pair(6, 9)
    found = measure(reference, reference.clone())
    assert found.sqnr_db == math.inf
    assert found.cosine == pytest.approx(1.0, abs=1e-15)
    assert found.max_abs_error == found.kl_divergence == found.probability_shift == 0.0
    assert found.top1_agreement == found.top5_agreement == 1.0


def test_batches_add_up_to_the_whole():
    reference, output = _pair(30, 8)
    meter = QualityMeter()
    for r, o in zip(reference.split([1, 9, 20]), output.split([1, 9, 20]), strict=True):
        meter.update(r, o)
    found, whole = meter.result().to_dict(), measure(reference, output).to_dict()
    assert found.keys() == whole.keys()
    assert found == {name: pytest.approx(value, rel=1e-12) for name, value in whole.items()}


def test_zero_reference_is_not_hidden():
    zero, one = torch.zeros(3, 3), torch.ones(3, 3)
    assert measure(zero, one).sqnr_db == -math.inf
    assert math.isnan(measure(zero, one).cosine)
    assert measure(zero, zero).sqnr_db == math.inf


@pytest.mark.parametrize("side", ["reference", "output"])
def test_nan_is_reported(side):
    reference, output = _pair(20, 6)
    poisoned = {"reference": reference.clone(), "output": output.clone()}
    poisoned[side][4, 2] = math.nan
    meter = QualityMeter()
    meter.update(reference, reference)  # a good batch before and after must not hide it
    meter.update(poisoned["reference"], poisoned["output"])
    meter.update(reference, reference)
    found = meter.result()
    for value in (
        found.sqnr_db,
        found.cosine,
        found.max_abs_error,
        found.kl_divergence,
        found.probability_shift,
    ):
        assert math.isnan(value)
    counts = found.nonfinite_reference, found.nonfinite_output
    assert counts == ((1, 0) if side == "reference" else (0, 1))


def test_a_row_with_nan_never_agrees():
    scores = torch.eye(8)
    broken = scores.clone()
    broken[3, 3] = math.nan  # argmax would still point at class 3
    found = measure(scores, broken)
    assert found.top1_agreement == found.top5_agreement == 7 / 8


def test_infinite_output():
    reference = torch.ones(4, 4, 4)
    output = reference.clone()
    output[0, 0, 0] = math.inf
    found = measure(reference, output)
    assert (found.sqnr_db, found.max_abs_error) == (-math.inf, math.inf)
    assert (found.nonfinite_reference, found.nonfinite_output) == (0, 1)


def test_excluded_classes_add_nothing_to_the_divergence():
    reference, output = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[0.0, 1.0, -50.0]])
    assert measure(reference, output).kl_divergence == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "task", "rows"),
    [
        ((6, 1), None, 0),  # a single class is no classification
        ((6,), None, 0),
        ((2, 3, 7), None, 0),
        ((2, 3, 7), "classification", 6),
        ((6, 7), None, 6),
        ((6, 7), "other", 0),
    ],
)
def test_what_counts_as_a_classification(shape, task, rows):
    found = measure(*_pair(*shape), task=task)
    assert found.rows == rows
    assert (found.kl_divergence is None) == (rows == 0)


@pytest.mark.parametrize("shape", [(6, 1), (6,)])
def test_scores_of_one_class_are_refused_as_classification(shape):
    with pytest.raises(ValueError, match="C >= 2"):
        measure(*_pair(*shape), task="classification")


def test_top5_needs_more_than_five_classes():
    assert measure(*_pair(6, 5)).top5_agreement is None
    assert measure(*_pair(6, 6)).top5_agreement is not None


def test_logits_are_found_by_name_among_other_outputs():
    reference, output = _pair(6, 7)
    hidden = torch.ones(6, 3)
    outputs = ({"hidden": hidden, "logits": t} for t in (reference, output))
    found = measure(*outputs)
    assert found.elements == 6 * 7 + 6 * 3
    assert found.kl_divergence == measure(reference, output).kl_divergence


@dataclass
class _Output:
    scores: torch.Tensor
    extra: object = None


def test_structured_outputs_are_flattened():
    a, b, c = torch.ones(1), torch.full((2,), 2.0, dtype=torch.bfloat16), torch.full((3,), 3.0)
    point = namedtuple("point", "x y")
    for output in (
        (a, [b, (c,)]),
        {"a": a, "ids": torch.arange(4), "rest": [b, c], "none": None},
        OrderedDict(a=a, b=point(b, c)),
        _Output(a, {"b": b, "c": _Output(c, "text")}),
    ):
        found = floating_tensors(output)
        assert [t.numel() for t in found] == [1, 2, 3]
        assert all(x is y for x, y in zip(found, (a, b, c), strict=True))


@pytest.mark.parametrize(
    ("reference", "output", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"\[\[2, 3\]\].*\[\[3, 2\]\]"),
        ((torch.ones(2), torch.ones(2)), torch.ones(2), "outputs differ"),
        (torch.arange(3), torch.arange(3), "no floating-point tensor"),
    ],
)
def test_outputs_that_cannot_be_compared(reference, output, message):
    with pytest.raises(ValueError, match=message):
        measure(reference, output)


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match="unknown task 'regression'"):
        QualityMeter("regression")
    with pytest.raises(ValueError, match="no outputs"):
        QualityMeter().result()
