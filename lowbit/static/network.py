"""A static network: segments that stay in integers, each one call into C++, and floats between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import _core
from lowbit.nn.layer import is_compiling
from lowbit.observers import Affine
from lowbit.static import eager
from lowbit.static.account import Account, make_account
from lowbit.static.lowering import Lowered
from lowbit.static.node import Node, check_size, references, replace
from lowbit.static.planning import Part, Plan, make_plan
from lowbit.static.stages import Segment, coded_values, make_stages

_CACHES = ("_plans", "_affines")
_MOST_PLANS = 64  # sizes of inputs times segments; the oldest goes


class Scope(nn.Module):
    """What is left of a module whose forward is part of the network: the names of its layers."""


class Network(nn.Module):
    """A model that runs in integers, with float operations where there is no step.

    Takes and returns what the float model did: any batch, contiguous or channels_last, dtypes as
    the float model's (others are converted). Programs are planned for the size of an input when it
    comes first, and kept. For inference only.

    The layers have the names that they had in the float model. Beside theirs, the state dict has
    `value_scale` float32 [V] and `value_zero` int32 [V]: what the codes of values mean.

    Attributes:
        eager: whether to run step by step in Python, by the layers and torch: the same bits,
            slowly, for looking inside.
        nodes: what it computes, in order.
        make_program: what runs a program's arguments; for tests and profiles.
        folded: names of the float model's batch norms that are part of layers.
        exported: whether torch.export captured it: it takes inputs of the example's size alone.
        uncalled: names and classes of the float model's modules that its forward does not use.
    """

    make_program: Callable[..., Any] = _core.Program

    value_scale: Tensor
    value_zero: Tensor
    _plans: dict[Any, Plan]
    _affines: dict[str, Affine] | None

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[str],
        arguments: Sequence[str],
        output: Any,
        affines: Mapping[str, Affine],
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.eager = False
        self.folded: tuple[str, ...] = ()
        self.exported = False
        self.uncalled: tuple[tuple[str, str], ...] = ()
        self.nodes = list(nodes)
        self._inputs = dict(zip(arguments, inputs, strict=True))
        self._output = output
        self._names = tuple(affines)
        self._owners = coded_values(nodes)
        self._by_name = {node.name: node for node in nodes}
        self._stages = make_stages(nodes, set(references(output)))
        scales = [affine.scale for affine in affines.values()]
        zeros = [affine.zero for affine in affines.values()]
        self.register_buffer("value_scale", torch.tensor(scales, dtype=torch.float32))
        self.register_buffer("value_zero", torch.tensor(zeros, dtype=torch.int32))
        for path, module in modules.items():
            self._place(path).add_module(path.rpartition(".")[2], module)
        for path, tensor in tensors.items():
            owner, name = self._place(path), path.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(name, tensor)
            else:
                owner.register_buffer(name, tensor)
        self._forget()

    def _place(self, path: str) -> nn.Module:
        """The module that has what lies at a path."""
        module: nn.Module = self
        for part in path.split(".")[:-1]:
            if part not in module._modules:
                module.add_module(part, Scope())
            module = module.get_submodule(part)
        return module

    # --- Running ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the float model returns.

        Raises:
            TypeError: other arguments than the example inputs that the model was captured with.
            ValueError: sizes that do not fit.
            RuntimeError: an input that is not on the CPU; torch.export, torch.jit.trace and the
                transforms of torch.func, which cannot see into its programs.
        """
        if torch.compiler.is_exporting():
            raise _cannot_see("torch.export")
        if is_compiling():
            # Not as a decorator: that would import the compiler with lowbit, which takes a second.
            eager: Callable[..., Any] = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
            return eager(*args, **kwargs)
        if torch._C._is_tracing():
            raise _cannot_see("torch.jit.trace")
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        values, asked = self._bind(args, kwargs)
        last = any(_is_channels_last(x) for x in values.values())
        with torch.no_grad():
            for stage in self._stages:
                if stage.in_integers:
                    self._run_segment(stage, values, last)
                else:
                    node = stage.nodes[0]
                    values[node.name] = self._run_float(node, values)
                for name in stage.released:
                    values.pop(name, None)
            return replace(self._output, lambda name: _converted(values[name], asked))

    def _bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], torch.dtype | None]:
        """Values by node, and the dtype of outputs where the inputs ask for another."""
        given = dict(zip(self._inputs, args, strict=False)) | dict(kwargs)
        if len(args) + len(kwargs) != len(given) or set(given) != set(self._inputs):
            names = ", ".join(self._inputs)
            raise TypeError(
                f"the network takes ({names}), as its example inputs were, not {len(args)} "
                f"arguments and {sorted(kwargs)}"
            )
        values = {}
        asked = None
        for name, node in self._inputs.items():
            x = given[name]
            if not isinstance(x, Tensor):
                raise TypeError(f"argument '{name}' is a {type(x).__name__}, not a tensor")
            if x.device.type != "cpu":
                raise RuntimeError(f"argument '{name}' is on {x.device}; move it to the CPU")
            if self.exported:
                check_size(name, x, self._by_name[node])
            dtype = self._by_name[node].dtype
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                raise _cannot_see("torch.func")
            x = x.detach()
            if x.is_floating_point() and x.dtype != dtype:
                asked = x.dtype
                x = x.to(dtype)
            values[node] = x
        return values, asked

    def _run_float(self, node: Node, values: Mapping[str, Any]) -> Any:
        kind, target, args, kwargs = node.settings["call"]
        if kind == "get_attr":
            owner, _, name = target.rpartition(".")
            return getattr(self.get_submodule(owner), name)
        args, kwargs = replace((args, kwargs), values.__getitem__)
        if kind == "call_module":
            return self.get_submodule(node.settings.get("path", target))(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _run_segment(self, stage: Segment, values: dict[str, Any], last: bool) -> None:
        inputs = {name: values[name] for name in stage.inputs}
        batch, *others = (x.shape[0] for x in inputs.values())
        if any(other != batch for other in others):
            shapes = [list(x.shape) for x in inputs.values()]
            raise ValueError(f"inputs of different batches: {shapes}")
        found = {name: self._dense(name, x) for name, x in inputs.items()}
        for part in self._plan(stage, {name: tuple(x.shape) for name, x in found.items()}).parts:
            self._run_part(part, found, batch, last)
            for name in part.released:
                found.pop(name, None)
        for name in stage.outputs:
            dtype = self._by_name[name].dtype
            values[name] = found[name] if dtype is torch.float32 else found[name].to(dtype)

    def _run_part(self, part: Part, values: dict[str, Tensor], batch: int, last: bool) -> None:
        lowered = part.lowered
        inputs = [values[name] for name in lowered.inputs]
        outputs = [
            _empty((batch, *shape), last and planar)
            for shape, planar in zip(lowered.shapes, lowered.planar[1], strict=True)
        ]
        if not batch:
            pass
        elif self.eager or part.core is None:
            _run_eagerly(lowered, inputs, outputs)
        else:
            part.core.run(
                _addresses(inputs, lowered.planar[0]),
                _addresses(outputs, lowered.planar[1]),
                batch,
                torch.get_num_threads(),
            )
        values.update(zip(lowered.outputs, outputs, strict=True))

    def _dense(self, name: str, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            x = x.float()
        if x.is_neg():
            x = x.resolve_neg()
        planar = self._by_name[name].layout == "nchw"
        if planar and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return x
        return x.contiguous()

    def _plan(self, stage: Segment, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
        key = (stage.nodes[0].name, tuple(shape[1:] for shape in shapes.values()))
        plan = self._plans.get(key)
        if plan is None or not plan.is_current():
            rank = [len(self._by_name[name].shape) for name in stage.inputs]
            if [len(shape) for shape in shapes.values()] != rank:
                raise ValueError(
                    f"inputs of {[list(shape) for shape in shapes.values()]}: the example inputs' "
                    f"had {rank} dimensions"
                )
            sizes = {name: (self._by_name[name].layout, shape) for name, shape in shapes.items()}
            plan = make_plan(stage, sizes, self, self.make_program)
            self._plans[key] = plan
            if len(self._plans) > _MOST_PLANS:
                del self._plans[next(iter(self._plans))]
        return plan

    def refused(self) -> dict[str, str]:
        """Nodes that the kernels refuse, for the example inputs' size or one that came since.

        They are computed by torch or the layer itself, on floats.

        Returns:
            By the node's name, the reason.
        """
        if self.value_scale.device.type == "cpu":
            for stage in self._stages:
                if stage.in_integers:
                    self._plan(stage, {name: self._by_name[name].shape for name in stage.inputs})
        return {name: why for plan in self._plans.values() for name, why in plan.refused.items()}

    # --- What programs are made of ---------------------------------------------------------------

    def affine(self, name: str) -> Affine | None:
        """What the codes of a value mean; None where it has none."""
        if self._affines is None:
            pairs = zip(self.value_scale.tolist(), self.value_zero.tolist(), strict=True)
            self._affines = {
                name: Affine(scale, zero)
                for name, (scale, zero) in zip(self._names, pairs, strict=True)
            }
        owner = self._owners.get(name)
        return None if owner is None else self._affines[owner]

    def layer(self, name: str) -> nn.Module:
        """The lowbit layer of a node."""
        return self.get_submodule(self._by_name[name].settings["path"])

    @property
    def account(self) -> Account:
        """What became of each call of the float model. Print it for a table."""
        outputs = set(references(self._output))
        return make_account(self.nodes, outputs, self.refused(), self.uncalled)

    # --- State -----------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Programs are planned anew."""
        self._plans = {}
        self._affines = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Network:
        """Moves between devices. What is computed stays float32, whatever the inputs' dtype."""

        def keep_dtype(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in _CACHES:
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def extra_repr(self) -> str:
        integers = sum(stage.in_integers for stage in self._stages)
        return f"programs={integers}, float operations={len(self._stages) - integers}"


def _cannot_see(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} cannot see into the programs of a static network: prepare the model with "
        "graph=False, whose layers are operators, or write the network by lowbit.save_file"
    )


def _converted(x: Any, dtype: torch.dtype | None) -> Any:
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(dtype) if floats and dtype is not None else x


def _is_channels_last(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _empty(shape: tuple[int, ...], last: bool) -> Tensor:
    if last and len(shape) == 4:
        return torch.empty(shape, memory_format=torch.channels_last)
    return torch.empty(shape)


def _addresses(tensors: Sequence[Tensor], planar: Sequence[bool]) -> list[tuple[int, bool]]:
    """For each tensor its address, and whether channels come last in memory."""
    return [
        (x.data_ptr(), not channels_first or not x.is_contiguous())
        for x, channels_first in zip(tensors, planar, strict=True)
    ]


def _run_eagerly(lowered: Lowered, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    pixels = [
        _as_pixels(x, lowered.program.values[step["to"]].size, planar)
        for x, planar, step in zip(inputs, lowered.planar[0], lowered.program.steps, strict=False)
    ]
    found = eager.run(lowered.program, pixels)
    for i, y in enumerate(outputs):
        z = found[i].movedim(3, 1) if lowered.planar[1][i] else found[i]
        y.copy_(z.reshape(y.shape))


def _as_pixels(x: Tensor, size: tuple[int, int, int], planar: bool) -> Tensor:
    """[N, H, W, C] of a value."""
    channels, height, width = size
    if planar:
        return x.reshape(len(x), channels, height, width).movedim(1, 3)
    return x.reshape(len(x), height, width, channels)
