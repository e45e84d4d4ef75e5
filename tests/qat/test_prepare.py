"""Models that are prepared, trained, saved, resumed and converted."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from models import row
from torch import nn

import lowbit
from lowbit import qat


def net():
    return models.trained(models.Net())


def batch(n=6):
    """Images that a network of this size can tell apart."""
    labels = torch.arange(n) % 5
    return torch.randn(n, 3, 9, 8) + torch.randn(5, 3, 1, 1)[labels], labels


def fit(model, steps, optimizer=None, seed=0):
    """Trains, and returns the losses and the optimizer."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 3, 9, 8, generator=generator)
        loss = F.cross_entropy(model(x), torch.arange(6) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


@pytest.mark.parametrize("scheme", [*lowbit.RECIPES, "w4a8-g32", "w1a8-g32"])
def test_the_trained_model_in_eval_mode_is_the_deployed_model(scheme):
    prepared = lowbit.prepare_qat(net(), scheme)
    fit(prepared, 4)
    x, _ = batch()
    with torch.no_grad():
        trained = prepared.eval()(x)
        deployed = lowbit.convert(prepared)
        assert torch.equal(deployed(x), trained)
        assert all(torch.equal(deployed(x[i : i + 1])[0], trained[i]) for i in range(2))
    assert not any(isinstance(module, qat.QATLayer) for module in deployed.modules())
    assert type(deployed.stem) is lowbit.nn.Conv2d


def test_before_training_it_is_what_quantize_makes():
    model, (x, _) = net(), batch()
    with torch.no_grad():
        y = lowbit.prepare_qat(model, "w8a8")(x)
        torch.testing.assert_close(y, lowbit.quantize(model, "w8a8")(x), rtol=0, atol=0.02)
        plain = lowbit.prepare_qat(model, "w4a8", fuse=False)(x)
        assert torch.equal(plain, lowbit.quantize(model, "w4a8", fuse=False)(x))


def test_the_model_is_a_copy_in_the_same_modes():
    model = net()
    model.norm.train()
    before = models.state(model)
    prepared = lowbit.prepare_qat(model, "w4a8")
    assert prepared.stem.norm.training
    assert not prepared.stem.training
    assert type(prepared.norm) is nn.Identity
    fit(prepared, 2)
    models.assert_same_state(model, before)
    assert type(model.stem) is nn.Conv2d


def test_converting_leaves_the_prepared_model_to_train_on():
    prepared = lowbit.prepare_qat(net(), "w4a8")
    fit(prepared, 1)
    before = models.state(prepared)
    deployed = lowbit.convert(prepared)
    assert not any(module.training for module in deployed.modules())
    assert prepared.training
    models.assert_same_state(prepared, before)
    fit(prepared, 1)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=3e-3),
}


@pytest.mark.parametrize("scheme", ["w4a8", "w1a8"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_lowers_the_loss_and_is_seen_by_eval_mode(name, scheme):
    prepared = lowbit.prepare_qat(net(), scheme).train()
    optimizer = OPTIMIZERS[name](prepared.parameters())
    x, labels = batch()
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(prepared(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    prepared.eval()
    with torch.no_grad():
        before = prepared(x)
        for _ in range(2):
            optimizer.step()  # with the gradients of the last
            after = prepared(x)
            assert not torch.equal(after, before)
            assert torch.equal(after, lowbit.convert(prepared)(x))
            before = after


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w2a8", "wta8", "w1a1"])
def test_checkpoints_resume_exactly(scheme, tmp_path):
    first = lowbit.prepare_qat(net(), scheme)
    _, optimizer = fit(first, 3)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, path)
    wanted, _ = fit(first, 4, optimizer, seed=7)

    torch.manual_seed(5)  # other weights, other scales
    second = lowbit.prepare_qat(net(), scheme)
    saved = torch.load(path)
    second.load_state_dict(saved["model"])
    optimizer = torch.optim.Adam(second.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    found, _ = fit(second, 4, optimizer, seed=7)
    assert found == wanted
    models.assert_same_tensors(first, second)
    models.assert_same_tensors(lowbit.convert(first), lowbit.convert(second))


def test_whole_models_are_copied_and_pickled(tmp_path):
    prepared = lowbit.prepare_qat(net(), "w4a8")
    fit(prepared, 2)
    path = tmp_path / "model.pt"
    torch.save(prepared, path)
    for other in (copy.deepcopy(prepared), torch.load(path, weights_only=False)):
        wanted, _ = fit(copy.deepcopy(prepared), 3)
        found, _ = fit(other, 3)
        assert found == wanted


def test_overrides_and_filter():
    prepared = lowbit.prepare_qat(
        net(),
        "w2a8",
        overrides={"stem": "w8a8", "fc": None, r"re:blocks\.[01]": lowbit.Scheme("int4")},
        filter_fn=lambda module, name: name != "blocks.1",
    )
    assert prepared.stem.scheme.name == "w8a8"
    assert [type(block) for block in prepared.blocks] == [qat.Conv2d, nn.Conv2d, qat.Conv2d]
    assert [prepared.blocks[i].scheme.name for i in (0, 2)] == ["w4a8", "w2a8"]
    assert "override 'fc' is None" in row(prepared, "fc").note
    deployed = lowbit.convert(prepared)
    assert models.schemes(deployed) == {
        "stem": "w8a8",
        "norm": "folded",
        "blocks.0": "w4a8",
        "blocks.1": "float32",
        "blocks.2": "w2a8",
        "fc": "float32",
    }


def test_the_account_before_and_after():
    prepared = lowbit.prepare_qat(net(), "w4a8")
    assert row(prepared, "stem").note == "trains as w4a8; batch norm 'norm' folded in"
    assert row(prepared, "norm").removed
    assert not lowbit.summary(prepared).converted
    deployed, quantized = (
        {r.name: r for r in lowbit.summary(model).rows}
        for model in (lowbit.convert(prepared), lowbit.quantize(net(), "w4a8"))
    )
    assert deployed == quantized


def test_deployed_models_are_written_and_read(tmp_path):
    prepared = lowbit.prepare_qat(net(), "w4a8")
    fit(prepared, 2)
    deployed = lowbit.convert(prepared)
    path = tmp_path / "model.safetensors"
    lowbit.save_file(deployed, path)
    x, _ = batch()
    assert torch.equal(lowbit.load_file(net(), path)(x), deployed(x))


def test_a_layer_by_itself():
    prepared = lowbit.prepare_qat(nn.Linear(8, 4), "w4a8")
    x = torch.randn(3, 8)
    assert type(prepared) is qat.Linear
    assert torch.equal(prepared.eval()(x), lowbit.convert(prepared)(x))


def test_shared_layers_and_tied_weights_stay_so():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 8))
    model[3].weight = shared.weight
    prepared = lowbit.prepare_qat(model, "w4a8")
    assert prepared[0] is prepared[2]
    assert prepared[3].weight is prepared[0].weight
    deployed = lowbit.convert(prepared)
    assert deployed[0] is deployed[2]
    x = torch.randn(2, 8)
    assert torch.equal(deployed(x), prepared.eval()(x))


def test_hooks_and_attributes_of_users_are_carried_to_the_deployed_layer():
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].note = "mine"
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    prepared = lowbit.prepare_qat(model, "w4a8").eval()
    x = torch.randn(2, 8)
    y = prepared(x)
    deployed = lowbit.convert(prepared)
    assert torch.equal(deployed(x), y)
    assert deployed[0].note == "mine"
    assert "_deployed" not in vars(deployed[0])


def test_what_cannot_be_trained_stays_float_and_says_why():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), Own(36, 2)
    )
    prepared = lowbit.prepare_qat(model, "w4a8")
    assert type(prepared[0]) is qat.Conv2d
    assert type(prepared[1]) is nn.ConvTranspose2d
    assert type(prepared[2]) is nn.BatchNorm2d
    assert "training of ConvTranspose2d is not supported yet" in row(prepared, "1").note
    assert "'1' before it stays float" in row(prepared, "2").note
    assert "overrides the forward" in row(prepared, "4").note
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(lowbit.convert(prepared)(x), prepared.eval()(x))


def test_transformer_encoders_call_their_prepared_layers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    prepared = lowbit.prepare_qat(model, "w2a8")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = prepared(x)
        assert torch.equal(lowbit.convert(prepared)(x), y)
        assert not torch.allclose(model(x), y, atol=1e-3)


def test_errors_are_named():
    prepared = lowbit.prepare_qat(net(), "w4a8")
    with pytest.raises(ValueError, match="prepared already"):
        lowbit.prepare_qat(prepared, "w4a8")
    with pytest.raises(ValueError, match=r"lowbit\.prepare_qat"):
        lowbit.convert(net())
    with pytest.raises(ValueError, match="override 'nope' matches no layer"):
        lowbit.prepare_qat(net(), "w4a8", overrides={"nope": None})
    with pytest.raises(ValueError, match="unknown scheme"):
        lowbit.prepare_qat(net(), "w5a8")
    with pytest.raises(ValueError, match=r"no layer can be prepared.*the scheme is None"):
        lowbit.prepare_qat(net(), None)
    with pytest.raises(ValueError, match="no layer can be prepared: the model has none"):
        lowbit.prepare_qat(nn.ReLU(), "w4a8")
    broken = net()
    broken.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 'fc': 1 of the 40 weights are NaN"):
        lowbit.prepare_qat(broken, "w4a8")
    prepared.blocks[1].weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"'blocks\.1'.*'weight' are NaN or Inf"):
        lowbit.convert(prepared)


@pytest.mark.filterwarnings("ignore:no layer was converted")
def test_quantize_says_what_a_prepared_layer_is():
    prepared = lowbit.prepare_qat(net(), "w4a8")
    assert "lowbit.convert" in row(lowbit.quantize(prepared, "w4a8"), "fc").note


def test_activations_stay_modules(tmp_path):
    """In training and deployed, also where `quantize` would move them into layers."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    model.eval()
    prepared = lowbit.prepare_qat(model, "w4a8")
    assert type(prepared[2]) is nn.ReLU6
    assert "followed by" not in row(prepared, "0").note
    deployed = lowbit.convert(prepared)
    x = torch.randn(2, 3, 9, 9)
    y = deployed(x)
    assert type(deployed[2]) is nn.ReLU6
    assert deployed[0].epilogue == "none"
    assert "followed by" not in row(deployed, "0").note
    path = tmp_path / "model.safetensors"
    lowbit.save_file(deployed, path)
    loaded = lowbit.load_file(model, path)
    assert type(loaded[2]) is nn.ReLU6
    assert torch.equal(loaded(x), y)
