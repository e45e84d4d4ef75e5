"""lowbit.benchmark.conv_targets: figures, and that every layer has to reach them."""

import pytest
from matrix_lines import CONV, conv_rows, line, small_conv_matrix

from lowbit.benchmark.conv_targets import CONV_TARGETS, HELD_TARGETS
from lowbit.benchmark.shapes import KINDS
from lowbit.benchmark.summary import summarize
from lowbit.benchmark.targets import outcomes
from lowbit.schemes import Scheme


def found(lines, targets=CONV_TARGETS):
    summary = summarize(lines)
    return {
        (outcome.target.regime, outcome.name.split()[0], outcome.threads): outcome
        for outcome in outcomes(summary, targets)
    }


def test_figures():
    outcomes = found(small_conv_matrix())
    dense = outcomes["dense 3x3 and 1x1: times torch INT8", "w8a8", 1]
    assert dense.figures == (2.0, 2.0)  # batch 1 and 8
    assert dense.reached
    assert outcomes["the same: of the dot peak", "w8a8", 2].figure == pytest.approx(1.0)
    fewer = outcomes["the same in fewer bits: time over W8A8's", "w4a8", 1]
    assert fewer.figure == pytest.approx(1.04)
    assert fewer.reached
    assert len(outcomes["7x7 maps, batch 1: times torch INT8", "w8a8", 1].figures) == 1
    depthwise = outcomes["the same: times torch float32 channels_last", "w8a8", 1]
    assert depthwise.figure == pytest.approx(4.0)
    binary = outcomes["W1A1, 128 channels and more: times W8A8", "w1a1", 1]
    assert binary.figure == pytest.approx(4.0)
    assert binary.shapes == 1  # 64 channels do not count
    layout = outcomes["NCHW: time over channels_last", "w8a8", 1]
    assert layout.figure == pytest.approx(1.2)
    assert not layout.reached
    assert len(layout.figures) == 6


def test_every_layer_has_to_reach_it():
    lines = [
        line(conv_rows(fast), shape=shape, op="conv")
        for shape, fast in (("64x64k3@14", 1.5), ("64x64k3@16", 1.2), ("64x64k3@20", 0.9))
    ]
    outcome = found(lines)["dense 3x3 and 1x1: times torch INT8", "w8a8", 1]
    assert (outcome.figure, outcome.worst, outcome.count) == (1.2, 0.9, 2)
    assert not outcome.reached
    assert found(lines[:2])["dense 3x3 and 1x1: times torch INT8", "w8a8", 1].reached


def test_older_instruction_sets_have_their_own():
    outcomes = found(small_conv_matrix(), HELD_TARGETS)
    assert {regime for regime, _, _ in outcomes} == {target.regime for target in HELD_TARGETS}
    assert len(outcomes["dense: times torch INT8, held to it too", "w8a8", 1].figures) == 4
    assert set(CONV) <= set(KINDS)


@pytest.mark.parametrize("target", [*CONV_TARGETS, *HELD_TARGETS], ids=lambda t: t.regime)
def test_targets_name_recipes_and_kinds(target):
    assert [Scheme.parse(name.split()[0]) for name in target.names]
    assert set(target.kinds) <= set(KINDS)
