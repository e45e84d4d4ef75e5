"""lowbit.benchmark.summary: cells of a matrix, and what is counted of them."""

import copy
import math

import pytest
from matrix_lines import CEILINGS, line, row, small_matrix

from lowbit.benchmark.summary import by_isa, geometric_mean, over_shapes, summarize


def test_cells_hold_what_the_rows_say():
    summary = summarize([line([row("w8a8", 2e-3, own=True, peer="x", ratio=1.5)], m=4)])
    (cell,) = summary.cells
    assert (cell.name, cell.shape, cell.m, cell.threads) == ("w8a8", "1024x1024", 4, 1)
    assert (cell.ratio, cell.p10, cell.p90) == (1.5, 0.9 * 1.5, 1.1 * 1.5)
    assert cell.macs_per_second == 4 * 1024 * 1024 / 2e-3
    assert cell.intensity == 4 * 2**20 / (2**20 + 4 * 4 * 2048)
    assert cell.source == "cache"
    (from_memory,) = summarize([line([row("w8a8", 1.0)], weights="memory")]).cells
    assert from_memory.source == "memory"
    assert from_memory.ratio is None


def test_the_later_measurement_of_a_cell_holds():
    first, second = line([row("w8a8", 1.0), row("w4a8", 1.0)]), line([row("w8a8", 3.0)])
    seconds = {cell.name: cell.seconds for cell in summarize([first, second]).cells}
    assert seconds == {"w8a8": 3.0, "w4a8": 1.0}


def test_what_is_behind_comes_worst_first():
    rows = [
        row(name, 1.0, own=True, peer="x", ratio=ratio)
        for name, ratio in (("w8a8", 0.9), ("w4a8", 1.0), ("w2a8", 0.5))
    ]
    summary = summarize([line([*rows, row("x", 1.0)])])
    assert [cell.name for cell in summary.behind] == ["w2a8", "w8a8"]
    assert [cell.name for cell in summary.compared] == ["w8a8", "w4a8", "w2a8"]


def test_columns_are_in_the_order_of_m_memory_first():
    lines = [
        line([row("w8a8", 1.0)], m=m, weights=weights)
        for m, weights in ((512, "cache"), (1, "cache"), (1, "memory"), (8, "cache"))
    ]
    expected = [(1, "memory"), (1, "cache"), (8, "cache"), (512, "cache")]
    assert summarize(lines).columns == expected


def test_failures_are_counted():
    lines = [line([], m=m, failed={"x": f"reason {m}"}) for m in (1, 4)]
    assert summarize(lines).failed() == {"x": ("reason 1", 2)}


def test_ceilings_by_threads():
    found = summarize(small_matrix()).ceilings(2)
    assert found["dot4"] == [2 * CEILINGS["dot4"]] * 4
    assert "dot" not in found


def test_values_over_shapes():
    summary = summarize(small_matrix())
    found = over_shapes(summary.select(threads=1), lambda cell: cell.macs)
    assert list(dict.fromkeys(name for name, _ in found)) == [
        "w8a8",
        "w1a8",
        "torch float32",
        "torch int8",
    ]
    assert found["w8a8", (128, "cache")] == [128 * 1024 * 1024, 128 * 768 * 3072]


def test_geometric_mean():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))


def test_files_from_before_ceilings_had_widths():
    (old,) = [copy.deepcopy(line([row("w8a8", 1.0, own=True)]))]
    (group,) = old["result"]["groups"]
    group["ceilings"] = {"dot": 5e11, "fma": 1e11, "xnor": 2e12, "read": 4e10, "l3": None}
    group["rows"][0]["bound"] = "dot"
    for name in ("layout", "fraction_of_peak", "versus_torch_int8", "versus_float32"):
        del group["rows"][0][name]
    summary = summarize([old])
    assert summary.ceilings(1)["dot"] == [5e11]
    assert summary.cells[0].bound == "dot"


def test_instruction_sets_apart():
    lines = [line([row("w8a8", 1.0)], m=m, isa=isa) for m, isa in ((1, "b"), (1, "a"), (4, "a"))]
    found = by_isa(lines)
    assert list(found) == ["a", "b"]
    assert [cell.m for cell in found["a"].cells] == [1, 4]
    for held in lines[1:]:
        held["case"]["isa"] = "a"
    assert list(by_isa(lines)) == ["b", "a"]


def test_a_part_keeps_the_machine():
    summary = summarize(small_matrix())
    part = summary.part(lambda cell: cell.name == "w8a8")
    assert {cell.name for cell in part.cells} == {"w8a8"}
    assert part.lines == summary.lines
    assert part.ceilings(1) == summary.ceilings(1)


def test_cells_of_convolutions():
    rows = [row("w8a8 channels_last", 1.0, own=True, layout="channels_last", int8=2.0, float32=3.0)]
    (cell,) = summarize([line(rows, shape="64x64k3@14", op="conv")]).cells
    assert (cell.kind, cell.layout, cell.peak) == ("dense 3x3", "channels_last", 1e-3)
    assert str(cell.int8) == "2.00 (1.80-2.20)"
    assert cell.float32.median == 3.0
