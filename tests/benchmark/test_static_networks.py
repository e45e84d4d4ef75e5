"""lowbit.benchmark.static_networks, openvino_network: sides and profiles. No timing asserted."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lowbit
from lowbit.benchmark import openvino_network, static_networks
from lowbit.benchmark.static_networks import (
    DYNAMIC,
    FLOAT32,
    INT8,
    MODELS,
    OPENVINO,
    STATIC,
    Model,
    ResNet,
    StaticCase,
    cases,
    profile,
    race,
)
from lowbit.benchmark.worker import main
from lowbit.fuse import fuse


def _images():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(3)]
    return batches[:1], batches[1:]


def small():
    torch.manual_seed(0)
    return fuse(ResNet((8, 16), 10).eval())


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Model(small, _images, 1.0))
    monkeypatch.setattr(static_networks, "PROFILE_ROUNDS", 2)


def test_every_side_runs_and_agrees(tiny):
    before = torch.get_num_threads()
    found = race(StaticCase("tiny", 1, 1, seconds=0.0))
    assert torch.get_num_threads() == before
    wanted = {FLOAT32, DYNAMIC, STATIC, INT8}
    if openvino_network.available():
        wanted.add(OPENVINO)
    assert set(found.timings) == wanted == set(found.qualities)
    for name, quality in found.qualities.items():
        assert quality["sqnr_db"] is None or quality["sqnr_db"] > 15, name
    operations = [operation for _, operation, _ in found.steps]
    assert operations[0] == "quantize"
    assert operations.count("conv") == 11
    assert all(seconds >= 0 for *_, seconds in found.steps)
    line = json.loads(json.dumps(found.to_dict()))
    assert {row["name"] for row in line["rows"]} == wanted


def test_larger_batches_are_not_profiled(tiny):
    found = race(StaticCase("tiny", 2, 1, seconds=0.0))
    assert not found.steps
    assert not found.layers
    assert not found.qualities


def test_cases_and_their_processes(tiny, capfd):
    found = cases(["tiny"], seconds=0.0)
    assert [(case.batch, case.threads) for case in found] == [(1, 1), (8, 1), (1, 2), (8, 2)]
    assert found[0].beside(found[0])
    assert not found[0].beside(found[1])
    assert "tiny" in str(found[0])
    assert found[0].cost > 0
    main([json.dumps(found[0].options(found[:1]))])


def test_the_network_of_eighteen_layers():
    model = ResNet().eval()
    assert sum(p.numel() for p in model.parameters()) == 11_689_512  # as published
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.skipif(not openvino_network.available(), reason="OpenVINO is not installed")
def test_what_openvino_computes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 2)
            self.pad = nn.ZeroPad2d((0, 1, 0, 1))
            self.deep = nn.Conv2d(8, 8, 3, groups=8, bias=False)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            x = nn.functional.hardswish(self.stem(self.pad(x)))
            x = nn.functional.relu6(x + nn.functional.max_pool2d(x, 3, 1, 1))
            return self.fc(self.deep(x).relu().mean((2, 3)))

    images = torch.randn(4, 3, 20, 20)
    prepared = lowbit.prepare(Net().eval(), "w8a8-static", images)
    lowbit.calibrate(prepared, [images])
    peer = openvino_network.compile_network(prepared, (1, 3, 20, 20), 1)
    wanted = prepared(images)
    error = (peer.each(images) - wanted).norm() / wanted.norm()
    assert error < 0.05
    assert peer.profile(images[:1], 2)


@pytest.mark.skipif(not openvino_network.available(), reason="OpenVINO is not installed")
def test_what_openvino_is_not_told():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(2, 3, 8, 8)
    prepared = lowbit.prepare(model, "w8a8-static", images)
    lowbit.calibrate(prepared, [images])
    with pytest.raises(ValueError, match="silu"):
        openvino_network.build(prepared, (1, 3, 8, 8))


def test_profiles_have_every_step():
    model = small()
    images = torch.randn(2, 3, 32, 32)
    network = lowbit.convert(
        lowbit.calibrate(lowbit.prepare(model, "w8a8-static", images), [images])
    )
    steps = profile(network, images)
    assert steps[0][:2] == ("x", "quantize")
    assert ("fc", "conv") in [step[:2] for step in steps]
