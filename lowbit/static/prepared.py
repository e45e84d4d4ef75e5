"""A captured model that runs in float and observes the values that will be codes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit import observers, rules
from lowbit.baselines import eval_mode
from lowbit.calibration.prepared import Learned, ObserverModule, detach, learned
from lowbit.carried import carried_state, carry_over
from lowbit.convert import name_layer
from lowbit.nn import Conv2d
from lowbit.nn.base import QuantizedLayer
from lowbit.observers import Affine
from lowbit.plan import Plan, plan_layers
from lowbit.report import Entry, entry_of, set_entry
from lowbit.schemes import Scheme
from lowbit.static.account import refused_note
from lowbit.static.capture import Graph, NotCaptured, capture
from lowbit.static.network import Network
from lowbit.static.node import Node, check_size
from lowbit.static.stages import coded_values


class PreparedNetwork(nn.Module):
    """What `lowbit.prepare` makes of a model that is captured whole.

    It runs as the float model; every call is observed.

    Attributes:
        model: the traced float model.
        observers: of the values that will have codes, by their names.
        layer_observers: of the inputs of static layers that run by themselves, by the layer's node.
        folded: names of the batch norms that are part of layers.
        exported: whether torch.export captured it: it takes inputs of the example's size alone.
        uncalled: names and classes of the modules with parameters or buffers that nothing uses.
    """

    def __init__(
        self,
        graph: Graph,
        layers: Mapping[str, Learned],
        make: Callable[[str], observers.Observer],
    ) -> None:
        super().__init__()
        self.model = graph.module
        self._graph = (graph.nodes, graph.inputs, graph.arguments, graph.output)
        self.exported = graph.exported
        self.uncalled = graph.uncalled
        self._layers = dict(layers)
        self.folded: list[str] = []
        self.observers = nn.ModuleDict()
        for owner in dict.fromkeys(coded_values(graph.nodes).values()):
            shown = next(node.fused[-1:] for node in graph.nodes if node.name == owner)
            what = f"the value of '{''.join(shown) or owner}'"
            self.observers[owner] = ObserverModule(make("int8"), what)
        self.layer_observers = nn.ModuleDict()
        for node in graph.nodes:
            path = _own_layer(node, self._layers)
            if path is not None and self._layers[path].preparation.scheme.static:
                activation = self._layers[path].preparation.scheme.activation
                module = ObserverModule(make(activation), f"layer '{path}'")
                self.layer_observers[node.name] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float model's output.

        Raises:
            TypeError: other arguments than the example inputs.
            ValueError: a value with NaN or Inf; a size that does not fit.
        """
        arguments = self._graph[2]
        given = dict(zip(arguments, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != len(given) or set(given) != set(arguments):
            raise TypeError(
                f"the model takes ({', '.join(arguments)}), as the example inputs were, not "
                f"{len(args)} arguments and {sorted(kwargs)}"
            )
        if self.exported:
            nodes = {node.name: node for node in self._graph[0]}
            for name, argument in zip(self._graph[1], arguments, strict=True):
                check_size(argument, given[argument], nodes[name])
        return _Observing(self).run(*(given[name] for name in arguments))

    def convert(self, learn: Callable[[nn.Module, Plan], None] | None = None) -> Network:
        """The network in integers of what was observed, in eval mode.

        Args:
            learn: is given the float model and the plan for it: layers that it makes are taken.

        Raises:
            ValueError: nothing was observed.
        """
        values, layers = _learned(self.observers), _learned(self.layer_observers)
        if any(observer.seen == 0 for observer in [*values.values(), *layers.values()]):
            raise ValueError("the model is not calibrated: run lowbit.calibrate(prepared, data)")
        affines = {name: observer.parameters() for name, observer in values.items()}
        conversion = Conversion(self, affines)
        if learn is not None:
            conversion.learn(learn)
        return conversion.run()

    def __getstate__(self) -> dict[str, Any]:
        # A graph is pickled as code, and names what it finds there anew.
        return {**self.__dict__, "_names": [node.name for node in self.model.graph.nodes]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("_names")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for node, name in zip(self.model.graph.nodes, names, strict=True):
            node.name = name


def _learned(modules: nn.ModuleDict) -> dict[str, observers.Observer]:
    found: dict[str, Any] = dict(modules.items())
    return {name: module.observer for name, module in found.items()}


class _Observing(fx.Interpreter):
    """Runs the float model, values passing their observers."""

    def __init__(self, prepared: PreparedNetwork) -> None:
        super().__init__(prepared.model)
        self.prepared = prepared

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.prepared.layer_observers:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.prepared.layer_observers[n.name](args[0])
        value = super().run_node(n)
        if n.name in self.prepared.observers:
            self.prepared.observers[n.name](value)
        return value


def prepare_network(prepared: nn.Module, example_inputs: Any) -> PreparedNetwork:
    """Captures a model of `lowbit.prepare` whose layers observe their inputs.

    Args:
        prepared: becomes part of the result; as it was, if it cannot be captured.
        example_inputs: one batch.

    Raises:
        NotCaptured: the reason why it runs layer by layer.
    """
    if example_inputs is None:
        raise NotCaptured("no example inputs were given to capture it with")
    found = learned(prepared)
    settings = next(layer.observer for layer in found.values() if layer.observer is not None)
    undo = detach(prepared)
    try:
        modules = dict(prepared.named_modules())
        for name, module in modules.items():
            if rules.hook_count(module) and id(module) not in found:
                raise NotCaptured(f"'{name}' has hooks, which would not run")
        graph = captured(prepared, example_inputs, found)
        if not any(node.in_integers for node in graph.nodes):
            raise NotCaptured("none of its layers runs in integers")
        _check_seen(graph, [name for name, module in modules.items() if id(module) in found])
        layers = {
            name: found[id(module)] for name, module in modules.items() if id(module) in found
        }
    except NotCaptured:
        undo()
        raise

    def make(activation: str) -> observers.Observer:
        return observers.make(settings.name, activation, settings.symmetric)

    network = PreparedNetwork(graph, layers, make).train(prepared.training)
    for name, module in modules.items():
        entry = entry_of(module)
        if isinstance(module, nn.Identity) and entry is not None and entry.folded:
            network.folded.append(name)
    return network


def _check_seen(graph: Graph, layers: list[str]) -> None:
    """Layers inside a module that is not traced into would stay float without a word."""
    called = [str(n.target) for n in graph.module.graph.nodes if n.op == "call_module"]
    for outer in called:
        for layer in layers:
            if layer.startswith(f"{outer}."):
                kind = type(graph.module.get_submodule(outer)).__name__
                raise NotCaptured(f"torch.fx does not look into '{outer}', a {kind}")


def captured(model: nn.Module, example_inputs: Any, layers: Mapping[int, Learned]) -> Graph:
    """The graph of a float model, of which these layers convert.

    Raises:
        NotCaptured: there is none.
    """
    modules = [module for module in model.modules() if id(module) in layers]
    operations = {id(module): _operation(module, layers[id(module)]) for module in modules}
    with eval_mode([model]):
        return capture(model, example_inputs, operations)


def _operation(module: nn.Module, layer: Learned) -> str:
    """ "conv" or "linear", or why a layer runs by itself."""
    scheme = layer.preparation.scheme
    converter, reason = rules.find_empty_converter(module, None)
    if converter is None:
        return reason
    if not scheme.static:
        return f"runs by itself: {scheme.name} is dynamic"
    if scheme.activation != "int8":
        return f"runs by itself: programs have no {scheme.activation} activations"
    kinds = {nn.Linear: "linear", nn.Conv2d: "conv"}
    kind = next((name for base, name in kinds.items() if isinstance(module, base)), None)
    if kind is None or not rules.is_plain(module):
        return f"runs by itself: programs have no {type(module).__name__}"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"runs by itself: programs have no {module.padding_mode} padding"
    if rules.hook_count(module):
        return "runs by itself: it has hooks"
    return kind


def _own_layer(node: Node, layers: Mapping[str, Learned]) -> str | None:
    """The path of the layer that a float node calls, if that is to be converted."""
    if node.kind != "float":
        return None
    kind, target, *_ = node.settings["call"]
    return target if kind == "call_module" and target in layers else None


class Conversion:
    """Makes a network of a prepared one.

    Args:
        affines: what the codes of each observed value mean.
        empty: whether tensors will come from a file: weights are not read.
    """

    def __init__(
        self, prepared: PreparedNetwork, affines: Mapping[str, Affine], empty: bool = False
    ) -> None:
        self.prepared = prepared
        self.empty = empty
        self.nodes, self.inputs, self.arguments, self.output = copy.deepcopy(prepared._graph)
        self.affines = affines
        self.owners = coded_values(self.nodes)
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.made: dict[str, nn.Module] = {}
        self.anew: set[str] = set()
        self.entered: set[str] = set()

    def learn(self, learn: Callable[[nn.Module, Plan], None]) -> None:
        """Takes the layers that learn from data."""
        model = self.prepared.model
        plan = plan_layers(model, _Schemes(self.prepared._layers))
        inputs = {
            node.settings["module"]: self.affines[self.owners[node.inputs[0]]]
            for node in reversed(self.nodes)
            if node.kind == "layer"
        }
        for node in self.nodes:
            path = _own_layer(node, self.prepared._layers)
            if path is not None and node.name in self.prepared.layer_observers:
                observer = _learned(self.prepared.layer_observers)[node.name]
                inputs[path] = observer.parameters()
        for job in plan.jobs:
            job.activation = inputs.get(job.name)
        learn(model, plan)
        self.made = {job.name: job.layer for job in plan.jobs if job.layer is not None}
        for node in self.nodes:
            path = node.settings.get("module", "")
            layer = self.made.get(path)
            grouped = isinstance(layer, QuantizedLayer) and layer.scheme.group_size is not None
            if "flattened" in node.settings and grouped:
                # Groups of its columns would be torn apart.
                del self.made[path]
                self.anew.add(path)

    def run(self) -> Network:
        """The network, in eval mode."""
        with torch.no_grad():
            for node in self.nodes:
                if node.kind == "layer":
                    self._layer(node)
                elif node.kind == "float":
                    self._float(node)
        network = Network(
            self.nodes,
            self.inputs,
            self.arguments,
            self.output,
            self.affines,
            self.modules,
            self.tensors,
        )
        network.folded = tuple(self.prepared.folded)
        network.exported = self.prepared.exported
        network.uncalled = self.prepared.uncalled
        if not self.empty:
            self._enter_refused(network)
        return network.eval()

    def _enter_refused(self, network: Network) -> None:
        """Says in the account of layers that the kernels refuse them."""
        for name, reason in network.refused().items():
            if network._by_name[name].kind == "layer":
                layer = network.layer(name)
                entry = entry_of(layer)
                if entry is not None:
                    set_entry(layer, replace(entry, note=refused_note(reason)))

    def _layer(self, node: Node) -> None:
        path, copies = node.settings["module"], node.settings["copy"]
        source = self._float_layer(node, self.prepared.model.get_submodule(path))
        layer = self._converted(path, source)
        assert isinstance(layer, QuantizedLayer)
        if path in self.made and "flattened" in node.settings:
            layer = _reordered(layer, node.settings["flattened"])
        if node.settings.get("sides"):
            assert isinstance(layer, Conv2d)
            layer = rules.with_static_padding(layer, node.settings["sides"])
        affine = self.affines[self.owners[node.inputs[0]]]
        layer.set_activation(affine.scale, affine.zero)
        function = node.settings.get("function")
        if function is not None and function.epilogue is not None and len(node.inputs) == 1:
            layer.epilogue = function.epilogue
        if copies:
            first = self.modules[path]
            for name, tensor in first._buffers.items():
                same = layer._buffers.get(name)
                if tensor is not None and same is not None and not name.startswith("activation"):
                    layer._buffers[name] = tensor
        where = path + (f"_call{copies + 1}" if copies else "")
        node.settings["path"] = where
        self._enter(layer, path, _note(node))
        self.modules[where] = layer

    def _float_layer(self, node: Node, module: nn.Module) -> nn.Module:
        """The layer, columns of its weight reordered behind a flattened image."""
        if "flattened" not in node.settings or node.settings["module"] in self.made:
            return module
        channels, height, width = node.settings["flattened"]
        weight = module._parameters["weight"]
        assert weight is not None
        by_channel = weight.detach().reshape(len(weight), channels, height, width)
        columns = by_channel.permute(0, 2, 3, 1).reshape(len(weight), -1)
        result = copy.copy(module)
        parameters = {**module._parameters, "weight": nn.Parameter(columns, requires_grad=False)}
        vars(result)["_parameters"] = parameters
        return result

    def _float(self, node: Node) -> None:
        kind, target, *_ = node.settings["call"]
        if kind == "get_attr":
            owner, _, name = target.rpartition(".")
            tensor = getattr(self.prepared.model.get_submodule(owner), name)
            if isinstance(tensor, Tensor):
                self.tensors[target] = copy.deepcopy(tensor)
            return
        if kind != "call_module":
            return
        path = _own_layer(node, self.prepared._layers)
        if path is None:
            module = self.prepared.model.get_submodule(target)
            self.modules.setdefault(target, copy.deepcopy(module))
            return
        layer = self._converted(path, self.prepared.model.get_submodule(path))
        if node.name in self.prepared.layer_observers and isinstance(layer, QuantizedLayer):
            observer = _learned(self.prepared.layer_observers)[node.name]
            affine = Affine(1.0, 0) if self.empty else observer.parameters()
            layer.set_activation(affine.scale, affine.zero)
        where = path
        if path in self.modules:  # called before, on other values
            where = f"{path}_{node.name}"
        node.settings["path"] = where
        self._enter(layer, path, node.reason)
        self.modules[where] = layer

    def _converted(self, path: str, module: nn.Module) -> nn.Module:
        scheme = self.prepared._layers[path].preparation.scheme
        if path in self.made:
            return copy.deepcopy(self.made[path])
        if path in self.anew:
            scheme = replace(scheme, quantizer=None)
        find = rules.find_empty_converter if self.empty else rules.find_converter
        converter, reason = find(module, None)
        if converter is None:
            raise ValueError(f"layer '{path}': {reason}")
        layer = converter(module, scheme)
        carry_over(copy.deepcopy(carried_state(module, rules.is_builtin(converter))), layer)
        name_layer(layer, path)
        return layer

    def _enter(self, layer: nn.Module, path: str, note: str) -> None:
        """Leaves the account of the float layer on the converted one."""
        preparation = self.prepared._layers[path].preparation
        before = entry_of(self.prepared.model.get_submodule(path))
        if path in self.anew:
            note += "; rounded without the data, its columns being in another order here"
        notes = "; ".join([note, *preparation.notes])
        if before is not None:
            entry = Entry(
                before.kind,
                before.shape,
                0 if path in self.entered else before.bytes_before,  # one layer, called again
                notes,
                getattr(layer, "scheme", preparation.scheme),
                before.folded,
            )
            set_entry(layer, entry)
            self.entered.add(path)


def _reordered(layer: QuantizedLayer, image: tuple[int, int, int]) -> QuantizedLayer:
    """A layer of features in torch's order [C, H, W], for those in the codes' [H, W, C]."""
    q = layer.quantized_weight()
    by_channel = q.codes.reshape(len(q.codes), *image)
    codes = by_channel.permute(0, 2, 3, 1).reshape(q.codes.shape)
    layer.set_quantized_weight(replace(q, codes=codes))
    return layer


class _Schemes:
    """Gives each layer the scheme that it was prepared for."""

    def __init__(self, layers: Mapping[str, Learned]) -> None:
        self.layers = layers
        self.lowbit_names: list[str] = []

    def choose(self, name: str, module: nn.Module) -> tuple[Scheme | None, str]:
        layer = self.layers.get(name)
        return (None, "it was not prepared") if layer is None else (layer.preparation.scheme, "")

    def check_all_matched(self) -> None:
        """Every layer was prepared under its own name."""


def _note(node: Node) -> str:
    parts = [f"'{part}'" for part in node.fused if part != node.settings["module"]]
    return "in integers" + (f", with {', '.join(parts)}" if parts else "")
