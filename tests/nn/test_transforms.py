"""Layers of every kind under torch.func and the tracer: the bits of single calls, no warnings."""

import copy
import warnings

import expected
import pytest
import torch
from torch import nn

from lowbit.nn import Conv1d, Conv2d, ConvTranspose2d, Linear

KINDS = {
    "linear": lambda: (Linear.from_float(nn.Linear(40, 12), "w4a8-g32"), (3, 40)),
    "linear, one row": lambda: (Linear.from_float(nn.Linear(40, 12), "w1a1"), (40,)),
    "conv1d": lambda: (Conv1d.from_float(nn.Conv1d(6, 9, 3), "w8a8"), (2, 6, 11)),
    "conv2d": lambda: (Conv2d.from_float(nn.Conv2d(6, 9, 3, bias=False), "w2a8"), (2, 6, 9, 8)),
    "conv2d, one image": lambda: (Conv2d.from_float(nn.Conv2d(6, 9, 3), "w8a16"), (6, 9, 8)),
    "conv2d, reflect": lambda: (
        Conv2d.from_float(nn.Conv2d(6, 9, 3, padding=1, padding_mode="reflect"), "w8a8"),
        (2, 6, 9, 8),
    ),
    "conv_transpose2d": lambda: (
        ConvTranspose2d.from_float(nn.ConvTranspose2d(6, 9, 3, 2), "w8a8"),
        (2, 6, 5, 4),
    ),
}


@pytest.fixture(params=KINDS)
def layer_and_shape(request):
    layer, shape = KINDS[request.param]()
    return layer.eval(), shape


def test_vmap(layer_and_shape):
    layer, shape = layer_and_shape
    x = torch.randn(3, *shape)
    want = torch.stack([layer(part) for part in x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expected.same_bits(torch.vmap(layer)(x), want)
        last = torch.vmap(layer, in_dims=-1, out_dims=-1)(x.movedim(0, -1))
        assert expected.same_bits(last.movedim(-1, 0), want)
        nested = torch.vmap(torch.vmap(layer))(torch.stack([x, x]))
    assert expected.same_bits(nested, torch.stack([want, want]))


def test_an_ensemble(layer_and_shape):
    """Models of one kind with weights of their own, called as one."""
    layer, shape = layer_and_shape
    other = copy.deepcopy(layer)
    for name, tensor in other.named_buffers():
        if name.endswith("weight_scale"):
            tensor.mul_(2)
    parameters, buffers = torch.func.stack_module_state([layer, other])

    def call(state, x):
        return torch.func.functional_call(layer, state, (x,))

    x = torch.randn(2, *shape)
    want = torch.stack([layer(x[0]), other(x[1])])
    assert expected.same_bits(torch.vmap(call)((parameters | buffers), x), want)
    same = torch.vmap(call, in_dims=(0, None))((parameters | buffers), x[0])
    assert expected.same_bits(same, torch.stack([layer(x[0]), other(x[0])]))


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.func.grad(lambda v: layer(v).sum())(x),
        lambda layer, x: torch.func.jacrev(layer)(x),
        lambda layer, x: torch.func.jacfwd(layer)(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
        lambda layer, x: torch.vmap(torch.func.grad(lambda v: layer(v).sum()))(x[None]),
    ],
    ids=["grad", "jacrev", "jacfwd", "jvp", "grad of samples"],
)
def test_derivatives_are_refused(layer_and_shape, transform):
    layer, shape = layer_and_shape
    layer._fqn = "net.0"
    with pytest.raises(RuntimeError, match=r"'net\.0': quantized layers compute no gradients"):
        transform(layer, torch.randn(shape))


def test_derivatives_of_something_else(layer_and_shape):
    layer, shape = layer_and_shape
    x = torch.randn(shape)
    want = layer(x)
    grad = torch.func.grad(lambda scale, v: (scale * layer(v)).sum())(torch.ones_like(want), x)
    assert expected.same_bits(grad, want)


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_tracing(layer_and_shape):
    layer, shape = layer_and_shape
    x = torch.randn(shape)
    traced = torch.jit.trace(layer, x)
    assert "lowbit::" in str(traced.graph)
    assert expected.same_bits(traced(x), layer(x))
    if len(shape) == 3 and isinstance(layer, Conv2d):
        return  # torch.fx does not tell an image from a batch
    graph = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert expected.same_bits(graph(x), layer(x))
