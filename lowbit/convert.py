"""Replace the layers of a float model by lowbit layers, and account for every one of them.

`plan.py` decides what is done, `rules.py` what can convert and how.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowbit import rules
from lowbit.baselines import run
from lowbit.calibration.data import Data, batches, repeatable
from lowbit.carried import carried_state, carry_over
from lowbit.errors import one_line
from lowbit.fuse import identity
from lowbit.nn.base import QuantizedLayer
from lowbit.plan import Filter, Job, Overrides, Plan, SchemeLike, make_plan
from lowbit.quantizers import needs_data
from lowbit.report import Report, is_converted, lowbit_layers, set_entry, summary
from lowbit.rounding.sequential import round_layers
from lowbit.rules import register_converter

ForwardFn = Callable[[nn.Module, Any], Any]

__all__ = ["quantize", "quantize_", "register_converter"]


def quantize(
    model: nn.Module,
    scheme: SchemeLike | None,
    *,
    overrides: Overrides | None = None,
    filter_fn: Filter | None = None,
    fuse: bool = True,
    calibration: Data | None = None,
    forward_fn: ForwardFn | None = None,
    steps: int | None = None,
    correct_bias: bool = False,
    block_steps: int = 0,
) -> nn.Module:
    """A quantized copy of a model; `lowbit.summary` gives its account.

    The float weights of converted layers are not copied. Everything else is.

    Args:
        model: any module; untouched. Its `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` and
            `nn.ConvTranspose2d` layers convert.
        scheme: for every layer that no override names: a recipe ("w4a8-g128"), a `Scheme`, its
            dict, or None to keep them float.
        overrides: ordered; from the exact name of a layer, or "re:" and a regular expression for
            the full name, to a scheme or None. The first that matches decides.
        filter_fn: `filter_fn(module, name)`; only layers for which it returns True convert.
        fuse: whether to fold batch norms into the layers that convert, as `lowbit.fuse` does:
            exact but for rounding, and the float pass over the layer's output is gone. The account
            has a row for each, folded or with the reason why not. Norms in training mode stay. An
            `nn.ReLU`, `nn.ReLU6` or `nn.Hardswish` that torch.fx shows to take nothing but the
            outputs of converted layers, which go nowhere else, is computed by these layers (their
            attribute `epilogue`), with the same bits; an `nn.Identity` takes its place.
        calibration: batches of example inputs for the schemes that learn from data, see
            `lowbit.calibration.batches`.
        forward_fn: `forward_fn(model, batch)` runs the model on a batch, where neither
            `model(batch)`, `model(*batch)` nor `model(**batch)` does.
        steps: the most batches to take of `calibration`.
        correct_bias: whether biases make up for what rounding does to the mean of each output
            channel over `calibration`.
        block_steps: for how many steps each block of layers (an element of an `nn.ModuleList` or
            `nn.Sequential`) learns its codes, scales and biases together, so that its outputs on
            `calibration` come near those of the float block. 0 for none; 200 take minutes.

    Returns:
        The copy. Where `model` is itself a layer, the lowbit layer.

    Raises:
        TypeError: `model` is no `nn.Module`, but, say, a state dict.
        ValueError: a scheme is not valid, an override matches no layer, or a layer cannot be
            converted (NaN in its weight): the message names it. Calibration data that no scheme
            asks for, or that holds no batch.
    """
    plan = make_plan(model, scheme, overrides, filter_fn, fuse)
    learning = _learning(plan, calibration, forward_fn, steps, correct_bias, block_steps)
    if learning is None or not learning.static:
        if learning is not None:
            learning.round(model, plan)
        return converted_copy(model, plan)
    from lowbit.calibration import deploy
    from lowbit.calibration.prepare import add_note, prepare

    prepared = prepare(
        model,
        scheme,
        learning.example(),
        overrides=overrides,
        filter_fn=filter_fn,
        fuse=fuse,
        graph=not learning.block_steps,
    )
    if learning.block_steps:
        add_note(prepared, "runs layer by layer: its blocks learn from the data, too")
    learning.calibrate(prepared)
    return deploy.calibrated_copy(prepared, learning.round)


def quantize_alone(
    model: nn.Module,
    scheme: SchemeLike,
    *,
    filter_fn: Filter | None,
    fuse: bool,
    calibration: Data,
    forward_fn: ForwardFn | None,
    correct_bias: bool = False,
) -> nn.Module:
    """As `quantize`, with weights that learn from the inputs that layers have in the float model.

    For layers that are put into the float model one by one: those of `quantize` make up for the
    errors of all layers before them.
    """
    plan = make_plan(model, scheme, None, filter_fn, fuse)
    learning = _learning(plan, calibration, forward_fn, None, correct_bias, 0)
    if learning is not None:
        learning.round(model, plan, alone=True)
    return converted_copy(model, plan)


def converted_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """What `quantize` returns, of a plan for this model."""
    # deepcopy takes what the memo holds for the copy: the lowbit layer instead of the float one.
    memo: dict[int, Any] = {}
    done: dict[int, nn.Module] = {}
    for job in _progress(plan.jobs):
        layer = _convert(job, done)
        if layer is job.module:
            plan.keep(job)
        else:
            memo[id(job.module)] = layer
            plan.entries.append((job.module, job.entry()))
            if job.fold is not None:
                memo[id(job.fold.norm)] = identity(job.fold.norm)
    for job in plan.jobs:
        _set_epilogue(memo[id(job.module)], job)
    for module in plan.absorbed:
        memo[id(module)] = identity(module)
    result = _copy(model, memo)
    for job in plan.jobs:
        # After the model: a hook may be a method of a module, which then has its copy already.
        carried = carried_state(job.module, rules.is_builtin(job.converter))
        carry_over(copy.deepcopy(carried, memo), memo[id(job.module)])
    for module, entry in plan.entries:
        if id(module) in memo:
            set_entry(memo[id(module)], entry)
    _check_all_in(result, plan, memo)
    run_converted_encoder_layers(result)
    _warn_if_nothing_converted(plan, result)
    return result


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        result: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:  # of any class that the model holds
        raise RuntimeError(
            f"the model cannot be copied, which lowbit.quantize_ does not need ({one_line(error)})"
        ) from error
    return result


def quantize_(
    model: nn.Module,
    scheme: SchemeLike | None,
    *,
    overrides: Overrides | None = None,
    filter_fn: Filter | None = None,
    fuse: bool = True,
    calibration: Data | None = None,
    forward_fn: ForwardFn | None = None,
    steps: int | None = None,
    correct_bias: bool = False,
    block_steps: int = 0,
) -> Report:
    """Quantize the layers of a model in place, one after the other, and return the account.

    Each float weight is released as soon as its layer is replaced. An error in the middle leaves
    the layers before it converted; what can be checked is checked before the first.

    Args:
        model: as for `quantize`; changed.
        scheme, overrides, filter_fn, fuse, calibration, forward_fn, steps, correct_bias,
            block_steps: as for `quantize`.

    Returns:
        The report: print it for a table. `lowbit.summary(model)` gives it again.

    Raises:
        ValueError: as `quantize`; and if `model` is itself a layer, which cannot be replaced in
            place.
    """
    plan = make_plan(model, scheme, overrides, filter_fn, fuse)
    if any(job.module is model for job in plan.jobs):
        raise ValueError(
            f"quantize_ cannot replace the model itself, a {type(model).__name__}: "
            "use model = lowbit.quantize(model, scheme)"
        )
    learning = _learning(plan, calibration, forward_fn, steps, correct_bias, block_steps)
    if learning is None or not learning.static:
        if learning is not None:
            learning.round(model, plan)
        convert_in_place(model, plan)
        return summary(model)
    from lowbit.calibration import deploy
    from lowbit.calibration.prepare import add_note, prepare_in_place
    from lowbit.calibration.prepared import detach

    plan = make_plan(model, scheme, overrides, filter_fn, fuse, epilogues=False)
    prepare_in_place(model, plan, fuse)
    add_note(model, "runs layer by layer: it was converted in place")
    try:
        learning.calibrate(model)
    except BaseException:
        detach(model)
        raise
    deploy.convert_calibrated(model, learning.round)
    return summary(model)


def convert_in_place(model: nn.Module, plan: Plan) -> None:
    """What `quantize_` does to the model, of a plan for it."""
    done: dict[int, nn.Module] = {}
    identities: dict[int, nn.Module] = {}
    slots = child_slots(model)
    for job in _progress(plan.jobs):
        layer = _convert(job, done)
        if layer is job.module:
            plan.keep(job)
            continue
        carry_over(carried_state(job.module, rules.is_builtin(job.converter)), layer)
        for parent, key in slots[id(job.module)]:
            parent._modules[key] = layer
        set_entry(layer, job.entry())
        if job.fold is not None:
            norm = job.fold.norm
            identities[id(norm)] = identity(norm)
            for parent, key in slots[id(norm)]:
                parent._modules[key] = identities[id(norm)]
        job.module, job.fold = layer, None  # drops the last reference to the float layer
    # At the end: an error before has left activations and layers that do not compute them.
    for job in plan.jobs:
        _set_epilogue(job.module, job)
    for activation in plan.absorbed:
        identities[id(activation)] = identity(activation)
        for parent, key in slots[id(activation)]:
            parent._modules[key] = identities[id(activation)]
    for module, entry in plan.entries:
        set_entry(identities.get(id(module), module), entry)
    run_converted_encoder_layers(model)
    _warn_if_nothing_converted(plan, model)


def child_slots(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place (parent, key) of every child module, by the module's id."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                slots.setdefault(id(child), []).append((parent, key))
    return slots


def run_converted_encoder_layers(
    model: nn.Module, replaced: Callable[[nn.Module], bool] = is_converted
) -> None:
    """Make transformer encoders call those of their layers that were replaced.

    In eval mode `nn.TransformerEncoderLayer` hands the raw weights of linear1 and linear2 to one
    fused function, and `nn.TransformerEncoder` looks at them before it nests its input. The
    attributes that they consult for layers which the fused function does not know turn both off,
    before they ask a lowbit layer for float weights, which would be computed at every call.
    """
    changed = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            linears = [module._modules.get(key) for key in ("linear1", "linear2")]
            if any(linear is not None and replaced(linear) for linear in linears):
                module.activation_relu_or_gelu = 0
                changed.add(id(module))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            id(layer) in changed for layer in module.modules()
        ):
            module.use_nested_tensor = False


def name_layer(layer: nn.Module, name: str) -> None:
    """Tell lowbit layers their name in the model, for error messages."""
    for module in [layer, *lowbit_layers(layer)]:
        object.__setattr__(module, "_fqn", name)


def _set_epilogue(layer: nn.Module, job: Job) -> None:
    if job.epilogue != "none":
        assert isinstance(layer, QuantizedLayer)
        layer.epilogue = job.epilogue


def _check_all_in(result: nn.Module, plan: Plan, memo: dict[int, Any]) -> None:
    """Classes may define how they are copied, and leave the lowbit layers out."""
    present = {id(module) for module in result.modules()}
    for job in plan.jobs:
        replaced = [job.module, *([] if job.fold is None else [job.fold.norm])]
        replaced += [] if job.epilogue == "none" else plan.absorbed
        if not {id(memo[id(module)]) for module in replaced} <= present:
            raise ValueError(
                f"layer '{job.name}' did not get into the copy: a module above it has a "
                "__deepcopy__ of its own; copy the model first and use lowbit.quantize_ on that"
            )


def _progress(jobs: list[Job]) -> Iterator[Job]:
    """The jobs, with a progress bar on stderr if that is a terminal."""
    yield from tqdm(jobs, desc="quantize", unit="layer", disable=None, leave=False)


def _convert(job: Job, done: dict[int, nn.Module]) -> nn.Module:
    """The lowbit layer of a job, or the float layer itself where a converter returned that."""
    try:
        with torch.no_grad():
            layer = job.layer or job.converter(job.source(), job.scheme)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"layer '{job.name}' ({job.scheme.name}): {error}") from error
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"layer '{job.name}': the converter of {job.kind} returned a {type(layer).__name__}, "
            "not a torch.nn.Module"
        )
    if layer is not job.module:
        layer.train(job.module.training)
        name_layer(layer, job.name)
        if job.activation is not None:
            _set_activation(layer, job)
        if job.tied_weight is not None:
            _share_equal_buffers(layer, done.setdefault(job.tied_weight, layer))
    return layer


def _set_activation(layer: nn.Module, job: Job) -> None:
    """Gives a layer the scale and zero point of its input, which its job knows."""
    assert job.activation is not None
    set_activation: Any = getattr(layer, "set_activation", None)
    if set_activation is None:
        raise ValueError(
            f"layer '{job.name}': the converter of {job.kind} returned a {type(layer).__name__}, "
            "not a layer of lowbit.nn, whose input was calibrated; give it a dynamic scheme by an "
            "override"
        )
    set_activation(job.activation.scale, job.activation.zero)


def _share_equal_buffers(layer: nn.Module, first: nn.Module) -> None:
    """Let two layers that were converted from one weight hold one packed weight."""
    others = dict(first.named_buffers())
    for module_name, module in layer.named_modules():
        for key, buffer in module._buffers.items():
            other = others.get(f"{module_name}.{key}" if module_name else key)
            if buffer is None or other is None or other.dtype != buffer.dtype:
                continue
            if torch.equal(buffer, other):
                module._buffers[key] = other


@dataclass
class _Learning:
    """Calibration data, and what learns from it.

    Attributes:
        data: what `batches` takes; read once, and again where weights learn, too.
        static: whether activations have scales to learn.
        rounds: whether weights, biases or blocks learn.
    """

    data: Data
    forward_fn: ForwardFn | None
    steps: int | None
    correct_bias: bool
    block_steps: int
    static: bool
    rounds: bool

    def example(self) -> Any:
        """The first batch, to capture a graph with; None where that is not done."""
        if self.forward_fn is not None or self.block_steps:
            return None
        source = batches(self.data, self.steps)
        first = next(source)
        if not self.rounds:  # else the data are read again
            self.data = itertools.chain([first], source)
        return first

    def calibrate(self, prepared: nn.Module) -> None:
        from lowbit.calibration.run import calibrate

        calibrate(prepared, self.data, self.forward_fn, self.steps)

    def round(self, model: nn.Module, plan: Plan, alone: bool = False) -> None:
        """Makes the layers that learn from data; `alone` as for `round_layers`."""
        if not self.rounds:
            return
        made: dict[int, nn.Module] = {}
        layers = round_layers(
            model,
            plan.jobs,
            repeatable(self.data, self.steps),
            lambda job: _convert(job, made),
            self.forward_fn or run,
            self.correct_bias,
            self.block_steps,
            alone,
        )
        for job in plan.jobs:
            job.layer = layers[id(job.module)]


def _learning(
    plan: Plan,
    calibration: Data | None,
    forward_fn: ForwardFn | None,
    steps: int | None,
    correct_bias: bool,
    block_steps: int,
) -> _Learning | None:
    """What learns from the data; None without. Refuses data that nothing would use."""
    learned = [job for job in plan.jobs if needs_data(job.scheme.quantizer or "")]
    static = [job for job in plan.jobs if job.scheme.static]
    if calibration is None:
        if forward_fn is not None or steps is not None or correct_bias or block_steps:
            raise ValueError(
                "forward_fn, steps, correct_bias and block_steps belong to calibration data: pass "
                "calibration="
            )
        for job in learned:
            raise ValueError(
                f"layer '{job.name}': quantizer {job.scheme.quantizer!r} needs calibration data: "
                "lowbit.quantize(model, scheme, calibration=batches)"
            )
        for job in static:
            raise ValueError(
                f"layer '{job.name}': {job.scheme.name} has static activations, whose scales come "
                "from calibration data: lowbit.quantize(model, scheme, calibration=batches)"
            )
        return None
    rounds = bool(learned or correct_bias or block_steps)
    if not (rounds or static):
        names = ", ".join(dict.fromkeys(job.scheme.name for job in plan.jobs)) or "none"
        raise ValueError(f"no scheme of the model (they are: {names}) learns from calibration data")
    if rounds and static and isinstance(calibration, Iterator):
        calibration = list(batches(calibration, steps))
    return _Learning(
        calibration, forward_fn, steps, correct_bias, block_steps, bool(static), rounds
    )


def _warn_if_nothing_converted(plan: Plan, model: nn.Module) -> None:
    if plan.jobs:
        return
    message = "no layer was converted: lowbit.summary(model) lists the reasons"
    if any(is_converted(module) for module in model.modules()):
        message = (
            "no layer was converted: those that could be are lowbit layers already; convert the "
            "float model for another scheme"
        )
    warnings.warn(message, stacklevel=4)
