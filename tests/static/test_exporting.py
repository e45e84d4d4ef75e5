"""Models that torch.fx cannot trace, captured by torch.export."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from static.test_patterns import by_oracle, check, converted, eagerly, sqnr
from torch import nn

import lowbit
from lowbit.static import Network, PreparedNetwork


class Net(nn.Module):
    """Every kind of name: layers, parameters, buffers, constants, functions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.SiLU())
        self.unused = nn.Linear(3, 4)
        self.tokens = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.zeros(8))
        self.head = nn.Linear(8, 5)

    def forward(self, *images):
        (x,) = images
        if x.shape[1] != 3:
            raise ValueError("three channels")
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.body(x)
        x = F.max_pool2d(x, 2)
        x = F.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1)
        x = self.tokens(x) * self.scale + self.shift + torch.tensor(0.5)
        return {"classes": self.head(x)}


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, 12)


@pytest.fixture
def network(images):
    model = Net()
    model.norm.running_mean.normal_()
    return converted(model, images)


def test_parameters_keep_the_names_of_their_modules(network, images):
    assert isinstance(network, Network)
    assert network.exported
    rows = {row.name: row for row in network.account.rows}
    assert rows["body.1"].operation == "conv, silu"
    assert rows["tokens"].where == "float"
    assert rows["unused"].where == "nowhere"
    assert "never called" in rows["unused"].note
    kept = {row.name: row for row in lowbit.summary(network).rows}
    assert kept["head"].scheme == kept["body.0"].scheme == "w8a8-static"
    assert "batch norm 'norm' folded in" in kept["stem"].note
    state = network.state_dict()
    assert {"stem.bias", "tokens.weight", "scale", "shift", "head.weight_packed"} <= set(state)
    assert not any(name.startswith(("norm", "unused")) for name in state)


def test_any_batch_of_the_size_that_was_seen(images, monkeypatch):
    model = Net()
    model.norm.running_var.uniform_(0.5, 2)
    network = converted(model, images[:1])  # which torch.export would take for a constant
    many = torch.randn(5, 3, 8, 12)
    for x in (many, many[:1], many[:0], many.to(memory_format=torch.channels_last)):
        y = network(x)["classes"]
        assert torch.equal(y, eagerly(network, x)["classes"])
        assert torch.equal(y, by_oracle(network, monkeypatch, x)["classes"])
    assert sqnr(model(many)["classes"], network(many)["classes"]) > 20  # one image was seen
    with pytest.raises(ValueError, match=r"\[2, 3, 12, 8\].*\[N, 3, 8, 12\] alone"):
        network(images.transpose(2, 3))
    prepared = lowbit.prepare(model, "w8a8-static", images)
    with pytest.raises(ValueError, match="alone"):
        prepared(images[..., :6])


OPERATORS = {
    "relu": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "clamp": lambda x: x.clamp(min=0, max=6),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": lambda x: F.elu(x, 0.5),
    "mish": F.mish,
    "softplus": F.softplus,
    "numbers": lambda x: (2 - (x + 1) * 0.5 - 0.25) / 4,
    "add": lambda x: x + F.relu(x),
    "add_": lambda x: F.relu(x).add_(x),
    "mul": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "pad": lambda x: F.relu(F.pad(x, (1, 0, 2, 1))),
    "upsample": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "dropout": lambda x: F.dropout(x, 0.5, training=False).clone(),
}


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        object.__setattr__(self, "function", function)

    def forward(self, *images):
        return self.second(self.function(self.first(images[0])))


@pytest.mark.parametrize("function", OPERATORS.values(), ids=OPERATORS)
def test_operators_have_steps(function, images, monkeypatch):
    found = check(Between(function), monkeypatch, images)
    assert found.exported


def test_concatenation(images, monkeypatch):
    model = Between(lambda x: torch.cat([x, F.relu(x)], 1))
    model.second = nn.Conv2d(16, 4, 1)
    assert check(model, monkeypatch, images).exported


def test_what_has_no_step_is_an_island(images, monkeypatch):
    def function(x):
        a, b = torch.sort(x, 1).values.chunk(2, 1)
        return torch.cat([a, b.softmax(1)], 1)

    found = check(Between(function), monkeypatch, images, floats=ISLAND)
    assert found.exported


ISLAND = ["sort", "getitem", "chunk", "getitem_2", "getitem_3", "softmax", "cat"]


def test_overrides_and_copies(images, tmp_path):
    model = Net().eval()
    overrides = {"body.0": "w4a8-static", "head": "w8a8"}
    network = converted(model, images, overrides=overrides)
    wanted = network(images)["classes"]
    kept = {row.name: row.scheme for row in lowbit.summary(network).rows}
    assert (kept["body.0"], kept["head"]) == ("w4a8-static", "w8a8")
    assert "dynamic" in {row.name: row.note for row in network.account.rows}["head"]
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images)["classes"], wanted)
    prepared = lowbit.prepare(model, "w8a8-static", images)
    found = [
        lowbit.convert(lowbit.calibrate(twin, [images]))(images)["classes"]
        for twin in (pickle.loads(pickle.dumps(prepared)), copy.deepcopy(prepared), prepared)
    ]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    path = tmp_path / "network.safetensors"
    lowbit.save_file(network, path)
    for into in (model, Net().to("meta")):
        loaded = lowbit.load_file(into, path)
        assert torch.equal(loaded(images)["classes"], wanted)
        assert str(loaded.account) == str(network.account)


@pytest.mark.parametrize("scheme", ["w4a8-static-gptq", "w4a8-g32-static-gptq"])
def test_weights_that_learn_from_the_data(scheme, images):
    data = [torch.randn_like(images) for _ in range(4)]
    found = lowbit.quantize(Net().eval(), scheme, calibration=data)
    assert isinstance(found, Network)
    assert torch.equal(found(images)["classes"], eagerly(found, images)["classes"])


def test_attention_layers_are_seen_into():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = Between(None)
    model.first, model.second, tokens = nn.Linear(16, 16), encoder, torch.randn(2, 5, 16)
    object.__setattr__(model, "function", lambda x: x if x.shape[1] > 1 else -x)
    network = converted(model.eval(), tokens)
    assert network.exported
    rows = {row.name: row for row in network.account.rows}
    assert rows["second.linear1"].where == rows["second.linear2"].where == "integers"
    assert sqnr(model(tokens), network(tokens)) > 25


class Batch(Between):
    def forward(self, *images):
        y = super().forward(*images)
        return y * 2 if y.shape[0] > 1 else y


class Fixed(Between):
    def forward(self, *images):
        return super().forward(*images).view(2, -1)


class Tied(Between):
    def forward(self, *images):
        return super().forward(*images) + self.second.weight.mean()


class Reflecting(Between):
    def __init__(self, function):
        super().__init__(function)
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")


class Counting(Between):
    def __init__(self, function):
        super().__init__(function)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *images):
        self.calls += 1
        return super().forward(*images)


class Deciding(Between):
    def forward(self, *images):
        return super().forward(*images) if images[0].sum() > 0 else images[0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Batch, "something else for a batch of 1"),
        (Fixed, "take the batch for a constant"),
        (Tied, "more than this layer"),
        (Reflecting, "more than this layer"),
        (Counting, "changes 'calls'"),
        (Deciding, "nor torch.export"),
    ],
)
def test_what_cannot_be_captured_runs_layer_by_layer(make, reason, images):
    model = make(F.relu).eval()
    prepared = lowbit.prepare(model, "w8a8-static", images)
    assert not isinstance(prepared, PreparedNetwork)
    found = lowbit.convert(lowbit.calibrate(prepared, [images.abs()]))
    notes = {row.name: row.note for row in lowbit.summary(found).rows}
    assert "torch.fx cannot trace it" in notes["second"]
    assert reason in notes["second"]
    assert sqnr(model(images.abs()), found(images.abs())) > 20


def test_named_and_left_out_arguments(images):
    class Two(Between):
        def forward(self, x, *more, scale=None):
            y = super().forward(x + sum(more))
            return y if scale is None else (y * scale, x)

    model = Two(F.relu).eval()
    assert converted(model, images, images).exported
    scale = torch.rand(2, 1, 1, 1)
    inputs = {"x": images, "more_0": images, "scale": scale}
    prepared = lowbit.prepare(model, "w8a8-static", inputs)
    assert isinstance(prepared, PreparedNetwork)
    found = lowbit.convert(lowbit.calibrate(prepared, [inputs]))
    y, x = found(**inputs)
    assert sqnr(model(images, images, scale=scale)[0], y) > 20
    assert torch.equal(x, images)
