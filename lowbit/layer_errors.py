"""The error of each converted layer: its weights and outputs against those of the float layer.

Two errors of the output are taken. *Alone*: the quantized layer gets the very inputs that the float
layer gets in the float model, so that the figure is the layer's own doing. *In the network*: the
outputs of the two models are compared where the layer stands, so that what the layers before it did
is in it. Hooks take both; every batch runs once through the float model, and once through each
candidate. Where a batch norm was folded into a layer, or an activation is computed in its epilogue,
the float side is the float layer with the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lowbit.baselines import run
from lowbit.fuse import find_folds, folded_layer
from lowbit.nn.base import QuantizedLayer
from lowbit.nn.floats import FLOAT_EPILOGUES
from lowbit.quality import QualityMeter, floating_tensors, measure
from lowbit.report import ROOT, is_converted, is_unit, lowbit_layers, walk

BINS = 56

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Histogram:
    """Counts of float and of quantized values in the same bins of equal width.

    Attributes:
        low, high: the outer edges: the least and the greatest float value (of outputs: in the first
            call). Values beyond them are in the first and in the last bin; NaN and infinities in
            none.
        reference: counts of the float values.
        quantized: counts of the quantized ones.
    """

    low: float
    high: float
    reference: tuple[int, ...]
    quantized: tuple[int, ...]


@dataclass(frozen=True)
class LayerError:
    """The error of one converted layer; None where it could not be taken.

    Attributes:
        name: fully qualified name; "(root)" for a model that is itself a layer.
        scheme: name of its scheme.
        weight_db: SQNR of the weights, dB.
        alone_db: SQNR of the outputs on the float model's inputs of this layer, dB.
        network_db: SQNR of the outputs in the quantized model, dB.
        weights: of float and quantized weights.
        outputs: of the outputs in the float and in the quantized model.
    """

    name: str
    scheme: str
    weight_db: float | None = None
    alone_db: float | None = None
    network_db: float | None = None
    weights: Histogram | None = None
    outputs: Histogram | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, without the histograms."""
        values = asdict(self)
        del values["weights"], values["outputs"]
        return values


def layer_errors(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    batches: Sequence[Any],
    progress: Progress | None = None,
) -> dict[str, tuple[LayerError, ...]]:
    """The error of every converted layer of every candidate.

    The outputs of all converted layers for one batch are held at a time, in the float model's
    dtype. A layer that the model does not call as a module (`out_proj` of an attention, say) has
    the error of its weights alone.

    Args:
        model: the float model, in eval mode.
        candidates: name -> model converted from it. Layers are matched by name.
        batches: as `lowbit.compare` takes them, already in a sequence.
        progress: called with the stage and the share of it that is done.

    Returns:
        candidate -> its layers in the order of the model.

    Raises:
        Exception: whatever a model raises on a batch.
    """
    floats = _FloatLayers(model)
    sides = {name: _sides(candidate, floats) for name, candidate in candidates.items()}
    steps = len(batches) * (1 + len(candidates))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("layers", done / steps)

    with torch.inference_mode():
        for batch in batches:
            with floats.recording([side for chosen in sides.values() for side in chosen]):
                run(model, batch)
            step()
            for name, candidate in candidates.items():
                with _comparing(sides[name]):
                    run(candidate, batch)
                step()
            floats.forget()
    return {name: tuple(side.result() for side in chosen) for name, chosen in sides.items()}


class _Form:
    """A float layer as a candidate has it (with its batch norm, or without), and its outputs."""

    def __init__(self, layer: nn.Module, folded: nn.Module | None) -> None:
        self.layer = layer
        self.source = layer if folded is None else folded
        self.outputs: list[Any] = []

    def output(self, args: Any, kwargs: Any, own: Any) -> Any:
        if self.source is self.layer:
            return _copied(own)
        return self.source.forward(*args, **kwargs)  # not called: it shares the layer's hooks


class _FloatLayers:
    """The layers of the float model, found by name."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name or ROOT: module for name, module, _ in walk(model, is_unit)}
        self._folds = {fold.layer_name: fold for fold in find_folds(model)[0]}
        self._forms: dict[tuple[int, bool], _Form] = {}

    def form(self, name: str, candidate: nn.Module) -> _Form | None:
        """The float layer of a candidate's converted layer; None where there is none."""
        layer = self._modules.get(name)
        if layer is None or is_converted(layer):
            return None
        fold = self._folds.get(name)
        folded = None
        if fold is not None:
            place = dict(candidate.named_modules(remove_duplicate=False)).get(fold.norm_name)
            if isinstance(place, nn.Identity):
                folded = folded_layer(fold.layer, fold.norm)
        return self._forms.setdefault((id(layer), folded is not None), _Form(layer, folded))

    @contextlib.contextmanager
    def recording(self, sides: Sequence[_Side]) -> Iterator[None]:
        """Keeps the outputs of the float layers, and tries the converted ones on their inputs."""
        by_layer: dict[int, list[_Form]] = {}
        for form in self._forms.values():
            by_layer.setdefault(id(form.layer), []).append(form)
        followers: dict[int, list[_Side]] = {}
        for side in sides:
            if side.form is not None:
                followers.setdefault(id(side.form), []).append(side)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for form in by_layer[id(module)]:
                form.outputs.append(form.output(args, kwargs, output))
                for side in followers.get(id(form), ()):
                    side.try_alone(form.outputs[-1], args, kwargs)

        with contextlib.ExitStack() as stack:
            for forms in by_layer.values():
                handle = forms[0].layer.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def forget(self) -> None:
        """Drops the outputs."""
        for form in self._forms.values():
            form.outputs.clear()


class _Side:
    """One converted layer of one candidate."""

    def __init__(self, name: str, layer: nn.Module, form: _Form | None) -> None:
        self.name, self.layer, self.form = name, layer, form
        self.calls = 0
        self._alone, self._network = QualityMeter("other"), QualityMeter("other")
        self._outputs = _Counts()
        epilogue = layer.epilogue if isinstance(layer, QuantizedLayer) else "none"
        self._epilogue = FLOAT_EPILOGUES[epilogue]() if epilogue != "none" else nn.Identity()

    def try_alone(self, reference: Any, args: Any, kwargs: Any) -> None:
        self._alone.update(self._after(reference), self.layer(*args, **kwargs))

    def compare(self, output: Any) -> None:
        if self.form is None or self.calls >= len(self.form.outputs):
            return  # called more often than in the float model: nothing to compare with
        reference = self._after(self.form.outputs[self.calls])
        self.calls += 1
        self._network.update(reference, output)
        self._outputs.add(floating_tensors(reference), floating_tensors(output))

    def _after(self, reference: Any) -> Any:
        """The float outputs behind the activation that the layer computes."""
        return self._epilogue(reference) if isinstance(reference, torch.Tensor) else reference

    def result(self) -> LayerError:
        schemes = dict.fromkeys(layer.scheme.name for layer in lowbit_layers(self.layer))
        weight_db = weights = None
        source = None if self.form is None else getattr(self.form.source, "weight", None)
        if isinstance(source, torch.Tensor) and isinstance(self.layer, QuantizedLayer):
            before, after = source.detach(), self.layer.weight.as_subclass(torch.Tensor)
            if before.shape == after.shape and before.numel():
                weight_db = measure(before, after, "other").sqnr_db
                counts = _Counts()
                counts.add([before], [after])
                weights = counts.result()
        return LayerError(
            name=self.name,
            scheme=", ".join(schemes),
            weight_db=weight_db,
            alone_db=_sqnr(self._alone),
            network_db=_sqnr(self._network),
            weights=weights,
            outputs=self._outputs.result(),
        )


class _Counts:
    """A histogram that is filled call by call; the first call fixes its range."""

    def __init__(self) -> None:
        self._range: tuple[float, float] | None = None
        self._reference = self._quantized = torch.zeros(BINS)

    def add(self, reference: Sequence[torch.Tensor], quantized: Sequence[torch.Tensor]) -> None:
        before, after = _finite_values(reference), _finite_values(quantized)
        if self._range is None:
            if before.numel() == 0:
                return
            low, high = float(before.min()), float(before.max())
            if low == high:  # a range of no width has no bins
                low, high = low - 0.5, high + 0.5
            self._range = low, high
        self._reference = self._reference + self._count(before)
        self._quantized = self._quantized + self._count(after)

    def _count(self, values: torch.Tensor) -> torch.Tensor:
        assert self._range is not None
        low, high = self._range
        return torch.histc(values.clamp(low, high), BINS, low, high).double()

    def result(self) -> Histogram | None:
        if self._range is None:
            return None
        counts = (tuple(map(int, c.tolist())) for c in (self._reference, self._quantized))
        return Histogram(*self._range, *counts)


def _sides(candidate: nn.Module, floats: _FloatLayers) -> list[_Side]:
    """The converted layers of a candidate, each once, under its first name."""
    sides: dict[int, _Side] = {}
    for name, module, _ in walk(candidate, is_unit):
        if is_converted(module) and id(module) not in sides:
            form = floats.form(name or ROOT, candidate)
            sides[id(module)] = _Side(name or ROOT, module, form)
    return list(sides.values())


@contextlib.contextmanager
def _comparing(sides: Sequence[_Side]) -> Iterator[None]:
    """Compares what the converted layers return with what the float layers did."""
    with contextlib.ExitStack() as stack:
        for side in sides:
            side.calls = 0

            def hook(_: nn.Module, args: Any, output: Any, side: _Side = side) -> None:
                side.compare(output)

            stack.callback(side.layer.register_forward_hook(hook).remove)
        yield


def _copied(output: Any) -> Any:
    """A copy: an activation that works in place may follow."""
    return output.clone() if isinstance(output, torch.Tensor) else output


def _finite_values(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All finite elements in one dimension, float32."""
    flat = torch.cat([t.detach().float().flatten() for t in tensors] or [torch.zeros(0)])
    return flat[torch.isfinite(flat)]


def _sqnr(meter: QualityMeter) -> float | None:
    try:
        return meter.result().sqnr_db
    except ValueError:  # nothing was added
        return None
