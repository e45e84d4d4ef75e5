"""The page of mixed against uniform schemes."""

import torch

from lowbit.benchmark.mixed import Line, page
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
    assert "w4a8 " in text.split("uniform -> mixed: ")[1]
    assert "Written by `python bench/search.py`" in text


def test_a_target_that_is_missed():
    lines = [*LINES[:2], Line("half of w8a8", 1990, _quality(3.0), True, {}), LINES[3]]
    assert "not reached" in page(lines, "x")
