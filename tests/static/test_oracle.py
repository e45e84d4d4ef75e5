"""The oracle of programs against torch's float operators on what the codes mean."""

from __future__ import annotations

import numpy as np
import oracle as numerics
import pytest
import torch
import torch.nn.functional as F
from static import oracle

import lowbit
from lowbit import _core

HALF = 0.5001  # of one step of the output's codes
SCALES = {"x": (0.03, 11), "to": (0.05, -7)}


def run(values, steps, *inputs):
    arrays = dict(enumerate(np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy()) for x in inputs))
    program = oracle.Program(values, steps)
    outputs = program.interpret(arrays, len(inputs[0]))
    return [torch.from_numpy(np.ascontiguousarray(outputs[i])).movedim(3, 1) for i in outputs]


def grid(rng, shape, name="x"):
    """Floats [N, C, H, W] that codes of the named scale mean."""
    codes = rng.integers(-128, 128, shape)
    scale, zero = SCALES[name]
    return torch.from_numpy(oracle.dequantize(codes, scale, zero))


def one_step(x, size, step, to="to"):
    """Quantize, a step from value 0 to value 1, dequantize."""
    values = [(x.shape[1], *x.shape[2:], *SCALES["x"]), (*size, *SCALES[to])]
    steps = [
        {"op": "quantize", "input": 0, "to": 0},
        {"x": 0, "to": 1, **step},
        {"op": "dequantize", "x": 1, "output": 0},
    ]
    (y,) = run(values, steps, x)
    return y


def clamped(y, name="to"):
    scale, zero = SCALES[name]
    return y.clamp(scale * (-128 - zero), scale * (127 - zero))


def convolution(groups, fmt="int8", group_size=None):
    layer = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)
    scheme = lowbit.Scheme(weight=fmt, group_size=group_size)
    return lowbit.nn.Conv2d.from_float(layer, scheme)


def conv_step(layer, **keys):
    geometry = (layer.out_channels, *layer.kernel_size, *layer.stride, *layer.padding, 1, 1)
    weight = layer._operands().operands
    geometry = (*geometry, layer.groups)
    return {"op": "conv", "weight": weight, "geometry": geometry, "epilogue": "none", **keys}


@pytest.mark.parametrize("fmt", _core.FORMATS)
@pytest.mark.parametrize(("groups", "group_size"), [(1, None), (2, None), (8, None), (1, 32)])
def test_convolution_is_the_float_one_of_its_weights(rng, fmt, groups, group_size):
    layer = convolution(groups, fmt, group_size)
    twin = layer.dequantize()
    x = grid(rng, (2, 8, 7, 9))
    y = one_step(x, (16, 4, 5), conv_step(layer, epilogue="relu"))
    assert (y - clamped(F.relu(twin(x)))).abs().max() <= HALF * SCALES["to"][0]


def test_convolution_adds_the_residual_before_the_activation(rng):
    layer = convolution(1)
    x, r = grid(rng, (2, 8, 7, 9)), grid(rng, (2, 16, 4, 5), "to")
    values = [(8, 7, 9, *SCALES["x"]), *[(16, 4, 5, *SCALES["to"])] * 2]
    steps = [
        {"op": "quantize", "input": 0, "to": 0},
        {"op": "quantize", "input": 1, "to": 1},
        conv_step(layer, x=0, residual=1, epilogue="relu", to=2),
        {"op": "dequantize", "x": 2, "output": 0},
    ]
    (y,) = run(values, steps, x, r)
    wanted = clamped(F.relu(layer.dequantize()(x) + r))
    assert (y - wanted).abs().max() <= HALF * SCALES["to"][0]


def test_convolution_to_floats_and_through_a_table(rng):
    layer = convolution(1)
    x = grid(rng, (2, 8, 7, 9))
    scale, zero = SCALES["to"]
    inv, low = 200.0, -2048
    points = (np.arange(4096, dtype=np.float32) + low) / np.float32(inv)
    table = oracle.quantize(np.tanh(points), scale, zero).tobytes()
    values = [(8, 7, 9, *SCALES["x"]), (16, 4, 5, scale, zero)]
    steps = [
        {"op": "quantize", "input": 0, "to": 0},
        conv_step(layer, x=0, output=0, out_height=4, out_width=5),
        conv_step(layer, x=0, table=(inv, low, table), to=1),
        {"op": "dequantize", "x": 1, "output": 1},
    ]
    y, activated = run(values, steps, x)
    wanted = layer.dequantize()(x)
    assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (activated - torch.tanh(y)).abs().max() <= 0.55 * scale


@pytest.mark.parametrize(
    ("size", "step", "reference"),
    [
        (
            (4, 3, 4),
            {"op": "avg_pool", "kernel": (3, 2), "stride": (2, 2), "padding": (1, 1)},
            lambda x: F.avg_pool2d(x, (3, 2), 2, (1, 1)),
        ),
        ((4, 2, 3), {"op": "adaptive_avg_pool"}, lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
        ((4, 1, 1), {"op": "adaptive_avg_pool"}, lambda x: x.mean((2, 3), keepdim=True)),
    ],
)
@pytest.mark.parametrize("include_pad", [True, False])
def test_averages(rng, size, step, reference, include_pad):
    x = grid(rng, (2, 4, 5, 7))
    wanted = reference(x)
    if step["op"] == "avg_pool":
        step = {**step, "include_pad": include_pad}
        wanted = F.avg_pool2d(x, (3, 2), 2, (1, 1), count_include_pad=include_pad)
    y = one_step(x, tuple(wanted.shape[1:]), step)
    assert (y - clamped(wanted)).abs().max() <= HALF * SCALES["to"][0]


def test_what_moves_codes_alone_is_exact(rng):
    x = grid(rng, (2, 4, 6, 8))
    zero = SCALES["x"][1]
    pool = {"op": "max_pool", "kernel": (3, 2), "stride": (2, 1), "padding": (1, 1)}
    y = one_step(x, (4, 2, 8), {**pool, "dilation": (2, 2)}, "x")
    assert torch.equal(y, F.max_pool2d(x, (3, 2), (2, 1), (1, 1), (2, 2)))
    y = one_step(x, (4, 9, 10), {"op": "pad", "top": 1, "left": 2, "code": zero}, "x")
    assert torch.equal(y, F.pad(x, (2, 0, 1, 2)))
    y = one_step(x, (4, 12, 24), {"op": "resize"}, "x")
    assert torch.equal(y, F.interpolate(x, (12, 24)))
    y = one_step(x, (4 * 48, 1, 1), {"op": "view"}, "x")
    assert torch.equal(y[:, :, 0, 0], x.permute(0, 2, 3, 1).flatten(1))
    table = oracle.quantize(np.arange(-128, 128), 1.0, 0)
    table = np.roll(table, 128)[::-1].tobytes()  # of code c: -1 - c
    y = one_step(x, (4, 6, 8), {"op": "lut", "table": table}, "x")
    scale = np.float32(SCALES["x"][0])
    codes = (x / scale).round() + zero
    assert torch.equal(y, ((-1 - codes) - zero) * scale)


@pytest.mark.parametrize("broadcast", [False, True])
def test_sum_product_and_concatenation(rng, broadcast):
    a = grid(rng, (2, 4, 3, 5))
    b = grid(rng, (2, 4, 1, 1) if broadcast else (2, 4, 3, 5), "to")
    values = [(4, 3, 5, *SCALES["x"]), (4, *b.shape[2:], *SCALES["to"])]
    steps = [{"op": "quantize", "input": i, "to": i} for i in range(2)]

    def result(step, channels):
        ending = [{**step, "to": 2}, {"op": "dequantize", "x": 2, "output": 0}]
        return run([*values, (channels, 3, 5, *SCALES["to"])], steps + ending, a, b)[0]

    y = result({"op": "mul", "a": 0, "b": 1}, 4)
    assert (y - clamped(a * b)).abs().max() <= HALF * SCALES["to"][0]
    if not broadcast:
        y = result({"op": "add", "a": 0, "b": 1, "epilogue": "relu"}, 4)
        assert (y - clamped(F.relu(a + b))).abs().max() <= HALF * SCALES["to"][0]
        y = result({"op": "concat", "xs": [0, 1]}, 8)
        assert (y - clamped(torch.cat([a, b], 1))).abs().max() <= HALF * SCALES["to"][0]
        assert torch.equal(y[:, 4:], b)


def test_images_that_are_not_finite_are_nan_alone(rng):
    x = grid(rng, (3, 2, 2, 2))
    x[1, 0, 1, 0] = float("inf")
    y = one_step(x, (2, 1, 1), {"op": "adaptive_avg_pool"})
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


def test_addresses_and_memory_formats(rng):
    x = grid(rng, (2, 3, 4, 5))
    values = [(3, 4, 5, *SCALES["x"])]
    steps = [
        {"op": "quantize", "input": 0, "to": 0},
        {"op": "dequantize", "x": 0, "output": 0},
    ]
    for last in (False, True):
        x = x.contiguous(memory_format=[torch.contiguous_format, torch.channels_last][last])
        y = torch.empty_like(x)
        program = oracle.Program(values, steps)
        program.run([(x.data_ptr(), last)], [(y.data_ptr(), last)], 2, 1)
        assert torch.equal(x, y)


def test_codes_saturate_and_round_to_even():
    x = np.array([0.5, 1.5, -0.5, -1.5, 1e38, -1e38, 300.0], np.float32)
    assert oracle.quantize(x, 1.0, 0).tolist() == [0, 2, 0, -2, 127, -128, 127]
    assert oracle.quantize(x, 1e-30, 3).tolist()[4:6] == [127, -128]
    assert numerics.FLT_MIN > 0
