"""Nodes in integers, for inputs of one size, as the steps of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lowbit import _core
from lowbit.formats import FORMATS
from lowbit.nn import Conv2d
from lowbit.nn.base import QuantizedLayer
from lowbit.observers import Affine
from lowbit.static import functions
from lowbit.static.node import Node
from lowbit.static.program import Program

Size = tuple[int, int, int]
"""(channels, height, width) of codes."""

# Where channels, height and width are among the dimensions behind the batch; -1: they are 1.
_DIMENSIONS = {
    "nchw": (0, 1, 2),
    "nhwc": (2, 0, 1),
    "nct": (0, -1, 1),
    "ntc": (1, -1, 0),
    "nc": (0, -1, -1),
    "flat": (0, -1, -1),  # between programs, where features are in the codes' order
}


class Lookup(Protocol):
    """What a network knows beside its nodes."""

    def affine(self, name: str) -> Affine | None:
        """What the codes of a value mean; None where it has none."""

    def layer(self, name: str) -> nn.Module:
        """The lowbit layer of a node."""


@dataclass
class Lowered:
    """A program and where its inputs and outputs come from and go.

    Attributes:
        outputs: for each, the node's name.
        shapes: of each output, the batch left out.
        planar: for each input and output, whether channels come before pixels ([N, C, ...]).
        flattened: sizes of the images that "flat" values are of.
    """

    program: Program
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    planar: tuple[tuple[bool, ...], tuple[bool, ...]]
    flattened: dict[str, Size]


def code_size(shape: Sequence[int], layout: str) -> Size:
    """Size of the codes of a float tensor [N, ...]."""
    sizes = [*shape[1:], 1]
    channels, height, width = (sizes[i] for i in _DIMENSIONS[layout])
    return channels, height, width


def float_shape(size: Size, layout: str) -> tuple[int, ...]:
    """Dimensions behind the batch of the float tensor of codes."""
    dims = _DIMENSIONS[layout]
    found = {dim: extent for dim, extent in zip(dims, size, strict=True) if dim >= 0}
    return tuple(found[i] for i in range(len(found)))


def lower(
    nodes: Sequence[Node],
    inputs: Mapping[str, tuple[str, tuple[int, ...]]],
    outputs: Sequence[str],
    lookup: Lookup,
    flattened: Mapping[str, Size] | None = None,
) -> Lowered:
    """The program of nodes in integers.

    Args:
        nodes: in order.
        inputs: float values that they take: layout and shape [N, ...] of each.
        outputs: names of the nodes whose values leave as floats.
        lookup: the network.
        flattened: of the inputs that are "flat", as `Lowered` has it.

    Raises:
        ValueError: the sizes do not fit: the message names the node.
    """
    return _Lowering(lookup, flattened or {}).run(nodes, inputs, outputs)


class _Lowering:
    def __init__(self, lookup: Lookup, flattened: Mapping[str, Size]) -> None:
        self.lookup = lookup
        self.program = Program()
        self.index: dict[str, int] = {}
        self.sizes: dict[str, Size] = {}
        self.flattened = dict(flattened)
        self.written: list[str] = []

    def run(
        self,
        nodes: Sequence[Node],
        inputs: Mapping[str, tuple[str, tuple[int, ...]]],
        outputs: Sequence[str],
    ) -> Lowered:
        for position, (name, (layout, shape)) in enumerate(inputs.items()):
            self._define(name, code_size(shape, layout), self._affine(name))
            self.program.step(name, "quantize", input=position, to=self.index[name])
        for node in nodes:
            emit: Callable[[Node], None] = getattr(self, "_" + node.kind)
            emit(node)
        for name in outputs:
            if name in self.index:
                self.program.step(
                    name, "dequantize", x=self.index[name], output=self._position(name)
                )
        layouts = {node.name: node.layout for node in nodes}
        planar = ("nchw", "nct")
        return Lowered(
            self.program,
            tuple(inputs),
            tuple(self.written),
            tuple(float_shape(self.sizes[n], layouts[n]) for n in self.written),
            (
                tuple(layout in planar for layout, _ in inputs.values()),
                tuple(layouts[name] in planar for name in self.written),
            ),
            self.flattened,
        )

    # --- Values ----------------------------------------------------------------------------------

    def _affine(self, name: str) -> Affine:
        affine = self.lookup.affine(name)
        assert affine is not None, name
        return affine

    def _define(self, name: str, size: Size, affine: Affine) -> int:
        self.sizes[name] = size
        self.index[name] = self.program.value(size, affine)
        return self.index[name]

    def _position(self, name: str) -> int:
        self.written.append(name)
        return len(self.written) - 1

    def _input(self, node: Node, which: int = 0) -> tuple[int, Size]:
        name = node.inputs[which]
        return self.index[name], self.sizes[name]

    def _same(self, node: Node, op: str, size: Size, **operands: Any) -> None:
        """A step whose codes mean what its input's do."""
        x, _ = self._input(node)
        to = self._define(node.name, size, self.program.values[x].affine)
        self.program.step(node.name, op, x=x, **operands, to=to)

    def _new(self, node: Node, op: str, size: Size, **operands: Any) -> None:
        """A step that makes codes of their own meaning."""
        to = self._define(node.name, size, self._affine(node.name))
        self.program.step(node.name, op, **operands, to=to)

    def _wrong(self, node: Node, text: str) -> ValueError:
        return ValueError(f"'{node.fused[0] if node.fused else node.name}': {text}")

    # --- Operations ------------------------------------------------------------------------------

    def _layer(self, node: Node) -> None:
        x, size = self._input(node)
        layer = self.lookup.layer(node.name)
        assert isinstance(layer, QuantizedLayer)
        geometry, (height, width) = self._geometry(node, layer, size)
        operands: dict[str, Any] = {
            "x": x,
            "weight": packed_operands(layer),
            "geometry": geometry,
            "epilogue": "none",
            "table": None,
            "residual": -1,
        }
        out = (geometry[0], height, width)
        if len(node.inputs) > 1:
            operands["residual"], residual = self._input(node, 1)
            if residual != out:
                raise self._wrong(node, f"adds {residual} to {out} (channels, height, width)")
        function = node.settings.get("function")
        affine = self.lookup.affine(node.name)
        if function is not None and function.epilogue is not None:
            operands["epilogue"] = function.epilogue
        elif function is not None:
            assert affine is not None
            operands["table"] = functions.table(function, affine)
        self.program.held.append((layer, layer._operands()))
        if affine is None:  # nothing takes codes of it
            self.sizes[node.name] = out
            position = self._position(node.name)
            shape = {"out_height": height, "out_width": width}
            self.program.step(node.name, "conv", **operands, output=position, **shape)
        else:
            self._new(node, "conv", out, **operands)

    def _geometry(
        self, node: Node, layer: QuantizedLayer, size: Size
    ) -> tuple[tuple[int, ...], tuple[int, int]]:
        channels, height, width = size
        wanted = getattr(layer, "in_channels", None) or layer.in_features
        if channels != wanted:
            raise ValueError(f"{layer.label}: takes {wanted} channels, not {channels}")
        if not isinstance(layer, Conv2d):
            flattened = node.settings.get("flattened")
            found = self.flattened.get(node.inputs[0])
            if flattened is not None and tuple(flattened) != found:
                raise ValueError(
                    f"{layer.label}: takes features of images {flattened} (channels, height, "
                    f"width), not {found}"
                )
            return (layer.weight_shape[0], 1, 1, 1, 1, 0, 0, 1, 1, 1), (height, width)
        (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
        top, left, bottom, right = layer._pads()
        out_h = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1
        out_w = (width + left + right - dw * (kw - 1) - 1) // sw + 1
        if out_h < 1 or out_w < 1:
            raise ValueError(
                f"{layer.label}: the image {height} x {width} is smaller than the kernel"
            )
        geometry = (layer.out_channels, kh, kw, sh, sw, top, left, dh, dw, layer.groups)
        return geometry, (out_h, out_w)

    def _unary(self, node: Node) -> None:
        x, size = self._input(node)
        affine = self.program.values[x].affine
        table = functions.lookup(node.settings["function"], affine, self._affine(node.name))
        self._keep_flattened(node)
        self._new(node, "lut", size, x=x, table=table)

    def _add(self, node: Node) -> None:
        (a, size), (b, other) = self._input(node), self._input(node, 1)
        if size != other:
            raise self._wrong(node, f"adds {other} to {size} (channels, height, width)")
        function = node.settings.get("function")
        self._keep_flattened(node)
        epilogue = "none" if function is None else function.epilogue
        self._new(node, "add", size, a=a, b=b, epilogue=epilogue)

    def _mul(self, node: Node) -> None:
        (a, size), (b, other) = self._input(node), self._input(node, 1)
        if other not in (size, (size[0], 1, 1)):
            raise self._wrong(node, f"multiplies {size} by {other} (channels, height, width)")
        self._keep_flattened(node)
        self._new(node, "mul", size, a=a, b=b)

    def _concat(self, node: Node) -> None:
        sizes = [self.sizes[name] for name in node.inputs]
        if len({size[1:] for size in sizes}) > 1:
            raise self._wrong(node, f"joins {sizes} (channels, height, width)")
        size = (sum(size[0] for size in sizes), *sizes[0][1:])
        self._new(node, "concat", size, xs=[self.index[name] for name in node.inputs])

    def _max_pool(self, node: Node) -> None:
        window, size = self._window(node)
        self._same(node, "max_pool", size, **window)

    def _avg_pool(self, node: Node) -> None:
        window, size = self._window(node)
        window.pop("dilation")
        include = node.settings["include_pad"]
        self._new(node, "avg_pool", size, x=self._input(node)[0], **window, include_pad=include)

    def _window(self, node: Node) -> tuple[dict[str, Any], Size]:
        _, (channels, *extents) = self._input(node)
        given = node.settings
        kernel = given["kernel"] or tuple(extents)
        dilation = given.get("dilation", (1, 1))
        found = []
        for i, extent in enumerate(extents):
            stride, padding = given["stride"][i], given["padding"][i]
            room = extent + 2 * padding - dilation[i] * (kernel[i] - 1) - 1
            out = (room + (stride - 1 if given["ceil"] else 0)) // stride + 1
            if given["ceil"] and (out - 1) * stride >= extent + padding:
                out -= 1  # torch: the last window starts inside the image or its left padding
            if out < 1:
                raise self._wrong(node, f"an image {tuple(extents)} is smaller than the window")
            found.append(out)
        window = {"kernel": kernel, "stride": given["stride"], "padding": given["padding"]}
        return {**window, "dilation": dilation}, (channels, found[0], found[1])

    def _adaptive_avg_pool(self, node: Node) -> None:
        x, (channels, height, width) = self._input(node)
        out_h, out_w = node.settings["size"]
        size = (channels, out_h or height, out_w or width)
        self._new(node, "adaptive_avg_pool", size, x=x)

    def _pad(self, node: Node) -> None:
        x, (channels, height, width) = self._input(node)
        left, right, top, bottom = node.settings["sides"]
        size = (channels, height + top + bottom, width + left + right)
        code = functions.code(node.settings["value"], self.program.values[x].affine)
        self._same(node, "pad", size, top=top, left=left, code=code)

    def _resize(self, node: Node) -> None:
        _, (channels, height, width) = self._input(node)
        by_height, by_width = node.settings["factors"]
        self._same(node, "resize", (channels, height * by_height, width * by_width))

    def _view(self, node: Node) -> None:
        x, size = self._input(node)
        channels, height, width = size
        pixels = node.settings["pixels"]
        wanted = size
        if pixels == "row":
            wanted = (channels, 1, height * width)
        elif pixels == "none":
            wanted = (channels * height * width, 1, 1)
        if node.layout == "flat":
            self.flattened[node.name] = size
        if wanted == size:
            self.index[node.name], self.sizes[node.name] = x, size
        else:
            self._same(node, "view", wanted)

    def _keep_flattened(self, node: Node) -> None:
        if node.inputs[0] in self.flattened:
            self.flattened[node.name] = self.flattened[node.inputs[0]]


def packed_operands(layer: QuantizedLayer) -> tuple[int, ...]:
    """Format, activation, group size and the addresses of a layer's tensors.

    Raises:
        RuntimeError, ValueError: tensors that are not what the kernels take.
    """
    layer._operands()  # checks them
    scheme = layer.scheme
    tensors: tuple[torch.Tensor | None, ...] = layer.operator_tensors()[:5]
    return (
        FORMATS[scheme.weight].index,
        _core.ACTIVATIONS.index(scheme.activation),
        scheme.group_size or 0,
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
    )
