"""Files: what comes back is what was written, mapped and not copied, and bad files are errors."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

import lowbit
from lowbit import rules
from lowbit.rules import PaddedConv2d
from lowbit.serialize import FileFormatError


class Net(nn.Module):
    """Plain and grouped convolutions, a norm, and linear layers of ragged sizes."""

    def __init__(self, width=24, classes=5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.fc = nn.Linear(width, 50)
        self.head = nn.Linear(50, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.depthwise(self.grouped(x)))
        return self.head(self.fc(x.mean((2, 3))))


SCHEMES = ["w8a8", "w4a8", "w4a16-g32", "w2a8", "wta8", "w1a8-g64", "w1a1"]


def trained(net):
    """Statistics as after training, so that buffers matter."""
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    net.norm.num_batches_tracked += 7
    return net.eval()


@pytest.fixture
def saved(tmp_path):
    """A converted model and its file."""
    model = lowbit.quantize(trained(Net()), "w4a8", overrides={"head": None})
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)
    return model, path


def rewrite(path, change):
    """Write the file again after `change(tensors, header)`."""
    with safe_open(path, "pt") as handle:
        header = json.loads(handle.metadata()["lowbit"])
    tensors = {name: value.clone() for name, value in load_tensors(path).items()}
    change(tensors, header)
    save_tensors(tensors, path, metadata={"lowbit": json.dumps(header)})


def assert_same_tensors(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


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


# --- The file ------------------------------------------------------------------------------------


def test_the_file_is_a_plain_safetensors_file(saved):
    model, path = saved
    tensors = load_tensors(path)
    assert set(tensors) == set(model.state_dict())
    with safe_open(path, "pt") as handle:
        header = json.loads(handle.metadata()["lowbit"])
    assert header["layout_version"] == 1
    assert header["layers"]["fc"]["class"] == "Linear"
    assert header["layers"]["fc"]["scheme"] == model.fc.scheme.to_dict()
    assert "head" not in header["layers"]


def test_weights_are_mapped_not_copied(tmp_path):
    path = tmp_path / "model.safetensors"
    lowbit.save_file(lowbit.quantize(trained(Net(width=32)), "w4a8-g32"), path)
    loaded = lowbit.load_file(Net(width=32).eval(), path)
    with open("/proc/self/maps") as maps:
        lines = [line for line in maps if line.rstrip().endswith(str(path))]
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in lines]
    assert ranges
    tensors = loaded.state_dict()
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    loaded(torch.randn(1, 3, 16, 16))
    assert pointers == {name: t.data_ptr() for name, t in loaded.state_dict().items()}
    mapped = {n for n, p in pointers.items() if any(low <= p < high for low, high in ranges)}
    assert all(pointer % 64 == 0 for pointer in pointers.values())
    # All but small tensors of odd sizes, which would lie askew in the file.
    assert mapped >= {name for name, tensor in tensors.items() if tensor.nbytes % 64 == 0}
    assert mapped >= {f"{name}.weight_packed" for name in ("stem", "grouped", "depthwise", "fc")}


def test_a_loaded_model_may_be_written_to_the_same_file(saved):
    model, path = saved
    loaded = lowbit.load_file(Net().eval(), path)
    lowbit.save_file(loaded, path)
    assert_same_tensors(loaded, model)
    assert_same_tensors(lowbit.load_file(Net().eval(), path), model)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_writing_to_a_loaded_model_leaves_the_file_alone(saved):
    _, path = saved
    before = path.read_bytes()
    loaded = lowbit.load_file(Net().eval(), path)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    assert path.read_bytes() == before


def test_loaded_models_copy_and_pickle_by_layer(saved):
    _, path = saved
    loaded = lowbit.load_file(Net().eval(), path)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(copy.deepcopy(loaded)(x), loaded(x))
    stream = io.BytesIO()
    torch.save(loaded.fc.state_dict(), stream)
    assert stream.tell() < path.stat().st_size + 8192


def test_plain_state_dicts_load_with_weights_only(saved):
    model, _ = saved
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    tensors = torch.load(stream, weights_only=True)
    other = lowbit.quantize(Net().eval(), "w4a8", overrides={"head": None})
    other.load_state_dict(tensors)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(other(x), model(x))


MEMORY = textwrap.dedent(
    """
    import gc, sys, torch
    import lowbit
    from torch import nn

    def rss():
        gc.collect()
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        return [int(fields[k].split()[0]) / 1024 for k in ("VmRSS", "RssAnon", "VmHWM")]

    def build():
        with torch.device("meta"):
            return nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(8)])

    path = sys.argv[1]
    if sys.argv[2] == "save":
        layer = lowbit.quantize(nn.Linear(4096, 4096, bias=False), "w8a8")
        model = nn.Sequential(*[lowbit.nn.Linear(4096, 4096, bias=False, scheme="w8a8")
                                for _ in range(8)])
        for part in model:
            part.load_state_dict(layer.state_dict())
        lowbit.save_file(model, path)
    else:
        torch.set_num_threads(1)
        before = rss()
        model = lowbit.load_file(build(), path)
        y = model(torch.randn(1, 4096))
        print(*before, *rss())
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_and_running_holds_the_weights_once(tmp_path):
    def run(mode):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "model.safetensors"), mode]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, result.stderr
        return [float(number) for number in result.stdout.split()]

    run("save")
    weights = 8 * 16.0  # MiB
    before, anonymous_before, _, after, anonymous, peak = run("load")
    assert anonymous - anonymous_before < weights / 4  # pages of the file, not copies of them
    assert after - before < 1.25 * weights
    assert peak - before < 1.25 * weights


# --- Errors --------------------------------------------------------------------------------------


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
        (2, "layout version 2, written by lowbit .*upgrade lowbit"),
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
