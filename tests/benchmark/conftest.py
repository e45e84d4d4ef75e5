"""A network small enough for tests, under the name that its fixture returns."""

import pytest
import torch
from torch import nn

from lowbit.benchmark.networks import NETWORKS, Network


def images(count):
    return torch.randn(count, 3, 8, 8)


def load():
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    return nn.Sequential(*layers).eval()


@pytest.fixture
def small_network(monkeypatch):
    network = Network(load, images, "images", (1, 2), "torch float32 channels_last", 1.5)
    monkeypatch.setitem(NETWORKS, "small", network)
    return "small"
