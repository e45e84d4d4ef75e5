"""A model as a graph of nodes: torch.fx or torch.export traces it, example inputs give sizes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit.dataflow import Flow, is_leaf
from lowbit.errors import one_line
from lowbit.report import FLOAT_CLASSES
from lowbit.static.exporting import SHOWN, NotExported, Operator, export
from lowbit.static.fusing import fuse_nodes
from lowbit.static.node import CHANNELS_LAST, LAYOUTS, Node, Ref, references
from lowbit.static.patterns import Alias, Call, recognize


class NotCaptured(ValueError):
    """Why a model does not become a network in integers."""


@dataclass
class Graph:
    """A captured model.

    Attributes:
        module: the traced model; its graph has a node for each value that is observed.
        nodes: in order; inputs first.
        inputs: names of the input nodes, in the order of forward's arguments.
        arguments: names of these.
        output: what forward returns, with references to values.
        exported: whether torch.export captured it: for inputs of these sizes alone, any batch.
        uncalled: names and classes of the modules with parameters or buffers that nothing uses.
    """

    module: fx.GraphModule
    nodes: list[Node]
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    output: Any
    exported: bool
    uncalled: tuple[tuple[str, str], ...]


def capture(model: nn.Module, example_inputs: Any, layers: Mapping[int, Any]) -> Graph:
    """The graph of a model.

    Args:
        model: float, in eval mode, batch norms folded.
        example_inputs: one batch: a tensor, a tuple of positional or a mapping of keyword
            arguments.
        layers: by its id, what a module that is to run in integers is: its operation ("conv" or
            "linear"), or the reason why it is not.

    Raises:
        NotCaptured: neither torch.fx nor torch.export can, or an input is no tensor.
    """
    bound = bind(model, example_inputs)
    arguments = tensors_of(bound)
    if is_leaf(model) or id(model) in layers:
        raise NotCaptured("it is a single layer")
    exported = False
    try:
        traced = _trace(model, bound, layers)
    except NotCaptured as error:
        try:
            traced = export(model, bound, list(arguments), layers)
        except NotExported as second:
            raise NotCaptured(f"{error}, nor torch.export ({second})") from None
        exported = True
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    names = tuple(str(node.target) for node in placeholders)
    values = _record(traced, [arguments[name] for name in names])
    reader = _Reader(traced, values, layers)
    for node in traced.graph.nodes:
        if node.op == "output":
            output = reader.argument(node.args[0])
        else:
            reader.read(node)
    nodes = fuse_nodes(reader.nodes, set(references(output)))
    inputs = tuple(node.name for node in placeholders)
    return Graph(traced, nodes, inputs, names, output, exported, _uncalled(model, traced))


def exported_flow(model: nn.Module, example_inputs: Any) -> Flow | None:
    """Which layer's output a batch norm takes, where only torch.export can tell.

    Args:
        model: float, in eval mode.
        example_inputs: as for `capture`.

    Returns:
        None where there is no batch norm, torch.fx can tell, or neither can.
    """
    layers = [id(module) for module in model.modules() if isinstance(module, FLOAT_CLASSES)]
    if example_inputs is None or not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return None
    try:
        bound = bind(model, example_inputs)
        names = list(tensors_of(bound))
        if is_leaf(model):
            return None
    except NotCaptured:
        return None
    try:
        _trace(model, bound, layers)
    except NotCaptured:
        try:
            return Flow(model, export(model, bound, names, layers))
        except NotExported:
            return None
    return None


def bind(model: nn.Module, inputs: Any) -> inspect.BoundArguments:
    """Example inputs as the model's arguments.

    Raises:
        NotCaptured: they do not fit its signature.
    """
    signature = inspect.signature(model.forward)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        args, kwargs = _positional(signature, dict(inputs))
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise NotCaptured(f"the example inputs do not fit its forward: {error}") from None


def _positional(
    signature: inspect.Signature, named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of named ones, `x_0`, `x_1` being those of `*x`."""
    parameters = list(signature.parameters.values())
    star = next((p for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if star is None or f"{star.name}_0" not in named:
        return (), named
    before = [p.name for p in parameters[: parameters.index(star)] if p.name in named]
    rest = [name for name in named if name.startswith(f"{star.name}_")]
    return tuple(named.pop(name) for name in [*before, *rest]), named


def tensors_of(bound: inspect.BoundArguments) -> dict[str, Tensor]:
    """The tensors by names; those of `*x` are `x_0`, `x_1`.

    Raises:
        NotCaptured: one is no tensor.
    """
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise NotCaptured(f"argument '{name}' is a {type(value).__name__}, not a tensor")
    return found


def _uncalled(model: nn.Module, traced: fx.GraphModule) -> tuple[tuple[str, str], ...]:
    """Names and classes of the modules with parameters or buffers that a graph does not use."""
    used: set[int] = set()
    for node in traced.graph.nodes:
        if node.op == "call_module":
            called = traced.get_submodule(str(node.target))
            used |= {id(tensor) for tensor in [*called.parameters(), *called.buffers()]}
        elif node.op == "get_attr":
            used.add(id(operator.attrgetter(str(node.target))(traced)))
    found = []
    for name, module in model.named_modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        own = [id(tensor) for tensor in tensors if tensor is not None]
        if own and used.isdisjoint(own):
            found.append((name or "(root)", type(module).__name__))
    return tuple(found)


class _Tracer(fx.Tracer):
    """Traces into all modules but torch's own and those that convert."""

    def __init__(self, layers: Collection[int] = ()) -> None:  # without: when a trace is unpickled
        super().__init__()
        self._layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._layers or is_leaf(m)


def _trace(
    model: nn.Module, bound: inspect.BoundArguments, layers: Collection[int]
) -> fx.GraphModule:
    given = bound.arguments
    parameters = bound.signature.parameters.values()
    left_out = {p.name: p.default for p in parameters if p.name not in given}
    for p in parameters:
        if p.name in given and p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise NotCaptured(f"torch.fx cannot trace it (it takes any number of '{p.name}')")
    try:
        graph = _Tracer(layers).trace(model, left_out or None)
    except Exception as error:  # any: it is the model's code, run on what is no tensor
        raise NotCaptured(f"torch.fx cannot trace it ({one_line(error)})") from None
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target not in given:
            _erase(graph, node)  # an argument that was left out, and torch.fx's check of it
    module = fx.GraphModule(model, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps shape and dtype of each tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = tuple(value.shape), value.dtype
        return value


def _record(
    module: fx.GraphModule, inputs: list[Any]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    recorder = _Recorder(module)
    try:
        with torch.no_grad():
            recorder.run(*inputs)
    except Exception as error:  # the model's own code
        raise NotCaptured(f"it does not run on the example inputs ({one_line(error)})") from None
    return recorder.found


class _Reader:
    """Makes nodes of torch.fx's, in integers where all that they take can be."""

    def __init__(
        self, module: fx.GraphModule, values: Mapping[str, Any], layers: Mapping[int, Any]
    ) -> None:
        self.module = module
        self.values = values
        self.layers = layers
        self.by_name: dict[str, Node] = {}
        self.aliases: dict[str, str] = {}
        self.calls: dict[str, int] = {}
        self.tensors = set(values)

    @property
    def nodes(self) -> list[Node]:
        return list(self.by_name.values())

    def argument(self, value: Any) -> Any:
        """An argument with references for torch.fx's nodes."""

        def reference(n: fx.Node) -> Any:
            return Ref(self._current(n.name))

        return fx.node.map_arg(value, reference)

    def _current(self, name: str) -> str:
        """Which value a name stands for now."""
        while name in self.aliases:
            name = self.aliases[name]
        return name

    def read(self, node: fx.Node) -> None:
        shape, dtype = self.values.get(node.name, ((), torch.float32))
        if node.op == "placeholder":
            self.by_name[node.name] = Node(node.name, "input", shape=shape, dtype=dtype)
            return
        args, kwargs = self.argument(node.args), self.argument(node.kwargs)
        module = None
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
        inputs = tuple(dict.fromkeys(references((args, kwargs))))
        call = Call(node.op, node.target, module, args, dict(kwargs), shape, node.name)
        call.values = [self.by_name[name] for name in inputs if name in self.tensors]
        plain = _plain(node, module, call)
        found: Node | Alias | None = None
        reason = ""
        if node.name in self.values and dtype.is_floating_point:
            found, reason = self._recognized(call, module)
        if isinstance(found, Alias):
            self.aliases[node.name] = found.of
            return
        if call.in_place() and isinstance(call.args[0], Ref) and call.args[0].name in self.tensors:
            self.aliases[call.args[0].name] = node.name  # what comes later sees the new values
        if found is None:
            found = Node(node.name, "float", inputs, reason=reason)
            found.settings["pad"] = call.zero_pad()
        found.shape, found.dtype = shape, dtype
        found.settings["call"] = plain
        found.fused = found.fused or (_shown(node),)
        self.by_name[node.name] = found

    def _recognized(self, call: Call, module: nn.Module | None) -> tuple[Node | Alias | None, str]:
        layer = self.layers.get(id(module)) if module is not None else None
        if isinstance(layer, str) and layer not in ("conv", "linear"):
            return None, layer
        if layer is not None:
            return self._layer(call, layer)
        identity = call.identity()
        if identity is not None:
            return identity, ""
        known = [v for v in call.values if v.in_integers]
        if not known:
            return None, "what it takes is not in integers"
        layout = known[0].layout
        for value in call.values:
            if not self._give_layout(value, layout):
                return None, f"it takes values of two memory layouts ({layout}, {value.layout})"
        found = recognize(call, layout)
        return found, "" if found else f"{call.label} has no step in integers"

    def _layer(self, call: Call, operation: str) -> tuple[Node | None, str]:
        if len(call.args) != 1 or call.kwargs or len(call.values) != 1:
            return None, "it is called with more than one argument"
        (value,) = call.values
        layout = value.layout
        if not layout:
            ranks = {4: "nhwc", 3: "ntc", 2: "nc"} if operation == "linear" else {4: "nchw"}
            layout = ranks.get(len(value.shape), "")
        fits = layout == "nchw" if operation == "conv" else layout in (*CHANNELS_LAST, "flat")
        if not fits or not self._give_layout(value, layout):
            return None, f"an input of {list(value.shape)} ({value.layout or 'float'})"
        settings: dict[str, Any] = {"module": str(call.target), "operation": operation}
        settings["copy"] = self.calls.get(str(call.target), 0)
        self.calls[str(call.target)] = settings["copy"] + 1
        module = call.module
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
            pads, dilation = module.padding, module.dilation
            reach = tuple(d * (k - 1) for d, k in zip(dilation, module.kernel_size, strict=True))
            settings["room"] = tuple(zip(reach, pads, strict=True))
        if layout == "flat":
            # The weight's columns are in torch's order [C, H, W], the codes in [H, W, C].
            settings["flattened"] = self._flattened(value)
            layout = "nc"
        return Node(call.name, "layer", (value.name,), settings, layout), ""

    def _flattened(self, value: Node) -> tuple[int, int, int]:
        """(C, H, W) behind features in torch's order."""
        while value.layout == "flat":
            value = self.by_name[value.inputs[0]]
        return value.shape[1], value.shape[2], value.shape[3]

    def _give_layout(self, value: Node, layout: str) -> bool:
        """Whether a value has this layout; floats get that of the first who wants their codes."""
        if not value.layout and not value.in_integers and value.dtype.is_floating_point:
            if LAYOUTS[layout] != len(value.shape) or layout == "flat":
                return False
            value.layout = layout
        return value.layout == layout


def _plain(node: fx.Node, module: nn.Module | None, call: Call) -> tuple[Any, ...]:
    """The float operation: (kind, target, args, kwargs)."""
    return node.op, Operator.of(node.target), tuple(call.args), dict(call.kwargs)


def _shown(node: fx.Node) -> str:
    """How the account names a call: a module's name, else the node's."""
    return str(node.target if node.op == "call_module" else node.meta.get(SHOWN, node.name))
