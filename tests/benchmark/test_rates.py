"""lowbit.benchmark.rates: a line for every layer, a mark for every engine."""

import pytest

pytest.importorskip("matplotlib")

from matrix_lines import line, row, small_conv_matrix

from lowbit.benchmark.rates import engine, rates
from lowbit.benchmark.summary import Summary, summarize


def marks(axes):
    return {mark.get_label(): mark for mark in axes.lines if not mark.get_label().startswith("_")}


def test_a_panel_for_each_number_of_threads(tmp_path, figures):
    rates(summarize(small_conv_matrix()), tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["1 thread", "2 threads"]
    assert "batch 1" in figure.get_suptitle()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [
        "dense 3x3  64x64k3@14",
        "7x7 map  128x128k3@7",
        "depthwise  32x32k3g32@14",
    ]
    assert list(marks(figure.axes[0])) == [
        "lowbit w8a8",
        "lowbit w4a8",
        "lowbit w1a1",
        "torch int8",
    ]
    assert "int8 dot 1000" in [label.get_text() for label in figure.axes[1].texts]


def test_points_are_the_rates_of_channels_last(tmp_path, figures):
    summary = summarize(small_conv_matrix())
    rates(summary, tmp_path / "rates.png")
    cells = summary.select(name="w8a8 channels_last", m=1, threads=1)
    x, y = marks(figures[0].axes[0])["lowbit w8a8"].get_data()
    assert list(x) == [cell.macs_per_second / 1e9 for cell in cells]
    assert sorted(y) == [0, 1, 2]


def test_the_quicker_format_of_a_peer_is_drawn(tmp_path, figures):
    names = {"torch int8 x86": 3.0, "torch int8 onednn channels_last": 1.0, "openvino int8": 2.0}
    rows = [row(name, seconds) for name, seconds in names.items()]
    summary = summarize([line(rows, shape="64x64k3@14", op="conv")])
    assert [engine(cell) for cell in summary.cells] == ["torch int8", "torch int8", "openvino int8"]
    rates(summary, tmp_path / "rates.png")
    (x,) = marks(figures[0].axes[0])["torch int8"].get_xdata()
    assert x == summary.cells[1].macs_per_second / 1e9


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no results to draw"):
        rates(Summary([], [], []), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_error_names_the_extra(tmp_path, no_matplotlib):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowbit\[plot\]'"):
        rates(summarize(small_conv_matrix()), tmp_path / "rates.png")
