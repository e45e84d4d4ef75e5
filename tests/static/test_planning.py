"""Steps that the kernels refuse: computed beside the programs, and said so in the account."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from static.test_patterns import by_oracle, converted, eagerly, sqnr
from torch import nn

import lowbit
from lowbit.static import Network


class Chain(nn.Module):
    """Convolutions around a function, to be named by the function's node."""

    def __init__(self, function, channels=4, tail=None):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.tail = tail or nn.Conv2d(channels, 4, 1)
        object.__setattr__(self, "function", function)

    def forward(self, x):
        return self.tail(self.function(self.first(x)))


class Gate(nn.Module):
    """Two branches of very small values, multiplied."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.tail = (nn.Conv2d(n, 4, 1) for n in (3, 3, 4))
        with torch.no_grad():
            for layer in (self.left, self.right):
                layer.weight.mul_(1e-18)
                layer.bias.mul_(1e-18)
            self.tail.bias.zero_()

    def forward(self, x):
        return self.tail(self.left(x) * self.right(x))


def narrow(x):
    return x.clamp(0.5, 0.502)


# Of each: the model, the shape of its input, names of the calls beside the programs, a reason.
with torch.random.fork_rng():
    torch.manual_seed(0)  # whatever was imported before
    REFUSED = {
        "a table far from 0": (Chain(narrow), (2, 3, 4, 5), {"first"}, "far from 0"),
        "a mean of too many pixels": (
            Chain(lambda x: x.mean((2, 3), keepdim=True), channels=1),
            (1, 3, 2050, 2050),
            {"mean"},
            "too large to be averaged",
        ),
        "an image that is too wide": (
            nn.Sequential(nn.Conv2d(3, 1, 1, stride=(1, 4)), nn.ReLU(), nn.Conv2d(1, 1, 1)),
            (1, 3, 1, 2**20 + 2),
            {"0"},
            "absurdly large",
        ),
        "too many features": (
            Chain(lambda x: x.flatten(1), tail=nn.Linear(2**20 + 4, 2)),
            (1, 3, 1, 2**18 + 1),
            {"flatten", "tail"},
            "absurdly large",
        ),
        "a product of tiny values": (Gate(), (2, 3, 4, 5), {"mul"}, "product of the scales"),
        "a kernel that is too large": (
            nn.Sequential(nn.Conv2d(3, 2, 257), nn.ReLU(), nn.Conv2d(2, 2, 1)),
            (1, 3, 258, 259),
            {"0"},
            "kernel is too large",
        ),
    }


@pytest.fixture(params=REFUSED.values(), ids=REFUSED)
def case(request):
    torch.manual_seed(0)
    model, shape, names, reason = request.param
    x = torch.randn(shape)
    return model, x, converted(model, x, batches=1, observer="minmax"), names, reason


def test_what_is_refused_runs_beside(case, monkeypatch):
    model, x, network, names, reason = case
    assert isinstance(network, Network)
    apart = [row for row in network.account.rows if "no step takes it" in row.note]
    assert {row.where for row in apart} == {"float"}
    assert {row.name for row in apart} == names
    assert any(reason in row.note for row in apart)
    notes = {row.name: row.note for row in lowbit.summary(network).rows}
    assert all("no step takes it" in notes[name] for name in names & set(notes))
    y, wanted = network(x), model(x)
    assert y.shape == wanted.shape
    assert sqnr(wanted.double(), y.double()) > 25
    assert torch.equal(y, eagerly(network, x))
    if x.numel() < 1e6:
        assert torch.equal(y, by_oracle(network, monkeypatch, x))


def test_what_is_refused_at_another_size():
    model = nn.Sequential(
        nn.Conv2d(3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 2, 1)
    )
    small, large = torch.randn(2, 3, 8, 8), torch.randn(1, 3, 2050, 2050)
    network = converted(model, small)
    assert not network.account.in_float
    before = network(small)
    assert torch.equal(network(large), eagerly(network, large))
    (row,) = network.account.in_float
    assert row.name == "2"
    assert torch.equal(network(small), before)  # where nothing is refused
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(large), network(large))


def test_a_residual_and_images_that_are_not_finite_beside_what_is_refused(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.tail = (nn.Conv2d(n, 4, 1) for n in (3, 4, 4))

        def forward(self, x):
            x = F.relu(self.first(x))
            y = self.body(x).clamp(0.5, 0.502)
            return x + self.tail(y + x), y.to(torch.float64)

    torch.manual_seed(0)
    x = torch.randn(3, 3, 4, 5)
    network = converted(Net(), x, observer="minmax")
    assert "far from 0" in str(network.account)
    for image in (
        x,
        x.to(memory_format=torch.channels_last),
        x.index_fill(0, torch.tensor(1), torch.nan),
    ):
        found = network(image)
        for y, other, mirrored in zip(
            found, eagerly(network, image), by_oracle(network, monkeypatch, image), strict=True
        ):
            assert torch.equal(y.nan_to_num(7), other.nan_to_num(7))
            assert torch.equal(y.nan_to_num(7), mirrored.nan_to_num(7))
    assert [bool(y.isnan().all()) for y in found[0]] == [False, True, False]


def test_files_of_networks_with_what_is_refused(tmp_path):
    model, shape, *_ = REFUSED["a table far from 0"]
    x = torch.randn(shape)
    network = converted(model, x, observer="minmax")
    path = tmp_path / "network.safetensors"
    lowbit.save_file(network, path)
    loaded = lowbit.load_file(copy.deepcopy(model), path)
    assert torch.equal(loaded(x), network(x))
    assert str(loaded.account) == str(network.account)
    assert str(lowbit.summary(loaded)) == str(lowbit.summary(network))


def test_errors_that_are_about_no_step_are_raised(monkeypatch):
    def make(*arguments):
        raise ValueError("something else")

    network = converted(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 4, 5))
    twin = copy.deepcopy(network)
    monkeypatch.setattr(twin, "make_program", make, raising=False)
    with pytest.raises(ValueError, match="something else"):
        twin(torch.randn(2, 3, 4, 5))
