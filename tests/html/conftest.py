"""Comparisons with details, of small models that are quick to compare."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.compare import compare

EVIL = "<script>alert('x')</script>"


class Pictured(nn.Module):
    """Classifies pictures; one of its layers stays float, and has an evil name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.add_module(EVIL.replace(".", ""), nn.Linear(32, 32))
        self.head = nn.Linear(32, 7)

    def forward(self, x):
        x = self.depthwise(self.relu(self.norm(self.stem(x)))).mean((2, 3))
        return self.head(self._modules[EVIL](x))


class Restorer(nn.Module):
    """Makes pictures of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def pictured_comparison():
    torch.manual_seed(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = Pictured().eval()
        x = torch.rand(4, 3, 16, 16)
        candidates = {
            "w8a8": lowbit.quantize(model, "w8a8", overrides={"depthwise": None}),
            "w4a8 & <b>": lowbit.quantize(model, "w4a8"),
        }
        return compare(
            model,
            candidates,
            [x[:1], x[1:]],
            budget_seconds=0.05,
            torch_int8=False,
            details=True,
            labels=[f"<i>{name}</i>" for name in "abcdefg"],
        )
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def comparison():
    return pictured_comparison()


@pytest.fixture
def restorer():
    torch.manual_seed(4)
    return Restorer().eval()
