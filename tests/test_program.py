"""`_core.Program` against `static/oracle.py`, bit for bit, on every instruction set; bad steps."""

from __future__ import annotations

import numpy as np
import operands
import oracle as numerics
import pytest
from hypothesis import given
from hypothesis import strategies as st
from static import oracle

from lowbit import _core

F32 = np.float32


class Network:
    """A program that grows step by step, on data: scales are chosen so that codes are used."""

    def __init__(self, rng, batch=2):
        self.rng, self.batch = rng, batch
        self.values, self.steps, self.inputs, self.held = [], [], {}, []

    def value(self, size, scale=None, zero=None):
        """A new value (channels, height, width)."""
        scale = float(F32(self.rng.uniform(0.01, 0.1))) if scale is None else scale
        zero = int(self.rng.integers(-128, 128)) if zero is None else zero
        self.values.append((*map(int, size), float(scale), int(zero)))
        return len(self.values) - 1

    def like(self, index, size=None):
        """A new value of the same scale and zero point."""
        value = self.values[index]
        return self.value(size or value[:3], *value[3:])

    def step(self, op, **keys):
        self.steps.append({"op": op, **keys})
        return keys.get("to", -1)

    def input(self, size, **affine):
        """A new input, quantized: the index of the value."""
        to = self.value(size, **affine)
        c, h, w = size
        x = self.rng.normal(size=(self.batch, h, w, c)) * self.values[to][3] * 60
        x -= self.values[to][3] * self.values[to][4]
        self.inputs[len(self.inputs)] = x.astype(F32)
        return self.step("quantize", input=len(self.inputs) - 1, to=to)

    def conv(
        self,
        x,
        out_channels,
        kernel=(1, 1),
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=1,
        fmt="int8",
        group_size=None,
        zeros=False,
        bias=True,
        output=None,
        **keys,
    ):
        """Appends a conv; its output's scale fits the values. Padding: top, bottom, left, right."""
        channels, height, width = self.values[x][:3]
        shape = (out_channels, *kernel, channels // groups)
        w = operands.random_weights(self.rng, fmt, shape, group_size, zeros, bias)
        packed = numerics.pack_conv(w.codes, fmt, groups)
        arrays, addresses = operands._operands(
            packed, w, numerics.conv_blocks(out_channels, groups)
        )
        self.held.append(arrays)
        top, bottom, left, right = padding
        size = [
            numerics.output_size(height, kernel[0], stride[0], top + bottom, dilation[0]),
            numerics.output_size(width, kernel[1], stride[1], left + right, dilation[1]),
        ]
        step = {
            "x": x,
            "weight": (operands.FORMAT_INDEX[fmt], 0, group_size or 0, *addresses),
            "geometry": (out_channels, *kernel, *stride, top, left, *dilation, groups),
            "epilogue": keys.pop("epilogue", "none"),
            **keys,
        }
        floats = {**step, "output": 0, "out_height": size[0], "out_width": size[1]}
        if output is not None:
            return self.step("conv", **{**floats, "output": output})
        y = self.run_oracle([*self.steps, {"op": "conv", **floats, "table": None}])[0]
        scale = max(float(np.abs(y).max()) / 150, 1e-6)
        if step.get("table") == "any":
            step["table"] = table = (float(F32(40 / scale / 100)), -50, self.random_bytes(300))
            assert len(table[2]) == 300
        return self.step("conv", **step, to=self.value((out_channels, *size), F32(scale)))

    def random_bytes(self, count):
        return self.rng.integers(0, 256, count).astype(np.uint8).tobytes()

    def dequantize(self, x, output=0):
        self.step("dequantize", x=x, output=output)

    def run_oracle(self, steps=None):
        return oracle.Program(self.values, steps or self.steps).interpret(self.inputs, self.batch)

    def run_core(self, threads=1, x_last=True, y_last=True, program=None):
        """Outputs NHWC by their numbers."""
        program = program or _core.Program(self.values, self.steps)
        order = (0, 3, 1, 2)
        xs = [
            operands.Guarded(x if x_last else np.ascontiguousarray(x.transpose(order)))
            for x in self.inputs.values()
        ]
        ys = {}
        for step in self.steps:
            if "output" not in step:
                continue
            if step["op"] == "conv":
                c, h, w = step["geometry"][0], step["out_height"], step["out_width"]
            else:
                c, h, w = self.values[step["x"]][:3]
            shape = (self.batch, h, w, c)
            if not y_last:
                shape = tuple(shape[i] for i in order)
            ys[step["output"]] = operands.Guarded.output(shape)
        program.run(
            [(x.address, x_last) for x in xs],
            [(ys[i].address, y_last) for i in sorted(ys)],
            self.batch,
            threads,
        )
        for y in ys.values():
            y.check_before()
        return {
            i: y.array if y_last else np.ascontiguousarray(y.array.transpose(0, 2, 3, 1))
            for i, y in ys.items()
        }

    def check(self, **how):
        expected, actual = self.run_oracle(), self.run_core(**how)
        assert expected.keys() == actual.keys()
        for i, y in expected.items():
            operands.assert_same_bits(actual[i], np.ascontiguousarray(y))

    def finish(self, x, **how):
        self.dequantize(x)
        self.check(**how)


# --- Convolutions --------------------------------------------------------------------------------

KINDS = {
    "first": {
        "channels": 3,
        "out_channels": 20,
        "kernel": (3, 3),
        "stride": (2, 2),
        "padding": (0, 1, 0, 1),
    },
    "dense": {"channels": 24, "out_channels": 40, "kernel": (3, 3), "padding": (1, 1, 1, 1)},
    "pointwise": {"channels": 40, "out_channels": 72},
    "strided": {"channels": 37, "out_channels": 16, "stride": (2, 2)},
    "depthwise": {
        "channels": 40,
        "out_channels": 40,
        "kernel": (3, 3),
        "padding": (1, 1, 1, 1),
        "groups": 40,
    },
    "depthwise5": {
        "channels": 24,
        "out_channels": 24,
        "kernel": (5, 5),
        "stride": (2, 2),
        "padding": (2, 2, 2, 2),
        "groups": 24,
    },
    "grouped": {
        "channels": 40,
        "out_channels": 80,
        "kernel": (3, 3),
        "padding": (1, 1, 1, 1),
        "groups": 20,
    },
    "halves": {
        "channels": 24,
        "out_channels": 40,
        "kernel": (3, 2),
        "dilation": (2, 1),
        "groups": 2,
    },
    "dilated": {
        "channels": 9,
        "out_channels": 17,
        "kernel": (2, 3),
        "padding": (1, 2, 3, 0),
        "dilation": (2, 3),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions(isa, rng, fmt, kind):
    """Each kind with each format, alone, and with what may end it."""
    keys = dict(KINDS[kind])
    channels = keys.pop("channels")
    for ending in ({}, {"epilogue": "relu6"}, {"epilogue": "hardswish"}, {"table": "any"}):
        net = Network(rng)
        x = net.input((channels, 9, 7))
        net.finish(net.conv(x, fmt=fmt, **keys, **ending))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeros", [False, True])
def test_groups_of_k(isa, rng, kind, zeros):
    keys = dict(KINDS[kind])
    net = Network(rng)
    x = net.input((keys.pop("channels"), 9, 7))
    net.finish(net.conv(x, fmt="int4", group_size=32, zeros=zeros, epilogue="relu", **keys))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["none", "relu", "hardswish"])
def test_residuals_and_float_outputs(isa, rng, kind, ending):
    keys = dict(KINDS[kind])
    net = Network(rng, batch=1)
    x = net.input((keys.pop("channels"), 9, 7))
    first = net.conv(x, **keys, bias=False)
    second = net.conv(x, **keys, residual=first, epilogue=ending)
    net.conv(x, **keys, residual=second, epilogue=ending, output=1)
    net.conv(x, **keys, epilogue=ending, output=2)
    net.finish(second, y_last=False)


def test_extreme_codes(isa, rng):
    """-128 in activations and in weights, in products of bytes that ISAs add up in pairs."""
    for fmt in numerics.FORMATS:
        for zero in (-128, 0, 127):
            net = Network(rng)
            x = net.input((64, 4, 4), zero=zero)
            net.inputs[0][0] = -1e9
            net.inputs[0][1] = 1e9
            wide = net.conv(x, 48, fmt=fmt)
            net.finish(net.conv(wide, 20, (3, 3), padding=(1, 1, 1, 1), fmt=fmt, epilogue="relu"))


# --- Everything else -----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [5, 16, 35])
@pytest.mark.parametrize("ending", ["none", "relu", "relu6", "hardswish"])
def test_add(isa, rng, channels, ending):
    net = Network(rng)
    a, b = net.input((channels, 3, 5)), net.input((channels, 3, 5))
    net.finish(net.step("add", a=a, b=b, epilogue=ending, to=net.value((channels, 3, 5))))


@pytest.mark.parametrize("size", [(35, 3, 5), (35, 1, 1)])
def test_mul(isa, rng, size):
    net = Network(rng)
    a, b = net.input((35, 3, 5)), net.input(size)
    net.finish(net.step("mul", a=a, b=b, to=net.value((35, 3, 5), scale=0.3)))


def test_concat(isa, rng):
    net = Network(rng)
    xs = [net.input((c, 4, 3)) for c in (16, 7, 33)]
    to = net.like(xs[0], (56, 4, 3))
    net.finish(net.step("concat", xs=xs, to=to))


def test_lut(isa, rng):
    net = Network(rng)
    x = net.input((21, 4, 3))
    net.finish(net.step("lut", x=x, table=net.random_bytes(256), to=net.value((21, 4, 3))))


@pytest.mark.parametrize("include_pad", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "size"),
    [
        ((2, 2), (2, 2), (0, 0), (1, 1), (4, 3)),
        ((3, 3), (2, 2), (1, 1), (1, 1), (5, 4)),
        ((3, 2), (1, 2), (1, 0), (2, 3), (7, 2)),
        ((3, 3), (2, 2), (0, 1), (1, 1), (4, 4)),  # the last window is cut off
    ],
)
def test_pools(isa, rng, include_pad, kernel, stride, padding, dilation, size):
    net = Network(rng)
    x = net.input((37, 9, 7))
    keys = {"x": x, "kernel": kernel, "stride": stride, "padding": padding}
    if dilation == (1, 1):
        to = net.value((37, *size))
        net.dequantize(net.step("avg_pool", **keys, include_pad=include_pad, to=to))
    to = net.like(x, (37, *size))
    net.dequantize(net.step("max_pool", **keys, dilation=dilation, to=to), len(net.steps) - 1 > 1)
    net.check()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 7), (12, 5)])
def test_adaptive_avg_pool(isa, rng, size):
    net = Network(rng)
    x = net.input((37, 9, 7))
    net.finish(net.step("adaptive_avg_pool", x=x, to=net.value((37, *size))))


def test_codes_that_move(isa, rng):
    net = Network(rng)
    x = net.input((20, 3, 4))
    pad = net.step("pad", x=x, top=1, left=2, code=-3, to=net.like(x, (20, 6, 7)))
    resize = net.step("resize", x=pad, to=net.like(x, (20, 12, 14)))
    view = net.step("view", x=resize, to=net.like(x, (35, 4, 24)))
    net.finish(net.step("view", x=view, to=net.like(x, (35 * 4 * 24, 1, 1))))


# --- Whole networks ------------------------------------------------------------------------------


def small_network(rng, batch, fmt="int8"):
    """Inverted residuals, squeeze and excitation, pools: the kinds of steps in one network."""
    net = Network(rng, batch)
    x = net.input((3, 17, 15))
    x = net.conv(x, 24, (3, 3), (2, 2), (1, 1, 1, 1), epilogue="relu6")
    for stride in (1, 2):
        wide = net.conv(x, 72, fmt=fmt, epilogue="relu6")
        deep = net.conv(
            wide, 72, (3, 3), (stride, stride), (1, 1, 1, 1), groups=72, epilogue="hardswish"
        )
        mean = net.step("adaptive_avg_pool", x=deep, to=net.value((72, 1, 1)))
        gate = net.conv(net.conv(mean, 18, epilogue="relu"), 72, table="any")
        size = net.values[deep][:3]
        gated = net.step("mul", a=deep, b=gate, to=net.value(size, scale=0.5))
        narrow = {"residual": x} if stride == 1 else {}
        x = net.conv(gated, 24, fmt=fmt, **narrow)
    # Read with a border, without one, and by a pool.
    size = net.values[x][:3]
    a = net.conv(x, 24, (3, 3), padding=(1, 1, 1, 1), fmt=fmt)
    b = net.conv(x, 40, fmt=fmt)
    c = net.step(
        "max_pool",
        x=x,
        kernel=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        to=net.like(x),
    )
    joined = net.step("concat", xs=[a, b, c], to=net.like(a, (88, *size[1:])))
    net.dequantize(joined, 1)
    mean = net.step("adaptive_avg_pool", x=joined, to=net.value((88, 1, 1)))
    net.conv(mean, 10, output=0, out_height=1, out_width=1)
    return net


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_network(isa, rng, batch, threads):
    net = small_network(rng, batch)
    net.check(threads=threads, x_last=batch != 2, y_last=batch != 5)


def test_a_program_runs_again_with_another_batch(rng):
    net = small_network(rng, 3)
    program = _core.Program(net.values, net.steps)
    expected = net.run_core(program=program)
    net.batch = 1
    for i in (2, 0, 1):
        whole, net.inputs = net.inputs, {0: net.inputs[0][i : i + 1]}
        for port, y in net.run_core(program=program).items():
            operands.assert_same_bits(y, expected[port][i : i + 1])
        net.inputs = whole
    assert 0 < program.arena_bytes < 200_000


def test_steps_share_their_work(isa, rng):
    """Large enough for threads to share an image: its pixels, its channels."""
    net = Network(rng, batch=1)
    x = net.input((64, 20, 20))
    x = net.conv(x, 64, (3, 3), padding=(1, 1, 1, 1), epilogue="relu")
    x = net.conv(x, 64, (5, 5), padding=(2, 2, 2, 2), groups=64)
    x = net.conv(x, 64, (3, 3), padding=(1, 1, 1, 1), groups=16, residual=x)
    x = net.conv(x, 256, (3, 3), (9, 9), epilogue="relu")  # more weights than activations
    net.conv(x, 128, output=1)
    net.finish(x, threads=2)


def test_images_that_are_not_finite(isa, rng):
    net = small_network(rng, 4)
    expected = net.run_core()
    net.inputs[0][1, 3, 4, 0] = np.nan
    net.inputs[0][3, 16, 14, 2] = -np.inf
    net.check(threads=2)
    for port, y in net.run_core().items():
        assert np.isnan(y[[1, 3]]).all()
        operands.assert_same_bits(
            np.ascontiguousarray(y[[0, 2]]), np.ascontiguousarray(expected[port][[0, 2]])
        )


def test_profile_times_every_step(rng):
    net = small_network(rng, 1)
    program = _core.Program(net.values, net.steps)
    x = operands.Guarded(net.inputs[0])
    ys = [operands.Guarded.output((1, 10)), operands.Guarded.output((1, 5, 4, 88))]
    times = program.profile([(x.address, True)], [(y.address, True) for y in ys], 1, 1)
    assert [op for op, _ in times] == [step["op"] for step in net.steps]
    assert all(seconds >= 0 for _, seconds in times)


@given(data=st.data())
def test_any_convolution(isa, data):
    """Sizes, strides, padding and groups at random, a second convolution behind the first."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    net = Network(np.random.default_rng(draw(0, 1 << 20)), draw(1, 2))
    groups = draw(1, 5)
    x = net.input((groups * draw(1, 9), draw(5, 9), draw(5, 9)))
    for channels in (groups * draw(1, 12), groups * draw(1, 5)):
        kernel, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2))
        padding = [draw(0, (kernel[i // 2] - 1) * dilation[i // 2]) for i in range(4)]
        height, width = net.values[x][1:3]
        if height + sum(padding[:2]) <= (kernel[0] - 1) * dilation[0]:
            return
        if width + sum(padding[2:]) <= (kernel[1] - 1) * dilation[1]:
            return
        fmt = data.draw(st.sampled_from(list(numerics.FORMATS)))
        group_size = data.draw(st.sampled_from([None, None, 32]))
        x = net.conv(
            x,
            channels,
            kernel,
            (draw(1, 2), draw(1, 2)),
            tuple(padding),
            dilation,
            groups,
            fmt,
            group_size,
            epilogue=data.draw(st.sampled_from(_core.EPILOGUES)),
        )
    net.finish(x, threads=draw(1, 2))
