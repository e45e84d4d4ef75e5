"""Which layer's output a batch norm or an activation takes, as torch.fx sees it.

The model is traced whole if that is possible. Otherwise its modules are, each as far up as its
forward can be traced, the ones that cannot being opaque to those above them: a `nn.Sequential`
shows its order in any case. What is traced is a copy, since tracing runs the code of the model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from lowbit.errors import one_line
from lowbit.nn.layer import LowbitLayer
from lowbit.report import FLOAT_CLASSES

# What a forward may ask of a layer's output without depending on its values.
_METADATA = ("shape", "ndim", "dtype", "device")
_METADATA_METHODS = ("size", "dim")


class NotFolded(ValueError):
    """Why a batch norm or an activation stays."""


class Flow:
    """The calls of a model's layers and norms.

    Args:
        traced: the graph of the whole model, if torch.fx is not to trace it.

    Attributes:
        failures: by the id of a module, why its own forward cannot be traced.
    """

    def __init__(self, model: nn.Module, traced: fx.GraphModule | None = None) -> None:
        self._calls: dict[int, list[fx.Node]] = {}
        self._modules: dict[fx.Node, nn.Module] = {}
        self._read: set[int] = set()
        self._opaque: set[int] = set()
        self.failures: dict[int, str] = {}
        if traced is not None:
            self._read_graph(traced, traced.graph, {id(m): m for m in model.modules()})
            return
        # Parameters are shared: they are not run on. Buffers might be counters.
        memo: dict[int, Any] = {id(p): p for p in model.parameters()}
        # So are weights that a hook computes (weight_norm): they cannot be copied.
        held = (value for module in model.modules() for value in vars(module).values())
        memo |= {id(value): value for value in held if isinstance(value, Tensor)}
        try:
            twin = copy.deepcopy(model, memo)
        except Exception as error:  # whatever a __deepcopy__ raises
            self.failures[id(model)] = f"the model cannot be copied ({one_line(error)})"
            return
        originals = {id(memo[id(m)]): m for m in model.modules() if id(m) in memo}
        search = _Search()
        for root, graph in search.graphs(twin):
            self._read_graph(root, graph, originals)
        for key, why in search.failures.items():
            if key in originals:
                self.failures[id(originals[key])] = why
        self._opaque = {id(originals[key]) for key in search.opaque if key in originals}

    def sees(self, module: nn.Module) -> bool:
        """Whether all that this module's forward calls is known."""
        return id(module) not in self._opaque and not is_leaf(module)

    def input_of(self, norm: nn.Module) -> nn.Module:
        """The layer whose every output goes to this norm alone, and which alone feeds it.

        Raises:
            NotFolded: there is none.
        """
        calls = self._calls.get(id(norm), [])
        if not calls:
            raise NotFolded("no traced forward calls it")
        layers = {id(layer): layer for layer in map(self._feeding_layer, calls)}
        if len(layers) > 1:
            raise NotFolded("it follows several layers")
        (layer,) = layers.values()
        for node in self._calls[id(layer)]:
            for user in node.users:
                if self._modules.get(user) is not norm and not _is_metadata(user):
                    raise NotFolded("the output of the layer before it is used elsewhere, too")
        if {id(layer), id(norm)} & self._read:
            raise NotFolded("its tensors, or those of the layer before it, are used directly")
        return layer

    def layers_before(self, activation: nn.Module, passed: set[int]) -> list[nn.Module]:
        """The layers whose every output goes to this activation alone, and which alone feed it.

        Args:
            passed: ids of modules between them that will do nothing.

        Raises:
            NotFolded: something else feeds it, or sees what feeds it.
        """
        calls = self._calls.get(id(activation), [])
        if not calls:
            raise NotFolded("no traced forward calls it")
        layers = {id(layer): layer for layer in (self._feeding_layer(c, passed) for c in calls)}
        for layer in layers.values():
            if not all(self._ends_in(node, activation, passed) for node in self._calls[id(layer)]):
                raise NotFolded("the output of the layer before it is used elsewhere, too")
        return list(layers.values())

    def path_to(
        self, layer: nn.Module, passes: Callable[[nn.Module], bool]
    ) -> tuple[nn.Module, list[nn.Module]]:
        """The layer that alone feeds this one, and whose outputs go nowhere else.

        Args:
            layer: a layer that is called once.
            passes: whether a module may lie between the two.

        Returns:
            The layer before, and the modules between, from there to here.

        Raises:
            NotFolded: there is none.
        """
        calls = self._calls.get(id(layer), [])
        if len(calls) != 1:
            raise NotFolded("it is not called exactly once")
        between: list[nn.Module] = []
        node = calls[0]
        while True:
            if len(node.all_input_nodes) != 1 or len(node.args) + len(node.kwargs) != 1:
                raise NotFolded("it is called with more than one argument")
            (before,) = node.all_input_nodes
            if any(user is not node and not _is_metadata(user) for user in before.users):
                raise NotFolded("its input is used elsewhere, too")
            module = self._modules.get(before)
            if module is None:
                raise NotFolded(f"what comes before it is no layer ({_what(before)})")
            if isinstance(module, FLOAT_CLASSES):
                if len(self._calls[id(module)]) != 1:
                    raise NotFolded("the layer before it is not called exactly once")
                if {id(layer), id(module)} & self._read:
                    raise NotFolded("tensors of one of the two are used directly")
                return module, between[::-1]
            if not passes(module):
                raise NotFolded(f"{type(module).__name__} lies before it")
            between.append(module)
            node = before

    def _ends_in(self, node: fx.Node, activation: nn.Module, passed: set[int]) -> bool:
        """Whether nothing but the activation sees the values of a node."""
        for user in node.users:
            module = self._modules.get(user)
            if module is activation or _is_metadata(user):
                continue
            if id(module) not in passed or not self._ends_in(user, activation, passed):
                return False
        return True

    def _feeding_layer(self, call: fx.Node, passed: Collection[int] = ()) -> nn.Module:
        if len(call.all_input_nodes) != 1 or len(call.args) + len(call.kwargs) != 1:
            raise NotFolded("it is called with more than one argument")
        (before,) = call.all_input_nodes
        layer = self._modules.get(before)
        if layer is not None and id(layer) in passed:
            return self._feeding_layer(before, passed)
        if layer is None or not isinstance(layer, FLOAT_CLASSES):
            name = _what(before) if layer is None else type(layer).__name__
            raise NotFolded(f"what comes before it is no layer that it can be folded into ({name})")
        return layer

    def _read_graph(
        self, root: nn.Module, graph: fx.Graph, originals: dict[int, nn.Module]
    ) -> None:
        for node in graph.nodes:
            if node.op == "call_module":
                module = originals.get(id(root.get_submodule(node.target)))
                if module is not None:
                    self._modules[node] = module
                    self._calls.setdefault(id(module), []).append(node)
            elif node.op == "get_attr":
                owner = originals.get(id(_owner(root, node.target)))
                self._read.add(id(owner))


@dataclass
class _Search:
    """Traces modules, as large ones as possible."""

    opaque: set[int] = field(default_factory=set)
    failures: dict[int, str] = field(default_factory=dict)

    def graphs(self, model: nn.Module) -> list[tuple[nn.Module, fx.Graph]]:
        own, inner = self._collect(model)
        return own + inner

    def _collect(self, module: nn.Module) -> tuple[list[Any], list[Any]]:
        """Graphs that show the module from outside, and graphs of what is opaque in it."""
        if is_leaf(module):
            return [], []
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict))  # they have no forward
        own = [] if container else self._trace(module)
        if own:
            return own, []
        known = len(self.opaque)
        found = [self._collect(child) for child in module.children()]
        shown = [graph for outer, _ in found for graph in outer]
        inner = [graph for _, deeper in found for graph in deeper]
        if container:
            return shown, inner
        if len(self.opaque) > known:
            own = self._trace(module)
            if own:
                return own, inner
        self.opaque.add(id(module))
        return [], inner + shown

    def _trace(self, module: nn.Module) -> list[tuple[nn.Module, fx.Graph]]:
        """The module's graphs: with every argument given, and with those that have no default.

        Code may ask whether an argument is None, which shows only one of its branches.
        """
        parameters = inspect.signature(module.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        ways = [None, defaults] if defaults else [None]
        graphs = [self._graph(module, concrete) for concrete in ways]
        return [(module, graph) for graph in graphs if graph is not None]

    def _graph(self, module: nn.Module, concrete: dict[str, Any] | None) -> fx.Graph | None:
        try:
            return _Tracer(self.opaque).trace(module, concrete)
        except Exception as error:  # any: it is the model's code, run on what is no tensor
            self.failures[id(module)] = one_line(error)
            return None


class _Tracer(fx.Tracer):
    """Traces into all modules but layers, norms, torch's own and those that cannot be traced."""

    def __init__(self, opaque: set[int]) -> None:
        super().__init__()
        self._opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or id(m) in self._opaque


def is_leaf(module: nn.Module) -> bool:
    if isinstance(module, (*FLOAT_CLASSES, _NormBase, LowbitLayer)):
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, containers)


def _is_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA


def _owner(root: nn.Module, target: str) -> nn.Module:
    """The module that has this attribute, or the last one on its path."""
    module = root
    for part in target.split(".")[:-1]:
        inner = getattr(module, part, None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def _what(node: fx.Node) -> str:
    target: Callable[..., Any] | str = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
