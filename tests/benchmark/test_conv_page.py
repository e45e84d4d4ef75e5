"""lowbit.benchmark.conv_page: the page says what the matrix and the networks hold."""

from matrix_lines import CONV, conv_rows, line, small_conv_matrix, table

from lowbit.benchmark.conv_page import conv_page
from lowbit.benchmark.summary import summarize


def network_line(ratio=1.75, reference="torch float32 channels_last"):
    spread = {"median": ratio, "p10": 0.9 * ratio, "p90": 1.1 * ratio}
    rows = [
        {
            "name": "w8a8 channels_last",
            "timing": {"p50_seconds": 4e-3},
            "relative_error": 0.05,
            "versus": {reference: spread, "torch int8 channels_last": spread},
        },
        {"name": "torch int8 channels_last", "relative_error": 0.09},
    ]
    case = {"network": "efficientnet-lite0", "size": 8, "threads": 2, "formats": ["w8a8"]}
    environment = {"isa": {"chosen": "avx512vnni"}}
    result = {"rows": rows, "int8": "static, onednn", "environment": environment}
    return {"case": case, "result": result}


def page(lines=None, networks=(), picture=None):
    return conv_page({"avx512vnni": summarize(lines or small_conv_matrix())}, networks, picture)


def test_ratios_by_kind():
    text = page()
    ratios = table(text, "times faster, batch 8, 2 threads")
    assert list(ratios) == [
        "w8a8",
        "w8a8 channels_last",
        "w4a8 \\*",
        "w4a8 channels_last \\*",
        "w1a1 \\*",
        "w1a1 channels_last \\*",
    ]
    assert ratios["w8a8"] == ["2.00 (2.00)"] * len(CONV)
    assert "all 72 cells: **2.00 times" in text


def test_each_layer_has_a_row():
    found = table(page(), "batch 1, 1 thread ")
    assert list(found) == ["64x64k3@14", "128x128k3@7", "32x32k3g32@14"]  # by kind
    assert found["64x64k3@14"] == [
        "dense 3x3",
        "1,000",
        "7.23",
        "100 %",
        "2.00 (1.80-2.20)",
        "4.00",
        "1.20",
        "1.04",
        "",
        "",
        "4.00",
    ]


def test_targets_tell_median_worst_and_count():
    targets = table(page(), "regime")
    assert targets["dense 3x3 and 1x1: times torch INT8"][1:] == [
        ">= 1.00",
        "w8a8 2.00 (worst 2.00; 2 of 2)",
    ]
    assert "**w8a8 1.20 (worst 1.20; 0 of 6)**" in targets["NCHW: time over channels_last"][2]


def test_networks_and_their_targets():
    text = page(networks=[network_line(), network_line(1.25)])
    rows = [row for row in text.splitlines() if row.startswith("| efficientnet-lite0, w8a8")]
    assert "1.75 (1.57-1.93)" in rows[0]
    assert "1.5 x float32 channels_last: reached" in rows[0]
    assert "**not reached**" in rows[1]
    assert "python bench/networks.py" in text
    assert "Whole networks" not in page()


def test_what_torch_is_held_to_has_its_own_targets():
    held = [line(conv_rows(0.5), shape="64x64k3@14", op="conv", isa="avx2")]
    found = {"avx512vnni": summarize(small_conv_matrix()), "avx2": summarize(held)}
    text = conv_page(found)
    section = text.split("## Held to avx2")[1].split("\n## ")[0]
    assert "**w8a8 0.50 (worst 0.50; 0 of 1)**" in section
    assert "--out conv_avx2.jsonl" in text
    assert "--isa avx2" in text
    assert "conv.jsonl conv_avx2.jsonl --out bench/RESULTS_CONV.md" in text


def test_what_falls_short_and_what_is_missing():
    lines = [line(conv_rows(0.5), shape="64x64k3@14", op="conv", failed={"openvino int8": "no"})]
    text = page(lines)
    assert text.count("| 0.50 (0.45-0.55)") >= 6
    assert "- failed in 1 of 1 cases: openvino int8 (no)" in text
    assert "- missing: ggml (not there)" in text


def test_bare_operators_stand_among_the_engines():
    engines = page().split("## All engines")[1]
    assert "torch codes x86 channels_last" in table(engines, "batch 1, 1 thread")
    assert "batch 1, 2 threads" not in engines


def test_a_picture():
    assert "![Rates of all layers](conv.png)" in page(picture="conv.png")
    assert "![" not in page()
