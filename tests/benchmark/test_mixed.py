"""The page of mixed against uniform schemes."""

import torch

from lowbit.benchmark.mixed import Line, _limits, page
from lowbit.quality import measure


def _quality(noise):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(40, 10, generator=generator)
    return measure(reference, reference + noise * torch.randn(40, 10, generator=generator))


LINES = [
    Line("w8a8", 4000, _quality(0.01), False, {}),
    Line("w4a8", 2200, _quality(2.0), False, {}),
    Line("half of w8a8", 1990, _quality(0.01), True, {"w4a8": 3, "w8a8": 1}),
    Line("as w4a8", 2190, _quality(0.005), True, {"w8a8": 4}),
]


def test_page():
    text = page(LINES, "python bench/search.py")
    rows = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row != "scheme"] == [
        "half of w8a8",
        "as w4a8",
        "w4a8",
        "w8a8",
    ]
    share = LINES[2].quality.top1_agreement
    assert share >= 0.93
    assert f"reached, {100 * share:.1f} % with 1,990 bytes" in text
    assert "not reached" not in text
    uniform, mixed = (100 * LINES[i].quality.top1_agreement for i in (1, 3))
    found = text.split("uniform -> mixed: ")[1]
    assert found.startswith(f"w4a8 {uniform:.1f} -> {mixed:.1f} % (KL ")
    assert "w8a8" not in found.split("\n")[0]
    assert "Written by `python bench/search.py`" in text


def test_what_is_searched_for():
    lines = [
        Line(name, size, LINES[0].quality, False, {})
        for name, size in (("w8a8", 4001), ("w4a8", 2200), ("w4a8-g32", 2400), ("w2a8", 1100))
    ]
    assert _limits(lines) == {2000: "half of w8a8", 2200: "as w4a8", 2400: "as w4a8-g32"}


def test_a_target_that_is_missed():
    lines = [*LINES[:2], Line("half of w8a8", 1990, _quality(3.0), True, {}), LINES[3]]
    assert "not reached" in page(lines, "x")
