"""Blocks that learn their rounding: the soft layer is the lowbit layer, and errors fall."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.rounding.blocks import SoftLayer, find_blocks

LAYERS = [
    (nn.Conv2d(24, 8, 3, padding=1), (2, 24, 6, 6)),
    (nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False), (2, 6, 7, 7)),
    (nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular"), (2, 6, 7, 7)),
    (nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 9)),
    (nn.Linear(40, 5), (2, 3, 40)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("scheme", ["w4a8", "w2a8-g32-hqq", "wta8", "w1a8", "w4a1"])
def test_the_soft_layer_computes_what_the_lowbit_layer_does(module, shape, scheme):
    layer = lowbit.quantize(module, scheme)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    soft = SoftLayer(layer)
    wanted = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(soft.forward(x), wanted, rtol=1e-3, atol=1e-3)
    codes = layer.quantized_weight().codes
    soft.store()
    assert torch.equal(layer.quantized_weight().codes, codes)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=lambda value: str(value)[:20])
def test_what_was_learned_is_stored(module, shape):
    layer = lowbit.quantize(module, "w2a8-g32-hqq")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    soft = SoftLayer(layer)
    before = layer(x)
    with torch.no_grad():
        soft.forward(x)
        for parameter in soft.parameters.values():
            parameter += 0.8 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
        wanted = soft.forward(x)
    soft.store()
    torch.testing.assert_close(layer(x), wanted, rtol=5e-3, atol=5e-3 * float(wanted.abs().max()))
    assert (before - wanted).abs().max() > 0.1


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one = nn.Linear(width, 2 * width)
        self.act = nn.ReLU()
        self.two = nn.Linear(2 * width, width)

    def forward(self, x, scale=1.0):
        return x + scale * self.two(self.act(self.one(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


def test_blocks_are_what_containers_list():
    model = Net()
    assert find_blocks(model) == list(model.blocks)
    nested = nn.Sequential(nn.Sequential(Block(4), nn.ReLU()), nn.Linear(4, 4))
    assert find_blocks(nested) == [nested[0][0], nested[0][1], nested[1]]
    assert find_blocks(Block(4)) == []


def data(seed, count=8):
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(9))
    return [torch.randn(32, 16, generator=random) @ mix for _ in range(count)]


def test_learning_brings_the_outputs_nearer():
    model, head = Net(), {"head": None}
    once, learned, again = (
        lowbit.quantize(
            model, "w2a8", overrides=head, calibration=data(0), block_steps=steps, correct_bias=True
        )
        for steps in (0, 200, 200)
    )
    x = torch.cat(data(1))
    with torch.no_grad():
        errors = [float((model(x) - side(x)).square().mean()) for side in (once, learned)]
    assert errors[1] < 0.8 * errors[0]
    for key, value in learned.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    note = next(r.note for r in lowbit.summary(learned).rows if r.name == "blocks.0.one")
    assert "learned with its block: error" in note


def test_what_is_no_better_is_thrown_away(monkeypatch):
    """A rate at which everything diverges."""
    model = Net()
    once = lowbit.quantize(model, "w4a8-gptq", calibration=data(0))
    monkeypatch.setattr(
        "lowbit.rounding.blocks._RATES",
        dict.fromkeys(("levels", "log_scale", "zero", "bias"), 30.0),
    )
    kept = lowbit.quantize(model, "w4a8-gptq", calibration=data(0), block_steps=5)
    for key, value in once.state_dict().items():
        assert torch.equal(value, kept.state_dict()[key]), key
