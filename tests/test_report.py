"""The account: its rows, its totals, its table, and where it survives."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import lowbit
from lowbit import _core, report
from lowbit.mixed.budget import Budget
from lowbit.report import Report, Row


def model_bytes(model):
    return sum(t.nbytes for t in model.state_dict().values())


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 32),
        nn.Linear(32, 10),
    )


def test_rows_of_a_converted_model(model):
    report = lowbit.quantize_(model, "w4a8", overrides={"4": None})
    conv, norm, first, last = report.rows
    assert conv == Row(
        name="0",
        kind="Conv2d",
        scheme="w4a8",
        kernel=_core.kernel_name("int4", "int8"),
        shape=(16, 3, 3, 3),
        bytes_before=4 * (16 * 27 + 16),
        bytes_after=model_bytes(model[0]),
        converted=True,
        note="",
    )
    assert (first.shape, first.bytes_after) == ((32, 784), model_bytes(model[3]))
    assert last.note == "override '4' is None"
    assert (last.kernel, last.converted, last.scheme) == ("", False, "float32")
    assert last.bytes_before == last.bytes_after == 4 * 330
    assert report.converted == (conv, first)
    assert (norm.kind, norm.shape, norm.scheme) == ("BatchNorm2d", (16,), "float32")
    assert "not folded: it is in training mode" in norm.note
    assert norm.bytes_before == norm.bytes_after == model_bytes(model[1])
    assert report.kept == (norm, last)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w2a8", "w1a1"])
@pytest.mark.parametrize("fuse", [True, False])
def test_totals_are_those_of_the_state_dicts(model, scheme, fuse):
    before = model_bytes(model.eval())
    report = lowbit.quantize_(model, scheme, fuse=fuse)
    assert report.bytes_before == before
    assert report.bytes_after == model_bytes(model)
    assert report.other_bytes == model_bytes(model[1])  # a folded norm has its own row
    assert report.ratio == before / model_bytes(model)


def test_a_float_model_has_an_account_too(model):
    report = lowbit.summary(model)
    assert [row.name for row in report.rows] == ["0", "3", "4"]
    assert not report.converted
    assert report.bytes_before == report.bytes_after == model_bytes(model)
    assert report.ratio == 1.0
    assert all(row.note == "" for row in report.rows)


def test_a_model_without_tensors():
    report = lowbit.summary(nn.ReLU())
    assert report == Report(())
    assert report.ratio == 1.0
    assert "0 converted, 0 kept float" in str(report)


def test_layers_that_were_built_as_lowbit_layers():
    report = lowbit.summary(nn.Sequential(lowbit.nn.Linear(64, 32, scheme="w2a8")))
    (row,) = report.rows
    assert (row.scheme, row.shape, row.converted) == ("w2a8", (32, 64), True)
    assert row.bytes_before == 4 * (32 * 64 + 32)


def test_half_precision_is_counted_as_such():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)).to(torch.bfloat16)
    report = lowbit.quantize_(model, "w8a8", overrides={"1": None})
    assert [row.bytes_before for row in report.rows] == [2 * (64 * 32 + 32), 2 * (32 * 32 + 32)]
    assert [row.scheme for row in report.rows] == ["w8a8", "bfloat16"]


def test_the_account_survives_copies_and_serves_parts(model):
    report = lowbit.quantize_(model, "w4a8", overrides={"4": None})
    assert lowbit.summary(copy.deepcopy(model)) == report
    assert lowbit.summary(pickle.loads(pickle.dumps(model))) == report
    (part,) = lowbit.summary(model[4]).rows
    assert (part.name, part.note) == ("(root)", "override '4' is None")


def test_json(model):
    report = lowbit.quantize_(model, "w4a8")
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["converted"] == 3
    assert data["layers"][0]["shape"] == [16, 3, 3, 3]
    assert data["bytes_after"] == model_bytes(model)


def test_table_shows_every_row_note_and_total(model):
    report = lowbit.quantize_(model.eval(), "w4a8", overrides={"4": None})
    text = str(report)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["layer", "class", "weight", "scheme"]
    assert f"[a] {_core.kernel_name('int4', 'int8')}" in lines
    assert [line.split()[4] for line in (lines[2], lines[4])] == ["a", "a"]
    assert lines[3].split()[:4] == ["1", "BatchNorm2d", "16", "folded"]
    assert "[1] batch norm '1' folded in" in lines
    assert "[2] folded into '0'" in lines
    (kept,) = [line for line in lines if line.startswith("4 ")]
    assert kept.split()[-1] == "3"
    assert "[3] override '4' is None" in lines
    assert "2 converted, 1 kept float, batch norms folded: 1" in text
    assert f"{report.ratio:.2f}x smaller" in lines[-1]


def test_table_of_deep_models_fits_a_terminal():
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    model = nn.ModuleDict(
        {
            "some_wrapper_with_a_long_name": nn.ModuleDict(
                {"text_encoder": nn.TransformerEncoder(layer, 2)}
            )
        }
    )
    report = lowbit.quantize_(model, "w4a8-g32")
    table = str(report).split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 120
    joined = "".join(line.split(" ")[0] for line in table.splitlines())
    for row in report.rows:  # wrapped names lose nothing
        assert row.name in joined
    # One note for all rows that it serves: a kernel, and three reasons.
    assert len([line for line in str(report).splitlines() if line.startswith("[")]) == 1 + 3


def test_kernels_have_letters_and_names_break_behind_dots():
    assert [report._letter(i) for i in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]
    assert report._wrap("encoder.layer.weight", 14) == "encoder.layer.\nweight"
    assert report._wrap("encoder", 4) == "enco\nder"
    assert report._wrap("(root)", 40) == "(root)"


def test_sizes_have_decimal_units():
    sizes = [0, 999, 1000, 999_949, 999_950, 2_500_000, 10**12]
    texts = ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "2.5 MB", "1.0 TB"]
    assert [report.size_text(size) for size in sizes] == texts
    assert Budget.parse("2.5MB").value == 2_500_000  # what the account shows may be a budget


def test_quantize_alone_leaves_the_account_on_the_copy(model):
    quantized = lowbit.quantize(model, "w4a8", overrides={"4": None})
    assert lowbit.summary(quantized).kept[-1].note == "override '4' is None"
    assert lowbit.summary(model).kept[2].note == ""
