"""The page of mixed against uniform schemes."""

import dataclasses

import pytest
import torch
from mixed_nets import LAYERS, batches, net

import lowbit.benchmark.mixed
from lowbit.baselines import weight_bytes
from lowbit.benchmark.mixed import Line, Options, run, searched_for
from lowbit.benchmark.mixed_networks import NETWORKS, Data
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


def test_schemes_of_one_size_share_a_search():
    twin = dataclasses.replace(LINES[1], name="w4a16")
    lines = [*LINES[:2], twin, dataclasses.replace(twin, name="w2a8", bytes=1500)]
    assert searched_for(lines) == {2050: "half of w8a8", 2200: "as w4a8"}
    text = page({"efficientnet": [*lines, *LINES[2:]]}, "x").split("uniform -> mixed: ")[1]
    assert text.startswith("w4a8 KL")
    assert "; w4a16 KL" in text
    assert "w2a8" not in text.split("\n")[0]


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


def test_a_small_network(tmp_path, monkeypatch):
    data = Data(batches(2, seed=3), batches(6, rows=4, seed=4), batches(4, seed=5))
    schemes = (("w8a8", "w4a8-gptq", "w2a8-gptq"), ("w8a8", "w4a8", "w2a8"))
    small = dataclasses.replace(
        NETWORK,
        load=net,
        data=lambda: data,
        schemes=schemes,
        uniform=schemes,
        target=None,
    )
    monkeypatch.setitem(NETWORKS, "small", small)
    options = Options("small", learned=True)
    lines = run(options, tmp_path / "new", lambda *_: None)
    assert [line.name for line in lines] == [
        *schemes[0],
        "half of w8a8",
        "as w4a8-gptq",
    ]
    uniform, mixed = lines[:3], {line.name: line for line in lines[3:]}
    for line in uniform:
        copy = lowbit.quantize(
            net(), line.name, **({} if line.name == "w8a8" else {"calibration": data.learn})
        )
        assert line.bytes == weight_bytes(copy)
        with torch.inference_mode():
            sides = [torch.cat([m(x) for x in data.tests]) for m in (net(), copy)]
        assert line.figures == small.figures(*sides)
        assert line.bytes - line.layer_bytes == lines[0].bytes - lines[0].layer_bytes
    assert mixed["as w4a8-gptq"].bytes <= uniform[1].bytes
    assert mixed["half of w8a8"].layer_bytes <= uniform[0].layer_bytes / 2
    assert sum(mixed["half of w8a8"].layers.values()) == len(LAYERS)
    monkeypatch.setattr(lowbit.benchmark.mixed, "search_many", None)
    assert run(options, tmp_path / "new", lambda *_: None) == lines, "all of it was on record"
    assert "as w4a8-gptq" in page({"small": lines}, "x")
