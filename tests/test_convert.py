"""Conversion of models: what is replaced, what is not and why, and what stays as it was."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import lowbit
from lowbit import rules
from lowbit.convert import register_converter
from lowbit.rules import PaddedConv2d


class Net(nn.Module):
    """A stem, a body and a head, with norms between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=g) for g in (1, 2, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def registry(monkeypatch):
    """Converters that a test registers are forgotten after it."""
    monkeypatch.setattr(rules, "_registered", dict(rules._registered))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def row(model, name):
    (found,) = [row for row in lowbit.summary(model).rows if row.name == name]
    return found


def relative_error(y, reference):
    return float((y - reference).detach().norm() / reference.detach().norm())


# --- What is converted ---------------------------------------------------------------------------


def test_quantize_copies_and_leaves_the_original_alone():
    model = Net().eval()
    before = state(model)
    x = torch.randn(2, 3, 12, 12)
    y = model(x)

    quantized = lowbit.quantize(model, "w8a8")

    assert_same_state(model, before)
    assert torch.equal(model(x), y)
    assert type(model.stem) is nn.Conv2d
    assert not any("lowbit" in key for m in model.modules() for key in vars(m))
    assert isinstance(quantized, Net)
    assert isinstance(quantized.stem, lowbit.nn.Conv2d)
    assert all(isinstance(block, lowbit.nn.Conv2d) for block in quantized.blocks)
    assert isinstance(quantized.fc, lowbit.nn.Linear)
    assert relative_error(quantized(x), y) < 0.05
    # What was not converted is a copy, not shared.
    quantized.norm.weight.data.zero_()
    assert_same_state(model, before)


def test_quantize_in_place_gives_what_quantize_gives():
    model = Net().eval()
    x = torch.randn(2, 3, 12, 12)
    quantized = lowbit.quantize(model, "w4a8")
    report = lowbit.quantize_(model, "w4a8")
    assert torch.equal(model(x), quantized(x))
    assert_same_state(model, state(quantized))
    assert report == lowbit.summary(model) == lowbit.summary(quantized)
    assert [r.name for r in report.converted] == ["stem", "blocks.0", "blocks.1", "blocks.2", "fc"]
    assert not report.kept


def test_layers_know_their_names_and_keep_the_training_flag():
    model = Net().eval()
    model.blocks.train()
    quantized = lowbit.quantize(model, "w4a8")
    assert quantized.blocks[1]._fqn == "blocks.1"
    assert quantized.fc._fqn == "fc"
    assert {n: m.training for n, m in quantized.named_modules()} == {
        n: m.training for n, m in model.named_modules()
    }


@pytest.mark.parametrize("layer", [nn.Linear(40, 7), nn.Conv2d(3, 4, 3)], ids=["linear", "conv"])
def test_the_model_may_be_a_layer(layer):
    converted = lowbit.quantize(layer, "w4a8")
    assert isinstance(converted, (lowbit.nn.Linear, lowbit.nn.Conv2d))
    (only,) = lowbit.summary(converted).rows
    assert (only.name, only.scheme) == ("(root)", "w4a8")
    with pytest.raises(ValueError, match=r"use model = lowbit\.quantize"):
        lowbit.quantize_(layer, "w4a8")


def test_converted_parts_are_left_as_they_are():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    lowbit.quantize_(model, "w4a8", overrides={"1": None})
    first = model[0]
    lowbit.quantize_(model, "w8a8")
    assert model[0] is first
    assert [r.scheme for r in lowbit.summary(model).rows] == ["w4a8", "w8a8"]
    with pytest.raises(ValueError, match=r"'0' matches no .* is a lowbit layer already"):
        lowbit.quantize_(model, "w8a8", overrides={"0": "w2a8"})


def test_subclasses_that_compute_the_same_convert():
    class Named(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.role = "head"

        def reset_parameters(self):
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

        def extra_repr(self):
            return "named"

    model = nn.Sequential(Named(32, 4))
    quantized = lowbit.quantize(model, "w8a8")
    assert type(quantized[0]) is lowbit.nn.Linear
    assert quantized[0].role == "head"
    assert row(quantized, "0").kind == "Named"


# --- Schemes, overrides, filters -----------------------------------------------------------------


def schemes(model):
    return {r.name: r.scheme for r in lowbit.summary(model).rows}


def test_first_override_that_matches_decides():
    scheme = lowbit.Scheme(weight="int2", group_size=32)
    quantized = lowbit.quantize(
        Net(),
        "w8a8",
        overrides={
            "blocks.1": scheme,
            r"re:blocks\.\d": "w4a8",
            r"re:.*s.*": {"weight": "int8", "activation": "int16"},
            "fc": None,
        },
    )
    assert schemes(quantized) == {
        "stem": "w8a16",
        "blocks.0": "w4a8",
        "blocks.1": "w2a8-g32",
        "blocks.2": "w4a8",
        "fc": "float32",
    }
    assert row(quantized, "fc").note == "override 'fc' is None"


def test_a_regular_expression_has_to_match_the_whole_name():
    with pytest.raises(ValueError, match="matches no"):
        lowbit.quantize(Net(), "w8a8", overrides={"re:blocks": None})


def test_an_override_that_matches_nothing_names_close_layers():
    with pytest.raises(ValueError, match=r"'block\.1' matches no .*'blocks\.1'"):
        lowbit.quantize(Net(), "w8a8", overrides={"block.1": None})
    with pytest.raises(ValueError, match="'norm' matches no"):
        lowbit.quantize(Net(), "w8a8", overrides={"norm": "w8a8"})
    with pytest.raises(ValueError, match="override 're:\\*' is no regular expression"):
        lowbit.quantize(Net(), "w8a8", overrides={"re:*": None})


def test_bad_schemes_are_errors_before_anything_changes():
    model = Net()
    before = state(model)
    with pytest.raises(ValueError, match="w4a8"):
        lowbit.quantize_(model, "w5a8")
    with pytest.raises(ValueError, match="override 'fc'"):
        lowbit.quantize_(model, "w4a8", overrides={"fc": "nope"})
    with pytest.raises(TypeError, match="scheme"):
        lowbit.quantize_(model, 4)
    assert_same_state(model, before)


def test_filter():
    quantized = lowbit.quantize(Net(), "w4a8", filter_fn=lambda m, name: isinstance(m, nn.Linear))
    assert [r.name for r in lowbit.summary(quantized).converted] == ["fc"]
    assert row(quantized, "stem").note == "filter_fn returned False"


def test_no_scheme_but_overrides():
    quantized = lowbit.quantize(Net(), None, overrides={"fc": "w8a8"})
    assert [r.name for r in lowbit.summary(quantized).converted] == ["fc"]


def test_converting_nothing_warns():
    with pytest.warns(UserWarning, match="no layer was converted"):
        lowbit.quantize(nn.Sequential(nn.ReLU()), "w4a8")
    with pytest.warns(UserWarning, match="no layer was converted"):
        lowbit.quantize_(nn.Sequential(nn.Linear(32, 32)), None)


# --- Shared modules and tied weights -------------------------------------------------------------


def test_a_shared_module_stays_shared():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model.append(model[0])
    for quantized in (lowbit.quantize(model, "w4a8"), model):
        if quantized is model:
            lowbit.quantize_(model, "w4a8")
        assert isinstance(quantized[0], lowbit.nn.Linear)
        assert quantized[2] is quantized[0]
        first, second = lowbit.summary(quantized).rows
        assert second.note == "the same module as '0'"
        assert (second.bytes_before, second.bytes_after) == (0, 0)
        assert first.bytes_before == 4 * (32 * 32 + 32)


def test_a_shared_module_cannot_have_two_schemes():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model.append(model[0])
    with pytest.raises(ValueError, match=r"'0' and '2' are the same module.*None and w4a8"):
        lowbit.quantize(model, "w4a8", overrides={"0": None})


class LanguageModel(nn.Module):
    def __init__(self, head_first=False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(32, 50, bias=False)
        self.embedding = nn.Embedding(50, 32)
        if not head_first:
            self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tie_to_an_embedding_is_broken_and_accounted_for(head_first):
    model = LanguageModel(head_first).eval()
    tokens = torch.arange(50)
    y = model(tokens)
    quantized = lowbit.quantize(model, "w8a8")
    assert relative_error(quantized(tokens), y) < 0.02
    assert torch.equal(quantized.embedding.weight, model.embedding.weight)
    assert quantized.embedding.weight is not model.embedding.weight
    assert model.head.weight is model.embedding.weight

    report = lowbit.summary(quantized)
    assert "'embedding.weight', kept float, is broken" in row(quantized, "head").note
    assert "not supported" in row(quantized, "embedding").note
    assert report.bytes_before == 50 * 32 * 4  # one tensor, counted once
    assert report.bytes_after == 50 * 32 * 4 + quantized.head.packed_bytes
    assert row(quantized, "embedding").bytes_after == 50 * 32 * 4


def test_layers_tied_to_each_other_hold_one_packed_weight():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    x = torch.randn(3, 64)
    quantized = lowbit.quantize(model, "w4a8")
    first, second = quantized
    assert first.weight_packed.data_ptr() == second.weight_packed.data_ptr()
    assert not torch.equal(first.bias, second.bias)
    assert relative_error(quantized(x), model(x)) < 0.3
    assert "tied to '1.weight'" in row(quantized, "0").note
    assert row(quantized, "1").bytes_after < row(quantized, "0").bytes_after / 2

    other = lowbit.quantize(model, "w4a8", overrides={"1": "w8a8"})
    assert schemes(other) == {"0": "w4a8", "1": "w8a8"}
    assert torch.equal(other[0].weight_packed, first.weight_packed)


# --- What is not converted, and why --------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class PaddedForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 0, 1, 0)), weight, bias)


def with_replaced_forward():
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: x
    return layer


def with_state_dict_hook():
    layer = nn.Linear(32, 32)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


def with_extra_parameter():
    layer = nn.Linear(32, 32)
    layer.scale = nn.Parameter(torch.ones(1))
    return layer


KEPT = {
    "overridden forward": (lambda: Doubled(32, 32), "Doubled overrides the forward"),
    "overridden conv": (lambda: PaddedForward(8, 8, 3), "register_converter(PaddedForward"),
    "instance forward": (with_replaced_forward, "forward was replaced on the instance"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
        "remove_parametrizations",
    ),
    "weight hook": (
        lambda: prune.random_unstructured(nn.Linear(32, 32), "weight", 0.5),
        "computed by a hook",
    ),
    "state_dict hook": (with_state_dict_hook, "state_dict hooks"),
    "extra parameter": (with_extra_parameter, "beside weight and bias: scale"),
    "lazy": (lambda: nn.LazyLinear(8), "lazy"),
    "lazy conv": (lambda: nn.LazyConv2d(8, 3), "lazy"),
    "meta": (lambda: nn.Linear(32, 32, device="meta"), "device 'meta'"),
    "float8": (lambda: nn.Linear(32, 32).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "complex": (lambda: nn.Linear(32, 32, dtype=torch.complex64), "torch.complex64"),
    "empty": (lambda: nn.Linear(0, 32), "no elements"),
    "embedding": (lambda: nn.Embedding(8, 8), "nn.Embedding is not supported yet"),
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), "nn.Conv1d is not supported yet"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), "nn.ConvTranspose2d is not supported"),
    "lstm": (lambda: nn.LSTM(8, 8), "nn.LSTM is not supported yet"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("make", "reason"), KEPT.values(), ids=[k.replace(" ", "-") for k in KEPT])
def test_kept_layers_say_why(make, reason):
    model = nn.Sequential(make(), nn.Linear(32, 32))
    kept = model[0]
    report = lowbit.quantize_(model, "w4a8")
    assert model[0] is kept
    assert [r.name for r in report.converted] == ["1"]
    (only,) = report.kept
    assert only.name == "0"
    assert reason in only.note


def test_modules_without_weights_have_no_rows():
    model = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8), nn.ReLU(), nn.BatchNorm1d(8))
    report = lowbit.quantize_(model, "w4a8")
    assert [r.name for r in report.rows] == ["0"]
    assert report.other_bytes == 4 * (8 + 8 + 8 + 8 + 8 + 8) + 8  # and num_batches_tracked


def test_layers_inside_a_kept_layer_convert():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(32, 32)
            self.down, self.up = nn.Linear(32, 4), nn.Linear(4, 32)

        def forward(self, x):
            return super().forward(x) + self.up(self.down(x))

    report = lowbit.quantize_(nn.Sequential(Adapted()), "w8a8")
    assert [r.name for r in report.kept] == ["0"]
    assert [r.name for r in report.converted] == ["0.down", "0.up"]
    assert report.kept[0].bytes_after == 4 * (32 * 32 + 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_with_nan_are_errors_that_name_the_layer(bad):
    model = Net()
    with torch.no_grad():
        model.blocks[2].weight[3, 0, 1, 1] = bad
    before = state(model)
    for convert in (lowbit.quantize, lowbit.quantize_):
        with pytest.raises(ValueError, match=r"layer 'blocks\.2': 1 of the 72 weights"):
            convert(model, "w4a8")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    lowbit.quantize_(model, "w4a8", overrides={"blocks.2": None})


# --- Modules that are special in torch -----------------------------------------------------------


def test_traced_graphs_convert():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 32)
    expected = lowbit.quantize(model, "w8a8")(x)
    assert torch.equal(lowbit.quantize(graph, "w8a8")(x), expected)
    assert type(graph.get_submodule("0")) is nn.Linear
    lowbit.quantize_(graph, "w8a8")
    assert torch.equal(graph(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_stay_float():
    part = torch.jit.trace(nn.Linear(32, 32), torch.zeros(1, 32))
    model = nn.Sequential(part, nn.Linear(32, 32)).eval()
    report = lowbit.quantize_(model, "w8a8")
    assert [(r.name, r.converted) for r in report.rows] == [("0", False), ("1", True)]
    assert model(torch.zeros(1, 32)).shape == (1, 32)


def test_a_module_that_copies_itself_cannot_lose_layers_silently():
    class Itself(nn.Sequential):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(Itself(nn.Linear(32, 32)))
    with pytest.raises(ValueError, match=r"layer '0\.0' did not get into the copy"):
        lowbit.quantize(model, "w4a8")
    lowbit.quantize_(model, "w4a8")
    assert isinstance(model[0][0], lowbit.nn.Linear)


# --- Registered converters -----------------------------------------------------------------------


def test_a_registered_converter_serves_its_class_and_subclasses(registry):
    class Doubles(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return 2 * self.linear(x)

    class StillDoubled(Doubled):
        pass

    class Tripled(Doubled):
        def forward(self, x):
            return 1.5 * super().forward(x)

    def convert(module, scheme):
        return Doubles(lowbit.nn.Linear.from_float(module, scheme))

    register_converter(Doubled, convert)
    model = nn.Sequential(Doubled(32, 32), StillDoubled(32, 32), Tripled(32, 32))
    quantized = lowbit.quantize(model, "w8a8")
    assert [type(m).__name__ for m in quantized] == ["Doubles", "Doubles", "Tripled"]
    assert quantized[0].linear._fqn == "0"
    x = torch.randn(4, 32)
    assert relative_error(quantized(x), model(x)) < 0.05
    first = row(quantized, "0")
    assert (first.kind, first.scheme, first.converted) == ("Doubled", "w8a8", True)
    assert first.bytes_after == quantized[0].linear.packed_bytes
    assert "Tripled overrides" in row(quantized, "2").note


def test_a_converter_may_serve_any_class_and_may_decline(registry):
    def convert(module, scheme):
        if module.in_channels == 1:
            return module
        linear = nn.Linear(module.in_channels, module.out_channels)
        return lowbit.nn.Linear.from_float(linear, scheme)

    register_converter(nn.Conv1d, convert)
    model = nn.Sequential(nn.Conv1d(32, 8, 1), nn.Conv1d(1, 8, 1))
    before = state(model)
    quantized = lowbit.quantize(model, "w8a8", overrides={"0": "w4a8"})
    assert schemes(quantized) == {"0": "w4a8", "1": "float32"}
    assert "returned it unchanged" in row(quantized, "1").note
    assert_same_state(model, before)
    assert quantized[1] is not model[1]
    assert not any("lowbit" in key for key in vars(model[1]))
    lowbit.quantize_(model, "w8a8")
    assert "returned it unchanged" in row(model, "1").note


def test_errors_of_converters_name_the_layer(registry):
    def fail(module, scheme):
        raise ValueError("cannot")

    register_converter(Doubled, fail)
    with pytest.raises(ValueError, match=r"layer '0' \(w4a8\): cannot"):
        lowbit.quantize(nn.Sequential(Doubled(32, 32)), "w4a8")
    register_converter(Doubled, lambda module, scheme: None)
    with pytest.raises(TypeError, match=r"layer '0'.*NoneType"):
        lowbit.quantize(nn.Sequential(Doubled(32, 32)), "w4a8")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        register_converter(int, fail)
    with pytest.raises(TypeError, match="function"):
        register_converter(Doubled, "fail")


# --- Hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_move_to_the_lowbit_layer(in_place):
    calls = []
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))

    def pre(module, args, kwargs):
        calls.append(("pre", type(module)))
        return (2 * args[0],), kwargs

    def post(module, args, output):
        calls.append(("post", type(module)))
        return output + 1

    handles = [
        model[0].register_forward_pre_hook(pre, with_kwargs=True),
        model[0].register_forward_hook(post),
    ]
    x = torch.randn(2, 32)
    plain = lowbit.quantize(nn.Sequential(copy.deepcopy(model[1])), "w8a8")
    quantized = model
    if in_place:
        lowbit.quantize_(model, "w8a8")
    else:
        quantized = lowbit.quantize(model, "w8a8")
    calls.clear()
    hidden = quantized[0](x)
    assert calls == [("pre", lowbit.nn.Linear), ("post", lowbit.nn.Linear)]
    assert row(quantized, "0").note == "hooks carried over: 2"
    assert torch.equal(quantized[1](hidden), plain[0](hidden))

    calls.clear()
    for handle in handles:
        handle.remove()
    quantized[0](x)
    assert len(calls) == (0 if in_place else 2)  # the copy has hooks of its own


def test_a_hook_bound_to_a_module_of_the_model_follows_the_copy():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.calls = 0
            self.fc.register_forward_hook(self.count)

        def count(self, *_):
            self.calls += 1

    model = Counter()
    quantized = lowbit.quantize(model, "w4a8")
    quantized.fc(torch.randn(1, 32))
    assert (model.calls, quantized.calls) == (0, 1)


# --- Attention and transformers ------------------------------------------------------------------


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


# --- Convolutions that pad in their own forward --------------------------------------------------


def padded_conv(*args, image_size, **options):
    utilities = pytest.importorskip("efficientnet_lite_pytorch.utils")
    return utilities.Conv2dStaticSamePadding(*args, image_size=image_size, **options)


@pytest.mark.parametrize("image_size", [(16, 16), (15, 15), (17, 14), (224, 224)], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2), (2, 1), (1, 2)])
def test_static_same_padding_is_kept_exactly(kernel, stride, image_size):
    original = padded_conv(6, 8, kernel, stride=stride, image_size=image_size, groups=2)
    layer = lowbit.quantize(original, "w8a8")
    pads = getattr(original.static_padding, "padding", (0, 0, 0, 0))
    symmetric = pads[0] == pads[1] and pads[2] == pads[3]
    assert isinstance(layer, lowbit.nn.Conv2d if symmetric else PaddedConv2d)

    dequantized = layer.dequantize()
    inner = dequantized if symmetric else dequantized[1]
    assert getattr(layer, "static_padding", pads) == pads
    original.weight.data.copy_(inner.weight)
    for size in [(16, 16), (15, 17), (9, 22)]:
        x = torch.randn(2, 6, *size)
        assert torch.equal(dequantized(x), original(x))
        assert layer(x).shape == original(x).shape
        assert relative_error(layer(x), original(x)) < 0.05
    x = torch.randn(6, 9, 9)  # unbatched
    assert torch.equal(layer(x), layer(x[None])[0])
    x = torch.randn(2, 6, 9, 9).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w1a1"])
def test_static_padding_is_padding_of_the_convolution(scheme):
    original = padded_conv(40, 8, 2, image_size=16)  # one column to the right, one row below
    layer = lowbit.quantize(original, scheme)
    assert layer.static_padding == (0, 1, 0, 1)
    around = nn.Conv2d(40, 8, 2, padding=1)
    around.load_state_dict(original.state_dict())
    x = torch.randn(2, 40, 9, 7)
    expected = lowbit.quantize(around, scheme)(x)[:, :, 1:, 1:]
    assert torch.equal(layer(x), expected)
    assert "static_padding=(0, 1, 0, 1)" in repr(layer)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(copied(x), expected)


def test_whole_converted_layers_load_with_weights_only():
    layer = lowbit.quantize(padded_conv(4, 8, 3, stride=2, image_size=16), "w4a8")
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    with torch.serialization.safe_globals(lowbit.nn.SAFE_GLOBALS):
        loaded = torch.load(stream, weights_only=True)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(loaded(x), layer(x))
    assert lowbit.summary(loaded) == lowbit.summary(layer)


def test_a_class_of_that_name_with_another_padding_is_reported():
    class Conv2dStaticSamePadding(nn.Conv2d):
        def __init__(self):
            super().__init__(4, 4, 3)
            self.static_padding = nn.ReflectionPad2d(1)

        def forward(self, x):
            return super().forward(self.static_padding(x))

    model = nn.Sequential(Conv2dStaticSamePadding(), nn.Conv2d(4, 4, 3))
    report = lowbit.quantize_(model, "w8a8")
    assert "overrides the forward" in report.kept[0].note


def test_efficientnet_lite_converts_in_full():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0").eval()
    quantized = lowbit.quantize(model, "w8a16")
    report = lowbit.summary(quantized)
    assert not report.kept
    assert len(report.converted) == 49 + 1  # convolutions and the classifier
    assert {r.kind for r in report.converted} == {"Conv2dStaticSamePadding", "Linear"}
    assert report.bytes_before == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert report.bytes_after == sum(t.nbytes for t in quantized.state_dict().values())
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert relative_error(quantized(x), model(x)) < 0.1


# --- Memory --------------------------------------------------------------------------------------

MEMORY = textwrap.dedent(
    """
    import gc, sys, torch
    import lowbit
    from torch import nn

    def status(key):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024

    def reset_peak():
        gc.collect()
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")

    torch.set_num_threads(1)
    lowbit.quantize(nn.Sequential(nn.Linear(256, 256)), "w4a8")  # warm up
    layer = 16  # MiB
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(12)])
    reset_peak()
    before = status("VmRSS")
    if sys.argv[1] == "copy":
        result = lowbit.quantize(model, "w4a8-minmax")
    else:
        lowbit.quantize_(model, "w4a8-minmax")
    print(before, status("VmHWM"), status("VmRSS"))
    """
)


def run_memory(mode):
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, mode],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        # Freed memory goes back to the system at once, so that what is resident is what is used.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if "PermissionError" in result.stderr:
        pytest.skip("the peak of the resident memory cannot be reset here")
    assert result.returncode == 0, result.stderr
    return [float(number) for number in result.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["copy", "in place"])
def test_memory_peaks_near_model_and_result(mode):
    before, peak, after = run_memory(mode)
    layer, packed = 16.0, 12 * 2.0  # MiB: one float layer, and the result
    # The promise. A copy of the float model would be 12 layers.
    slack = layer
    if mode == "copy":
        assert peak - before < packed + slack
        assert after - before < packed + layer / 2
    else:
        assert peak - before < slack
        assert before - after > 12 * layer - packed - layer / 2  # the float weights are gone


def test_each_float_weight_is_released_before_the_next_layer(monkeypatch):
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    alive = [weakref.ref(layer.weight) for layer in model]
    counts = []
    from_float = lowbit.nn.Linear.from_float.__func__

    def counting(cls, module, scheme):
        counts.append(sum(ref() is not None for ref in alive))
        return from_float(cls, module, scheme)

    monkeypatch.setattr(lowbit.nn.Linear, "from_float", classmethod(counting))
    gc.disable()
    try:
        lowbit.quantize_(model, "w4a8")
    finally:
        gc.enable()
    assert counts == [4, 3, 2, 1]
    assert not any(ref() is not None for ref in alive)
