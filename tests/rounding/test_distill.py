"""A whole model that learns from its float self: outputs get nearer, nothing else changes."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.rounding import distill


class Net(nn.Module):
    """A convolution with an epilogue, a depthwise one, a residual sum and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU6()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = x + self.depthwise(x)
        return self.head(x.mean((2, 3)))


def data(seed, count=9):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 6, 6, generator=random) for _ in range(count)]


def error(model, quantized):
    x = torch.cat(data(1, 16))
    with torch.no_grad():
        return float((model(x) - quantized(x)).square().mean())


@pytest.mark.parametrize("scheme", ["w2a8", "w4a8", "w2a16-g32-hqq"])
def test_outputs_get_nearer(scheme):
    model = Net().eval()
    before, once, again = (lowbit.quantize(model, scheme) for _ in range(3))
    found = [lowbit.distill_(side, model, data(0), steps=150) for side in (once, again)]
    assert found[0] == found[1]
    assert found[0][1] < 0.7 * found[0][0]
    assert error(model, once) < 0.7 * error(model, before)
    for key, value in once.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
        assert value.shape == before.state_dict()[key].shape
    assert all(parameter.grad is None for parameter in model.parameters())
    note = next(row.note for row in lowbit.summary(once).rows if row.name == "head")
    assert "distilled: the model's error" in note


def test_layers_with_static_activations_learn_too():
    model = Net().eval()
    quantized = Net().eval()
    lowbit.quantize_(quantized, "w2a8-static", calibration=data(0))
    before = error(model, quantized)
    scales = [float(quantized.get_submodule(name).activation_scale) for name in ("stem", "head")]
    lowbit.distill_(quantized, model, data(0), steps=150)
    assert error(model, quantized) < 0.7 * before
    after = [float(quantized.get_submodule(name).activation_scale) for name in ("stem", "head")]
    assert after == scales


def test_what_is_no_better_is_thrown_away():
    model = Net().eval()
    quantized, untouched = (lowbit.quantize(model, "w4a8") for _ in range(2))
    before, after = lowbit.distill_(quantized, model, data(0), steps=5, rate=1e3)
    assert after == before
    for key, value in quantized.state_dict().items():
        torch.testing.assert_close(value, untouched.state_dict()[key])


def test_batches_kept_back_are_not_learned_from():
    seen = []

    def forward(side, batch):
        seen.append((torch.is_grad_enabled(), batch))
        return side(torch.full((1, 3, 6, 6), float(batch)))

    model = Net().eval()
    quantized = lowbit.quantize(model, "w4a8")
    batches = [torch.tensor(i) for i in range(10)]
    lowbit.distill_(quantized, model, lambda: iter(batches), steps=20, forward_fn=forward)
    learned = [int(batch) for with_gradient, batch in seen if with_gradient]
    assert learned == [0, *range(2, 9), 0, *range(2, 9), 0, *range(2, 5)]
    assert {int(batch) for with_gradient, batch in seen if not with_gradient} >= {1, 9}
    assert "forward" not in vars(quantized.stem)


def test_a_stream_is_read_anew_and_judged_by_its_first_pass():
    passes, judged, wanted = [], [], []

    def stream():
        passes.append(len(passes))
        return iter(data(passes[-1], 4))

    def forward(side, batch):
        if not torch.is_grad_enabled():
            (judged if side is quantized else wanted).append(batch)
        return side(batch)

    model = Net().eval()
    quantized = lowbit.quantize(model, "w4a8")
    lowbit.distill_(quantized, model, stream, steps=10, forward_fn=forward)
    assert len(passes) == 5  # one to keep a batch back, and four of three batches to learn from
    assert len(judged) == 6
    assert all(torch.equal(batch, data(0, 4)[1]) for batch in judged)
    # The float model runs once for each step, and once for the batch kept back.
    assert len(wanted) == 11
    assert torch.equal(wanted[0], judged[0])


def test_the_model_keeps_its_mode_and_its_forwards():
    model = Net()
    quantized = lowbit.quantize(model, "w4a8").train()

    def fails(side, batch):
        if torch.is_grad_enabled():
            side(batch)
            raise RuntimeError("no")
        return side(batch)

    with pytest.raises(RuntimeError, match="no"):
        lowbit.distill_(quantized, model, data(0), steps=3, forward_fn=fails)
    assert model.training
    assert quantized.training
    assert not any("forward" in vars(module) for module in quantized.modules())


def test_nothing_to_learn_is_an_error():
    model = Net().eval()
    with pytest.raises(ValueError, match="no layer can learn"):
        lowbit.distill_(model, model, data(0), steps=5)
    quantized = lowbit.quantize(model, "w4a8")
    with pytest.raises(ValueError, match="steps=0"):
        lowbit.distill_(quantized, model, data(0), steps=0)
    with pytest.raises(ValueError, match="two batches"):
        lowbit.distill_(quantized, model, data(0)[:1], steps=5)
    network = lowbit.quantize(model, "w8a8-static", calibration=data(0))
    with pytest.raises(ValueError, match="run in integers"):
        lowbit.distill_(network, model, data(0), steps=5)
    assert distill.HELD_OUT > 2
