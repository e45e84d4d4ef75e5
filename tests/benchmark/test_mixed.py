"""The page of mixed against uniform schemes."""

import pytest
import torch

from lowbit.benchmark.mixed import Line, Options, searched_for
from lowbit.benchmark.mixed_networks import NETWORKS
from lowbit.benchmark.mixed_page import page
from lowbit.mixed.layers import parse_schemes

NETWORK = NETWORKS["efficientnet"]


def _figures(noise):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(40, 10, generator=generator)
    return NETWORK.figures(reference, reference + noise * torch.randn(40, 10, generator=generator))


LINES = [
    Line("w8a8", 4000, 3900, _figures(0.01), False, {}, 1.0),
    Line("w4a8", 2200, 2100, _figures(2.0), False, {}, 2.0),
    Line("half of w8a8", 1990, 1890, _figures(0.01), True, {"w4a8": 3, "w8a8": 1}, 30.0),
    Line("as w4a8", 2190, 2090, _figures(0.005), True, {"w8a8": 4}, 20.0),
]


def test_page():
    text = page({"efficientnet": LINES}, "python bench/search.py")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    assert [row[2].strip() for row in rows[1:]] == ["half of w8a8", "as w4a8", "w4a8", "w8a8"]
    assert rows[1][3].strip() == "1,990"
    assert rows[1][-2].strip() == "3 w4a8, 1 w8a8"
    share = LINES[2].figures["top-1 agreement, %"]
    assert share >= 93
    assert f"93.0: reached, {share:.1f} with 1,990 bytes" in text
    assert "not reached" not in text
    uniform, mixed = (LINES[i].figures["KL, nats"] for i in (1, 3))
    found = text.split("uniform -> mixed: ")[1]
    assert found.startswith(f"w4a8 KL, nats {uniform:.3g} -> {mixed:.3g}, top-1")
    assert "w8a8" not in found.split("\n")[0]
    assert "Written by `python bench/search.py`" in text
    assert text.count("\n## ") == 1


def test_what_is_searched_for():
    lines = [
        Line(name, size, size - 1000, LINES[0].figures, False, {}, 0.0)
        for name, size in (("w8a8", 5001), ("w4a8", 3200), ("w4a8-g32", 3400), ("w2a8", 2100))
    ]
    # Of the layers; the other 1000 bytes are in every one.
    assert searched_for(lines) == {
        3000: "half of w8a8",
        3200: "as w4a8",
        3400: "as w4a8-g32",
    }


def test_a_target_that_is_missed():
    half = Line("half of w8a8", 1990, 1890, _figures(3.0), True, {}, 0.0)
    assert "not reached" in page({"efficientnet": [*LINES[:2], half, LINES[3]]}, "x")


@pytest.mark.parametrize("name", NETWORKS)
def test_schemes_of_the_networks(name):
    for learned in (True, False):
        options = Options(name, learned)
        choices, uniform = map(parse_schemes, (options.choices, options.uniforms))
        assert any(s.learns for s in choices.values()) == learned
        assert any(s.learns for s in uniform.values()) == learned
    assert list(parse_schemes(Options(name, schemes=("w4a8",)).choices)) == ["w4a8"]
