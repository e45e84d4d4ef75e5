"""The geometry of the charts, against what it must mean."""

import dataclasses
import math
import re

import pytest

from lowbit.comparison import Row
from lowbit.html import charts
from lowbit.quality import Quality
from lowbit.timing import Ratio, Timing


def row(name, kind, speedup, sqnr_db, size=5_040_000, seconds=None):
    ratio = Ratio(speedup, speedup * 0.97, speedup, speedup, speedup * 1.03, 9)
    quality = None if sqnr_db is None else Quality(sqnr_db, 0.9, 0.1, 100)
    return Row(
        name, kind, Timing(0.1, seconds or (0.1,) * 9), 10.0, ratio, None, size, quality=quality
    )


REFERENCE = row("float32", "float", 1.0, None, 20_000_000)
ROWS = (
    REFERENCE,
    row("torch int8", "torch", 2.9, 22.0),
    row("w8a8", "candidate", 4.4, 31.0),
    row("w4a8", "candidate", 4.5, 14.0, 2_500_000),
    row("w2a8", "candidate", 4.6, 1.5, 1_250_000),
    row("wta8", "candidate", 4.62, 1.2, 1_250_000),
    row("w1a8", "candidate", 4.7, 0.6, 700_000),
)


def heights(path, height):
    """The height of each step of `area`'s path."""
    assert path.startswith(f"M0 {height}")
    assert path.endswith(f"V{height}z")
    top, found = 0, []
    for command, number in re.findall(r"([vh])(-?\d+)", path):
        if command == "v":
            top -= int(number)
        else:
            assert number == "2"
            found.append(top)
    return found


def test_an_area_has_the_heights_of_its_values():
    assert heights(charts.area([0, 1, 2, 2, 5, 0], 10, 4), 10) == [0, 2, 5, 5, 10, 0]
    assert heights(charts.area([0, 0], 10, 0), 10) == [0, 0]


def test_histograms_share_a_scale_and_show_shares():
    paths = charts.histogram((100, 300, 0), (1, 0, 0))
    before, after = (
        heights(p, charts.HISTOGRAM_HEIGHT) for p in (paths.reference, paths.quantized)
    )
    assert after == [48, 0, 0]  # all of its values in one bin
    assert before == [round(48 * math.sqrt(0.25)), round(48 * math.sqrt(0.75)), 0]
    assert paths.width == 6
    assert heights(charts.histogram((0, 0), (0, 0)).reference, 48) == [0, 0]


def test_latency_shows_medians_and_counts_what_is_beyond():
    slow = row("slow", "float", 1.0, None, seconds=(0.010,) * 199 + (9.0,))
    quick = row("quick", "candidate", 1.0, None, seconds=(0.005,) * 200)
    found = charts.latency([slow, quick, Row("none", "torch")])
    assert [one.row.name for one in found.calls] == ["slow", "quick"]
    assert found.end == pytest.approx(0.0105)
    assert [one.beyond for one in found.calls] == [1, 0]
    assert found.calls[1].median == pytest.approx(2 * charts.LATENCY_BINS * 0.005 / 0.0105, abs=0.1)
    assert max(heights(found.calls[0].path, charts.LATENCY_HEIGHT)) == charts.LATENCY_HEIGHT


def test_bars_leave_gaps_for_what_is_missing():
    path = charts.bars([50.0, None, 25.0, -3.0, math.inf, math.nan, 99.0], 50.0)
    assert re.findall(r"M(\d+) 24v-(\d+)", path) == [
        ("0", "24"),
        ("8", "12"),
        ("16", "24"),
        ("24", "24"),
    ]


@pytest.mark.parametrize(("width", "height"), [(680, 400), (340, 380)])
def test_scatter_is_inside_and_labels_cover_nothing(width, height):
    found = charts.scatter(ROWS, width, height)
    assert {mark.row.name for mark in found.marks} == {r.name for r in ROWS[1:]}
    assert found.absent == ()
    boxes = []
    for mark in found.marks:
        assert found.left <= mark.x <= found.right
        assert found.top <= mark.high <= mark.y <= mark.low <= found.bottom
        wide = charts._LETTER * max(len(mark.row.name), 7)
        left = mark.label_x - {"start": 0, "middle": wide / 2, "end": wide}[mark.anchor]
        boxes.append((left, mark.label_y - 11, left + wide, mark.label_y + 16))
        assert boxes[-1][0] >= 0
        assert boxes[-1][2] <= width
    for i, box in enumerate(boxes):
        assert not any(charts._overlap(box, other) > 0 for other in boxes[:i])
        for mark in found.marks:
            assert not (box[0] < mark.x < box[2] and box[1] < mark.y < box[3])


def test_scatter_is_to_scale():
    found = charts.scatter(ROWS, 680, 400)
    marks = {mark.row.name: mark for mark in found.marks}
    assert marks["w8a8"].x > marks["w4a8"].x > marks["w1a8"].x
    assert marks["w1a8"].y < marks["w8a8"].y < marks["torch int8"].y < found.line
    assert marks["w4a8"].radius / marks["w8a8"].radius == pytest.approx(
        math.sqrt(2_500_000 / 5_040_000), abs=0.01
    )
    per_unit = found.bottom - found.line  # of a speed-up of 1
    assert found.bottom - marks["w8a8"].y == pytest.approx(4.4 * per_unit, abs=0.5)
    assert {text for _, text in found.y_ticks} >= {f"1{charts.TIMES}", f"2{charts.TIMES}"}


@pytest.mark.parametrize("sqnr_db", [math.inf, math.nan, None])
def test_models_without_a_place_are_named(sqnr_db):
    odd = row("odd", "candidate", 2.0, sqnr_db)
    found = charts.scatter([*ROWS[:2], odd, Row("none", "torch")], 340, 300)
    assert found.absent == ("odd", "none")
    alone = charts.scatter([REFERENCE, odd], 340, 300)
    assert alone.marks == ()


def test_a_disturbed_round_does_not_squash_the_points():
    good = row("w8a8", "candidate", 2.0, 30.0)
    disturbed = dataclasses.replace(good, speedup=Ratio(2.0, 1.9, 2.0, 2.0, 300.0, 9))
    (mark,) = charts.scatter([REFERENCE, disturbed], 340, 300).marks
    assert mark.high == 14  # the bar leaves the frame
    assert mark.y < 200


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 5, 5, [0, 1, 2, 3, 4, 5]),
        (-12.3, 24.8, 8, [-10, -5, 0, 5, 10, 15, 20]),
        (0, 0.31, 3, [0, 0.2]),
        (0, 1.4, 5, [0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round(low, high, count, expected):
    assert charts.ticks(low, high, count) == pytest.approx(expected)
