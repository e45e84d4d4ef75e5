"""Files: bad ones are errors that say what is wrong, and the model is left alone."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RaggedNet as Net
from models import trained
from safetensors import safe_open
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

import lowbit
from lowbit.serialize import FileFormatError


def rewrite(path, change):
    """Write the file again after `change(tensors, header)`."""
    with safe_open(path, "pt") as handle:
        header = json.loads(handle.metadata()["lowbit"])
    tensors = {name: value.clone() for name, value in load_tensors(path).items()}
    change(tensors, header)
    save_tensors(tensors, path, metadata={"lowbit": json.dumps(header)})


def load_error(path, model=None):
    """The message of the error, after a check that the model was left alone."""
    model = Net().eval() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileFormatError) as caught:
        lowbit.load_file(model, path)
    assert isinstance(caught.value, ValueError)
    assert str(path) in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    return str(caught.value)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "damaged, truncated, or no safetensors file" in load_error(path)
    path.write_text("hello, this is no tensor at all")
    assert "no safetensors file" in load_error(path)
    torch.save({"x": torch.zeros(1)}, path)
    assert "no safetensors file" in load_error(path)
    with pytest.raises(FileNotFoundError):
        lowbit.load_file(Net(), tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        lowbit.load_file(Net(), tmp_path)


def test_truncated_files(saved):
    _, path = saved
    data = path.read_bytes()
    for size in (4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert "damaged, truncated" in load_error(path)


def test_files_of_others(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(Net().state_dict(), path)
    assert "no lowbit file" in load_error(path)
    assert "lowbit.quantize" in load_error(path)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "layout version 3, written by lowbit .*upgrade lowbit"),
        (1, "layout version 1, written by lowbit .*convert the float model again"),
        ("x", "no version"),
        (0, "no version"),
    ],
)
def test_layout_versions(saved, version, message):
    _, path = saved
    rewrite(path, lambda tensors, header: header.update(layout_version=version))
    with pytest.raises(FileFormatError, match=message):
        lowbit.load_file(Net(), path)


DAMAGES = {
    "no layers": (lambda t, h: h.pop("layers"), "metadata is damaged|metadata .* damaged"),
    "layers a list": (lambda t, h: h.update(layers=[1, 2]), "damaged"),
    "layer a number": (lambda t, h: h["layers"].update(fc=3), "of layer 'fc' is damaged"),
    "unknown scheme": (
        lambda t, h: h["layers"]["fc"]["scheme"].update(weight="int3"),
        "of layer 'fc'.*int3",
    ),
    "newer scheme": (
        lambda t, h: h["layers"]["fc"]["scheme"].update(version=9),
        "of layer 'fc'.*version 9",
    ),
    "account": (lambda t, h: h["account"]["fc"].update(shape=None), "of layer 'fc'"),
    "alias to nothing": (lambda t, h: h["aliases"].update(a="b"), "'a' .*'b'"),
    "missing tensor": (lambda t, h: t.pop("fc.weight_scale"), "missing.*'fc.weight_scale'"),
    "missing float tensor": (lambda t, h: t.pop("head.bias"), "missing.*'head.bias'"),
    "extra tensor": (lambda t, h: t.update(x=torch.zeros(1)), "not in the model: 'x'"),
    "missing layer": (lambda t, h: h["layers"].pop("fc"), "missing.*'fc.weight'"),
    "extra layer": (
        lambda t, h: h["layers"].update(gone=h["layers"]["fc"]),
        "layer 'gone' .*not in the model",
    ),
    "layer that cannot convert": (
        lambda t, h: h["layers"].update(norm=h["layers"]["fc"]),
        "layer 'norm' cannot be converted",
    ),
    "another class": (
        lambda t, h: h["layers"]["fc"].update({"class": "Conv2d"}),
        "layer 'fc' is a Conv2d, but a Linear",
    ),
    "shape": (
        lambda t, h: t.update({"fc.weight_scale": torch.ones(51)}),
        r"'fc.weight_scale' is \[51\], the model has \[50\]",
    ),
    "dtype": (
        lambda t, h: t.update({"fc.weight_scale": torch.ones(50, dtype=torch.float16)}),
        "'fc.weight_scale' is torch.float16, the model has torch.float32",
    ),
    "scheme": (
        lambda t, h: h["layers"]["fc"]["scheme"].update(weight="int8", quantizer="minmax"),
        "'fc.weight_packed' is",
    ),
}


@pytest.mark.parametrize(
    ("change", "message"), DAMAGES.values(), ids=[k.replace(" ", "-") for k in DAMAGES]
)
def test_damaged_files_name_the_layer(saved, change, message):
    _, path = saved
    rewrite(path, change)
    load_error(path)
    with pytest.raises(FileFormatError, match=message):
        lowbit.load_file(Net(), path)


@pytest.mark.parametrize("layer", ["stem", "grouped", "depthwise", "fc"])
@pytest.mark.parametrize("scheme", ["w8a8", "w2a8"])
def test_padding_codes_that_are_not_zero(tmp_path, layer, scheme):
    model = lowbit.quantize(trained(Net(width=20)), scheme)
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)

    def change(tensors, header):
        tensors[f"{layer}.weight_packed"][-1, -1, -1] |= 128  # of a channel that does not exist

    rewrite(path, change)
    message = load_error(path, Net(width=20).eval())
    assert f"'{layer}" in message
    assert "padding" in message


def test_other_architectures(saved):
    _, path = saved
    assert "layer 'stem'" in load_error(path, nn.Sequential(nn.Linear(3, 3)))
    assert "'fc.weight_packed' is" in load_error(path, Net(width=48).eval())
    assert "'head.weight' is [5, 50]" in load_error(path, Net(classes=6).eval())
    half = Net().eval()
    half.head.half()
    assert "'head.weight' is torch.float32, the model has torch.float16" in load_error(path, half)
    other = lowbit.quantize(Net().eval(), "w8a8")
    assert "layer 'stem' is w4a8, but w8a8 in the model" in load_error(path, other)


def test_what_no_file_can_hold(tmp_path):
    path = tmp_path / "model.safetensors"

    class Stateful(nn.Module):
        def get_extra_state(self):
            return {"step": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match=r"'0\._extra_state' is extra state of type dict"):
        lowbit.save_file(nn.Sequential(Stateful()), path)
    with pytest.raises(ValueError, match="'bias' is on device 'meta'"):
        lowbit.save_file(nn.Linear(3, 3, device="meta"), path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        lowbit.save_file(nn.Linear(3, 3), tmp_path / "absent" / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_buffers_that_no_file_has_may_not_stay_on_meta(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.register_buffer("table", torch.arange(4.0), persistent=False)

    path = tmp_path / "model.safetensors"
    lowbit.save_file(lowbit.quantize(Positions(), "w8a8"), path)
    assert torch.equal(lowbit.load_file(Positions(), path).table, torch.arange(4.0))
    with torch.device("meta"):
        model = Positions()
    with pytest.raises(FileFormatError, match="on the meta device in the model: 'table'"):
        lowbit.load_file(model, path)


@given(data=st.data())
def test_any_damage_gives_a_model_or_a_clear_error(data, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp()
    source = directory / "fuzz_source.safetensors"
    if not source.exists():
        torch.manual_seed(0)
        lowbit.save_file(lowbit.quantize(nn.Sequential(nn.Linear(40, 20)), "w4a8"), source)
    content = bytearray(source.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of the file's meaning is in its header.
        last = data.draw(st.sampled_from([header, len(content)])) - 1
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    path = directory / "fuzz.safetensors"
    path.write_bytes(content)
    caught = None
    try:
        loaded = lowbit.load_file(nn.Sequential(nn.Linear(40, 20)), path)
    except FileFormatError as error:
        caught = error
    if caught is None:
        assert loaded(torch.zeros(1, 40)).shape == (1, 20)
    else:
        assert str(path) in str(caught)
