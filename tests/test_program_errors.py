"""What `_core.Program` refuses: each with a ValueError that names the step."""

from __future__ import annotations

import numpy as np
import operands
import oracle as numerics
import pytest

from lowbit import _core

SMALL = (8, 5, 5, 0.1, 0)
FIRST = {"op": "quantize", "input": 0, "to": 0}
LAST = {"op": "dequantize", "x": 1, "output": 0}
VIEW = {"op": "view", "x": 0, "to": 1}


@pytest.fixture
def conv(rng):
    """A correct 3x3 step from value 0 to value 1, and its weights."""
    weights = operands.random_weights(rng, "int8", (8, 3, 3, 8))
    arrays, addresses = operands._operands(numerics.pack_conv(weights.codes, "int8", 1), weights)
    yield {
        "op": "conv",
        "x": 0,
        "weight": (0, 0, 0, *addresses),
        "geometry": (8, 3, 3, 1, 1, 1, 1, 1, 1, 1),
        "epilogue": "none",
        "to": 1,
    }
    del arrays


def refuses(match, step, values=(SMALL, SMALL), last=LAST):
    with pytest.raises(ValueError, match=match):
        _core.Program(list(values), [FIRST, step, last])


def test_what_is_right(conv):
    _core.Program([SMALL, SMALL], [FIRST, VIEW, LAST])
    _core.Program([SMALL, SMALL], [FIRST, conv, LAST])


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ((0, 5, 5, 0.1, 0), "sizes"),
        ((8, -1, 5, 0.1, 0), "sizes"),
        ((8, 1 << 40, 5, 0.1, 0), "sizes"),
        ((1 << 20, 1 << 20, 5, 0.1, 0), "sizes"),
        ((8, 5, 5, 0.0, 0), "scale"),
        ((8, 5, 5, -1.0, 0), "scale"),
        ((8, 5, 5, float("nan"), 0), "scale"),
        ((8, 5, 5, float("inf"), 0), "scale"),
        ((8, 5, 5, 1e-39, 0), "scale"),
        ((8, 5, 5, 3e38, 0), "scale"),
        ((8, 5, 5, 0.1, 128), "zero point"),
        ((8, 5, 5, 0.1, -129), "zero point"),
    ],
)
def test_values(value, match):
    with pytest.raises(ValueError, match=f"value 1: .*{match}"):
        _core.Program([SMALL, value], [FIRST, VIEW, LAST])


@pytest.mark.parametrize(
    ("step", "match"),
    [
        ({}, "'op' is missing"),
        ({"op": "sqrt", "x": 0, "to": 1}, "unknown"),
        ({"op": 3}, "'op' is of the wrong kind"),
        ({"op": "view", "to": 1}, "'x' is missing"),
        ({"op": "view", "x": "0", "to": 1}, "'x' is of the wrong kind"),
        ({"op": "view", "x": 0}, "'to'"),
        ({"op": "view", "x": 2, "to": 1}, "no value 2"),
        ({"op": "view", "x": -1, "to": 1}, "no value -1"),
        ({"op": "view", "x": 1, "to": 1}, "before it is made"),
        ({"op": "view", "x": 0, "to": 7}, "no value 7"),
        ({"op": "view", "x": 0, "to": 0}, "made twice"),
        ({"op": "view", "x": 0, "to": 1, "output": 0}, "output as well"),
        ({"op": "add", "a": 0, "to": 1}, "'b' is missing"),
        ({"op": "add", "a": 0, "b": 0, "epilogue": "tanh", "to": 1}, "'tanh' is unknown"),
        ({"op": "concat", "xs": [], "to": 1}, "nothing to join"),
        ({"op": "concat", "xs": [0, 0], "to": 1}, "channels"),
        ({"op": "lut", "x": 0, "table": b"\0" * 255, "to": 1}, "256"),
        ({"op": "pad", "x": 0, "top": 1, "left": 0, "code": 0, "to": 1}, "fit"),
        ({"op": "pad", "x": 0, "top": 0, "left": -1, "code": 0, "to": 1}, "fit"),
        ({"op": "pad", "x": 0, "top": 0, "left": 0, "code": 300, "to": 1}, "code"),
        ({"op": "quantize", "input": -1, "to": 1}, "0..4095"),
        ({"op": "quantize", "input": 1 << 40, "to": 1}, "0..4095"),
        ({"op": "quantize", "input": 2, "to": 1}, "no step has input 1"),
    ],
)
def test_steps(step, match):
    refuses(match, step)


@pytest.mark.parametrize(
    ("step", "size", "match"),
    [
        (VIEW, (8, 5, 4), "number of codes"),
        ({"op": "add", "a": 0, "b": 0, "to": 1}, (8, 5, 4), "size"),
        ({"op": "mul", "a": 0, "b": 0, "to": 1}, (8, 1, 1), "size"),
        ({"op": "lut", "x": 0, "table": b"\0" * 256, "to": 1}, (8, 4, 5), "size"),
        ({"op": "resize", "x": 0, "to": 1}, (8, 10, 7), "divide"),
        ({"op": "resize", "x": 0, "to": 1}, (9, 10, 10), "channels"),
        ({"op": "adaptive_avg_pool", "x": 0, "to": 1}, (9, 1, 1), "channels"),
    ],
)
def test_sizes(step, size, match):
    refuses(match, step, (SMALL, (*size, 0.1, 0)))


@pytest.mark.parametrize("op", ["view", "resize", "max_pool", "pad"])
def test_codes_that_move_keep_their_meaning(op):
    keys = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "top": 0, "left": 0, "code": 0}
    step = {"op": op, "x": 0, "to": 1, **keys}
    _core.Program([SMALL, SMALL], [FIRST, step, LAST])
    refuses("scale and zero point|scale, zero point", step, (SMALL, (8, 5, 5, 0.2, 0)))
    refuses("scale and zero point|scale, zero point", step, (SMALL, (8, 5, 5, 0.1, 1)))


@pytest.mark.parametrize("op", ["max_pool", "avg_pool"])
@pytest.mark.parametrize(
    ("key", "pair", "match"),
    [
        ("kernel", (0, 1), "positive"),
        ("stride", (1, -1), "positive"),
        ("kernel", (1, 2, 3), "wrong kind"),
        ("padding", (-1, 0), "negative"),
        ("padding", (2, 0), "outside"),
        ("stride", (3, 1), "outside"),
        ("kernel", (1 << 15, 1 << 15), "large"),
    ],
)
def test_windows(op, key, pair, match):
    step = {"op": op, "x": 0, "kernel": (2, 2), "stride": (1, 1), "padding": (0, 0), "to": 1}
    refuses(match, {**step, key: pair})


@pytest.mark.parametrize(
    ("index", "number", "match"),
    [
        (0, 9, "geometry"),
        (0, 0, "impossible"),
        (1, 0, "impossible"),
        (1, 1 << 40, "impossible"),
        (3, 0, "positive"),
        (5, -1, "negative"),
        (5, 1 << 21, "absurdly large"),
        (7, 0, "positive"),
        (7, 1 << 21, "absurdly large"),
        (9, 0, "positive"),
        (9, 3, "impossible"),
    ],
)
def test_geometry(conv, index, number, match):
    geometry = list(conv["geometry"])
    geometry[index] = number
    refuses(match, {**conv, "geometry": geometry})


@pytest.mark.parametrize(
    ("index", "number", "match"),
    [
        (0, 99, "unknown"),
        (0, -1, "wrong kind"),
        (1, 1, "int8"),
        (1, 3, "unknown"),
        (2, 32, "go together"),
        (2, 7, "multiple of 32"),
        (3, 0, "address"),
        (4, 0, "address"),
        (5, 64, "go together"),
    ],
)
def test_weights(conv, index, number, match):
    weight = list(conv["weight"])
    weight[index] = number
    refuses(match, {**conv, "weight": weight})


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"weight": (0, 0)}, "wrong kind"),
        ({"geometry": (1, 2, 3)}, "wrong kind"),
        ({"residual": 1}, "before it is made"),
        ({"residual": 9}, "no value 9"),
        ({"epilogue": "gelu"}, "'gelu' is unknown"),
        ({"table": (1.0, 0, b"")}, "65536"),
        ({"table": (1.0, 1 << 30, b"1")}, "far"),
        ({"table": (float("nan"), 0, b"1")}, "finite"),
        ({"table": 3}, "wrong kind"),
    ],
)
def test_convolutions(conv, keys, match):
    refuses(match, {**conv, **keys})


def test_outputs_of_convolutions(conv):
    floats = {key: conv[key] for key in conv if key != "to"} | {"output": 1}
    refuses("'out_height' is missing", floats)
    refuses("positive", {**floats, "out_height": 0, "out_width": 5})
    refuses("far beyond", {**floats, "out_height": 5, "out_width": 500})
    twice = {**floats, "output": 0, "out_height": 5, "out_width": 5}
    refuses("written twice", twice, last={"op": "dequantize", "x": 0, "output": 0})


def test_programs():
    with pytest.raises(ValueError, match="no output"):
        _core.Program([SMALL], [FIRST])
    with pytest.raises(ValueError, match="no step has output 0"):
        _core.Program([SMALL, SMALL], [FIRST, VIEW, {**LAST, "output": 1}])
    with pytest.raises(ValueError, match="another size"):
        _core.Program([SMALL, (8, 5, 4, 0.1, 0)], [FIRST, {**FIRST, "to": 1}, LAST])


def test_runs():
    program = _core.Program([SMALL, SMALL], [FIRST, VIEW, LAST])
    x, y = np.zeros((1, 5, 5, 8), np.float32), np.zeros((1, 5, 5, 8), np.float32)
    ports = [(x.ctypes.data, True)], [(y.ctypes.data, True)]
    program.run(*ports, 1, 1)
    program.run([(0, True)], [(0, True)], 0, 1)
    for inputs, outputs, batch, threads in [
        ([], ports[1], 1, 1),
        (ports[0], ports[1] * 2, 1, 1),
        ([(0, True)], ports[1], 1, 1),
        (ports[0], [(0, False)], 1, 1),
        (*ports, -1, 1),
        (*ports, 1, 0),
    ]:
        with pytest.raises(ValueError, match=r"inputs|outputs|required"):
            program.run(inputs, outputs, batch, threads)
