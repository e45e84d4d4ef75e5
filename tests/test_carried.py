"""What a float layer hands to the lowbit layer in its place."""

from __future__ import annotations

import copy

import pytest
import torch
from models import row
from torch import nn

import lowbit


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


@pytest.mark.parametrize("in_place", [False, True])
def test_attributes_of_the_user_move_and_those_of_float_layers_do_not(in_place):
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].role = "head"
    if in_place:
        lowbit.quantize_(model, "w8a8")
    else:
        model = lowbit.quantize(model, "w8a8")
    assert type(model[0]) is lowbit.nn.Linear
    assert model[0].role == "head"
    assert "weight" not in dict(model[0].named_parameters())
