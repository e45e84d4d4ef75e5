"""Conversion of attention and of torch's transformer layers, whose fused paths read weights."""

from __future__ import annotations

import copy

import pytest
import torch
from models import relative_error, row, schemes
from torch import nn

import lowbit


def test_attention_stays_float_and_says_so():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return self.fc(self.attention(x, x, x)[0])

    model = Block().eval()
    x = torch.randn(2, 5, 32)
    quantized = lowbit.quantize(model, "w8a8")
    with torch.inference_mode():
        assert relative_error(quantized(x), model(x)) < 0.05
    assert schemes(quantized) == {
        "attention": "float32",
        "attention.out_proj": "float32",
        "fc": "w8a8",
    }
    assert "in_proj" in row(quantized, "attention").note
    assert row(quantized, "attention").bytes_after == 4 * (96 * 32 + 96)
    assert "MultiheadAttention" in row(quantized, "attention.out_proj").note


def transformer_encoder(**options):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options).eval()


@pytest.fixture
def no_float_weights(monkeypatch):
    """The float weights of a lowbit layer must not be asked for."""

    def weight(self):
        raise RuntimeError("the layer was bypassed")

    def forbid():
        monkeypatch.setattr(lowbit.nn.Linear, "weight", property(weight))

    return forbid


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_encoder_layers_run_their_lowbit_layers(options, padded, mode, no_float_weights):
    model = transformer_encoder(**options)
    x = torch.randn(3, 6, 32)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    if padded:
        mask[0, 4:] = True
    arguments = {"src_key_padding_mask": mask} if padded else {}

    quantized = lowbit.quantize(model, "w4a8")

    # The reference: the float model on the slow path, with the weights that the codes mean.
    reference = copy.deepcopy(model)
    ran = []
    for name, module in quantized.named_modules():
        if isinstance(module, lowbit.nn.Linear):
            reference.get_submodule(name).load_state_dict(module.dequantize().state_dict())
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert not torch.equal(reference.layers[0].linear1.weight, model.layers[0].linear1.weight)
    no_float_weights()
    for hooked in (True, False):
        if not hooked:  # torch leaves its fused path for any hook: the values must prove it too
            for module in quantized.modules():
                module._forward_hooks.clear()
        with mode():
            y = quantized(x, **arguments)
            expected, float_y = reference(x, **arguments), model(x, **arguments)
        valid = ~mask
        assert relative_error(y[valid], expected[valid]) < 0.02
        assert relative_error(y[valid], float_y[valid]) > relative_error(y[valid], expected[valid])
    assert ran == [f"layers.{i}.{name}" for i in (0, 1) for name in ("linear1", "linear2")]
    for i in (0, 1):
        assert "fused path" in row(quantized, f"layers.{i}.linear2").note
    assert model.layers[0].activation_relu_or_gelu != 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_only_later_layers_converted_does_not_nest_its_input(no_float_weights):
    model = transformer_encoder()
    quantized = lowbit.quantize(model, None, overrides={"layers.1.linear2": "w8a8"})
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 3:] = True
    x = torch.randn(3, 6, 32)
    no_float_weights()
    with torch.inference_mode():
        y = quantized(x, src_key_padding_mask=mask)
        expected = model(x, src_key_padding_mask=mask)
    assert relative_error(y[~mask], expected[~mask]) < 0.02


def test_decoder_layers_convert():
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
    quantized = lowbit.quantize(model, "w8a8")
    source, target = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    with torch.inference_mode():
        assert relative_error(quantized(source, target), model(source, target)) < 0.05
    assert len(lowbit.summary(quantized).converted) == 4
