"""lowbit.benchmark.static_page: the page says what the lines hold."""

from __future__ import annotations

from lowbit.benchmark.static_networks import DYNAMIC, FLOAT32, INT8, OPENVINO, STATIC
from lowbit.benchmark.static_page import static_page
from lowbit.timing import Timing

MS = {FLOAT32: 12.0, INT8: 6.0, DYNAMIC: 4.0, STATIC: 2.5, OPENVINO: 2.0}


def line(static="efficientnet-lite0", batch=1, threads=1, milliseconds=MS):
    rows = [
        {
            "name": name,
            "timing": Timing(time / 1e3, (time / 1e3,)).to_dict(),
            "quality": {"sqnr_db": 20.125, "top1_agreement": 0.975, "rows": 96},
            "versus": {
                other: {"median": theirs / time}
                for other, theirs in milliseconds.items()
                if other != name
            },
        }
        for name, time in milliseconds.items()
    ]
    environment = {"cpu": {"model": "A CPU"}, "isa": {"chosen": "avx2"}}
    return {
        "case": {"static": static, "batch": batch, "threads": threads, "seconds": 1.0},
        "result": {
            "rows": rows,
            "int8": "static, onednn",
            "steps": [["_conv_stem", "conv", 3e-4], ["x", "quantize", 1e-4]],
            "layers": [["stem", "brgconv", 2e-4]],
            "environment": environment,
        },
    }


def test_times_targets_quality_and_steps():
    page = static_page([line()], "python bench/static.py --page x")
    assert "`python bench/static.py --page x`" in page
    assert "A CPU, avx2" in page
    assert "2.50" in page
    assert "4.80 (target 3: met)" in page
    assert "2.40 (target 2: met)" in page
    assert "0.80 (target 1: missed)" in page
    assert "| 20.12" in page
    assert "97.5" in page
    assert page.index("300") < page.index("brgconv")


def test_other_networks_and_sides_that_are_missing():
    times = {name: ms for name, ms in MS.items() if name != OPENVINO}
    page = static_page([line("resnet18", 8, 2, times)])
    assert "2.40 (target 1: met)" in page
    assert "not measured" in page
    assert "slowest" not in page


def test_no_quality():
    given = line()
    for row in given["result"]["rows"]:
        row["quality"] = None
    assert "Not measured." in static_page([given])
