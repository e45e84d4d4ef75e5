"""The page: valid, self-contained, escaped, complete."""

import dataclasses
import html
import json
import re
from itertools import pairwise

import html5lib
import pytest
import torch
from torch import nn

from lowbit.compare import compare
from lowbit.comparison import Row
from lowbit.html import page as page_module
from lowbit.html.page import page

EVIL = "<script>alert('x')</script>"
SVG = "{http://www.w3.org/2000/svg}svg"


def parsed(text):
    """The document, read by a parser that takes no error."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def words(element):
    return " ".join("".join(element.itertext()).split())


@pytest.fixture(scope="module")
def text(comparison):
    return page(comparison, command=f"lowbit report '{EVIL}'", inputs="a & b <file>")


@pytest.fixture(scope="module")
def document(text):
    return parsed(text)


def section(document, name):
    (found,) = [s for s in document.iter("section") if s.get("id") == name]
    return found


def test_everything_is_inside(text, document):
    policy = [m for m in document.iter("meta") if m.get("http-equiv")]
    assert policy[0].get("content").startswith("default-src 'none'; img-src data:;")
    assert not list(document.iter("script"))
    for element in document.iter():
        for attribute in ("src", "href", "action", "data", "srcset"):
            value = element.get(attribute) if isinstance(element.tag, str) else None
            assert value is None or value.startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in getattr(element, "attrib", {}))
    assert not re.search(r"url\(|@import", text)


def test_names_and_arguments_are_harmless(text, document):
    assert "<script" not in text
    assert "alert" in text  # it is there, as text
    tables = section(document, "layers")
    assert any(EVIL in words(th) for th in tables.iter("th"))
    assert EVIL in words(section(document, "reproduce"))
    assert "a & b <file>" in words(document)
    assert any(words(h) == "w4a8 & <b>" for h in document.iter("h3"))
    assert not list(document.iter("b"))


def test_ids_are_unique_and_links_lead_somewhere(document):
    ids = [e.get("id") for e in document.iter() if isinstance(e.tag, str) and e.get("id")]
    assert len(ids) == len(set(ids))
    for link in document.iter("a"):
        assert link.get("href")[1:] in ids


def test_headings_are_in_order(document):
    levels = [int(e.tag[1]) for e in document.iter() if re.fullmatch(r"h[1-6]", str(e.tag))]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_pictures_tables_and_regions_have_names(document):
    pictures = list(document.iter(SVG))
    assert len(pictures) > 10
    for svg in pictures:
        assert svg.get("role") == "img"
        assert len(svg.get("aria-label")) > 10
    for image in document.iter("img"):
        assert image.get("alt")
        assert image.get("width")
    for table in document.iter("table"):
        assert words(next(table.iter("caption")))
        assert all(th.get("scope") in ("col", "row") for th in table.iter("th"))
    for element in document.iter("section"):
        assert element.get("aria-labelledby")
    assert document.get("lang") == "en"


def test_figures_are_those_of_the_comparison(comparison, document):
    body = words(section(document, "picture"))
    for row in comparison.rows:
        assert f"{row.timing.p50 * 1e3:.3f}" in body
    row = comparison["w8a8"]
    assert f"{row.quality.sqnr_db:.1f}" in body
    assert f"{row.speedup.median:.2f}" in words(section(document, "short"))
    for name, layers in comparison.details.layers.items():
        (table,) = [
            t
            for t in section(document, "layers").iter("table")
            if words(t).find(f"of {name}, dB") > 0
        ]
        cells = [[words(td) for td in tr.iter("td")] for tr in table.iter("tr")][1:]
        for row_cells, layer in zip(cells, layers, strict=True):
            figures = (layer.weight_db, layer.alone_db, layer.network_db)
            assert row_cells == [f"{value:.1f}".replace("-", "\N{MINUS SIGN}") for value in figures]


def test_the_account_tells_what_stayed_float_and_why(comparison, document):
    account = section(document, "account")
    first, second = (words(e) for e in account.iter("summary"))
    assert first.startswith("w8a8 3 converted, 1 kept float, 1 batch norms folded")
    assert second.startswith("w4a8 & <b> 4 converted, 0 kept float")
    (item,) = account.iter("li")
    (kept,) = comparison.details.reports["w8a8"].kept
    assert kept.note
    assert words(item).startswith("depthwise (Conv2d, 32")
    assert words(item).endswith(kept.note)


def test_histograms_for_every_layer_and_candidate(comparison, document):
    found = section(document, "histograms")
    labels = [svg.get("aria-label") for svg in found.iter(SVG)]
    pairs = sum(len(layers) for layers in comparison.details.layers.values())
    assert len(labels) == 2 * pairs
    assert sum(label.startswith("Weights of ") for label in labels) == pairs


def test_pictures_show_the_guesses(comparison, document):
    seen = section(document, "pictures")
    assert len(list(seen.iter("img"))) == len(comparison.details.samples) == 4
    labels = {guess.label for s in comparison.details.samples for guess in s.guesses["float32"]}
    assert all(label in words(seen) for label in labels)
    assert not list(seen.iter("i"))  # one of the labels looks like it


def test_how_to_do_it_again(comparison, document):
    text = words(section(document, "reproduce"))
    assert f"lowbit=={comparison.details.environment['versions']['lowbit']}" in text
    assert "torch==" + comparison.torch_version.partition("+")[0] in text
    assert comparison.isa in text
    without_command = words(section(parsed(page(comparison)), "reproduce"))
    assert "details=True" in without_command
    assert "budget_seconds = 0.05" in without_command


def test_a_comparison_without_details_has_a_page(comparison, tmp_path):
    bare = dataclasses.replace(comparison, details=None)
    path = tmp_path / "bare.html"
    bare.save_html(path)
    document = parsed(path.read_text(encoding="utf-8"))
    ids = {s.get("id") for s in document.iter("section")}
    assert ids == {"short", "picture", "latency", "reproduce"}
    assert "details=True" in words(section(document, "reproduce"))


def test_what_could_not_be_taken_is_said(comparison):
    details = dataclasses.replace(
        comparison.details, layers={}, samples=(), reports={}, missing=("pictures: <no>",)
    )
    document = parsed(page(dataclasses.replace(comparison, details=details)))
    assert "Not taken: pictures: <no>" in words(section(document, "reproduce"))
    assert "No layer was measured." in words(section(document, "layers"))


def test_torch_int8_that_does_not_run_and_figures_that_are_not_finite():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    broken = nn.Sequential(nn.Linear(64, 8))
    broken[0].bias.data.fill_(float("nan"))
    found = compare(model, {"same": model, "broken": broken}, torch.randn(2, 64), budget_seconds=0)
    absent = Row("torch int8", "torch", notes=("no engine <here>",))
    rows = (found.rows[0], absent, *found.rows[2:])
    document = parsed(page(dataclasses.replace(found, rows=rows)))
    short = words(section(document, "short"))
    assert "no engine <here>" in short
    assert "\N{INFINITY} dB" in short
    assert "NaN dB" in short
    caption = words(next(section(document, "picture").iter("figcaption")))
    assert "Without a place: torch int8, same, broken." in caption


def test_many_layers_are_bounded(comparison, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_HISTOGRAMS", 4)
    monkeypatch.setattr(page_module, "MOST_ROWS", 2)
    document = parsed(page(comparison))
    figures = section(document, "histograms")
    assert len(list(figures.iter("details"))) == 2
    assert "more have no histogram here" in words(figures)
    assert "more layers" in words(section(document, "layers"))
    loudest = min(
        (layer for layers in comparison.details.layers.values() for layer in layers),
        key=lambda layer: layer.network_db,
    )
    assert loudest.name in [words(h) for h in figures.iter("h3")]


def test_layers_of_a_static_network_are_measured_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    found = compare(
        model,
        ["w8a8-static"],
        torch.randn(4, 64),
        calibration="inputs",
        budget_seconds=0,
        torch_int8=False,
        details=True,
    )
    layers = found.details.layers["w8a8-static"]
    assert [layer.network_db for layer in layers] == [None, None]
    assert all(layer.alone_db > 25 and layer.weight_db > 30 for layer in layers)
    table = next(section(parsed(page(found)), "layers").iter("tbody"))
    assert words(table).count("\N{EN DASH}") == 2
    overview = next(section(parsed(page(found)), "layers").iter(SVG))
    assert "alone" in overview.get("aria-label")


def test_names_break_behind_dots_and_underscores():
    broken = page_module._breakable("_blocks.0._project_conv<&")
    assert broken == "_blocks.<wbr>0.<wbr>_project_<wbr>conv&lt;&amp;"
    assert html.unescape(broken.replace("<wbr>", "")) == "_blocks.0._project_conv<&"


def test_a_file_that_cannot_be_written(comparison, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        comparison.save_html(tmp_path / "nowhere" / "x.html")


def test_json_has_the_errors_of_the_layers(comparison):
    data = json.loads(comparison.to_json())["details"]
    layer = data["layers"]["w8a8"][0]
    assert set(layer) == {"name", "scheme", "weight_db", "alone_db", "network_db"}
    assert data["reports"]["w8a8"]["kept"] == 1
    assert "details" not in json.loads(dataclasses.replace(comparison, details=None).to_json())
