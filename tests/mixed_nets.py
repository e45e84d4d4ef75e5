"""Small models for the choice of schemes, and what they run on."""

import torch
from torch import nn


class Net(nn.Module):
    """Convolutions with a norm and activations, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.Hardswish()
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.relu(self.body(x)).mean((2, 3))
        return self.head(torch.relu(self.fc(x)))


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2.0)
        model.head.weight.mul_(8.0)
    return model.eval()


def batches(count=2, rows=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, 10, 10, generator=generator) for _ in range(count)]


LAYERS = ("stem", "body", "fc", "head")
