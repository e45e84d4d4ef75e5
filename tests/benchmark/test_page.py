"""lowbit.benchmark.page: the page says what the matrix holds."""

import re

from matrix_lines import line, row, small_matrix, table

from lowbit.benchmark import page_parts as parts
from lowbit.benchmark.page import page as whole_page
from lowbit.benchmark.summary import summarize


def page(summary, picture=None):
    return whole_page({"avx512vnni": summary}, picture)


def test_machine_and_ceilings():
    text = page(summarize(small_matrix()))
    machine = table(text, "|  ")
    assert machine["CPU"] == ["Abacus 9, 2 cores; L1 48 KB, L2 1 MB"]
    assert machine["engines"] == ["onnx 1, onnxruntime 2, torch 2.13.0"]
    assert machine["measured"] == ["2026-01-01 to 2026-01-02"]
    ceilings = table(text, "ceiling ")
    assert ceilings["int8 dot, GMAC/s"] == ["500", "1,000"]
    assert ceilings["read from memory, GB/s"] == ["40", "80"]


def test_ratios_and_verdict():
    text = page(summarize(small_matrix()))
    assert "all 16 cells: **1.41 times" in text  # 12 cells at 2, 4 at 1/2
    assert "(2.00 over the 8 cells whose width a peer offers)" in text
    assert "Cells below 1.0: 4." in text
    ratios = table(text, "times faster, 1 thread")
    assert ratios["w8a8"] == ["2.00 (2.00)", "2.00 (2.00)"]
    assert ratios["w1a8 \\*"] == ["2.00 (2.00)", "0.50 (0.50)"]


def test_cells_that_fall_short_are_named(monkeypatch):
    summary = summarize(small_matrix())
    text = page(summary)
    assert text.count("| 0.50 (0.45-0.55)") == 4
    assert "torch int8 *" in text
    monkeypatch.setattr(parts, "MOST_BEHIND", 1)
    assert "And 3 more." in page(summary)


def test_all_engines_stand_in_the_table():
    text = page(summarize(small_matrix()))
    engines = table(text.split("## All engines")[1], "M = 1 ")
    assert list(engines) == ["w8a8", "w1a8", "torch float32", "torch int8"]


def test_missing_and_failed_are_named():
    lines = [*small_matrix(), line([row("w8a8", 1.0)], m=4, failed={"ggml q8_0": "no"})]
    text = page(summarize(lines))
    assert "- missing: ggml (not there)" in text
    assert "- failed in 1 of 9 cases: ggml q8_0 (no)" in text


def test_the_command_measures_the_same_again():
    text = page(summarize(small_matrix()))
    command = text.split("```sh")[1].replace("\\\n", "")
    assert "--shapes 1024x1024,768x3072" in command
    assert re.search(r"--m 1,128\s", command)
    assert "--threads 1,2" in command
    assert "--formats w8a8,w1a8" in command


def test_picture_and_targets():
    summary = summarize(small_matrix())
    assert "![Roofline](roofline.png)" in page(summary, "roofline.png")
    assert "![" not in page(summary)
    targets = table(page(summary), "regime")
    assert "2 threads over 1, M >= 128" in targets


def test_a_matrix_without_peers():
    text = page(summarize([line([row("w8a8", 1.0, own=True)], threads=2)]))
    assert "No peer was measured." in text
    assert "2 threads" in text.split("## All engines")[1]


def test_ragged_shapes_stand_in_the_targets_alone():
    rows = [row("w8a8", 1.25, own=True), row("w8a8 padded", 1.0)]
    text = page(summarize([*small_matrix(), line(rows, shape="1000x777", m=1)]))
    assert table(text, "regime")["ragged shapes: time of the padded shape over theirs"] == [
        "1",
        ">= 70 %",
        "w8a8 80 %",
    ]
    assert "padded |" not in text
    command = text.split("```sh")[1]
    assert "--ragged" in command
    assert "1000x777" not in command


def test_other_instruction_sets_follow():
    held = summarize([line([row("w8a8", 1.0, own=True)], isa="avx2")])
    text = whole_page({"avx512vnni": summarize(small_matrix()), "avx2": held})
    assert "## On avx2" in text
    assert "w8a8" in table(text.split("## On avx2")[1], "of the ceiling")
