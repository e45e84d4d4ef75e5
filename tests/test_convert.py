"""Conversion of models: what is replaced, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from models import Net, assert_same_state, relative_error, row, schemes, state
from torch import nn

import lowbit

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
    model.norm.train()
    lowbit.quantize(model, "w8a8").norm.weight.data.zero_()
    model.norm.eval()
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
        "norm": "float32",
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


def test_converting_again_warns():
    model = lowbit.quantize(nn.Sequential(nn.Linear(32, 32)), "w8a8")
    for quantize in (lowbit.quantize, lowbit.quantize_):
        with pytest.warns(UserWarning, match="lowbit layers already; convert the float model"):
            quantize(model, "w4a8")


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_model_that_cannot_be_copied_converts_in_place():
    model = nn.Sequential(nn.Linear(32, 32), nn.utils.weight_norm(nn.Linear(32, 4)))
    with torch.enable_grad():
        model(torch.randn(2, 32))  # its weight is no leaf now: torch does not copy it
    with pytest.raises(RuntimeError, match=r"cannot be copied, which lowbit\.quantize_ does not"):
        lowbit.quantize(model, "w8a8")
    report = lowbit.quantize_(model, "w8a8")
    assert [row.converted for row in report.rows] == [True, False]
    assert "weight_norm" in report.rows[1].note


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


# --- Calibration data ---------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [lowbit.quantize, lowbit.quantize_])
def test_data_that_nothing_learns_from_is_refused(convert):
    model = nn.Sequential(nn.Linear(32, 32))
    before = state(model)
    with pytest.raises(ValueError, match="learns from calibration data"):
        convert(model, "w8a8", calibration=[torch.randn(1, 32)])
    with pytest.raises(ValueError, match="pass calibration="):
        convert(model, "w8a8", steps=3)
    assert_same_state(model, before)
    assert isinstance(model[0], nn.Linear)
