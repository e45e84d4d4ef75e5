"""A captured network as OpenVINO's INT8 graph: FakeQuantize at the edges that are codes here.

Ranges are those of the same calibration, as NNCF's preset for speed has them: symmetric,
unsigned where nothing is negative; weights are int8 codes with a scale for each channel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.benchmark.peers.blocks import signed_codes
from lowbit.benchmark.peers.openvino_request import request
from lowbit.static.functions import Function
from lowbit.static.node import Node
from lowbit.static.prepared import PreparedNetwork
from lowbit.static.stages import coded_values


def available() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


class Compiled:
    """A compiled network, and the same with counters.

    Args:
        prepared, shape: as for `build`.
        threads: number of threads.
    """

    def __init__(self, prepared: PreparedNetwork, shape: tuple[int, ...], threads: int) -> None:
        self.run = request(build(prepared, shape), threads)
        self._graph = build(prepared, shape)
        self._threads = threads

    def each(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs of images one by one, where it was built for one."""
        return torch.cat([self.run(image[None].contiguous()).clone() for image in images])

    def profile(self, x: torch.Tensor, rounds: int) -> list[tuple[str, str, float]]:
        """(name, kind, seconds) of each layer, the best of some rounds."""
        import openvino as ov

        config = {
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERF_COUNT": True,
        }
        infer = ov.Core().compile_model(self._graph, "CPU", config).create_infer_request()
        best: dict[tuple[str, str], float] = {}
        for _ in range(rounds):
            infer.infer([x.numpy()])
            for layer in infer.profiling_info:
                key = layer.node_name, layer.exec_type
                seconds = layer.real_time.total_seconds()
                best[key] = min(best.get(key, seconds), seconds)
        return [(name, kind, seconds) for (name, kind), seconds in best.items() if seconds]


def compile_network(prepared: PreparedNetwork, shape: tuple[int, ...], threads: int) -> Compiled:
    """A network for inputs of this shape."""
    return Compiled(prepared, shape, threads)


def build(prepared: PreparedNetwork, shape: tuple[int, ...]) -> Any:
    """An `openvino.Model` of one image input and one output.

    Args:
        prepared: calibrated.
        shape: of the input [N, C, H, W].

    Raises:
        ValueError: a node that has no translation here.
    """
    return _Build(prepared).run(shape)


class _Build:
    def __init__(self, prepared: PreparedNetwork) -> None:
        from openvino import opset15

        self.op: Any = opset15
        self.prepared = prepared
        nodes, _, _, self.output = prepared._graph
        self.nodes: list[Node] = nodes
        self.owners = coded_values(nodes)
        self.values: dict[str, Any] = {}
        self.quantized: dict[str, Any] = {}

    def run(self, shape: tuple[int, ...]) -> Any:
        import openvino as ov

        parameters = []
        for node in self.nodes:
            if node.kind == "input":
                self.values[node.name] = self.op.parameter(list(shape), np.float32)
                parameters.append(self.values[node.name])
                continue
            translate: Callable[[Node], Any] | None = getattr(self, "_" + node.kind, None)
            if translate is None:
                raise ValueError(f"'{node.name}': no translation of {node.kind}")
            self.values[node.name] = translate(node)
        return ov.Model([self.values[self.output.name]], parameters, "network")

    def _codes(self, name: str) -> Any:
        """A value, quantized where it has codes."""
        owner = self.owners.get(name)
        if owner != name:
            return self.values[name]
        if name not in self.quantized:
            module: Any = self.prepared.observers[name]
            low, high = _range(module.observer.parameters())
            bounds = [self.op.constant(np.float32(v)) for v in (low, high)]
            fake = self.op.fake_quantize(self.values[name], *bounds, *bounds, 256)
            self.quantized[name] = fake
        return self.quantized[name]

    def _layer(self, node: Node) -> Any:
        module: Any = self.prepared.model.get_submodule(node.settings["module"])
        x = self._codes(node.inputs[0])
        y = self._conv(node, module, x) if isinstance(module, nn.Conv2d) else self._fc(module, x)
        if len(node.inputs) > 1:
            y = self.op.add(y, self._codes(node.inputs[1]))
        return self._function(y, node.settings.get("function"))

    def _conv(self, node: Node, module: nn.Conv2d, x: Any) -> Any:
        codes, scale = signed_codes(module)
        shape = module.weight.shape
        if module.groups > 1:
            shape = torch.Size((module.groups, shape[0] // module.groups, *shape[1:]))
        factors = scale.reshape(*shape[: len(shape) - 3], 1, 1, 1).astype(np.float32)
        weight = self._weight(codes.reshape(shape), factors)
        left, right, top, bottom = self._sides(node, module)
        own = [int(side) for side in module.padding]
        convolution = self.op.group_convolution if module.groups > 1 else self.op.convolution
        begin, end = [own[0] + top, own[1] + left], [own[0] + bottom, own[1] + right]
        y = convolution(x, weight, list(module.stride), begin, end, list(module.dilation))
        if module.bias is None:
            return y
        return self.op.add(y, self.op.constant(module.bias.detach().numpy().reshape(1, -1, 1, 1)))

    def _sides(self, node: Node, module: nn.Conv2d) -> tuple[int, int, int, int]:
        inner = module._modules.get("static_padding")
        found: Any = inner.padding if isinstance(inner, nn.ZeroPad2d) else (0, 0, 0, 0)
        more = node.settings.get("sides") or (0, 0, 0, 0)
        left, right, top, bottom = (int(a) + b for a, b in zip(found, more, strict=True))
        return left, right, top, bottom

    def _fc(self, module: nn.Linear, x: Any) -> Any:
        codes, scale = signed_codes(module)
        weight = self._weight(codes, scale.reshape(-1, 1).astype(np.float32))
        y = self.op.matmul(x, weight, False, True)
        return y if module.bias is None else self.op.add(y, module.bias.detach().numpy())

    def _weight(self, codes: Any, factors: Any) -> Any:
        converted = self.op.convert(self.op.constant(codes), "f32")
        return self.op.multiply(converted, self.op.constant(factors))

    def _function(self, y: Any, function: Function | None) -> Any:
        if function is None:
            return y
        known = {
            "relu": self.op.relu,
            "relu6": lambda v: self.op.clamp(v, 0.0, 6.0),
            "hardswish": self.op.hswish,
        }
        if function.name not in known:
            raise ValueError(f"no translation of {function}")
        return known[function.name](y)

    def _add(self, node: Node) -> Any:
        a, b = (self._codes(name) for name in node.inputs)
        return self._function(self.op.add(a, b), node.settings.get("function"))

    def _max_pool(self, node: Node) -> Any:
        given = node.settings
        pads = list(given["padding"])
        rounding = "ceil_torch" if given["ceil"] else "floor"
        x = self._codes(node.inputs[0])
        window = (list(given["stride"]), list(given["dilation"]), pads, pads, list(given["kernel"]))
        return self.op.max_pool(x, *window, rounding).output(0)

    def _adaptive_avg_pool(self, node: Node) -> Any:
        if node.settings["size"] not in ((1, 1), (1, None)):
            raise ValueError(f"no translation of adaptive pooling to {node.settings['size']}")
        axes = self.op.constant(np.array([2, 3]))
        return self.op.reduce_mean(self._codes(node.inputs[0]), axes, node.layout == "nchw")

    def _view(self, node: Node) -> Any:
        if node.layout != "nc":
            raise ValueError(f"no translation of a view as {node.layout}")
        return self.op.reshape(self.values[node.inputs[0]], np.array([0, -1]), True)


def _range(affine: Any) -> tuple[float, float]:
    low, high = ((code - affine.zero) * affine.scale for code in (-128, 127))
    if low >= -affine.scale / 2:
        return 0.0, high
    largest = max(-low, high)
    return -largest * 128 / 127, largest
