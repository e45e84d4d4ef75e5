"""Prepared calls notice every change of their layer: `lowbit.direct` and `QuantizedLayer`."""

import copy
import gc
import pickle
import weakref

import expected
import pytest
import torch
from torch import nn

from lowbit import direct
from lowbit.nn import Conv2d, Linear


def linear_and_input(**options):
    return Linear.from_float(nn.Linear(70, 33, **options).eval(), "w4a8-g32"), torch.randn(3, 70)


def conv_and_input(**options):
    conv = nn.Conv2d(6, 10, 3, padding=1, **options).eval()
    return Conv2d.from_float(conv, "w4a8-g32"), torch.randn(2, 6, 7, 5)


@pytest.fixture(params=[linear_and_input, conv_and_input], ids=["linear", "conv"])
def layer_and_input(request):
    return request.param()


def oracle_of(layer, x):
    return (expected.linear if isinstance(layer, Linear) else expected.conv2d)(layer, x)


needs_prepared = pytest.mark.skipif(not direct._bound, reason="this torch has no exchange table")


@pytest.fixture(
    params=[pytest.param(True, marks=needs_prepared), False], ids=["prepared", "unprepared"]
)
def both_ways(request, monkeypatch):
    """Runs a test with prepared calls, and as with a torch that cannot have them."""
    monkeypatch.setattr(direct, "_bound", request.param)
    return request.param


def set_attribute(name, change):
    return lambda layer: setattr(layer, name, change(getattr(layer, name)))


def set_data(name, change):
    def apply(layer):
        tensor = getattr(layer, name)
        tensor.data = change(tensor.data)

    return apply


def resized_storage(layer):
    old = layer.weight_packed.clone()
    layer.weight_packed.untyped_storage().resize_(0)
    blocker = torch.empty_like(old)  # takes the memory that has become free
    layer.weight_packed.untyped_storage().resize_(old.nbytes)
    layer.weight_packed.copy_(old)
    assert blocker.data_ptr() != layer.weight_packed.data_ptr()


def swapped(layer):
    other = layer.weight_scale * 3
    torch.utils.swap_tensors(layer.weight_scale, other)


def loaded(layer, **options):
    state = {
        name: value * 2 if name == "weight_scale" else value.clone()
        for name, value in layer.state_dict().items()
    }
    layer.load_state_dict(state, **options)


CHANGES = {
    "nothing": lambda layer: None,
    "scale assigned": set_attribute("weight_scale", lambda t: t * 2),
    "scale in place": lambda layer: layer.weight_scale.mul_(2),
    "scale by data": set_data("weight_scale", lambda t: t * 2),
    "scale by set_": lambda layer: layer.weight_scale.set_(layer.weight_scale * 2),
    "scale swapped": swapped,
    "packed assigned": set_attribute("weight_packed", torch.zeros_like),
    "packed by data": set_data("weight_packed", torch.clone),
    "packed in new memory": resized_storage,
    "group scale assigned": set_attribute("weight_group_scale", lambda t: t + 1),
    "zeros added": lambda layer: setattr(
        layer, "weight_group_zero", torch.ones_like(layer.weight_group_scale)
    ),
    "bias in place": lambda layer: layer.bias.add_(1),
    "bias removed": lambda layer: setattr(layer, "bias", None),
    "bias a parameter": lambda layer: setattr(
        layer, "bias", nn.Parameter(layer.bias + 1, requires_grad=False)
    ),
    "state loaded": loaded,
    "state assigned": lambda layer: loaded(layer, assign=True),
    "moved and back": lambda layer: layer.double().float(),
    "shared": lambda layer: layer.share_memory(),
    "buffers replaced": lambda layer: layer.__dict__.update(
        _buffers={**layer._buffers, "bias": layer.bias * 2}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_operands_are_seen(layer_and_input, change, both_ways):
    layer, x = layer_and_input
    layer(x)
    CHANGES[change](layer)
    for _ in range(2):
        assert expected.same_bits(layer(x), oracle_of(layer, x))


def test_a_parameter_in_place_of_a_missing_bias(both_ways):
    for layer, x in (linear_and_input(bias=False), conv_and_input(bias=False)):
        layer(x)
        layer.bias = nn.Parameter(torch.randn(len(layer.weight_scale)), requires_grad=False)
        assert expected.same_bits(layer(x), oracle_of(layer, x))


@needs_prepared
@pytest.mark.parametrize(
    "change",
    [
        set_data("weight_packed", lambda t: t[:, :1].contiguous()),
        set_data("weight_scale", lambda t: t[:5]),
        set_data("weight_scale", lambda t: t[:1].expand(len(t))),
        set_data("bias", lambda t: t.view(torch.int32)),
        lambda layer: layer.bias.resize_(1),
        lambda layer: layer.weight_scale.resize_(0),
    ],
)
def test_less_memory_at_the_same_address_is_refused(layer_and_input, change):
    layer, x = layer_and_input
    layer(x)
    change(layer)
    assert not layer._direct.matches(layer.__dict__)
    with pytest.raises(ValueError, match=r"lowbit\.nn\..* must be"):
        layer(x)


@pytest.mark.parametrize(
    ("name", "value", "shape"),
    [
        ("stride", (2, 1), (2, 10, 4, 5)),
        ("padding", (2, 1), (2, 10, 9, 5)),
        ("padding", "valid", (2, 10, 5, 3)),
        ("dilation", (1, 2), (2, 10, 7, 3)),
    ],
)
def test_changes_of_a_convolutions_settings_are_seen(name, value, shape, both_ways):
    layer, x = conv_and_input()
    layer(x)
    setattr(layer, name, value)
    for _ in range(2):
        y = layer(x)
        assert y.shape == shape
        assert expected.same_bits(y, oracle_of(layer, x))
    if both_ways:
        assert expected.same_bits(layer._direct(x, layer.__dict__), y)
    else:
        assert layer._direct is None


def test_another_padding_mode_is_seen(both_ways):
    layer, x = conv_and_input()
    layer(x)
    layer.padding_mode = "reflect"
    assert expected.same_bits(layer(x), oracle_of(layer, x))
    layer.padding_mode = "zeros"
    assert expected.same_bits(layer(x), oracle_of(layer, x))


def test_other_buffers_for_one_call(layer_and_input):
    layer, x = layer_and_input
    want = layer(x)
    other = {"bias": layer.bias + 1}
    changed = torch.func.functional_call(layer, other, (x,))
    torch.testing.assert_close(changed, want + 1)
    assert expected.same_bits(layer(x), want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_their_own_call(layer_and_input, copied):
    layer, x = layer_and_input
    want = layer(x)
    twin = copied(layer)
    assert twin._direct is None
    assert twin._checked is None
    twin.bias = twin.bias + 1
    torch.testing.assert_close(twin(x), want + 1)
    assert expected.same_bits(layer(x), want)


@needs_prepared
def test_a_copy_of_the_attributes_is_seen_as_another_layer(layer_and_input):
    """As data parallelism copies layers."""
    layer, x = layer_and_input
    want = layer(x)
    replica = layer._replicate_for_data_parallel()
    assert replica._direct is layer._direct
    replica._buffers["bias"] = layer.bias + 1
    torch.testing.assert_close(replica(x), want + 1)
    assert expected.same_bits(layer(x), want)


def test_replaced_tensors_are_freed(layer_and_input):
    layer, x = layer_and_input
    layer(x)
    old = weakref.ref(layer.weight_packed)
    layer.weight_packed = layer.weight_packed.clone()
    layer(x)
    assert old() is None


@pytest.mark.parametrize("build", [linear_and_input, conv_and_input])
def test_a_layer_in_a_cycle_is_collected(build):
    layer, x = build()
    layer(x)
    layer.weight_scale.owner = layer
    found = weakref.ref(layer), weakref.ref(layer.weight_packed)
    del layer
    gc.collect()
    assert [ref() for ref in found] == [None, None]
