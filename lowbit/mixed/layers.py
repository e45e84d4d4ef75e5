"""A float model whose layers are swapped for their lowbit layers and back, in place.

The lowbit layers of a scheme are made once, by `lowbit.quantize` with all that it can do
(calibration among it); only these are kept: 8 bits a weight or less.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from lowbit.baselines import eval_mode, no_fused_paths, weight_bytes
from lowbit.calibration.data import Data
from lowbit.calibration.deploy import calibrated_copy
from lowbit.calibration.prepare import prepare
from lowbit.calibration.run import calibrate
from lowbit.convert import child_slots, quantize, quantize_alone
from lowbit.fuse import identity
from lowbit.nn.base import QuantizedLayer
from lowbit.plan import Filter, SchemeLike, make_plan
from lowbit.quantizers import needs_data
from lowbit.report import count_bytes
from lowbit.schemes import Scheme
from lowbit.serialize import load_file, save_file

Assignment = Mapping[str, str | None]
"""From the names of layers to names of schemes; None, or no entry, is float."""


@dataclass
class Layer:
    """One layer that can be swapped.

    Attributes:
        name: its fully qualified name.
        module: the float layer.
        norm: the batch norm that its lowbit layers have taken in; None if there is none.
        versions: its lowbit layers by scheme.
        shape: of the float weight.
        float_bytes: parameters and buffers of the float layer and its norm.
    """

    name: str
    module: nn.Module
    norm: nn.Module | None
    shape: tuple[int, ...]
    float_bytes: int
    versions: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Class of the float layer."""
        return type(self.module).__name__

    def bytes(self, scheme: str | None) -> int:
        """Parameters and buffers in a scheme."""
        if scheme is None:
            return self.float_bytes
        version = self.versions[scheme]
        return count_bytes([*version.parameters(), *version.buffers()], set())


@dataclass(frozen=True)
class Conversion:
    """How layers are converted: the arguments of `quantize` besides model and schemes."""

    filter_fn: Filter | None = None
    fuse: bool = True
    calibration: Data | None = None
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def quantize(
        self, model: nn.Module, scheme: Scheme | None, assignment: Assignment | None = None
    ) -> nn.Module:
        """The copy, calibrated where a scheme learns from data."""
        given = [scheme, *map(_parse, (assignment or {}).values())]
        learns = bool(self.options) or any(one.learns for one in given if one is not None)
        data: dict[str, Any] = {}
        if self.calibration is not None and learns:
            data = {"calibration": self.calibration, "forward_fn": self.forward_fn}
        return quantize(
            model,
            scheme,
            overrides=assignment,
            filter_fn=self.filter_fn,
            fuse=self.fuse,
            **data,
            **(self.options if any(one is not None for one in given) else {}),
        )

    def layered(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        """The copy with one scheme, to take layers from.

        They run layer by layer: a static model is not captured as a graph. Weights learn from the
        inputs that the layers have in the float model, not behind others of few bits, whose
        errors they would make up for.
        """
        if self.calibration is None:
            return self.quantize(model, scheme)
        if not scheme.static:
            if not needs_data(scheme.quantizer or "") or "block_steps" in self.options:
                return self.quantize(model, scheme)
            return quantize_alone(
                model,
                scheme,
                filter_fn=self.filter_fn,
                fuse=self.fuse,
                calibration=self.calibration,
                forward_fn=self.forward_fn,
                **self.options,
            )
        if self.options or needs_data(scheme.quantizer or ""):
            return self.quantize(model, scheme)  # whose weights learn layer by layer, too
        prepared = prepare(model, scheme, filter_fn=self.filter_fn, fuse=self.fuse, graph=False)
        return calibrated_copy(calibrate(prepared, self.calibration, self.forward_fn))


def _parse(name: str | None) -> Scheme | None:
    return None if name is None else Scheme.parse(name)


def parse_schemes(schemes: Sequence[SchemeLike] | SchemeLike) -> dict[str, Scheme]:
    """Schemes by their names, in the given order.

    Raises:
        ValueError: none, one that is given twice, or one that is not valid.
    """
    if isinstance(schemes, (str, Scheme, Mapping)):
        schemes = [schemes]
    parsed = [Scheme.parse(scheme) for scheme in schemes]
    named = {scheme.name: scheme for scheme in parsed}
    if not named:
        raise ValueError("`schemes` is empty")
    if len(named) < len(parsed):
        raise ValueError(f"a scheme is given twice: {', '.join(s.name for s in parsed)}")
    return named


class Workbench:
    """Swaps layers while it is entered; when left, the model is what it was.

    Args:
        model: the float model.
        schemes: what its layers are converted to, by name.
        conversion: how.
        report: called with the scheme that is being made, and the share done.
        kept: the file where the layers of a scheme that learns are kept, by the scheme's name;
            those that are there are not learned again. None keeps none.

    Attributes:
        model: the float model itself.
        layers: those that a scheme converts, in the order of the model.

    Raises:
        ValueError: as `quantize`; no layer converts, or the model is itself one.
    """

    def __init__(
        self,
        model: nn.Module,
        schemes: Mapping[str, Scheme],
        conversion: Conversion,
        report: Callable[[str, float], None],
        kept: Callable[[str], Path] | None = None,
    ) -> None:
        self.model = model
        self.conversion = conversion
        self._kept = kept
        found: dict[str, Layer] = {}
        for done, (name, scheme) in enumerate(schemes.items()):
            report(f"converting to {name}", done / len(schemes))
            self._add(found, name, scheme)
        self._names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
        order = {names[0]: place for place, names in enumerate(self._names.values())}
        self.layers = sorted(found.values(), key=lambda layer: order[layer.name])
        if not self.layers:
            raise ValueError("the model has no layer that these schemes convert")
        self._slots = child_slots(model)
        self._now: dict[str, str | None] = {}
        self._stack = contextlib.ExitStack()

    def _add(self, found: dict[str, Layer], name: str, scheme: Scheme) -> None:
        conversion = self.conversion
        plan = make_plan(
            self.model, scheme, None, conversion.filter_fn, conversion.fuse, epilogues=False
        )
        if any(job.module is self.model for job in plan.jobs):
            raise ValueError(
                f"the model is itself a layer, a {type(self.model).__name__}: there is nothing to "
                "choose between its layers"
            )
        if not plan.jobs:
            return
        made = self._layered(name, scheme)
        for job in plan.jobs:
            version = made.get_submodule(job.name)
            if not any(isinstance(part, QuantizedLayer) for part in version.modules()):
                continue  # its converter left it as it is
            if isinstance(version, QuantizedLayer):
                version.epilogue = "none"  # the activation behind it stays in the float model
            norm = None if job.fold is None else job.fold.norm
            modules = [job.module] if norm is None else [job.module, norm]
            tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
            size = count_bytes(tensors, set())
            layer = Layer(job.name, job.module, norm, job.shape, size)
            found.setdefault(job.name, layer).versions[name] = version.eval()

    def _layered(self, name: str, scheme: Scheme) -> nn.Module:
        """The copy with one scheme: the one that is kept, or else a new one."""
        if self._kept is None or not scheme.learns:
            return self.conversion.layered(self.model, scheme)
        path = self._kept(name)
        if path.exists():
            # Into a copy without weights: the file has its own.
            memo: dict[int, Any] = {
                id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad)
                for p in self.model.parameters()
            }
            return load_file(copy.deepcopy(self.model, memo), path)
        made = self.conversion.layered(self.model, scheme)
        half = path.with_name(f"{path.name}.part")
        save_file(made, half)
        half.replace(path)  # a file that is there is whole
        return made

    def __enter__(self) -> Workbench:
        self._stack.enter_context(eval_mode([self.model]))
        self._stack.enter_context(no_fused_paths())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.set({})
        self._stack.close()

    def set(self, assignment: Assignment) -> None:
        """Swaps until each layer is in the scheme that is assigned to it."""
        for layer in self.layers:
            scheme = assignment.get(layer.name)
            if self._now.get(layer.name) == scheme:
                continue
            version = layer.module if scheme is None else layer.versions[scheme]
            self._put(layer.module, version)
            if layer.norm is not None:
                self._put(layer.norm, layer.norm if scheme is None else identity(layer.norm))
            self._now[layer.name] = scheme

    def _put(self, module: nn.Module, replacement: nn.Module) -> None:
        for parent, key in self._slots[id(module)]:
            parent._modules[key] = replacement

    def bytes(self, assignment: Assignment) -> int:
        """Parameters and buffers of the whole model, tensors that are shared counted once."""
        self.set(assignment)
        return weight_bytes(self.model)

    def overrides(self, assignment: Assignment) -> dict[str, str | None]:
        """The assignment for `quantize`, under every name that a layer has in the model."""
        return {
            name: assignment.get(layer.name)
            for layer in self.layers
            for name in self._names[id(layer.module)]
        }

    def uniform(self, scheme: str) -> dict[str, str | None]:
        """The assignment of one scheme to every layer that it converts."""
        return {layer.name: scheme if scheme in layer.versions else None for layer in self.layers}
