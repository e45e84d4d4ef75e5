"""State dicts, copies, pickles, moves: what a layer's tensors go through."""

import copy
import io
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import expected
import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lowbit import _core
from lowbit import nn as lnn
from lowbit.nn import Conv1d, Conv2d, Linear
from lowbit.packed import pack_groups
from lowbit.schemes import Scheme

KINDS = {
    "linear": (
        lambda s, bias=True: Linear.from_float(nn.Linear(75, 37, bias=bias).eval(), s),
        (3, 75),
    ),
    "conv": (
        lambda s, bias=True: Conv2d.from_float(nn.Conv2d(6, 10, 3, bias=bias).eval(), s),
        (2, 6, 7, 8),
    ),
    "grouped": (
        lambda s, bias=True: Conv2d.from_float(nn.Conv2d(6, 10, 3, groups=2, bias=bias).eval(), s),
        (2, 6, 7, 8),
    ),
    "signal": (
        lambda s, bias=True: Conv1d.from_float(nn.Conv1d(6, 10, 3, bias=bias).eval(), s),
        (2, 6, 9),
    ),
    "depthwise": (
        lambda s, bias=True: Conv2d.from_float(nn.Conv2d(6, 6, 3, groups=6, bias=bias).eval(), s),
        (2, 6, 7, 8),
    ),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)
schemes = pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w1a1"])


def make(kind="linear", scheme="w4a8-g32", bias=True):
    build, shape = KINDS[kind]
    return build(scheme, bias), torch.randn(shape)


def empty_like(layer, scheme=None, device=None):
    """A layer with the sizes of another one, and weights of its own."""
    scheme = scheme or layer.scheme
    if isinstance(layer, Linear):
        bias = layer.bias is not None
        return Linear(layer.in_features, layer.out_features, bias, scheme, device).eval()
    return type(layer)(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        groups=layer.groups,
        bias=layer.bias is not None,
        scheme=scheme,
        device=device,
    ).eval()


def check_same(other, layer, x):
    assert expected.same_bits(other(x), layer(x))
    assert other.scheme == layer.scheme
    assert {n: (b.shape, b.dtype) for n, b in other.state_dict().items()} == {
        n: (b.shape, b.dtype) for n, b in layer.state_dict().items()
    }


# --- contents ------------------------------------------------------------------------------------


def test_keys_are_plain_tensors():
    layer, _ = make("linear", "w4a8-g32")
    state = layer.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "weight_packed": ((3, 10, 64), torch.uint8),
        "weight_scale": ((37,), torch.float32),
        "weight_group_scale": ((3, 3, 16), torch.float16),
        "bias": ((37,), torch.float32),
        "format_version": ((5,), torch.int32),
    }
    assert all(type(t) is torch.Tensor for t in state.values())
    assert state["format_version"].tolist() == [_core.LAYOUT_VERSION, 4, 1, -8, 32]
    layer, _ = make("linear", "w1a1", bias=False)
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", "format_version"}
    assert layer.state_dict()["format_version"].tolist() == [_core.LAYOUT_VERSION, 1, 2, -1, 0]
    assert not list(layer.parameters())


@all_kinds
@schemes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_round_trip(kind, scheme, bias, assign):
    layer, x = make(kind, scheme, bias)
    other = empty_like(layer)
    other(x)  # the operands have been checked once, before they change
    state = copy.deepcopy(layer.state_dict())
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    check_same(other, layer, x)
    assert (other.weight_packed.data_ptr() == state["weight_packed"].data_ptr()) == assign


def test_the_activation_is_not_in_the_weights():
    layer, x = make("linear", "w4a8")
    other = empty_like(layer, "w4a16")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [True, False])
def test_group_zeros_come_and_go(assign):
    layer, x = make("linear", "w4a8-g32")
    shifted = copy.deepcopy(layer)
    shifted.weight_group_zero = pack_groups(torch.randn(37, 3).half(), 1)
    assert expected.same_bits(shifted(x), expected.linear(shifted, x))
    assert not torch.equal(shifted(x), layer(x))
    other = empty_like(layer)
    other.load_state_dict(shifted.state_dict(), assign=assign)
    check_same(other, shifted, x)
    other.load_state_dict(layer.state_dict(), assign=assign)
    check_same(other, layer, x)


def test_meta_then_assign():
    layer, x = make()
    other = empty_like(layer, device="meta")
    with pytest.raises(RuntimeError, match=r"weight_packed is on meta.*; load a state dict"):
        other(x)
    other.load_state_dict(layer.state_dict(), assign=True)
    check_same(other, layer, x)
    other.to("meta").to_empty(device="cpu").load_state_dict(layer.state_dict())
    check_same(other, layer, x)


def test_nested_in_a_model():
    model = nn.Sequential(make()[0], nn.ReLU(), Linear.from_float(nn.Linear(37, 5), "w8a8")).eval()
    other = nn.Sequential(
        Linear(75, 37, scheme="w4a8-g32"), nn.ReLU(), Linear(37, 5, scheme="w8a8")
    ).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 75)
    assert expected.same_bits(other(x), model(x))


def test_keys_of_other_layers_are_torchs_business():
    layer, x = make()
    want = layer(x)
    assert layer.load_state_dict({}, strict=False).missing_keys == list(layer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        layer.load_state_dict({**layer.state_dict(), "other": torch.zeros(1)})
    layer.load_state_dict({"bias": torch.zeros(37)}, strict=False)
    assert not torch.equal(layer(x), want)
    assert not layer.bias.any()


# --- refused -------------------------------------------------------------------------------------


def bent(state, name, change):
    return {**state, name: change(state[name])}


def replace_version(index, value):
    def change(version):
        version = version.clone()
        version[index] = value
        return version

    return change


MISTAKES = {
    "layout version": ("format_version", replace_version(0, 99), "layout version 99"),
    "bits": ("format_version", replace_version(1, 3), "holds unknown .*takes int4"),
    "group size": ("format_version", replace_version(4, 64), "group_size 64.*group_size 32"),
    "version dtype": ("format_version", lambda t: t.float(), "format_version must be int32"),
    "version shape": ("format_version", lambda t: t[:4], "format_version must be int32"),
    "packed shape": ("weight_packed", lambda t: t[:, :-1].contiguous(), "weight_packed must be"),
    "packed dtype": ("weight_packed", lambda t: t.to(torch.int32), "weight_packed must be"),
    "packed strides": (
        "weight_packed",
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "weight_packed must be contiguous",
    ),
    "scale shape": ("weight_scale", lambda t: t[:1], r"weight_scale must be .*\[37\]"),
    "scale dtype": ("weight_scale", lambda t: t.half(), "weight_scale must be"),
    "group shape": ("weight_group_scale", lambda t: t[:, :1], "weight_group_scale must be"),
    "group dtype": ("weight_group_scale", lambda t: t.float(), "weight_group_scale must be"),
    "bias shape": ("bias", lambda t: t[:1], "bias must be"),
    "bias dtype": ("bias", lambda t: t.half(), "bias must be"),
    "no tensor": ("weight_scale", lambda t: t.tolist(), "weight_scale must be tensors"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_refused(mistake, strict, assign):
    layer, x = make()
    layer._fqn = "blocks.0.fc1"
    want = layer(x)
    state = bent(layer.state_dict(), *MISTAKES[mistake][:2])
    with pytest.raises(RuntimeError, match=r"'blocks\.0\.fc1'.*" + MISTAKES[mistake][2]):
        layer.load_state_dict(state, strict=strict, assign=assign)
    assert expected.same_bits(layer(x), want)  # nothing was loaded


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("w8a8", "w4a8", r"holds int8 .*takes int4"),
        ("wta8", "w2a8", r"holds ternary .*takes int2"),
        ("w4a8-g32", "w4a8", r"group_size 32\).*group_size None"),
        ("w4a8", "w4a8-g64", r"group_size None\).*group_size 64"),
    ],
)
@all_kinds
def test_another_format_is_refused(kind, theirs, ours, message, strict):
    layer, _ = make(kind, theirs)
    with pytest.raises(RuntimeError, match=message):
        empty_like(layer, ours).load_state_dict(layer.state_dict(), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "name", ["weight_packed", "weight_scale", "weight_group_scale", "format_version"]
)
def test_incomplete_is_refused(name, strict):
    layer, _ = make()
    state = layer.state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=f"{name} (is )?missing"):
        layer.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_float_weights_are_refused(strict):
    layer, _ = make()
    with pytest.raises(RuntimeError, match="float weight; load it into the float model"):
        layer.load_state_dict(nn.Linear(75, 37).state_dict(), strict=strict)


def test_zeros_without_groups_are_refused():
    layer, _ = make("linear", "w4a8")
    state = {**layer.state_dict(), "weight_group_zero": torch.zeros(3, 3, 16).half()}
    with pytest.raises(RuntimeError, match="weight_group_zero is there, but"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(("kind", "step"), [("linear", -1), ("grouped", 0), ("depthwise", 0)])
@pytest.mark.parametrize("strict", [True, False])
def test_codes_in_the_padding_are_refused(kind, step, strict):
    layer, _ = make(kind, "w4a8")
    state = copy.deepcopy(layer.state_dict())
    packed = state["weight_packed"]
    # The last channel of the first block's last panel is padding: 37, 5 and 6 channels.
    panel = 2 if kind == "linear" else 0
    packed[panel, step, 63] = 1
    with pytest.raises(RuntimeError, match="damaged: codes in its padding"):
        layer.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("name", ["weight_group_scale", "weight_group_zero"])
@pytest.mark.parametrize("kind", ["linear", "grouped", "depthwise"])
def test_scales_in_the_padding_are_refused(kind, name):
    layer, _ = make(kind, "w4a8-g32")
    state = copy.deepcopy(layer.state_dict())
    state["weight_group_zero"] = torch.zeros_like(state["weight_group_scale"])
    empty_like(layer).load_state_dict(state)
    state[name][2 if kind == "linear" else 0, 0, 15] = 1
    with pytest.raises(RuntimeError, match=f"{name} is damaged: its padding"):
        layer.load_state_dict(state)


# --- copies and files ----------------------------------------------------------------------------


@all_kinds
@schemes
@pytest.mark.parametrize("used", [True, False])
def test_deepcopy_and_pickle(kind, scheme, used):
    layer, x = make(kind, scheme)
    layer._fqn = "fc"
    if used:
        layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        check_same(other, layer, x)
        assert other.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
        assert other.label == layer.label
        assert repr(other) == repr(layer)
    shallow = copy.copy(layer)
    check_same(shallow, layer, x)


@all_kinds
def test_pickle_has_the_packed_size(kind):
    layer, x = make(kind)
    before = len(pickle.dumps(layer))
    layer(x)
    assert len(pickle.dumps(layer)) == before


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@all_kinds
@schemes
def test_torch_save(kind, scheme):
    layer, x = make(kind, scheme)
    other = empty_like(layer)
    other.load_state_dict(torch.load(saved(layer.state_dict()), weights_only=True))
    check_same(other, layer, x)
    check_same(torch.load(saved(layer), weights_only=False), layer, x)
    with torch.serialization.safe_globals(lnn.SAFE_GLOBALS):
        check_same(torch.load(saved(layer), weights_only=True), layer, x)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved(layer), weights_only=True)


@pytest.mark.parametrize("load", [pickle.loads, lambda data: torch.load(io.BytesIO(data))])
def test_pickle_of_another_layout_version(load):
    layer, _ = make()
    layer.format_version[0] = 99
    data = pickle.dumps(layer) if load is pickle.loads else saved(layer).getvalue()
    with (
        torch.serialization.safe_globals(lnn.SAFE_GLOBALS),
        pytest.raises((RuntimeError, pickle.UnpicklingError), match="layout version 99, but"),
    ):
        load(data)


@all_kinds
@schemes
def test_mapped_safetensors(kind, scheme, tmp_path):
    layer, x = make(kind, scheme)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    with safe_open(tmp_path / "layer.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    other = empty_like(layer, device="meta")
    other.load_state_dict(state, assign=True)
    check_same(other, layer, x)
    for name, tensor in state.items():
        assert getattr(other, name).data_ptr() == tensor.data_ptr()  # no second copy


def test_share_memory_between_processes():
    layer, x = make()
    want = layer(x)
    layer.share_memory()
    assert layer.weight_packed.is_shared()
    assert expected.same_bits(layer(x), want)
    # A pool says so when its process dies; a queue would wait for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        got = torch.from_numpy(pool.submit(models.output_on_one_thread, layer, x).result())
    assert expected.same_bits(got, want)


# --- moves ---------------------------------------------------------------------------------------


@all_kinds
@schemes
@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.type(torch.float64), torch.float64),
        (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda m: m.half().float(), torch.float32),
        (lambda m: m.to(memory_format=torch.channels_last), torch.float32),
    ],
)
def test_moves_to_a_dtype_change_no_tensor(kind, scheme, move, dtype):
    layer, x = make(kind, scheme)
    want, before = layer(x), copy.deepcopy(layer)
    assert move(layer) is layer
    assert expected.same_bits(layer(x), want)
    check_same(layer, before, x)
    assert layer.weight.dtype == layer.weight_dtype == layer.dequantize().weight.dtype == dtype
    assert layer(x.to(dtype)).dtype == dtype


def test_moves_reach_children_and_parents():
    layer, x = make()
    layer.child = nn.BatchNorm1d(3)
    model = nn.Sequential(layer, nn.BatchNorm1d(37)).eval()
    model.half()
    assert layer.child.weight.dtype == model[1].weight.dtype == torch.float16
    assert layer.weight_scale.dtype == torch.float32
    assert model(x.half()).dtype == torch.float16


def test_meta_move_keeps_dtypes():
    layer, _ = make()
    layer.to("meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer.half()
    assert layer.weight_scale.dtype == torch.float32
    assert (layer.weight.dtype, layer.weight.is_meta) == (torch.float16, True)


def test_train_and_eval():
    layer, x = make()
    want = layer(x)
    for mode in (True, False):
        assert layer.train(mode) is layer
        assert layer.training == mode
        assert expected.same_bits(layer(x), want)
        assert Linear.from_float(layer.dequantize(), Scheme("int8")).training == mode
