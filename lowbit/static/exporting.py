"""Models that torch.fx cannot trace, as torch.export sees them: one size of inputs, any batch.

It gives operators on tensors. Those of layers that convert become calls of these modules again, and
what the others take keeps its name in the model: the graph is then like one of torch.fx.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lowbit.dataflow import is_leaf
from lowbit.errors import one_line

SHOWN = "lowbit_shown"
"""In a node's meta: the path of the module whose only operator it is."""

_LAYERS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "linear": nn.Linear,
    "batch_norm": _BatchNorm,
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_SETTINGS = ("stride", "padding", "dilation", "output_padding", "groups", "eps")


class NotExported(ValueError):
    """Why torch.export gives no graph of a model."""


@dataclass(frozen=True)
class Operator:
    """An operator of torch by its names, which unlike torch's object can be pickled."""

    namespace: str
    name: str
    overload: str

    @classmethod
    def of(cls, target: Any) -> Any:
        """The one that a function is; any other function as it is."""
        if not isinstance(target, torch._ops.OpOverload):
            return target
        name = str(target._schema.name).partition("::")[2]
        return cls(target.namespace, name, target._overloadname)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        packet = getattr(getattr(torch.ops, self.namespace), self.name)
        return getattr(packet, self.overload)(*args, **kwargs)


def operator_name(target: Any) -> str | None:
    """Of an operator of torch: "relu_" of aten::relu_; None for any other function."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target._schema.name).removeprefix("aten::")
    return None


def export(
    model: nn.Module,
    arguments: inspect.BoundArguments,
    names: Sequence[str],
    layers: Collection[int],
) -> fx.GraphModule:
    """The graph of a model.

    Args:
        model: float, in eval mode.
        arguments: tensors, as `forward` takes them.
        names: of the inputs, in their order.
        layers: by their ids, the modules whose calls are wanted, beside batch norms.

    Raises:
        NotExported: torch.export cannot, or it would take the batch for a constant.
    """
    for name, module in model.named_modules():
        if module._forward_pre_hooks or module._forward_hooks:
            raise NotExported(f"'{name}' has hooks, which would not run")
    inputs = arguments.args, arguments.kwargs
    free = pytree.tree_map(lambda x: {0: torch.export.Dim.DYNAMIC} if x.dim() else {}, inputs)
    shapes = arguments.signature.bind(*free[0], **free[1]).arguments
    args, kwargs = batch_of(inputs, 2)
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dict(shapes))
    except Exception as error:  # any: it runs the model's code
        if "Constraints violated" in str(error):
            raise NotExported("it would take the batch for a constant") from None
        raise NotExported(one_line(error)) from None
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise NotExported("it changes its buffers or inputs")
    graph = _Rewriting(model, program, layers).run(names)
    if not any(x.is_meta for x in pytree.tree_leaves(inputs)):
        _check_batches(model, graph, inputs)
    return graph


def batch_of(inputs: Any, size: int) -> Any:
    """Inputs of another batch: a batch of 1 would be taken for what is always 1."""

    def resized(x: Tensor) -> Tensor:
        return x[torch.arange(size) % len(x)] if x.dim() and len(x) else x

    return pytree.tree_map(resized, inputs)


def _check_batches(model: nn.Module, graph: fx.GraphModule, inputs: Any) -> None:
    """Code that looks at the batch shows only what it does for the one that it was given."""
    for size in (1, 3):
        args, kwargs = batch_of(inputs, size)
        try:
            with torch.no_grad():
                wanted = pytree.tree_leaves(model(*args, **kwargs))
                found = pytree.tree_leaves(graph(*pytree.tree_leaves((args, kwargs))))
            same = len(wanted) == len(found) and all(map(_equal, wanted, found))
        except Exception as error:  # the model's own code
            raise NotExported(f"it does not run on a batch of {size} ({one_line(error)})") from None
        if not same:
            raise NotExported(f"it computes something else for a batch of {size}")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or not a.is_floating_point() or not a.numel():
            return torch.equal(a, b)
        # Sums in another order: torch runs attention by other operators than it exports.
        most = float(a.nan_to_num(0, 0, 0).abs().max())
        return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * most, equal_nan=True)
    return bool(a == b)


class _Tracer(fx.Tracer):
    """Reads a graph again when it is unpickled."""

    proxy_buffer_attributes = True


class _Rewriting:
    """Makes of an exported program a graph whose parameters and layers are the model's."""

    def __init__(
        self, model: nn.Module, program: torch.export.ExportedProgram, layers: Collection[int]
    ) -> None:
        self.model = model
        self.program = program
        modules = dict(model.named_modules())
        self.layers = {name: m for name, m in modules.items() if id(m) in layers}
        self.calls = self.layers | {n: m for n, m in modules.items() if isinstance(m, _BatchNorm)}
        self.graph = fx.Graph(tracer_cls=_Tracer)
        self.new: dict[fx.Node, fx.Node] = {}
        self.paths: dict[fx.Node, str] = {}  # of parameters, buffers and constants
        self.held: dict[str, Any] = {}
        self.alone: dict[str, list[fx.Node]] = {}

    def run(self, names: Sequence[str]) -> fx.GraphModule:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        inputs = iter(names)
        nodes = self.program.graph.nodes
        for node in nodes:  # inputs first, as code that is traced again has them
            if node.op == "placeholder" and specs[node.name].target is None:
                self.new[node] = self.graph.placeholder(next(inputs))
        for node in nodes:
            if node.op == "placeholder":
                if node not in self.new:
                    self._hold(node, specs[node.name].target)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                flat = fx.node.map_arg(node.args[0], self.new.__getitem__)
                spec = self.program.call_spec.out_spec
                assert spec is not None
                self.graph.output(pytree.tree_unflatten(list(flat), spec))
            else:
                raise NotExported(f"it calls a function of its own ({node.target})")
        for path, nodes in self.alone.items():
            if len(nodes) == 1:
                nodes[0].meta[SHOWN] = path
        whole = fx.GraphModule(self.held, self.graph)
        whole.graph.eliminate_dead_code()
        called = {str(node.target) for node in whole.graph.nodes}
        read = {id(tensor) for path, tensor in self.held.items() if path in called}
        for name, layer in self.layers.items():
            if id(layer._parameters.get("weight")) in read:
                raise NotExported(f"the weight of '{name}' is used for more than this layer")
        return fx.GraphModule(whole, whole.graph)  # what is used of it

    def _hold(self, node: fx.Node, path: str) -> None:
        self.paths[node] = path
        if path in self.program.constants:
            self.held[path] = self.program.constants[path]
        else:
            self.held[path] = operator.attrgetter(path)(self.model)
        self.new[node] = self.graph.get_attr(path)

    def _call(self, node: fx.Node) -> None:
        name, target = operator_name(node.target) or "", node.target
        if name.startswith("_assert"):
            return
        first: Any = node.args[0] if node.args else None
        if name.endswith("_") and first in self.paths:
            raise NotExported(f"it changes '{self.paths[first]}'")
        if name in ("lift_fresh_copy", "detach_"):  # of a constant
            self.new[node] = self.new[first]
            return
        if name == "view":
            target = torch.ops.aten.reshape.default  # whatever strides a program's output has
        layer = self._layer(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.new.__getitem__)
        if layer is not None:
            self.held[layer] = self.calls[layer]
            new = self.graph.create_node("call_module", layer, args[:1], {}, node.name)
        else:
            new = self.graph.create_node("call_function", target, args, kwargs, node.name)
        self.new[node] = new
        *_, (path, _) = (node.meta.get("nn_module_stack") or {"": ("", "")}).values()
        try:
            leaf = is_leaf(self.model.get_submodule(path))
        except AttributeError:
            leaf = False  # what torch.export made itself
        if leaf:
            self.alone.setdefault(path, []).append(new)

    def _layer(self, node: fx.Node) -> str | None:
        """The path of the layer or norm whose whole call an operator is."""
        kinds = _LAYERS.get(operator_name(node.target) or "")
        if kinds is None:
            return None
        schema = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
        given = schema | dict(zip(schema, node.args, strict=False)) | dict(node.kwargs)
        found = {name: self.paths.get(given[name]) for name in _TENSORS if name in schema}
        path = next((path.rpartition(".")[0] for path in found.values() if path), "")
        layer = self.calls.get(path)
        if not isinstance(layer, kinds):
            return None
        held = layer._parameters | layer._buffers
        wanted = {name: None if held.get(name) is None else f"{path}.{name}" for name in found}
        fits = (
            found == wanted
            and not given.get("training")
            and getattr(layer, "padding_mode", "zeros") == "zeros"
            and all(_same(given[n], getattr(layer, n)) for n in _SETTINGS if n in schema)
        )
        return path if fits else None


def _same(given: Any, wanted: Any) -> bool:
    """Whether a setting is the same; an operator's may be one number for all dimensions."""
    if isinstance(given, (tuple, list)) and isinstance(wanted, (tuple, list)):
        return (len(set(given)) == 1 == len(set(wanted)) and given[0] == wanted[0]) or list(
            given
        ) == list(wanted)
    return bool(given == wanted)
