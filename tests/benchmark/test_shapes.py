"""lowbit.benchmark.shapes: texts, sizes, kinds."""

import pytest

from lowbit.benchmark.shapes import ConvShape, LinearShape, parse


@pytest.mark.parametrize(
    ("text", "shape", "kind"),
    [
        ("64x32k3@10", ConvShape(64, 32, 3, 1, 1, 1, 10), "dense 3x3"),
        ("64x32k5s2@20", ConvShape(64, 32, 5, 2, 1, 1, 20), "dense 5x5"),
        ("64x32k1@14", ConvShape(64, 32, 1, 1, 1, 1, 14), "dense 1x1"),
        ("64x32k1s2@14", ConvShape(64, 32, 1, 2, 1, 1, 14), "7x7 map"),
        ("3x32k7s2@24", ConvShape(3, 32, 7, 2, 1, 1, 24), "first layer"),
        ("8x8k3s2g8@7", ConvShape(8, 8, 3, 2, 1, 8, 7), "depthwise"),
        ("8x16k3d2g4@9", ConvShape(8, 16, 3, 1, 2, 4, 9), "grouped"),
        ("8x16k3d2@9", ConvShape(8, 16, 3, 1, 2, 1, 9), "dilated"),
    ],
)
def test_convolutions(text, shape, kind):
    assert parse("conv", text) == shape
    assert shape.kind == kind
    layer = shape.layer()
    y = layer(shape.input(2))
    assert y.shape == (2, shape.outputs, shape.output_size, shape.output_size)
    assert layer.weight.numel() == shape.weights
    assert shape.macs(2) == y.numel() * layer.weight[0].numel()


@pytest.mark.parametrize(
    ("text", "padded", "kind"),
    [
        ("64x48", LinearShape(64, 48), "linear"),
        ("1000x777", LinearShape(1024, 784), "ragged"),
        ("1024x1", LinearShape(1024, 16), "ragged"),
        ("33x64", LinearShape(64, 64), "ragged"),
    ],
)
def test_linears(text, padded, kind):
    shape = parse("linear", text)
    assert shape.padded == padded
    assert shape.kind == kind
    assert shape.layer()(shape.input(3)).shape == (3, shape.n)
    assert shape.macs(3) == 3 * shape.weights == 3 * shape.k * shape.n


@pytest.mark.parametrize(
    ("op", "text", "message"),
    [
        ("linear", "64", "INxOUT, e.g."),
        ("linear", "64x0", "holds a zero"),
        ("conv", "64x64", "INxOUTkKERNEL"),
        ("conv", "64x64k3d0@9", "holds a zero"),
        ("conv", "6x4k3g4@9", "4 groups do not divide"),
    ],
)
def test_texts_that_are_no_shapes(op, text, message):
    with pytest.raises(ValueError, match=message):
        parse(op, text)
