"""What a conversion will do: which layers get which scheme, and why the others stay float.

A plan is made before the first layer changes, so that whatever can be known by then is an error
by then: schemes, overrides that match nothing, weights with NaN.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit import rules
from lowbit.dataflow import Flow
from lowbit.epilogues import ACTIVATIONS, find_absorbed
from lowbit.errors import check_model
from lowbit.fuse import Fold, find_folds, folded_layer, identity, norm_entry
from lowbit.observers import Affine
from lowbit.report import (
    Entry,
    count_bytes,
    entry_of,
    holds_weights,
    is_converted,
    is_unit,
    own_tensors,
    set_entry,
    walk,
    weight_shape,
)
from lowbit.schemes import Scheme

SchemeLike = str | Scheme | Mapping[str, Any]
Overrides = Mapping[str, SchemeLike | None]
Filter = Callable[[nn.Module, str], bool]

_ENCODER_NOTE = "the fused path of nn.TransformerEncoderLayer is off: it would bypass this layer"


@dataclass
class Job:
    """One layer to convert."""

    module: nn.Module
    name: str
    scheme: Scheme
    converter: rules.Converter
    bytes_before: int
    kind: str
    shape: tuple[int, ...]
    tied_weight: int | None = None
    notes: list[str] = field(default_factory=list)
    folded: str = ""
    fold: Fold | None = None
    epilogue: str = "none"
    activation: Affine | None = None
    layer: nn.Module | None = None  # made already, where its inputs decide about it

    def entry(self) -> Entry:
        note = "; ".join(self.notes)
        return Entry(self.kind, self.shape, self.bytes_before, note, self.scheme, self.folded)

    def source(self) -> nn.Module:
        """The float layer to convert, its batch norm in it."""
        return self.module if self.fold is None else folded_layer(self.module, self.fold.norm)


@dataclass
class Plan:
    """Layers to convert, activations that they compute, and the entries to leave on modules.

    `counted`: the tensors whose bytes an entry has, see `count_bytes`.
    """

    jobs: list[Job] = field(default_factory=list)
    absorbed: list[nn.Module] = field(default_factory=list)
    entries: list[tuple[nn.Module, Entry]] = field(default_factory=list)
    counted: set[tuple[int, ...]] = field(default_factory=set)

    def leave_entries(self, slots: Mapping[int, list[tuple[nn.Module, str]]]) -> None:
        """Leave the entries on their modules; identities take the places of folded norms.

        Args:
            slots: every place (parent, key) of every module, by its id.
        """
        for module, entry in self.entries:
            place = module
            if isinstance(module, _BatchNorm) and entry.folded:
                place = identity(module)
                for parent, key in slots[id(module)]:
                    parent._modules[key] = place
            set_entry(place, entry)

    def keep(self, job: Job) -> None:
        """Account for a layer that its converter left as it is."""
        note = f"the converter of {job.kind} returned it unchanged"
        self.entries.append((job.module, Entry(job.kind, job.shape, job.bytes_before, note)))
        self.jobs = [other for other in self.jobs if other is not job]


def make_plan(
    model: nn.Module,
    scheme: SchemeLike | None,
    overrides: Overrides | None,
    filter_fn: Filter | None,
    fuse: bool,
    epilogues: bool = True,
    flow: Flow | None = None,
) -> Plan:
    """Decide about every module of a float model; arguments and errors as for `quantize`.

    `epilogues`: with `fuse`, whether layers take the activations behind them along, too.
    `flow`: of the model, if it is known already.
    """
    check_model(model)
    plan = plan_layers(model, _Chooser(scheme, overrides or {}, filter_fn))
    if fuse:
        plan_fusion(plan, model, epilogues=epilogues, flow=flow)
    return plan


class Chooser(Protocol):
    """What decides the scheme of each layer that could convert.

    Attributes:
        lowbit_names: names of layers that are lowbit's already; filled while a plan is made.
    """

    lowbit_names: list[str]

    def choose(self, name: str, module: nn.Module) -> tuple[Scheme | None, str]:
        """The scheme, or None and why the layer stays float."""

    def check_all_matched(self) -> None:
        """Asked last; raises ValueError for what was said of no layer."""


def plan_layers(model: nn.Module, chooser: Chooser) -> Plan:
    """A plan without fusion: which layers convert to what."""
    plan = Plan()
    converted: set[int] = set()
    chosen: dict[int, tuple[str, Scheme | None]] = {}
    counted = plan.counted
    owners = _parameter_owners(model)

    for name, module, parent in walk(model, lambda m: id(m) in converted or is_unit(m)):
        if is_converted(module):
            chooser.lowbit_names.append(name)
            continue
        candidate = rules.is_candidate(module)
        if not (candidate or holds_weights(module)):
            continue
        layer_scheme, note = chooser.choose(name, module) if candidate else (None, "")
        first, first_scheme = chosen.setdefault(id(module), (name, layer_scheme))
        if first_scheme != layer_scheme:
            raise ValueError(
                f"'{first}' and '{name}' are the same module, but they are given two schemes: "
                f"{_scheme_name(first_scheme)} and {_scheme_name(layer_scheme)}"
            )
        if first != name:
            continue
        converter = None
        if layer_scheme is not None:
            converter, note = rules.find_converter(module, parent)
        kind, shape = type(module).__name__, weight_shape(module)
        if converter is None or layer_scheme is None:
            size, folded = _before(module, own_tensors(module), counted)
            note = note or _kept_note(module)
            plan.entries.append((module, Entry(kind, shape, size, note, folded=folded)))
            continue
        size, folded = _before(module, [*module.parameters(), *module.buffers()], counted)
        job = Job(module, name, layer_scheme, converter, size, kind, shape, folded=folded)
        if isinstance(parent, nn.TransformerEncoderLayer) and any(
            module is parent._modules.get(key) for key in ("linear1", "linear2")
        ):
            job.notes.append(_ENCODER_NOTE)
        hooks = rules.hook_count(module)
        if hooks:
            job.notes.append(f"hooks carried over: {hooks}")
        converted.add(id(module))
        plan.jobs.append(job)
    chooser.check_all_matched()
    for job in plan.jobs:
        _check_finite(job)
        _note_ties(job, owners, converted)
    return plan


def plan_fusion(
    plan: Plan,
    model: nn.Module,
    *,
    folds: bool = True,
    epilogues: bool = True,
    flow: Flow | None = None,
) -> None:
    """Adds to a plan the batch norms to fold, and the activations that layers compute."""
    kinds: tuple[type[nn.Module], ...] = (_BatchNorm, *ACTIVATIONS)
    if plan.jobs and any(isinstance(module, kinds) for module in model.modules()):
        flow = flow or Flow(model)
        if folds:
            _plan_folds(plan, model, flow)
        if epilogues:
            _plan_epilogues(plan, model, flow)


def _plan_folds(plan: Plan, model: nn.Module, flow: Flow) -> None:
    """Fold batch norms into the layers that convert, and account for all others."""
    counted = plan.counted
    jobs = {id(job.module): job for job in plan.jobs}
    folds, kept = find_folds(model, flow)
    for fold in folds:
        size = count_bytes(own_tensors(fold.norm), counted)
        job = jobs.get(id(fold.layer))
        if job is None:
            note = f"batch norm not folded: '{fold.layer_name}' before it stays float"
            plan.entries.append((fold.norm, norm_entry(fold.norm, size, note)))
        else:
            job.fold, job.folded = fold, fold.layer_note
            plan.entries.append((fold.norm, fold.norm_entry(size)))
    for norm, note in kept:
        size = count_bytes(own_tensors(norm), counted)
        plan.entries.append((norm, norm_entry(norm, size, note)))


def _plan_epilogues(plan: Plan, model: nn.Module, flow: Flow) -> None:
    """Let the layers that convert compute the activations behind them."""
    jobs = {
        id(job.module): job
        for job in plan.jobs
        if rules.is_builtin(job.converter)
        and not isinstance(job.module, nn.ConvTranspose2d)  # its outputs are put together
        and not rules.hook_count(job.module)
    }
    norms = {id(job.fold.norm) for job in plan.jobs if job.fold is not None}
    names = {key: job.name for key, job in jobs.items()}
    for absorbed in find_absorbed(model, flow, names, norms):
        for layer, _ in absorbed.layers:
            jobs[id(layer)].epilogue = absorbed.epilogue
            jobs[id(layer)].notes.append(absorbed.layer_note)
        plan.absorbed.append(absorbed.module)
        plan.entries.append((absorbed.module, absorbed.entry()))


class _Chooser:
    """Decides the scheme of a layer from the overrides, the filter and the scheme of the model."""

    def __init__(
        self, scheme: SchemeLike | None, overrides: Overrides, filter_fn: Filter | None
    ) -> None:
        self.scheme = _parse(scheme)
        self.filter_fn = filter_fn
        self.names: list[str] = []
        self.lowbit_names: list[str] = []
        self.matched: set[str] = set()
        self.overrides: list[tuple[str, re.Pattern[str] | None, Scheme | None]] = []
        if not isinstance(overrides, Mapping):
            raise TypeError(
                "overrides is a mapping from layers' names to schemes, such as {'head': None}, not "
                f"a {type(overrides).__name__}"
            )
        for key, value in overrides.items():
            if not isinstance(key, str):
                raise TypeError(f"overrides name layers by strings, not by a {type(key).__name__}")
            pattern = None
            if key.startswith("re:"):
                try:
                    pattern = re.compile(key[3:])
                except re.error as error:
                    raise ValueError(
                        f"override '{key}' is no regular expression: {error}"
                    ) from None
            self.overrides.append((key, pattern, _parse(value, f"override '{key}'")))

    def choose(self, name: str, module: nn.Module) -> tuple[Scheme | None, str]:
        """The scheme, or None and why the layer stays float."""
        self.names.append(name)
        hits = [
            (key, scheme)
            for key, pattern, scheme in self.overrides
            if (pattern.fullmatch(name) if pattern else key == name)
        ]
        self.matched.update(key for key, _ in hits)
        if self.filter_fn is not None and not self.filter_fn(module, name):
            return None, "filter_fn returned False"
        if hits:
            key, scheme = hits[0]
            return scheme, "" if scheme else f"override '{key}' is None"
        return self.scheme, "" if self.scheme else "the scheme is None"

    def check_all_matched(self) -> None:
        for key, _, _ in self.overrides:
            if key in self.matched:
                continue
            wanted = key.removeprefix("re:").replace("\\", "")
            close = difflib.get_close_matches(wanted, self.names, n=5, cutoff=0.4)
            message = f"override '{key}' matches no layer that can be converted"
            if key in self.lowbit_names:
                message += ": this layer is a lowbit layer already"
            elif close:
                message += "; close names: " + ", ".join(f"'{name}'" for name in close)
            elif self.names:
                message += f"; the {len(self.names)} layers begin with '{self.names[0]}'"
            else:
                message += ": the model has none"
            raise ValueError(message)


def _parse(scheme: SchemeLike | None, what: str = "") -> Scheme | None:
    if scheme is None:
        return None
    try:
        return Scheme.parse(scheme)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{what}: {error}" if what else str(error)) from error


def _scheme_name(scheme: Scheme | None) -> str:
    return scheme.name if scheme else "None"


def _before(
    module: nn.Module, tensors: list[torch.Tensor], counted: set[tuple[int, ...]]
) -> tuple[int, str]:
    """Bytes of a module before the conversion, and what `lowbit.fuse` had folded into it."""
    entry, size = entry_of(module), count_bytes(tensors, counted)
    if entry is not None and entry.folded:
        return entry.bytes_before, entry.folded
    return size, ""


def _kept_note(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention passes its in_proj weight to functional code"
    if type(module).__module__.startswith("torch.nn."):
        return f"nn.{type(module).__name__} is not supported yet"
    return "no layer that can be converted: parameters of its own stay float"


def _parameter_owners(model: nn.Module) -> dict[int, dict[str, int]]:
    """For each parameter by its id: its names, and the id of the module that owns it there."""
    owners: dict[int, dict[str, int]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{key}" if prefix else key
                owners.setdefault(id(parameter), {})[name] = id(module)
    return owners


def _note_ties(job: Job, owners: dict[int, dict[str, int]], converted: set[int]) -> None:
    weight = job.module._parameters.get("weight")
    names = owners.get(id(weight), {})
    others = {name: owner for name, owner in names.items() if owner != id(job.module)}
    if others:
        job.tied_weight = id(weight)
        kept = [f"'{name}'" for name, owner in others.items() if owner not in converted]
        if kept:
            job.notes.append(f"the tie of its weight to {', '.join(kept)}, kept float, is broken")
        else:
            job.notes.append(f"its weight was tied to {', '.join(map(repr, others))}")


def _check_finite(job: Job) -> None:
    for key, plural in (("weight", "weights"), ("bias", "biases")):
        tensor = job.module._parameters.get(key)
        if tensor is None or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor.detach())  # passes NaN on, and makes no temporary
        if not (low.isfinite() and high.isfinite()):
            count = int((~torch.isfinite(tensor.detach())).sum())
            raise ValueError(
                f"layer '{job.name}': {count} of the {tensor.numel()} {plural} are NaN or Inf; "
                "repair the checkpoint, or keep the layer float with overrides="
                f"{{'{job.name}': None}}"
            )
