"""lowbit.benchmark.networks: sides, ratios, cases. No timing asserted."""

import pytest
import torch
from torch import nn

from lowbit import _core
from lowbit.benchmark.networks import NETWORKS, Network, NetworkCase, cases, race


def test_every_size_and_number_of_threads():
    found = cases(threads=(1, 2), seconds=1.0)
    assert len(found) == len(set(found)) == 8
    assert [str(case) for case in found[:3]] == [
        "efficientnet-lite0 1 images T=1",
        "efficientnet-lite0 8 images T=1",
        "minilm-l6 16 tokens T=1",
    ]
    assert not found[0].beside(found[1])  # a process each
    assert all(case.cost > 1 for case in found)
    assert NetworkCase(**found[0].options(found[:1])) == found[0]


def test_images_race_in_both_layouts(small_network):
    threads, isa = torch.get_num_threads(), _core.isa()
    case = NetworkCase(small_network, 2, 1, ("w8a8", "w4a8"), "scalar", 0.01)
    result = race(case)
    assert (torch.get_num_threads(), _core.isa()) == (threads, isa)
    assert list(result.timings) == [
        "torch float32",
        "torch float32 channels_last",
        "torch int8 channels_last",
        "w8a8",
        "w8a8 channels_last",
        "w4a8",
        "w4a8 channels_last",
    ]
    assert result.errors["torch float32"] == 0
    assert 0 < result.errors["w8a8"] < 0.05
    assert result.errors["w8a8"] == result.errors["w8a8 channels_last"]  # the same bits
    assert result.int8.startswith("static")
    data = result.to_dict()
    assert data["environment"]["isa"]["chosen"] == "scalar"
    rows = {row["name"]: row for row in data["rows"]}
    versus = rows["w8a8"]["versus"]
    assert set(versus) == set(rows) - {"w8a8"}
    assert versus["w4a8"]["rounds"] == rows["w4a8"]["timing"]["rounds"] >= 10


def test_texts_race_in_one_layout(monkeypatch):
    def load():
        return nn.Sequential(nn.Embedding(30522, 16), nn.Linear(16, 8)).eval()

    def tokens(count):
        return torch.arange(count)[None]

    network = Network(load, tokens, "tokens", (4,), "torch int8", 1.2)
    monkeypatch.setitem(NETWORKS, "small", network)
    result = race(NetworkCase("small", 4, 1, ("w8a8",), None, 0.01))
    assert list(result.timings) == ["torch float32", "torch int8", "w8a8"]
    assert result.int8.startswith("dynamic")


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs(name):
    network = NETWORKS[name]
    x = network.input(3)
    shape = {"images": (3, 3, 224, 224), "tokens": (1, 3)}[network.unit]
    assert tuple((x if network.unit == "images" else x["input_ids"]).shape) == shape


def test_a_network_without_its_package_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        race(NetworkCase("efficientnet-lite0", 1, 1))
