"""Equalization and smoothing: the same function, better spread."""

import warnings

import pytest
import torch
from torch import nn

import lowbit
from lowbit.rounding.equalize import equalize
from lowbit.rounding.smooth import smooth


def chain(act=nn.ReLU, seed=0):
    """Convolution, depthwise convolution, projection, with norms, and channels of all sizes."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        act(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        act(),
        nn.Conv2d(8, 6, 1),
    )
    with torch.no_grad():
        model[1].running_var.uniform_(0.01, 9)
        model[3].weight.mul_(torch.logspace(-2, 2, 8)[:, None, None, None])
    return model.eval()


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def spread(model):
    """The largest over the smallest range of the projection's input channels."""
    weight = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1].weight
    ranges = weight.abs().amax(dim=(0, 2, 3))
    return float(ranges.max() / ranges.min())


@pytest.mark.parametrize("act", [nn.ReLU, lambda: nn.LeakyReLU(0.1), lambda: nn.PReLU(8)])
def test_the_function_stays_and_the_ranges_become_equal(act):
    model = chain(act)
    result = equalize(model)
    with torch.no_grad():
        torch.testing.assert_close(result(X), model(X), rtol=1e-4, atol=1e-3)
    layers = [m for m in result.modules() if isinstance(m, nn.Conv2d)]
    for first, second, columns in (
        (layers[0], layers[1], (1, 2, 3)),
        (layers[1], layers[2], (0, 2, 3)),
    ):
        before = first.weight.abs().amax(dim=(1, 2, 3))
        after = second.weight.abs().amax(dim=columns)
        torch.testing.assert_close(before, after, rtol=0.05, atol=1e-6)
    first = lowbit.quantize(result, "w4a8")
    note = next(r.note for r in lowbit.summary(first).rows if r.name == "3")
    assert "equalized with '0'" in note
    assert "equalized with '5'" in note


def test_quantization_gains():
    model = chain()
    with torch.no_grad():
        wanted = model(X)
        plain, equal = (lowbit.quantize(m, "w4a8")(X) for m in (model, equalize(model)))
    assert (equal - wanted).norm() < (plain - wanted).norm()


def test_grouped_layers_and_linears():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.Flatten()
    )
    linear = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    for side, x in ((model, torch.randn(2, 4, 6, 6)), (linear, torch.randn(4, 5))):
        result = equalize(side.eval())
        with torch.no_grad():
            torch.testing.assert_close(result(x), side(x), rtol=1e-4, atol=1e-5)
        assert not torch.equal(next(result.parameters()), next(side.parameters()))


def test_relu6_is_left_alone_unless_it_may_go():
    model = chain(nn.ReLU6)
    with pytest.warns(UserWarning, match="2 pairs have ReLU6 between them"):
        kept = equalize(model)
    with torch.no_grad():
        torch.testing.assert_close(kept(X), model(X), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replaced = equalize(model, relu6="relu")
    assert not any(isinstance(m, nn.ReLU6) for m in replaced.modules())
    assert any(isinstance(m, nn.ReLU6) for m in model.modules())
    small = 1e-3 * X  # nothing gets to 6
    with torch.no_grad():
        model[3].bias.zero_()
        model[1].bias.zero_()
        model[1].running_mean.zero_()
        model[3].weight.clamp_(-1, 1)
        wanted = model(small)
        torch.testing.assert_close(
            equalize(model, relu6="relu")(small), wanted, rtol=1e-3, atol=1e-5
        )
    with pytest.raises(ValueError, match="relu6"):
        equalize(model, relu6="clip")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        y = self.act(self.a(x))
        return y + self.b(y)


def test_an_output_that_goes_elsewhere_is_left_alone():
    model = Residual()
    with pytest.warns(UserWarning, match="nothing was equalized"):
        result = equalize(model)
    assert torch.equal(result.a.weight, model.a.weight)


class Attention(nn.Module):
    """A pre-norm block; with `post`, its norm goes into the sum, too."""

    def __init__(self, post=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.post = nn.LayerNorm(16), post
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.norm.weight[3] = 60.0  # an outlier

    def forward(self, x):
        y = self.norm(x)
        return (y if self.post else x) + torch.tanh(self.q(y)) * self.k(y)


def tokens(seed=0):
    return torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(seed))


def test_smoothing_keeps_the_function_and_takes_the_outliers():
    model = Attention()
    result = smooth(model, [tokens(), tokens(1)])
    x = tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-3, atol=1e-3)
        before, after = (m.norm(x).abs().amax(dim=(0, 1)) for m in (model, result))
        assert after.max() / after.median() < 0.5 * before.max() / before.median()
        errors = [float((lowbit.quantize(m, "w8a8")(x) - model(x)).norm()) for m in (model, result)]
    assert errors[1] < 0.7 * errors[0]
    assert float(model.norm.weight[3].detach()) == 60.0


def test_a_norm_that_feeds_a_sum_is_left_alone():
    model = Attention(post=True)
    with pytest.warns(UserWarning, match="of 1 norms that Linear layers follow"):
        result = smooth(model, [tokens()])
    for one, two in zip(model.parameters(), result.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_smooth_refuses():
    with pytest.raises(ValueError, match="alpha"):
        smooth(Attention(), [tokens()], alpha=1.5)
    with pytest.raises(ValueError, match="NaN"):
        smooth(Attention(), [tokens() * torch.nan])
    with pytest.raises(ValueError, match="holds no batch"):
        smooth(Attention(), [])
