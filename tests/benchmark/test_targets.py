"""lowbit.benchmark.targets: figures, medians, and which way a limit goes."""

import pytest
from matrix_lines import line, row, small_matrix

from lowbit.benchmark.summary import summarize
from lowbit.benchmark.targets import TARGETS, Target, outcomes
from lowbit.schemes import Scheme


def found(lines, regime):
    return {
        (outcome.name, outcome.threads): outcome
        for outcome in outcomes(summarize(lines))
        if outcome.target.regime.startswith(regime)
    }


def test_fraction_is_the_median_over_shapes():
    shapes = ("1024x1024", "768x3072", "4096x4096", "384x1536")  # the last has too small a K
    lines = [
        line([row("w8a8", 1e-3 / fraction, own=True)], shape=shape, m=128)
        for shape, fraction in zip(shapes, (0.95, 0.91, 0.1, 0.01), strict=True)
    ]
    outcome = found(lines, "M >= 128, K")["w8a8", 1]
    assert outcome.figure == pytest.approx(0.91)
    assert outcome.reached
    assert outcome.shapes == 3


def test_int16_is_measured_against_int8():
    rows = [row("w8a8", 1.0, own=True), row("w8a16", 2.2, own=True), row("w4a16", 1.0, own=True)]
    outcome = found([line(rows, m=512)], "int16")
    assert outcome["w8a16", 1].figure == pytest.approx(2.2)
    assert not outcome["w8a16", 1].reached  # a limit from above
    assert ("w4a16", 1) not in outcome  # its int8 was not measured


def test_two_threads_are_measured_against_one():
    outcome = found(small_matrix(), "2 threads")["w8a8", 2]
    assert outcome.figure == pytest.approx(2**0.95)
    assert outcome.reached


def test_few_rows_by_the_place_of_the_weights():
    rows = [row("w8a8", 2e-3, own=True)]
    assert not found([line(rows)], "M = 1 from memory")
    outcome = found([line(rows, weights="memory")], "M = 1 from memory")["w8a8", 1]
    assert outcome.figure == pytest.approx(0.5)
    assert not outcome.reached


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.regime} {target.limit}")
def test_targets_name_recipes(target: Target):
    assert [Scheme.parse(name) for name in target.names]
