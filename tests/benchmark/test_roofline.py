"""lowbit.benchmark.roofline: a mark for every engine, lines for lowbit, probed roofs."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matrix_lines import line, row, small_matrix

from lowbit.benchmark.roofline import roofline, series
from lowbit.benchmark.summary import Summary, summarize


def labelled(axes):
    return {mark.get_label(): mark for mark in axes.lines if not mark.get_label().startswith("_")}


def test_a_panel_for_each_number_of_threads(tmp_path, figures):
    roofline(summarize(small_matrix()), tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["1 thread", "2 threads"]
    assert "K = 768, N = 3072" in figure.get_suptitle()  # the larger of two with as many cells
    for axes in figure.axes:
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert set(labelled(axes)) == {"lowbit w8a8", "lowbit w1a8", "torch float32", "torch int8"}
        roofs = [label.get_text() for label in axes.texts]
        assert len(roofs) == 6
    assert "int8 dot 1000" in [label.get_text() for label in figure.axes[1].texts]
    assert len(figure.legends[0].get_texts()) == 4


def test_points_are_rates_and_lie_inside(tmp_path, figures):
    summary = summarize(small_matrix())
    roofline(summary, tmp_path / "roof.svg", "1024x1024")
    axes = figures[0].axes[0]
    cells = series(summary.select(name="w8a8", shape="1024x1024", threads=1))
    x, y = labelled(axes)["lowbit w8a8"].get_data()
    assert list(x) == [cell.intensity for cell in cells]
    assert list(y) == [cell.macs_per_second / 1e9 for cell in cells]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for mark in labelled(axes).values():
        assert all(left < value < right for value in mark.get_xdata())
        assert all(bottom < value < top for value in mark.get_ydata())


def test_no_two_engines_look_the_same(tmp_path, figures):
    names = ["torch int8 x86", "torch int8 onednn", "torch weight-only int8", "ggml q8_0", "new"]
    peers = [row(name, 1.0) for name in names] + [row("openvino u4", 1.0, bits=4)]
    roofline(summarize([line(peers)]), tmp_path / "roof.png")
    looks = {
        (mark.get_marker(), to_hex(mark.get_markeredgecolor()), mark.get_markerfacecolor())
        for mark in labelled(figures[0].axes[0]).values()
    }
    assert len(looks) == len(peers)


def test_labels_of_slopes_follow_them(tmp_path, figures):
    roofline(summarize(small_matrix()), tmp_path / "roof.png")
    turned = [label.get_rotation() for label in figures[0].axes[0].texts if "GB/s" in str(label)]
    assert len(turned) == 3
    assert all(10 < angle < 80 for angle in turned)


def test_series_prefers_memory():
    lines = [
        line([row("w8a8", 1.0)], m=m, weights=weights)
        for m, weights in ((8, "cache"), (1, "memory"), (1, "cache"))
    ]
    cells = series(summarize(lines).cells)
    assert [(cell.m, cell.source) for cell in cells] == [(1, "memory"), (8, "cache")]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no results to draw"):
        roofline(Summary([], [], []), tmp_path / "none.png")
    with pytest.raises(ValueError, match="shape 1x1"):
        roofline(summarize(small_matrix()), tmp_path / "none.png", "1x1")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_error_names_the_extra(tmp_path, no_matplotlib):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowbit\[plot\]'"):
        roofline(summarize(small_matrix()), tmp_path / "roof.png")
