"""The plot: a file of sane size, labels that cover nothing, models without a point named."""

import dataclasses
import math
import struct

import pytest

pytest.importorskip("matplotlib")


from lowbit.comparison import Comparison, Row
from lowbit.plot import plot
from lowbit.quality import Quality
from lowbit.timing import Ratio, Timing


def _row(name, kind, speedup, sqnr_db):
    ratio = Ratio(speedup, speedup * 0.97, speedup, speedup, speedup * 1.03, 9)
    quality = None if sqnr_db is None else Quality(sqnr_db, 0.9, 0.1, 100)
    timed = Timing(0.1, (0.1 / speedup,) * 9)
    return Row(name, kind, timed, 10.0, ratio, None, 5_040_000, quality=quality)


def _comparison(*rows):
    reference = _row("float32", "float", 1.0, None)
    return Comparison("Net", "Some CPU", "avx2", 2, 8, 3, "2.13", (reference, *rows))


ROWS = (
    _row("torch int8", "torch", 2.9, 22.0),
    _row("w8a8", "candidate", 4.4, 31.0),
    _row("w4a8", "candidate", 4.5, 14.0),
    _row("w2a8", "candidate", 4.6, 1.5),
    _row("wta8", "candidate", 4.62, 1.2),
    _row("w1a8", "candidate", 4.7, 0.6),
    _row("slow", "candidate", 1.05, -1.0),
)


def _texts(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ()], ids=["many", "one", "none"])
def test_png_of_sane_size(tmp_path, rows):
    path = tmp_path / "plot.png"
    _comparison(*rows).plot(path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 800 <= width <= 2000
    assert 500 <= height <= 1500
    assert 10_000 < len(data) < 500_000


def test_labels_name_every_point_with_its_size_and_cover_none(tmp_path, figures):
    plot(_comparison(*ROWS), tmp_path / "plot.png")
    (figure,) = figures
    renderer = figure.canvas.get_renderer()
    labels = _texts(figure)
    expected = {f"{row.name}\n5.0 MB" for row in ROWS} | {"float32, 5.0 MB"}
    assert {label.get_text() for label in labels} == expected
    boxes = [label.get_window_extent(renderer) for label in labels]
    frame = figure.axes[0].get_window_extent(renderer)
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
        for row in ROWS:
            x, y = figure.axes[0].transData.transform((row.quality.sqnr_db, row.speedup.median))
            assert not box.contains(x, y)


def test_title_and_axes_say_what_was_measured(tmp_path, figures):
    plot(_comparison(*ROWS), tmp_path / "plot.svg")
    (figure,) = figures
    assert figure.get_suptitle() == "Net, batch 8, 2 threads\navx2, Some CPU"
    assert "SQNR" in figure.axes[0].get_xlabel()
    assert "dB" in figure.axes[0].get_xlabel()
    assert figure.axes[0].get_ylabel() == "speed-up over float32"
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    "odd",
    [
        _row("odd", "candidate", 2.0, math.inf),
        _row("odd", "candidate", 2.0, math.nan),
        _row("odd", "candidate", 2.0, None),
        Row("odd", "torch", notes=("no engine",)),
    ],
    ids=["equal", "nan", "no quality", "not available"],
)
def test_models_without_a_point_are_named(tmp_path, figures, odd):
    plot(_comparison(*ROWS[1:3], odd), tmp_path / "plot.png")
    (figure,) = figures
    assert figure.get_supxlabel() == "no point (see the table): odd"
    assert not any("odd" in label.get_text() for label in _texts(figure))


def test_without_matplotlib_the_error_names_the_extra(tmp_path, no_matplotlib):
    with pytest.raises(ImportError, match=r"pip install 'lowbit\[plot\]'"):
        plot(_comparison(), tmp_path / "plot.png")


def test_a_disturbed_round_does_not_squash_the_points(tmp_path, figures):
    row = _row("w8a8", "candidate", 2.0, 30.0)
    disturbed = dataclasses.replace(row, speedup=Ratio(2.0, 1.9, 2.0, 2.0, 300.0, 9))
    plot(_comparison(disturbed), tmp_path / "plot.png")
    assert figures[0].axes[0].get_ylim() == (0.0, pytest.approx(1.15 * 3.0))
