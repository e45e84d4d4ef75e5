"""Runs that begin behind a finished block: the same layers as whole runs make, in less work."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.rounding import shortcut
from lowbit.rounding.shortcut import Shortcut


class Block(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.one, self.two = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.calls = 0

    def forward(self, x, skip=None):
        self.calls += 1
        x = x if skip is None else x + skip
        return x + self.two(torch.relu(self.one(x)))


class Chain(nn.Module):
    """Blocks one after the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(12, 12)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(12, 5)
        self.eval()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LongSkip(Chain):
    """The last block takes what the first one returned."""

    def forward(self, x):
        first = self.blocks[0](self.stem(x))
        x = self.blocks[2](self.blocks[1](first))
        return self.head(self.blocks[3](x, first))


class Gate(Chain):
    """The last block takes of the first one's output what NaN does not come through."""

    def forward(self, x):
        first = self.blocks[0](self.stem(x))
        x = self.blocks[2](self.blocks[1](first))
        return self.head(self.blocks[3](x, (first > 0).float()))


class Careful(Chain):
    """Refuses NaN between its blocks."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            if x.isnan().any():
                raise RuntimeError("NaN")
        return self.head(x)


class Twice(Chain):
    """A block is called twice."""

    def forward(self, x):
        x = self.stem(x)
        for index in (0, 1, 0, 2, 3):
            x = self.blocks[index](x)
        return self.head(x)


class Branch(Chain):
    """Some batches pass a layer before the blocks that others never do."""

    def forward(self, x):
        x = self.stem(self.blocks[3](x) if len(x) > 40 else x)
        for block in self.blocks[:3]:
            x = block(x)
        return self.head(x)


class Pairs(Chain):
    """Blocks return tuples, and what follows works in place."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Pair() for _ in range(3)])

    def forward(self, x):
        y = None
        x = self.stem(x)
        for block in self.blocks:
            x, y, _ = block(x, y)
            x += 0.1
            y.mul_(0.5)
        return self.head(x + y)


class Pair(Block):
    def forward(self, x, y):
        x = super().forward(x, y)
        return x, x.flip(-1), None


class Named(Chain):
    """Blocks return mappings, which are not kept."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Mapped() for _ in range(3)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)["x"]
        return self.head(x)


class Mapped(Block):
    def forward(self, x):
        return {"x": super().forward(x)}


def sequential():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    parts += [nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Flatten(), nn.Linear(128, 5)]
    return nn.Sequential(*parts).eval()


def transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


def data(model):
    random = torch.Generator().manual_seed(0)
    shape = (8, 3, 8, 8) if isinstance(model, nn.Sequential) else (32, 12)
    if isinstance(model, nn.TransformerEncoder):
        shape = (4, 8, 12)
    found = [torch.randn(shape, generator=random) for _ in range(3)]
    return [*found[:2], torch.cat([found[2], found[0]])]


def cuts(monkeypatch):
    """The blocks that were cut at, and None where that was given up."""
    found = []
    keep, give_up = Shortcut.keep, Shortcut.give_up
    monkeypatch.setattr(
        Shortcut, "keep", lambda self, m, outputs: (found.append(m), keep(self, m, outputs))[1]
    )
    monkeypatch.setattr(Shortcut, "give_up", lambda self: (found.append(None), give_up(self))[1])
    return found


MODELS = {
    # model, how many cuts there are, whether they are given up
    Chain: (4, False),
    LongSkip: (3, True),
    Gate: (3, True),
    Careful: (2, True),
    Twice: (3, False),
    Branch: (0, False),
    Pairs: (3, False),
    Named: (0, False),
    sequential: (2, False),
    transformer: (2, False),
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", [{}, {"correct_bias": True}, {"block_steps": 4}], ids=str)
def test_the_layers_are_those_of_whole_runs(make, options, monkeypatch):
    model = make()
    x = data(model)
    found = cuts(monkeypatch)
    short = lowbit.quantize(model, "w4a8-gptq", calibration=x, **options)
    count, given_up = MODELS[make]
    assert len([block for block in found if block is not None]) == count
    assert (None in found) == given_up
    assert all("forward" not in vars(module) for module in model.modules())
    monkeypatch.setattr(Shortcut, "next_cut", lambda self, done: None)
    whole = lowbit.quantize(model, "w4a8-gptq", calibration=x, **options)
    wanted = whole.state_dict()
    assert short.state_dict().keys() == wanted.keys()
    for key, value in short.state_dict().items():
        assert torch.equal(value, wanted[key]), key


def test_finished_blocks_are_not_run_again(monkeypatch):
    calls = []
    for limit in (1 << 28, 0):
        model = Chain()
        monkeypatch.setattr(shortcut, "KEPT_BYTES", limit)
        lowbit.quantize_(model, "w4a8-gptq", calibration=data(model))
        calls.append([block.calls for block in model.blocks])
    short, whole = calls
    # Three batches: once to watch, then for each of ten layers in both models.
    assert whole[0] == 3 * (1 + 2 * 9)
    assert whole[3] == 3 * (1 + 2 * 3)
    # To watch, for its two layers, to keep its output; and first batches of what lies behind a cut.
    assert short[0] == 3 * (1 + 2 * 3) + 2 * 7
    assert short[3] == 3 * (1 + 2 * 3) + 2 * 3


def test_a_forward_that_the_user_has_set_stays(monkeypatch):
    model = Chain()
    found = cuts(monkeypatch)
    own = model.blocks[1].forward
    model.blocks[1].forward = lambda x: own(2 * x)
    kept = model.blocks[1].forward
    lowbit.quantize(model, "w4a8-gptq", calibration=data(model))
    assert found
    assert vars(model.blocks[1])["forward"] is kept
