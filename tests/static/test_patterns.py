"""What is captured, in every form that torch has for it: against the oracle, eager and float."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from static import oracle
from torch import nn

import lowbit
from lowbit.static.network import Network


def converted(model, *examples, scheme="w8a8-static", batches=3, **options):
    """The network of a model, calibrated on random batches of the examples' shapes."""
    data = [tuple(torch.randn_like(x) for x in examples) for _ in range(batches)]
    prepared = lowbit.prepare(model.eval(), scheme, examples, **options)
    return lowbit.convert(lowbit.calibrate(prepared, [*data, examples]))


def by_oracle(model, monkeypatch, *inputs):
    """What the oracle makes of the network's programs."""
    twin = copy.deepcopy(model)
    monkeypatch.setattr(twin, "make_program", oracle.Program, raising=False)
    return twin(*inputs)


def eagerly(model, *inputs):
    model.eager = True
    try:
        return model(*inputs)
    finally:
        model.eager = False


def sqnr(wanted, found):
    noise = (wanted - found).detach().norm()
    return float(20 * torch.log10(wanted.detach().norm() / noise))


def check(model, monkeypatch, *inputs, floats=(), least=25.0, **options):
    """Converts; compares with the oracle and the eager run, bit for bit, and with float."""
    found = converted(model, *inputs, **options)
    assert isinstance(found, Network)
    assert [row.name for row in found.account.in_float] == list(floats)
    y = found(*inputs)
    assert torch.equal(y, by_oracle(found, monkeypatch, *inputs))
    assert torch.equal(y, eagerly(found, *inputs))
    wanted = model(*inputs)
    assert y.shape == wanted.shape
    assert y.dtype == wanted.dtype
    assert sqnr(wanted, y) > least
    return found


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function, channels=8, groups=1, out=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        if isinstance(function, nn.Module):
            self.function = function
        else:
            object.__setattr__(self, "function", function)
        self.second = nn.Conv2d(out, 8, 3, groups=groups)

    def forward(self, x):
        return self.second(self.function(self.first(x)))


class Behind(nn.Module):
    """A function of a convolution's output that leaves the network."""

    def __init__(self, function):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        object.__setattr__(self, "function", function)

    def forward(self, x):
        return self.function(self.first(x))


@pytest.fixture
def images():
    return torch.randn(2, 3, 10, 12)


ACTIVATIONS = {
    "ReLU": nn.ReLU(),
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "ReLU6": nn.ReLU6(),
    "relu6": F.relu6,
    "clamp": lambda x: torch.clamp(x, 0, 6),
    "x.clamp": lambda x: x.clamp(min=0),
    "Hardtanh": nn.Hardtanh(0, 6),
    "Hardtanh of 1": nn.Hardtanh(),
    "Hardswish": nn.Hardswish(),
    "hardswish": F.hardswish,
    "Hardsigmoid": nn.Hardsigmoid(),
    "hardsigmoid": F.hardsigmoid,
    "SiLU": nn.SiLU(),
    "silu": F.silu,
    "GELU": nn.GELU(),
    "GELU of tanh": nn.GELU("tanh"),
    "gelu": F.gelu,
    "Sigmoid": nn.Sigmoid(),
    "torch.sigmoid": torch.sigmoid,
    "x.sigmoid": lambda x: x.sigmoid(),
    "Tanh": nn.Tanh(),
    "torch.tanh": torch.tanh,
    "x.tanh": lambda x: x.tanh(),
    "LeakyReLU": nn.LeakyReLU(0.1),
    "elu": lambda x: F.elu(x, alpha=0.5),
    "Mish": nn.Mish(),
    "Softplus": nn.Softplus(),
}


@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_are_computed_by_the_convolution(function, images, monkeypatch):
    found = check(Between(function), monkeypatch, images)
    assert [node.kind for node in found.nodes] == ["input", "layer", "layer"]


@pytest.mark.parametrize("name", ["relu", "hardswish", "silu", "gelu", "x.sigmoid"])
def test_activations_of_what_is_no_layer(name, images, monkeypatch):
    def function(x):
        return ACTIVATIONS[name](x + F.max_pool2d(x, 3, 1, 1))

    found = check(Between(function), monkeypatch, images)
    kinds = [node.kind for node in found.nodes]
    taken = name in ("relu", "hardswish")  # by the sum
    assert kinds.count("unary") == (0 if taken else 1)


@pytest.mark.parametrize(
    "function",
    [lambda x: x + 3, lambda x: 2 - x, lambda x: torch.mul(x, 0.5), lambda x: x / 4],
    ids=["+", "-", "*", "/"],
)
def test_arithmetic_with_numbers(function, images, monkeypatch):
    check(Between(function), monkeypatch, images)


MOVES = {
    "MaxPool2d": nn.MaxPool2d(3, 2, 1),
    "max_pool2d": lambda x: F.max_pool2d(x, (3, 2), stride=(2, 1), padding=(1, 1)),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 3, 1, 1, 1),
    "dilated": nn.MaxPool2d(3, 2, 1, dilation=2),
    "ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "AvgPool2d": nn.AvgPool2d(3, 2, 1),
    "AvgPool2d without padding": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "AvgPool2d ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "avg_pool2d": lambda x: F.avg_pool2d(x, (2, 3)),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((4, 5)),
    "AdaptiveAvgPool2d of None": nn.AdaptiveAvgPool2d((None, 5)),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 4),
    "ZeroPad2d": nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.ReLU()),
    "ConstantPad2d": nn.ConstantPad2d((1, 0, 2, 0), 0.5),
    "pad": lambda x: F.pad(x, (1, 1), value=-0.25),
    "Upsample": nn.Upsample(scale_factor=2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"),
    "Dropout": nn.Dropout(),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "Identity": nn.Identity(),
    "contiguous": lambda x: x.contiguous().clone(),
    "there and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("function", MOVES.values(), ids=MOVES)
def test_what_moves_and_pools(function, images, monkeypatch):
    check(Between(function), monkeypatch, images)


JOINS = {
    "+": operator.add,
    "torch.add": torch.add,
    "x.add": lambda a, b: a.add(b),
    "*": operator.mul,
    "torch.mul": torch.mul,
    "x.mul": lambda a, b: a.mul(b),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "cat by name": lambda a, b: torch.cat((a, b), dim=-3),
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_two_branches(join, images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.left, self.right = (nn.Conv2d(8, 8, 1) for _ in range(2))
            self.head = nn.LazyConv2d(4, 1)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.head(join(F.relu(self.left(x)), torch.sigmoid(self.right(x))))

    net = Net()
    net(images)
    check(net, monkeypatch, images)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.SiLU()])
def test_residuals_are_added_by_the_convolution(swapped, activation, images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.body = nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.activation = activation or nn.Identity()
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.stem(x).relu()
            y = self.norm(self.body(x))
            return self.head(self.activation(x + y if swapped else y + x))

    found = check(Net(), monkeypatch, images)
    assert [node.kind for node in found.nodes] == ["input", "layer", "layer", "layer"]
    assert len(found.nodes[2].inputs) == 2


def test_squeeze_and_excitation(images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = F.hardswish(self.stem(x))
            gate = F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
            return self.head(F.hardsigmoid(self.excite(gate)) * x)

    check(Net(), monkeypatch, images)


HEADS = {
    "flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "x.flatten": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1),
    "Flatten": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "view": lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1),
    "reshape": lambda x: F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], 8),
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "mean": lambda x: x.mean((2, 3)),
    "torch.mean": lambda x: torch.mean(x, dim=[-2, -1]),
    "max": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    "AdaptiveMaxPool2d": nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
}


class Classifier(nn.Module):
    def __init__(self, head, features=8):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        object.__setattr__(self, "head", head)
        if isinstance(head, nn.Module):
            self.head = head
        self.fc = nn.Linear(features, 5)

    def forward(self, x):
        return self.fc(F.relu(self.head(F.relu(self.stem(x)))))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_features_of_an_image(head, images, monkeypatch):
    names = {"view": "size", "reshape": "getattr_1"}
    unused = [row for row in names.values() if row]
    found = check(Classifier(head), monkeypatch, images)
    assert not {row.name for row in found.account.in_float} & set(unused)


@pytest.mark.parametrize(
    "head", [lambda x: x.flatten(1), lambda x: x.reshape(len(x), -1), nn.Flatten()]
)
def test_flattened_images_reorder_the_weight(head, images, monkeypatch):
    if callable(head) and not isinstance(head, nn.Module):
        head = (lambda x: x.flatten(1)) if head(images).dim() == 2 else head
    found = check(Classifier(head, 8 * 120), monkeypatch, images)
    with pytest.raises(ValueError, match=r"'fc'.*\(8, 10, 12\).*\(8, 12, 10\)"):
        found(images.transpose(2, 3).contiguous())


def test_flattened_images_for_more_than_a_layer_stay_in_float(images, monkeypatch):
    class Net(Classifier):
        def forward(self, x):
            features = F.relu(self.stem(x)).flatten(1)
            return self.fc(features) + features.sum(1, keepdim=True)

    check(Net(None, 960), monkeypatch, images, floats=["flatten", "sum_1", "add"])


def test_tokens_and_float_islands(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.qkv = nn.Linear(16, 48)
            self.out = nn.Linear(16, 16)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            y = torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
            x = x + self.out(y)
            return x + self.down(F.gelu(self.up(x)))

    found = check(Net(), monkeypatch, torch.randn(2, 7, 16), floats=FLOATS_OF_TOKENS)
    assert found(torch.randn(3, 5, 16)).shape == (3, 5, 16)


FLOATS_OF_TOKENS = [
    "norm",
    "chunk",
    "getitem",
    "getitem_1",
    "getitem_2",
    "transpose",
    "matmul",
    "truediv",
    "softmax",
    "matmul_1",
]


def test_channels_last_linear_and_patches(images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 2, 2)
            self.up = nn.Linear(8, 24)
            self.tokens = nn.Linear(24, 8)

        def forward(self, x):
            x = F.gelu(self.up(self.patches(x).permute(0, 2, 3, 1)))
            x = x.permute(0, 3, 1, 2).flatten(2).transpose(1, 2)
            return self.tokens(x).mean(1)

    check(Net(), monkeypatch, images)


def test_padding_before_a_convolution_is_its_own(images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pad = nn.ZeroPad2d((0, 1, 0, 1))
            self.below = 0
            self.stem = nn.Conv2d(3, 8, 3, stride=2)
            self.body = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)

        def forward(self, x):
            return self.body(F.pad(F.relu(self.stem(self.pad(x))), (0, 1, 1, self.below)))

    found = check(Net(), monkeypatch, images)
    assert [node.kind for node in found.nodes] == ["input", "layer", "layer"]
    model = Net()
    model.below = 3  # more than a window
    found = check(model, monkeypatch, images)
    assert [node.kind for node in found.nodes] == ["input", "layer", "pad", "layer"]


@pytest.mark.parametrize("scheme", ["w4a8-static", "w2a8-static", "w1a8-static", "w4a8-g32-static"])
def test_every_width(scheme, images, monkeypatch):
    check(Between(F.relu, 32, out=32), monkeypatch, images, scheme=scheme, least=0.0)


def test_overrides_inside_a_network(images, monkeypatch):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))
    overrides = {"1": None, "2": "w4a8-static", "3": "w8a8"}
    found = check(model, monkeypatch, images, overrides=overrides, floats=["1", "3"])
    notes = {row.name: row.note for row in found.account.in_float}
    assert "dynamic" in notes["3"]


def test_other_activations_run_by_themselves(images, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    overrides = {"2": "w8a16-static"}
    found = check(model, monkeypatch, images, overrides=overrides, floats=["2"])
    (row,) = found.account.in_float
    assert "int16" in row.note


def test_a_layer_that_is_called_twice(images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            return self.body(F.relu(self.body(x)))

    found = check(Net(), monkeypatch, images)
    assert found.body.weight_packed is found.body_call2.weight_packed
    assert found.body.activation_scale != found.body_call2.activation_scale


def test_several_inputs_and_outputs(images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x, y, scale=1.0):
            left, right = self.a(x), self.b(y)
            return {"sum": F.relu(left + right), "both": (left * scale, right)}

    other = torch.randn_like(images)
    model = Net()
    found = converted(model, images, other)
    y, wanted = found(images, y=other), model(images, other)
    assert sqnr(wanted["sum"], y["sum"]) > 25
    assert sqnr(wanted["both"][1], y["both"][1]) > 25
    with pytest.raises(TypeError, match="x, y"):
        found(images)


def test_what_is_changed_in_place(images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            y = self.body(self.relu(x))
            y += x  # after the ReLU
            return self.head(F.silu(y, inplace=True) + y)

    check(Net(), monkeypatch, images)


def test_values_of_another_batch(images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.rows = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
            self.side = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            y = self.stem(x).permute(0, 2, 3, 1).unflatten(1, (5, 2)).flatten(0, 1)
            return F.relu(self.rows(y)).unflatten(0, (-1, 5)).sum((1, 2, 3)) + self.side(x).mean(
                (2, 3)
            )

    found = check(Net(), monkeypatch, images, floats=FLOATS_OF_ROWS)
    assert found(torch.randn(3, 3, 10, 4)).shape == (3, 8)


FLOATS_OF_ROWS = ["unflatten", "flatten", "unflatten_1", "sum_1"]


@pytest.mark.parametrize("slope", [0.3, 0.01])
def test_tables_of_functions_that_do_not_saturate(slope, images, monkeypatch):
    class Net(Between):
        def forward(self, x):
            return super().forward(20 * x)

    model = Net(nn.LeakyReLU(slope))
    with torch.no_grad():
        model.first.bias -= 20
    check(model, monkeypatch, images, floats=["mul"])


def test_concatenation_has_the_codes_of_its_parts(images, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = F.relu(self.stem(x))
            inner = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
            return self.head(torch.cat([inner, x], 1))

    found = check(Net(), monkeypatch, images)
    outer = found.affine("cat_1")
    assert found.affine("relu_1") == found.affine("right") == found.affine("cat") == outer
    assert found.affine("relu") != outer
