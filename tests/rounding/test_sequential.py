"""Rounding whole models with calibration data: what layers see, what users get, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit.convert import quantize_alone
from lowbit.quantizers import dequantize_weight
from lowbit.rounding.moments import Moments, float_matrix, rows_of
from lowbit.schemes import Scheme


def images(count=4, channels=3, size=10, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 1),
        )
        self.head = nn.Linear(24, 10)
        self.unused = nn.Linear(24, 10)
        self.features[1].running_mean.normal_()
        self.features[1].running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def data(seed=0):
    return [images(seed=10 * seed + i) for i in range(6)]


def error(model, quantized, seed=7):
    x = torch.cat(data(seed))
    with torch.no_grad():
        return float((model(x) - quantized(x)).square().mean() / model(x).square().mean())


CONVOLUTIONS = [
    nn.Conv2d(6, 8, 3, padding=1),
    nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
    nn.Conv2d(6, 8, (2, 3), stride=(2, 1), groups=2, padding=(1, 0)),
    nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"),
    nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2),
    nn.Linear(6, 5),
]


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("scheme", ["w4a8", "wta8"])
def test_rows_times_the_matrix_are_the_outputs(module, scheme):
    """The oracle is the float layer itself, at all of its positions."""
    layer = lowbit.quantize(module, scheme)
    x = images(2, 6, 7)
    x = x[:, :, 0] if isinstance(module, nn.Conv1d) else x
    x = x.movedim(1, -1) if isinstance(module, nn.Linear) else x
    rows = rows_of(layer, x, 0)
    matrix, _ = float_matrix(layer, module.weight.detach())
    found = rows @ matrix.view(len(rows), -1, matrix.shape[1]).transpose(1, 2)
    with torch.no_grad():
        wanted = module(x) - (module.bias if isinstance(module, nn.Linear) else 0)
    if not isinstance(module, nn.Linear):
        wanted = wanted.movedim(1, -1) - module.bias
    wanted = wanted.reshape(-1, len(rows), found.shape[2]).movedim(1, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_large_images_give_some_of_their_positions():
    layer = lowbit.quantize(nn.Conv2d(3, 4, 3), "w4a8")
    x = images(2, 3, 30)
    rows = rows_of(layer, x, 5)
    assert rows.shape == (1, 2 * 128, 27)
    assert torch.equal(rows, rows_of(layer, x, 5))
    assert not torch.equal(rows, rows_of(layer, x, 6))
    all_rows = F.unfold(x, 3).transpose(1, 2).reshape(-1, 3, 9).transpose(1, 2).reshape(-1, 27)
    assert {tuple(r) for r in rows[0].tolist()} <= {tuple(r) for r in all_rows.tolist()}


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("scheme", ["w4a8", "w4a1", "w4a8-static", "w4a16-static"])
def test_rounded_rows_are_what_the_kernel_sees(module, scheme):
    """With the values of the codes they give the lowbit layer's outputs."""
    x = images(2, 6, 7)
    x = x[:, :, 0] if isinstance(module, nn.Conv1d) else x
    x = x.movedim(1, -1) if isinstance(module, nn.Linear) else x
    layer = lowbit.quantize(module, scheme, calibration=[x] if "static" in scheme else None)
    rows = rows_of(layer, x, 0, rounded=True)
    matrix = dequantize_weight(layer.quantized_weight())
    found = rows @ matrix.view(len(rows), -1, matrix.shape[1]).transpose(1, 2)
    found = found + layer.bias.view(len(rows), 1, -1)
    wanted = layer(x) if isinstance(module, nn.Linear) else layer(x).movedim(1, -1)
    wanted = wanted.reshape(-1, len(rows), found.shape[2]).movedim(1, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_the_target_makes_up_for_inputs_that_have_changed(centred):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 8, generator=random)
    mix = torch.eye(8) + 0.2 * torch.randn(8, 8, generator=random)
    z = x @ mix + 1.0 * centred
    w = torch.randn(3, 8, generator=random)
    moments = Moments.like(x)
    for a, b in zip(x.split(100, 1), z.split(100, 1), strict=True):
        moments.add(a, b)
    target = moments.target(w, centred)
    wanted, plain, found = x[0] @ w.T, z[0] @ w.T, z[0] @ target.T
    found = found + moments.shift(w, target)
    plain = plain + moments.shift(w, w)
    assert (found - wanted).square().mean() < 0.01 * (plain - wanted).square().mean()
    torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=1e-3, atol=1e-3)
    covariance = torch.cov(z[0].double().T, correction=0)
    second = (z[0].double().T @ z[0].double()) / 400
    expected = covariance if centred else second
    torch.testing.assert_close(moments.hessian(centred)[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheme", ["w4a8-gptq", "w2a8-descent", "w2a8-g32-descent", "w4a8-adaround"]
)
def test_outputs_on_other_data_come_nearer(scheme):
    model = Net()
    plain = lowbit.quantize(model, scheme.rsplit("-", 1)[0])
    better = lowbit.quantize(model, scheme, calibration=data())
    assert error(model, better) < 0.7 * error(model, plain)
    assert type(better.features[0]) is lowbit.nn.Conv2d
    assert better.features[0].scheme.name == scheme
    assert better.features[0].epilogue == "relu"


def test_static_activations_and_weights_learn_from_the_same_data():
    model = Net()
    plain = lowbit.quantize(model, "w2a8-static", calibration=data())
    better = lowbit.quantize(model, "w2a8-static-descent", calibration=data())
    assert error(model, better) < 0.7 * error(model, plain)
    assert better.head.scheme.name == "w2a8-static-descent"
    assert float(better.head.activation_scale) > 0


@pytest.mark.parametrize("scheme", ["w4a8-gptq", "w2a8-g32-descent"])
def test_the_same_in_place_by_a_generator_and_in_a_file(scheme, tmp_path):
    model = Net()
    copied = lowbit.quantize(model, scheme, calibration=data(), correct_bias=True)
    again = copy.deepcopy(model)
    lowbit.quantize_(again, scheme, calibration=(batch for batch in data()), correct_bias=True)
    for key, value in copied.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    lowbit.save_file(copied, tmp_path / "model.safetensors")
    loaded = lowbit.load_file(model, tmp_path / "model.safetensors")
    x = images()
    assert torch.equal(copied(x), loaded(x))


def test_the_model_is_left_as_it_was():
    model = Net()
    model.features[3].train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lowbit.quantize(model, "w4a8-gptq", calibration=data(), block_steps=3)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert model.features[3].training
    assert not model.features[0].training
    for key, value in before.items():
        assert torch.equal(value, model.state_dict()[key])


def test_overrides_choose_the_quantizer_layer_by_layer():
    model = Net()
    q = lowbit.quantize(
        model, "w4a8", overrides={"features.3": "w8a8-gptq", "head": None}, calibration=data()
    )
    names = [q.features[i].scheme.name for i in (0, 3, 5)]
    assert names == ["w4a8", "w8a8-gptq", "w4a8"]
    assert type(q.head) is nn.Linear
    plain = lowbit.quantize(model, "w4a8")
    assert torch.equal(q.features[0].weight_packed, plain.features[0].weight_packed)


def test_the_account_names_what_no_data_reached():
    report = lowbit.summary(lowbit.quantize(Net(), "w4a8-gptq", calibration=data()))
    row = next(row for row in report.rows if row.name == "unused")
    assert "the calibration data never reach it: mse instead" in row.note
    assert row.scheme == "w4a8"
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Conv2d(4, 4, 1))
    report = lowbit.summary(lowbit.quantize(transposed, "w4a8-gptq", calibration=data()))
    assert "ConvTranspose2d is not rounded for its inputs: mse instead" in report.rows[0].note
    assert report.rows[1].scheme == "w4a8-gptq"


def test_corrected_biases_keep_the_means():
    model = Net()
    with torch.no_grad():
        model.head.weight += 0.2  # a mean for its rounding to move
    plain = lowbit.quantize(model, "w2a8")
    corrected = lowbit.quantize(model, "w2a8", calibration=data(), correct_bias=True)
    x = torch.cat(data())
    with torch.no_grad():
        wanted = model(x).mean(0)
        assert (corrected(x).mean(0) - wanted).abs().max() < 1e-3
        assert (plain(x).mean(0) - wanted).abs().max() > 1e-2
    assert torch.equal(plain.head.weight_packed, corrected.head.weight_packed)
    note = next(r.note for r in lowbit.summary(corrected).rows if r.name == "features.0")
    assert "bias corrected" in note


def test_layers_alone_are_rounded_for_the_inputs_of_the_float_model():
    """The oracle converts one layer at a time."""
    model = Net()
    alone = quantize_alone(
        model,
        Scheme.parse("w2a8-gptq"),
        filter_fn=None,
        fuse=True,
        calibration=data(),
        forward_fn=None,
        correct_bias=True,
    )
    behind = lowbit.quantize(model, "w2a8-gptq", calibration=data(), correct_bias=True)
    for name in ("features.0", "features.3", "features.5", "head"):
        one = lowbit.quantize(
            model, None, overrides={name: "w2a8-gptq"}, calibration=data(), correct_bias=True
        )
        wanted, found, other = (q.get_submodule(name).state_dict() for q in (one, alone, behind))
        for key, value in wanted.items():
            assert torch.equal(found[key], value), (name, key)
        same = all(torch.equal(other[key], value) for key, value in wanted.items())
        assert same == (name == "features.0")


def test_layers_called_twice_and_transformers():
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    twice = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(16, 4)).eval()
    x = [torch.randn(64, 16) for _ in range(3)]
    q = lowbit.quantize(twice, "w4a8-gptq", calibration=x)
    assert q[0] is q[2]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = [torch.randn(4, 6, 16) for _ in range(3)]
    report = lowbit.summary(lowbit.quantize(encoder, "w4a8-gptq", calibration=x))
    schemes = [row.scheme for row in report.rows if row.name.endswith(("linear1", "linear2"))]
    assert schemes == ["w4a8-gptq"] * 4


def test_batches_are_run_as_the_user_says():
    model = Net()
    batches = [{"pixels": x} for x in data()]
    seen = []

    def forward(side, batch):
        seen.append(side is model)
        return side(batch["pixels"])

    q = lowbit.quantize(model, "w4a8-gptq", calibration=batches, forward_fn=forward, steps=2)
    same = lowbit.quantize(model, "w4a8-gptq", calibration=data()[:2])
    assert torch.equal(q.head.weight_packed, same.head.weight_packed)
    assert seen
    assert all(seen)


def test_what_is_refused():
    model = Net()
    with pytest.raises(ValueError, match=r"layer 'features.0': quantizer 'gptq' needs calibration"):
        lowbit.quantize(model, "w4a8-gptq")
    with pytest.raises(ValueError, match="belong to calibration data"):
        lowbit.quantize(model, "w4a8", correct_bias=True)
    with pytest.raises(ValueError, match="learns from calibration data"):
        lowbit.quantize(model, "w4a8", calibration=data())
    with pytest.raises(ValueError, match="holds no batch"):
        lowbit.quantize(model, "w4a8-gptq", calibration=[])
    bad = data()
    bad[2][1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'features\.0': batch 2 of the calibration data"):
        lowbit.quantize(model, "w4a8-gptq", calibration=bad)
    with pytest.raises(ValueError, match="give it empty inputs"):
        lowbit.quantize(model, "w4a8-gptq", calibration=[images(0)])
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_group_of_convolutions_has_moments_of_its_own():
    layer = lowbit.quantize(nn.Conv2d(4, 8, 3, padding=1, groups=2), "w4a8")
    rows = rows_of(layer, images(2, 4, 5), 0)
    assert rows.shape == (2, 50, 18)
    moments = Moments.like(rows)
    moments.add(rows, rows)
    expected = torch.stack([r.double().T @ r.double() / 50 for r in rows])
    torch.testing.assert_close(moments.hessian(False).double(), expected, rtol=1e-5, atol=1e-6)
    assert dequantize_weight(layer.quantized_weight()).shape == (8, 18)


def test_a_bare_layer_and_other_dtypes():
    x = [torch.randn(50, 24) @ torch.randn(24, 24) for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer = nn.Linear(24, 8).to(dtype)
        batches = [batch.to(dtype) for batch in x]
        plain = lowbit.quantize(layer, "w2a8")
        better = lowbit.quantize(layer, "w2a8-gptq", calibration=batches)
        with torch.no_grad():
            wanted = layer(batches[0]).float()
            errors = [(side(batches[0]).float() - wanted).norm() for side in (better, plain)]
        assert errors[0] < errors[1]


def test_tied_weights_are_rounded_for_the_inputs_of_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    model[2].weight = model[0].weight
    x = [torch.randn(64, 16) for _ in range(3)]
    q = lowbit.quantize(model, "w2a8-gptq", calibration=x)
    assert q[0].weight_packed is not q[2].weight_packed
    assert not torch.equal(q[0].weight_packed, q[2].weight_packed)
    plain = lowbit.quantize(model, "w2a8", calibration=x, correct_bias=True)
    assert plain[0].weight_packed is plain[2].weight_packed


def test_a_model_that_takes_another_path_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

        def forward(self, x):
            self.calls += 1
            return self.one(x) if self.calls > 2 else self.two(self.one(x))

    with pytest.raises(ValueError, match="takes the same path each time"):
        lowbit.quantize(Fickle(), "w4a8-gptq", calibration=[torch.randn(8, 4)] * 2)
