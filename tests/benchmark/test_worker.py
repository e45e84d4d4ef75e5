"""lowbit.benchmark.worker: what it prints."""

import json

import pytest

from lowbit.benchmark import ceilings, worker
from lowbit.benchmark.networks import NETWORKS, NetworkCase


def test_the_worker_prints_lines_and_nothing_else(capfd, monkeypatch):
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    given = {
        "shapes": ["32x16"],
        "m": [1, 2],
        "formats": ["w8a8"],
        "peers": [],
        "budget_seconds": 0.01,
        "probe_seconds": 0.003,
        "rotate_bytes": 0,
    }
    worker.main([json.dumps(given)])
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [result["groups"][0]["m"] for result in found] == [1, 2]


def test_options_with_a_network_race_it(capfd, monkeypatch, small_network):
    case = NetworkCase(small_network, 2, 1, ("w8a8",), None, 0.01)
    worker.main([json.dumps(case.options([case]))])
    (line,) = capfd.readouterr().out.splitlines()
    names = [row["name"] for row in json.loads(line)["rows"]]
    assert names[:2] == ["torch float32", "torch float32 channels_last"]
    assert small_network in NETWORKS


def test_an_isa_is_held_by_torch_too(capfd, monkeypatch):
    held = []
    monkeypatch.setattr(worker, "hold", held.append)
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    given = {"shapes": ["32x16"], "m": [1], "formats": [], "peers": [], "isa": "scalar"}
    worker.main([json.dumps(given | {"budget_seconds": 0.01, "probe_seconds": 0.003})])
    assert held == ["scalar"]
    with pytest.raises(ValueError, match="not usable"):
        worker.main([json.dumps(given | {"isa": "none"})])
