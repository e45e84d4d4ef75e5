"""Functions as tables: as near to the function as codes can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from static import oracle

from lowbit.observers import Affine, affine
from lowbit.static import functions
from lowbit.static.functions import Function

SMOOTH = ["hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "mish", "softplus", "elu"]


@pytest.mark.parametrize("name", [*SMOOTH, "leaky_relu"])
@pytest.mark.parametrize("spread", [0.1, 4.0, 300.0])
def test_tables_are_within_a_little_more_than_half_a_step(name, spread):
    function = Function(name)
    v = np.linspace(-3 * spread, 3 * spread, 10_001, dtype=np.float32)
    exact = function(torch.from_numpy(v).double()).numpy()
    to = affine(float(exact.min()), float(exact.max()))
    found = oracle.dequantize(oracle.look_up(v, functions.table(function, to)), *to)
    assert np.abs(found - exact).max() <= 0.75 * to.scale


@pytest.mark.parametrize("name", SMOOTH)
def test_lookups_are_exact(name):
    function, x, to = Function(name), Affine(0.03, 17), Affine(0.02, -90)
    codes = np.arange(-128, 128).astype(np.int8)
    table = np.frombuffer(functions.lookup(function, x, to), np.int8)
    exact = function(torch.from_numpy((codes - 17.0) * np.float32(0.03).astype(float))).numpy()
    wanted = np.clip(np.rint(exact / np.float32(0.02).astype(float)) - 90, -128, 127)
    assert np.array_equal(table[codes.view(np.uint8)], wanted)


def test_constants_and_single_codes():
    to = Affine(0.1, 5)
    inv, low, codes = functions.table(Function("mul", {"other": 0.0}), to)
    assert set(codes) == {5}
    assert np.array_equal(oracle.look_up(np.float32([-1e9, 0, 1e9]), (inv, low, codes)), [5] * 3)
    assert functions.code(0.26, to) == 8
    assert functions.code(1e9, to) == 127


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "wanted"),
    [
        (torch.clamp, (None, 0, 6), {}, Function("relu6")),
        ("clamp", (None,), {"min": 0.0}, Function("relu")),
        ("clamp", (None, -1, 2), {}, Function("clamp", {"min": -1, "max": 2})),
        (torch.nn.functional.gelu, (None,), {"approximate": "none"}, Function("gelu")),
        (torch.mul, (None, 2), {}, Function("mul", {"other": 2})),
        ("sub", (3, None), {}, Function("rsub", {"other": 3})),
        ("div", (3, None), {}, None),
        (torch.add, (None, True), {}, None),
        (torch.add, (None, None), {}, None),
        (torch.softmax, (None, 1), {}, None),
        (torch.nn.functional.leaky_relu, (None, [0.1]), {}, None),
    ],
)
def test_calls(target, args, kwargs, wanted):
    assert functions.of_call(target, args, kwargs) == wanted


def test_names_of_epilogues():
    assert Function("relu6").epilogue == "relu6"
    assert Function("silu").epilogue is None
    assert str(Function("gelu", {"approximate": "tanh"})) == "gelu"
