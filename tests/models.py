"""Small models that are converted, written and read, and what tests ask of models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import lowbit


class Net(nn.Module):
    """A stem, a body and a head, with norms between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=g) for g in (1, 2, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.fc(x.mean((2, 3)))


class RaggedNet(nn.Module):
    """Plain and grouped convolutions, a norm, and linear layers of ragged sizes."""

    def __init__(self, width=24, classes=5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.fc = nn.Linear(width, 50)
        self.head = nn.Linear(50, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.depthwise(self.grouped(x)))
        return self.head(self.fc(x.mean((2, 3))))


def trained(net):
    """Statistics as after training, so that buffers matter."""
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    net.norm.num_batches_tracked += 7
    return net.eval()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def row(model, name):
    (found,) = [row for row in lowbit.summary(model).rows if row.name == name]
    return found


def relative_error(y, reference):
    return float((y - reference).detach().norm() / reference.detach().norm())


def schemes(model):
    return {r.name: r.scheme for r in lowbit.summary(model).rows}


def assert_same_tensors(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def output_on_one_thread(model, x):
    """The output as an array: for other processes, which can import this file by its name."""
    torch.set_num_threads(1)
    return model(x).numpy()
