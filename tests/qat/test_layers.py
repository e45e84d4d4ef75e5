"""The layers that train: in eval mode they are the deployed layers, in training mode close to."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import relative_error
from torch import nn

import lowbit
from lowbit import qat

SCHEMES = (*lowbit.RECIPES, "w8a8-g32", "w4a8-g64", "w2a16-g32", "wta8-g32", "w1a8-g32")
KINDS = {
    "linear": lambda: (nn.Linear(70, 9), nn.BatchNorm1d(9), torch.randn(5, 70)),
    "conv": lambda: (
        nn.Conv2d(5, 18, 3, stride=2, padding=1),
        nn.BatchNorm2d(18),
        torch.randn(3, 5, 8, 7),
    ),
    "same": lambda: (
        nn.Conv2d(20, 6, (2, 3), padding="same", bias=False),
        nn.BatchNorm2d(6),
        torch.randn(2, 20, 5, 5),
    ),
    "grouped": lambda: (
        nn.Conv2d(8, 12, 3, groups=4, dilation=2),
        nn.BatchNorm2d(12, affine=False),
        torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last),
    ),
    "depthwise": lambda: (
        nn.Conv2d(10, 10, 3, groups=10, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(10),
        torch.randn(2, 10, 6, 6),
    ),
    "conv1d": lambda: (
        nn.Conv1d(6, 10, 5, padding=2, padding_mode="circular"),
        nn.BatchNorm1d(10),
        torch.randn(3, 6, 11),
    ),
}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def prepared(kind, scheme, norm=True):
    """A layer in training mode, as after some training, and an input."""
    layer, batch_norm, x = KINDS[kind]()
    batch_norm.running_mean.normal_()
    batch_norm.running_var.uniform_(0.5, 2)
    if batch_norm.affine:
        nn.init.normal_(batch_norm.weight)
        nn.init.normal_(batch_norm.bias)
    cls = {nn.Linear: qat.Linear, nn.Conv1d: qat.Conv1d, nn.Conv2d: qat.Conv2d}[type(layer)]
    result = cls.from_float(layer, scheme, batch_norm if norm else None)
    if result.log_scale is not None:
        nn.init.normal_(result.log_scale, std=0.1)
    return result, x


@each_scheme
@each_kind
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_eval_mode_is_the_deployed_layer_and_training_close_to_it(kind, scheme, norm):
    layer, x = prepared(kind, scheme, norm)
    deployed = layer.deploy()
    with torch.no_grad():
        y = layer.eval()(x)
        assert torch.equal(y, deployed(x))
        assert y.stride() == deployed(x).stride()
        layer.train()
        if norm:
            layer.norm.eval()
        assert relative_error(layer(x), y) < 1e-5


@each_scheme
@each_kind
def test_gradients_reach_everything_that_is_learned(kind, scheme):
    layer, x = prepared(kind, scheme)
    x.requires_grad_()
    layer.norm.eval()  # behind statistics of the batch a bias has none
    layer(x).square().sum().backward()
    assert x.grad.any()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.flatten(1).any(1).all() if name == "weight" else parameter.grad.any()


@pytest.mark.parametrize("scheme", ["w4a8", "w1a1"])
def test_a_batch_norm_sees_the_batch_in_training_and_its_statistics_move(scheme):
    layer, x = prepared("conv", scheme)
    before = layer.norm.running_mean.clone()
    y = layer(x)
    scale, shift = layer.norm.weight[:, None, None], layer.norm.bias[:, None, None]
    normal = ((y - shift) / scale).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normal.mean(1), torch.zeros(18), atol=1e-4, rtol=0)
    assert not torch.equal(before, layer.norm.running_mean)


def test_the_norm_is_folded_into_scales_and_leaves_codes_alone():
    layer, _ = prepared("conv", "w4a8-g32")
    plain = copy.deepcopy(layer)
    plain.norm = None
    folded, bare = layer.deploy(), plain.deploy()
    assert torch.equal(folded.weight_packed, bare.weight_packed)
    assert torch.equal(folded.weight_group_scale, bare.weight_group_scale)
    factor = layer.norm.weight * (layer.norm.running_var + layer.norm.eps).rsqrt()
    torch.testing.assert_close(folded.weight_scale, bare.weight_scale * factor.detach())


def _step(layer):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def _through_data(layer):
    layer.weight.data[0].neg_()


def _through_numpy(layer):
    layer.bias.detach().numpy()[1] += 1


def _statistics(layer):
    layer.norm.running_mean.data.add_(1)


def _load(layer):
    other, _ = prepared("conv", "w4a8")
    layer.load_state_dict(other.state_dict())


def _scale(layer):
    layer.log_scale.data += 0.5


def _epsilon(layer):
    layer.norm.eps = 0.5


def _stride(layer):
    layer.stride = (1, 1)


def _another_norm(layer):
    layer.norm = None


def _another_parameter(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


CHANGES = (_step, _through_data, _through_numpy, _statistics, _load, _scale, _epsilon, _stride)
CHANGES += (_another_norm, _another_parameter)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_eval_mode_sees_every_change(change):
    layer, x = prepared("conv", "w4a8")
    with torch.no_grad():
        before = layer.eval()(x)
        change(layer)
        after = layer(x)
        assert after.shape != before.shape or not torch.equal(after, before)
        assert torch.equal(after, layer.deploy()(x))


def test_eval_mode_keeps_its_layer_while_nothing_changes_and_training_mode_drops_it():
    layer, x = prepared("linear", "w4a8")
    layer.eval()
    layer(x)
    first = layer.deployed()
    assert layer.deployed() is first
    layer.train().eval()
    assert layer.deployed() is not first


@pytest.mark.parametrize("scheme", ["w4a8", "w2a16", "w1a1"])
def test_eval_mode_has_the_gradients_of_training_mode(scheme):
    layer, x = prepared("conv", scheme)
    layer.norm.eval()
    found = {}
    for mode in (True, False):
        layer.train(mode).norm.eval()
        layer.zero_grad()
        image = x.clone().requires_grad_()
        y = layer(image)
        y.sum().backward()
        found[mode] = [image.grad, *(parameter.grad for parameter in layer.parameters())]
    assert torch.equal(y.detach(), layer.deploy()(x))
    for a, b in zip(found[True], found[False], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("scheme", ["w4a8-g32", "w1a1"])
def test_copies_go_on_alike(scheme, copied):
    layer, x = prepared("conv", scheme)
    layer.eval()(x)
    other = copied(layer)
    assert "_deployed" not in vars(other) or copied is not copy.deepcopy
    for side in (layer, other):
        side.train()
        optimizer = torch.optim.SGD(side.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            side(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(layer.eval()(x), other.eval()(x))


def test_attributes_hooks_and_frozen_weights_stay():
    conv = nn.Conv2d(3, 4, 3, padding=(1, 0))
    conv.note = "mine"
    conv.weight.requires_grad_(False)
    seen = []
    conv.register_forward_hook(lambda *_: seen.append(1))
    layer = qat.Conv2d.from_float(conv, "w4a8")
    assert isinstance(layer, nn.Conv2d)
    assert (layer.in_channels, layer.padding, layer.note) == (3, (1, 0), "mine")
    assert not layer.log_scale.requires_grad
    assert type(conv) is nn.Conv2d
    layer(torch.randn(1, 3, 5, 5))
    assert seen == [1]
    assert "scheme=w4a8" in repr(layer)


@pytest.mark.parametrize("scheme", ["w4a8", "w1a1"])
@pytest.mark.parametrize("cls", [qat.Linear, qat.Conv1d, qat.Conv2d])
def test_layers_are_made_by_their_sizes(cls, scheme):
    layer = cls(4, 3, scheme=scheme) if cls is qat.Linear else cls(4, 3, 1, scheme=scheme)
    x = torch.randn(2, 4, *[5] * (layer.weight.dim() - 2))
    assert torch.equal(layer.eval()(x), layer.deploy()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", [True, False])
def test_the_output_has_the_dtype_of_the_input(dtype, mode):
    layer, x = prepared("conv", "w4a8", norm=False)
    layer.to(dtype).train(mode)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y.float(), layer.eval()(x.to(dtype)).float()) < 0.01


def test_autocast_changes_the_dtype_of_the_output_alone():
    layer, x = prepared("linear", "w4a8", norm=False)
    for mode in (True, False):
        plain = layer.train(mode)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, plain.bfloat16())


@pytest.mark.parametrize("mode", [True, False])
def test_single_images(mode):
    layer, x = prepared("conv", "w2a8", norm=False)
    layer.train(mode)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("mode", [True, False])
def test_wrong_shapes_are_named(mode):
    linear, _ = prepared("linear", "w4a8")
    conv, _ = prepared("conv", "w4a8")
    with pytest.raises(ValueError, match=r"qat\.Linear.*in_features = 70"):
        linear.train(mode)(torch.randn(5, 71))
    with pytest.raises(ValueError, match=r"qat\.Conv2d.*in_channels = 5"):
        conv.train(mode)(torch.randn(5, 6, 8, 8))
    with pytest.raises(ValueError, match="fuse=False"):
        linear(torch.randn(2, 5, 70))


@pytest.mark.parametrize("name", ["weight", "log_scale", "bias", "norm.running_var"])
def test_what_is_not_finite_is_named(name):
    layer, x = prepared("conv", "w4a8")
    layer._fqn = "body.3"
    dict([*layer.named_parameters(), *layer.named_buffers()])[name].data.view(-1)[1] = torch.nan
    with pytest.raises(ValueError, match=rf"'body\.3': 1 of \d+ numbers of '{name}' are NaN"):
        layer.eval()(x)


def test_wrong_modules_schemes_and_devices_are_named():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Linear, not Conv2d"):
        qat.Linear.from_float(nn.Conv2d(1, 1, 1), "w4a8")
    with pytest.raises(TypeError, match="not Linear"):
        qat.Linear.from_float(qat.Linear(2, 2), "w4a8")
    with pytest.raises(ValueError, match="unknown scheme 'w3a8'"):
        qat.Linear.from_float(nn.Linear(2, 2), "w3a8")
    with pytest.raises(RuntimeError, match="on meta"):
        qat.Linear(2, 2).to("meta").deploy()


def test_learned_scales_and_binary_weights_learn_a_function():
    """A layer of the width that its target has finds it: every gradient points the right way."""
    for scheme, most in (("w4a8", 0.1), ("w2a8", 1e-4), ("wta8", 1e-4), ("w1a8", 1e-4)):
        torch.manual_seed(0)
        x = torch.randn(256, 24)
        target = qat.Linear(24, 8, scheme=scheme).eval()
        layer = qat.Linear(24, 8, scheme=scheme)
        with torch.no_grad():
            y = target(x)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            F.mse_loss(layer(x), y).backward()
            optimizer.step()
        assert relative_error(layer.eval()(x), y) < most, scheme
