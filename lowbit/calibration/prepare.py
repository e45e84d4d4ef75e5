"""Float models that observe what flows into the layers that will convert."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from lowbit import observers
from lowbit.baselines import eval_mode
from lowbit.calibration.prepared import (
    ObserverModule,
    Preparation,
    learned,
    mark,
    preparation_of,
)
from lowbit.convert import child_slots, run_converted_encoder_layers
from lowbit.errors import check_model
from lowbit.fuse import folded_layer
from lowbit.plan import Filter, Job, Overrides, Plan, SchemeLike, make_plan
from lowbit.qat import QATLayer
from lowbit.report import set_entry
from lowbit.rules import PREPARED
from lowbit.static.capture import NotCaptured, exported_flow
from lowbit.static.prepared import prepare_network as capture

DEFAULT_OBSERVER = "mse"


def prepare(
    model: nn.Module,
    scheme: SchemeLike | None,
    example_inputs: Any = None,
    *,
    overrides: Overrides | None = None,
    filter_fn: Filter | None = None,
    fuse: bool = True,
    observer: str = DEFAULT_OBSERVER,
    symmetric: bool = False,
    graph: bool = True,
) -> nn.Module:
    """A copy of a float model to calibrate: it runs as the float model, and observes.

    Batch norms are folded, and each layer whose scheme is static has an observer of its input. Run
    it on example data (`lowbit.calibrate`, or by calling it: every call counts), then
    `lowbit.convert` makes the deployed model of it. The statistics are in its state dict.

    A layer that is called at several places has one observer, which sees all its calls. Layers of
    dynamic schemes, named by overrides, convert at the same time and observe nothing.

    Args:
        model: a float model; untouched.
        scheme, overrides, filter_fn, fuse: as for `lowbit.quantize`.
        example_inputs: one batch, for the capture of the model as a graph.
        observer: how ranges are chosen: "minmax", "moving_average", "percentile", "mse" or
            "entropy", see `lowbit.observers`. The default has the best SQNR on EfficientNet-Lite0
            (`bench/CALIBRATION.md`), and unlike "minmax" it is not at the mercy of one outlier.
        symmetric: whether int8 activations have no zero point.
        graph: whether to capture the model as a graph (by torch.fx, else by torch.export, for the
            size of the example alone), so that codes flow between layers. What cannot be captured
            is quantized layer by layer, and the account says why.

    Returns:
        The copy, in the modes (training, eval) of the model.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: as `lowbit.quantize`; the model is prepared already; no layer's scheme is
            static; an unknown observer.
    """
    check_model(model)
    kinds = (QATLayer, ObserverModule)
    if any(isinstance(m, kinds) or preparation_of(m) is not None for m in model.modules()):
        raise ValueError(
            "the model is prepared already: calibrate it, or prepare the float model that it was "
            "made of"
        )
    observers.make(observer)  # refuses an unknown one before the model is copied
    result = copy.deepcopy(model)
    flow = None
    if fuse and graph:
        with eval_mode([result]):
            flow = exported_flow(result, example_inputs)
    plan = make_plan(result, scheme, overrides, filter_fn, fuse, epilogues=False, flow=flow)
    prepare_in_place(result, plan, fuse, observer, symmetric)
    if graph:
        try:
            return capture(result, example_inputs)
        except NotCaptured as error:
            add_note(result, f"runs layer by layer: {error}")
    return result


def prepare_in_place(
    model: nn.Module,
    plan: Plan,
    fuse: bool,
    observer: str = DEFAULT_OBSERVER,
    symmetric: bool = False,
) -> None:
    """What `prepare` does to its copy, of a plan for it without epilogues."""
    if not any(job.scheme.static for job in plan.jobs):
        names = ", ".join(dict.fromkeys(job.scheme.name for job in plan.jobs))
        why = f"its layers' schemes ({names}) are dynamic" if names else "no layer converts"
        raise ValueError(
            f"nothing to calibrate: {why}; a static scheme is e.g. 'w8a8-static', and "
            "lowbit.quantize converts without calibration"
        )
    slots = child_slots(model)
    for job in plan.jobs:
        layer = job.module
        if job.fold is not None:
            layer._parameters.update(folded_layer(layer, job.fold.norm)._parameters)
        set_entry(layer, dataclasses.replace(job.entry(), scheme=None, note=_waiting(job)))
        module = None
        if job.scheme.static:
            made = observers.make(observer, job.scheme.activation, symmetric)
            module = ObserverModule(made, f"layer '{job.name}'")
        mark(layer, Preparation(job.scheme, fuse), module)
    plan.leave_entries(slots)
    layers = learned(model)
    run_converted_encoder_layers(model, lambda module: id(module) in layers)


def _waiting(job: Job) -> str:
    verb = "calibrates as" if job.scheme.static else "will be"
    return "; ".join([f"{verb} {job.scheme.name}", *job.notes])


def add_note(prepared: nn.Module, note: str) -> None:
    """Adds a note to the account of every static layer."""
    for module in prepared.modules():
        preparation = preparation_of(module)
        if preparation is not None and preparation.scheme.static:
            notes = (*preparation.notes, note)
            vars(module)[PREPARED] = dataclasses.replace(preparation, notes=notes)
