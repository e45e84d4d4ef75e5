"""lowbit.benchmark.matrix: which cases there are, and what their process is told."""

import dataclasses

import pytest

from lowbit.benchmark import matrix
from lowbit.benchmark.matrix import MatrixCase, cases, conv_cases, ragged_cases
from lowbit.benchmark.run import Options
from lowbit.benchmark.shapes import HELD_KINDS, KINDS, parse

SMALL = {"shapes": ("64x64", "64x32"), "ms": (1, 8), "threads": (1,)}


def test_all_cases_by_default():
    found = cases()
    assert len(set(found)) == len(found)
    cached = [case for case in found if case.weights == "cache"]
    assert len(cached) == len(matrix.SHAPES) * len(matrix.M) * len(matrix.THREADS)
    rotated = {(case.shape, case.m) for case in found if case.weights == "memory"}
    large = ("4096x4096", "4096x14336", "11008x4096")  # 256 copies of their 1-bit weights suffice
    assert rotated == {(shape, m) for shape in large for m in (1, 4, 8)}


def test_subsets():
    found = cases(**SMALL, weights=("cache",), formats=("w8a8",), seconds=0.5)
    assert [str(case) for case in found] == [
        "64x64 M=1 T=1 cache",
        "64x64 M=8 T=1 cache",
        "64x32 M=1 T=1 cache",
        "64x32 M=8 T=1 cache",
    ]
    assert all(case.formats == ("w8a8",) and case.seconds == 0.5 for case in found)
    assert all(case.cost > 0 for case in found)


def test_the_process_is_told_the_options():
    batch = cases(("64x64",), (1, 8), (2,), ("cache",), formats=("w8a8",), peers=(), isa="avx2")
    given = batch[0].options(batch)
    assert given == {
        "op": "linear",
        "shapes": ["64x64"],
        "m": [1, 8],
        "threads": [2],
        "formats": ("w8a8",),
        "peers": (),
        "isa": "avx2",
        "budget_seconds": 3.0,
        "probe_seconds": pytest.approx(0.3),
        "rotate_bytes": 0,
        "padded": False,
    }
    memory = MatrixCase("4096x4096", 1, 1, "memory")
    assert not {"rotate_bytes", "peers"} & set(memory.options([memory]))  # all of them
    assert set(given) <= {field.name for field in dataclasses.fields(Options)}


def test_ragged_shapes_are_timed_beside_padded_ones_without_peers():
    found = ragged_cases((1,), (1, 2))
    assert {case.shape for case in found} == set(matrix.RAGGED_SHAPES)
    assert all(case.options([case])["padded"] and case.peers == () for case in found)


def test_convolutions():
    found = conv_cases()
    assert len(found) == len(set(found)) == len(matrix.CONV_SHAPES) * 4
    assert {case.parsed.kind for case in found} == set(KINDS)
    assert str(found[1]) == "64x64k3@56 batch 8 T=1"
    assert found[0].beside(found[1])
    assert not found[0].beside(found[2])
    assert {case.weights for case in found} == {"cache"}
    assert all(case.cost > 0 for case in found)
    assert set(matrix.CONV_QUICK) <= set(matrix.CONV_SHAPES)
    Options(**found[0].options(found[:2])).check()


def test_older_instruction_sets_have_fewer_shapes():
    kinds = {parse("conv", shape).kind for shape in matrix.CONV_HELD}
    assert kinds == set(HELD_KINDS)
    assert set(matrix.CONV_HELD) < set(matrix.CONV_SHAPES)
