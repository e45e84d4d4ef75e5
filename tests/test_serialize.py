"""Files: what comes back is what was written."""

from __future__ import annotations

import copy

import pytest
import torch
from models import RaggedNet as Net
from models import assert_same_tensors, trained
from safetensors.torch import load_file as load_tensors
from torch import nn

import lowbit
from lowbit import rules
from lowbit.rules import PaddedConv2d
from lowbit.serialize import FileFormatError

SCHEMES = ["w8a8", "w4a8", "w4a16-g32", "w2a8", "wta8", "w1a8-g64", "w1a1"]


# --- Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("source", ["float", "meta", "converted"])
def test_round_trip_is_bit_equal(tmp_path, scheme, source):
    model = lowbit.quantize(trained(Net()), scheme, overrides={"head": "w8a8"})
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)
    if source == "meta":
        with torch.device("meta"):
            target = Net().eval()
    else:
        target = Net().eval()
    if source == "converted":
        target = lowbit.quantize(target, scheme, overrides={"head": "w8a8"})

    loaded = lowbit.load_file(target, path)

    assert loaded is target
    assert_same_tensors(loaded, model)
    x = torch.randn(3, 3, 17, 16)
    assert torch.equal(loaded(x), model(x))
    assert loaded.fc._fqn == "fc"
    assert loaded.fc.scheme == model.fc.scheme
    assert lowbit.summary(loaded) == lowbit.summary(model)


def test_float_layers_and_their_reasons_come_back(saved):
    model, path = saved
    loaded = lowbit.load_file(Net().eval(), path)
    assert type(loaded.head) is nn.Linear
    assert loaded.head.weight.requires_grad
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert lowbit.summary(loaded) == lowbit.summary(model)
    assert lowbit.summary(loaded).kept[0].note == "override 'head' is None"


def test_a_model_that_is_a_layer(tmp_path):
    layer = lowbit.quantize(nn.Linear(40, 30), "w2a8")
    lowbit.save_file(layer, tmp_path / "layer.safetensors")
    loaded = lowbit.load_file(nn.Linear(40, 30), tmp_path / "layer.safetensors")
    assert isinstance(loaded, lowbit.nn.Linear)
    x = torch.randn(2, 40)
    assert torch.equal(loaded(x), layer(x))


def test_layers_built_as_lowbit_layers(tmp_path):
    def build():
        return nn.Sequential(lowbit.nn.Linear(40, 30, scheme="w8a8"), nn.ReLU())

    model = build()
    model[0] = lowbit.nn.Linear.from_float(nn.Linear(40, 30), "w8a8")
    lowbit.save_file(model, tmp_path / "model.safetensors")
    loaded = lowbit.load_file(build(), tmp_path / "model.safetensors")
    assert_same_tensors(loaded, model)


def test_training_flags_are_the_model_s(saved):
    _, path = saved
    model = Net().eval()
    model.fc.train()
    loaded = lowbit.load_file(model, path)
    assert {name: m.training for name, m in loaded.named_modules() if m.training} == {"fc": True}


def test_convolutions_that_pad_themselves(tmp_path):
    utilities = pytest.importorskip("efficientnet_lite_pytorch.utils")

    def build():
        conv = utilities.Conv2dStaticSamePadding
        return nn.Sequential(
            conv(3, 8, 3, stride=2, image_size=16), conv(8, 8, 3, image_size=8, groups=8)
        )

    model = lowbit.quantize(build(), "w4a8")
    lowbit.save_file(model, tmp_path / "model.safetensors")
    loaded = lowbit.load_file(build(), tmp_path / "model.safetensors")
    assert isinstance(loaded[0], PaddedConv2d)
    assert isinstance(loaded[1], lowbit.nn.Conv2d)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))
    assert lowbit.summary(loaded) == lowbit.summary(model)


def test_registered_converters(tmp_path, monkeypatch):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Doubles(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return 2 * self.linear(x)

    monkeypatch.setattr(rules, "_registered", {})
    lowbit.register_converter(
        Doubled, lambda m, scheme: Doubles(lowbit.nn.Linear.from_float(m, scheme))
    )
    model = lowbit.quantize(nn.Sequential(Doubled(40, 30)), "w4a8")
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)
    with torch.device("meta"):
        target = nn.Sequential(Doubled(40, 30))
    loaded = lowbit.load_file(target, path)
    x = torch.randn(2, 40)
    assert torch.equal(loaded(x), model(x))

    monkeypatch.setattr(rules, "_registered", {})
    with pytest.raises(FileFormatError, match=r"layer '0' .*register_converter"):
        lowbit.load_file(nn.Sequential(Doubled(40, 30)), path)


def test_converted_encoder_layers_run_after_loading(tmp_path):
    def build():
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()

    model = lowbit.quantize(build(), "w4a8")
    lowbit.save_file(model, tmp_path / "model.safetensors")
    loaded = lowbit.load_file(build(), tmp_path / "model.safetensors")
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
        y, expected = (m(x, src_key_padding_mask=mask) for m in (loaded, model))
    assert torch.equal(y, expected)


def test_hooks_and_attributes_of_the_float_layer_stay(saved):
    _, path = saved
    model = Net().eval()
    calls = []
    handle = model.fc.register_forward_hook(lambda *_: calls.append(1))
    model.fc.role = "embedding"
    loaded = lowbit.load_file(model, path)
    loaded(torch.randn(1, 3, 8, 8))
    assert calls == [1]
    assert loaded.fc.role == "embedding"
    handle.remove()
    loaded(torch.randn(1, 3, 8, 8))
    assert calls == [1]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.complex64, torch.bfloat16, torch.float64, torch.int16], ids=str
)
def test_buffers_of_other_dtypes(tmp_path, dtype):
    model = nn.Sequential(lowbit.quantize(nn.Linear(32, 5), "w8a8"))
    model.register_buffer("table", torch.randn(3, 5).to(dtype).t())
    model.register_buffer("one", torch.ones((), dtype=dtype))
    model.register_buffer("none", torch.ones(0, 3, dtype=dtype))
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)
    assert_same_tensors(lowbit.load_file(copy.deepcopy(model), path), model)


# --- Shared tensors ------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied=True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.body = nn.Linear(32, 32)
        self.again = self.body if tied else nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.again(self.body(self.embedding(tokens))))


def test_shared_tensors_are_written_once_and_stay_shared(tmp_path):
    model = lowbit.quantize(Tied(), "w4a8", overrides={"head": None})
    assert model.head.weight is model.embedding.weight
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)
    names = set(load_tensors(path))
    assert len(names & {"head.weight", "embedding.weight"}) == 1
    assert len(names & {"body.weight_packed", "again.weight_packed"}) == 1
    loaded = lowbit.load_file(Tied(), path)
    assert loaded.body._fqn == "body"
    tokens = torch.arange(40)
    model.eval(), loaded.eval()
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.again is loaded.body
    assert loaded.head.weight is loaded.embedding.weight
    assert lowbit.summary(loaded) == lowbit.summary(model)


def test_layers_that_hold_one_packed_weight_do_so_after_loading(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        return model

    model = lowbit.quantize(build(), "w4a8")
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)
    assert "1.weight_packed" not in load_tensors(path)
    loaded = lowbit.load_file(build(), path)
    assert loaded[0].weight_packed.data_ptr() == loaded[1].weight_packed.data_ptr()
    assert_same_tensors(loaded, model)


def test_an_untied_file_unties_the_parameters_of_the_model(tmp_path):
    model = lowbit.quantize(Tied(tied=False), "w4a8", overrides={"head": None})
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)
    target = Tied()
    with pytest.raises(FileFormatError, match="'body' and 'again' are one module"):
        lowbit.load_file(target, path)
    target.again = nn.Linear(32, 32)
    loaded = lowbit.load_file(target, path)
    assert_same_tensors(loaded, model)
    assert loaded.head.weight is not loaded.embedding.weight


def test_overlapping_tensors_are_written_apart(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    memory = torch.randn(96)
    model.register_buffer("low", memory[:64])
    model.register_buffer("high", memory[32:])
    model.register_buffer("strided", torch.randn(4, 6).t())
    quantized = lowbit.quantize(model, "w4a8")
    lowbit.save_file(quantized, tmp_path / "model.safetensors")
    loaded = lowbit.load_file(model, tmp_path / "model.safetensors")
    assert_same_tensors(loaded, quantized)
