"""Models to train, and the deployed models that are made of them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn
from tqdm import tqdm

from lowbit import rules
from lowbit.carried import carried_state, carry_over
from lowbit.convert import (
    child_slots,
    name_layer,
    run_converted_encoder_layers,
)
from lowbit.errors import check_model
from lowbit.fuse import norm_entry
from lowbit.plan import Filter, Job, Overrides, Plan, SchemeLike, make_plan
from lowbit.qat.layers import LAYERS, QATLayer
from lowbit.report import Entry, count_bytes, entry_of, own_tensors, set_entry

# What a layer has beside its float layer's attributes and does not hand on when it is deployed.
_OWN = ("scheme", "norm", "_fqn", "_deployed", "_lowbit_entry")


def prepare_qat(
    model: nn.Module,
    scheme: SchemeLike | None,
    *,
    overrides: Overrides | None = None,
    filter_fn: Filter | None = None,
    fuse: bool = True,
) -> nn.Module:
    """A copy of a model to train for a scheme: its layers round as their lowbit layers will.

    Train it as any model, with any optimizer (made after this call: the scales are parameters),
    from the trained float model's weights if there are such; `lowbit.convert` then makes the
    deployed model of it. In eval mode its layers run the deployed layers: the outputs are those
    of the converted model, bit for bit. `lowbit.qat.QATLayer` says what is learned and how.

    Batch norms move into the layers before them, where `lowbit.quantize` would fold them (of
    either mode), and train there. `lowbit.summary` names them, and of every layer that stays float
    the reason why. Layers must be prepared on the CPU, and can train wherever torch can.

    Args:
        model: a float model; untouched. Its `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` are prepared.
        scheme, overrides, filter_fn: as for `lowbit.quantize`. A scheme's quantizer chooses the
            scales to begin with, and those of binary weights throughout.
        fuse: whether batch norms are taken along.

    Returns:
        The copy, in the modes (training, eval) of the model.

    Raises:
        ValueError: a scheme is not valid, an override matches no layer, weights have NaN or Inf,
            the model is prepared already, or no layer of it can be.
    """
    check_model(model)
    if any(isinstance(module, QATLayer) for module in model.modules()):
        raise ValueError(
            "the model is prepared already: train it, or prepare the float model that it was made "
            "of for another scheme"
        )
    result = copy.deepcopy(model)
    modes = [(module, module.training) for module in result.modules()]
    # In eval mode, since a norm in training mode is not folded. Here it stays a norm.
    plan = make_plan(result.eval(), scheme, overrides, filter_fn, fuse, epilogues=False)
    for module, mode in modes:
        module.training = mode
    slots = child_slots(result)
    prepared = 0
    for job in tqdm(plan.jobs, desc="prepare", unit="layer", disable=None, leave=False):
        cls = _class_for(job)
        if cls is None:
            _keep(plan, job)
            continue
        layer = cls.take_over(job.module, job.scheme, None if job.fold is None else job.fold.norm)
        layer._fqn = job.name or None
        set_entry(layer, dataclasses.replace(job.entry(), note=_note(job), scheme=None))
        prepared += 1
    plan.leave_entries(slots)
    if not prepared:
        notes = sorted({entry.note for _, entry in plan.entries if entry.note})
        raise ValueError("no layer can be prepared: " + ("; ".join(notes) or "the model has none"))
    run_converted_encoder_layers(result, lambda module: isinstance(module, QATLayer))
    return result


def convert(prepared: nn.Module) -> nn.Module:
    """The deployed model of a model that was prepared and trained, in eval mode.

    A copy, in which layers of `lowbit.nn` stand for those that were trained: the outputs are the
    ones of the prepared model in eval mode, bit for bit. `lowbit.summary` gives its account,
    `lowbit.save_file` writes it.

    Args:
        prepared: of `lowbit.prepare_qat`; untouched, and can be trained further.

    Raises:
        ValueError: no layer is prepared, or weights have NaN or Inf: the message names the layer.
        RuntimeError: a layer is not on the CPU.
    """
    layers = {name: m for name, m in prepared.named_modules() if isinstance(m, QATLayer)}
    if not layers:
        raise ValueError(
            "no layer of the model is prepared: train a model of lowbit.prepare_qat, or use "
            "lowbit.quantize to convert without training"
        )
    # deepcopy takes what the memo holds for the copy: the lowbit layer instead of the trained one.
    memo: dict[int, Any] = {}
    for name, layer in tqdm(layers.items(), desc="convert", disable=None, leave=False):
        deployed = layer.deploy()
        name_layer(deployed, name)
        memo[id(layer)] = deployed
    replaced = {id(memo[id(layer)]) for layer in layers.values()}
    result: nn.Module = copy.deepcopy(prepared, memo)
    for layer in layers.values():
        deployed = memo[id(layer)]
        carried = {key: v for key, v in carried_state(layer, True).items() if key not in _OWN}
        carry_over(copy.deepcopy(carried, memo), deployed)
        entry = entry_of(layer)
        if entry is not None:
            note = entry.note.partition("; ")[2]
            set_entry(deployed, dataclasses.replace(entry, scheme=layer.scheme, note=note))
    if not replaced <= {id(module) for module in result.modules()}:
        raise ValueError(
            "trained layers did not get into the copy: a module above them has a __deepcopy__ of "
            "its own"
        )
    return result.eval()


def _class_for(job: Job) -> type[QATLayer] | None:
    """What the layer of a job becomes; None if it cannot be trained."""
    if not rules.is_builtin(job.converter):
        return None
    for base, cls in LAYERS.items():
        if isinstance(job.module, base) and rules.same_forward(type(job.module), base):
            return cls
    return None


def _keep(plan: Plan, job: Job) -> None:
    """Account for a layer that converts and cannot be trained, and for the norm behind it."""
    note = f"quantization-aware training of {job.kind} is not supported yet"
    plan.entries.append((job.module, Entry(job.kind, job.shape, job.bytes_before, note)))
    if job.fold is None:
        return
    norm = job.fold.norm
    size = count_bytes(own_tensors(norm), set())
    reason = f"batch norm not folded: '{job.name}' before it stays float"
    plan.entries = [pair for pair in plan.entries if pair[0] is not norm]
    plan.entries.append((norm, norm_entry(norm, size, reason)))


def _note(job: Job) -> str:
    """The account of a layer in training; what comes after the first "; " holds afterwards, too."""
    return "; ".join([f"trains as {job.scheme.name}", *job.notes])
