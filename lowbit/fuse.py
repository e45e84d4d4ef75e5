"""Fold batch norms into the layers before them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lowbit import rules
from lowbit.baselines import eval_mode, run
from lowbit.dataflow import Flow, NotFolded
from lowbit.errors import check_model
from lowbit.norms import fold_channels
from lowbit.quality import floating_tensors
from lowbit.report import Entry, count_bytes, is_unit, own_tensors, set_entry, walk, weight_shape

# What each norm can be folded into: it normalises the dimension that these layers' outputs have
# their channels in.
_BEFORE: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d),
    nn.BatchNorm2d: (nn.Conv2d, nn.ConvTranspose2d),
}


@dataclass(frozen=True)
class Fold:
    """A batch norm and the layer to fold it into, with their names."""

    layer: nn.Module
    norm: nn.Module
    layer_name: str
    norm_name: str

    @property
    def layer_note(self) -> str:
        return f"batch norm '{self.norm_name}' folded in"

    def norm_entry(self, size: int) -> Entry:
        """What the account says of the norm."""
        return norm_entry(self.norm, size, folded=f"folded into '{self.layer_name}'")


def fuse(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A copy of a model, its batch norms folded into the layers before them.

    An `nn.BatchNorm1d` or `nn.BatchNorm2d` in eval mode goes into the weight and the bias of the
    `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.ConvTranspose2d` before it, where the layer's
    output goes to that norm alone; in its place is an `nn.Identity`. torch.fx tells what goes
    where. Of a model that it cannot trace, it is asked about the parts: what is consecutive in an
    `nn.Sequential` or in the forward of a block. The code around a part is then taken to call the
    part as a whole, and a norm behind a Linear is always taken to normalise its features; pass
    `example_inputs` to have both checked.

    The results are the same up to rounding. `lowbit.summary` of the copy names what was folded, and
    of every other batch norm why it was not. `lowbit.quantize` folds by itself.

    Args:
        model: a float model; untouched. Norms in training mode stay.
        example_inputs: one batch (a tensor, a tuple of positional or a mapping of keyword
            arguments). Both models are run on it in eval mode, and must agree.

    Raises:
        RuntimeError: the two do not agree on `example_inputs`.
        ValueError: a module with a `__deepcopy__` of its own leaves the folded layers out.
    """
    check_model(model)
    folds, kept = find_folds(model)
    counted: set[tuple[int, ...]] = set()
    memo: dict[int, Any] = {}
    entries = []
    for fold in folds:
        layer, norm = fold.layer, fold.norm
        memo[id(layer)] = folded_layer(layer, norm)
        memo[id(norm)] = identity(norm)
        size = count_bytes(own_tensors(layer), counted)
        kind = type(layer).__name__
        entries.append((layer, Entry(kind, weight_shape(layer), size, folded=fold.layer_note)))
        entries.append((norm, fold.norm_entry(count_bytes(own_tensors(norm), counted))))
    for norm, note in kept:
        size = count_bytes(own_tensors(norm), counted)
        entries.append((norm, norm_entry(norm, size, note)))
    replaced = {id(memo[key]) for key in memo}
    result: nn.Module = copy.deepcopy(model, memo)
    for fold in folds:
        # After the model: what a layer refers to has its copy by now.
        for key, value in vars(fold.layer).items():
            if key != "_parameters":
                vars(memo[id(fold.layer)])[key] = copy.deepcopy(value, memo)
    missing = replaced - {id(module) for module in result.modules()}
    if missing:
        raise ValueError(
            "folded layers did not get into the copy: a module above them has a __deepcopy__ of "
            "its own; copy the model first"
        )
    for module, entry in entries:
        if id(module) in memo:
            set_entry(memo[id(module)], entry)
    if example_inputs is not None:
        _check_same(model, result, example_inputs)
    return result


def identity(module: nn.Module) -> nn.Module:
    """What takes the place of a norm or an activation that the layer before it computes."""
    return nn.Identity().train(module.training)


def find_folds(
    model: nn.Module, flow: Flow | None = None
) -> tuple[list[Fold], list[tuple[nn.Module, str]]]:
    """The batch norms of a model that can be folded, and the others with the reason why not.

    Args:
        model: the float model.
        flow: of the model, if it is known already.
    """
    norms: dict[int, tuple[nn.Module, str]] = {}
    names: dict[int, str] = {}
    parents: dict[int, nn.Module | None] = {}
    for name, module, parent in walk(model, is_unit):
        names.setdefault(id(module), name)
        parents.setdefault(id(module), parent)
        if isinstance(module, _BatchNorm):
            norms.setdefault(id(module), (module, name))
    if not norms:
        return [], []
    flow = flow or Flow(model)
    folds, kept = [], []
    for norm, name in norms.values():
        found = _find_layer(norm, name, flow, model, parents)
        if isinstance(found, str):
            kept.append((norm, f"batch norm not folded: {found}"))
        else:
            folds.append(Fold(found, norm, names[id(found)], name))
    return folds, kept


def folded_layer(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A float layer like this one, sharing all but weight and bias, with the norm folded in."""
    result = copy.copy(layer)
    weight, bias = fold_tensors(layer, norm)
    trained = layer._parameters["weight"]
    grad = trained is not None and trained.requires_grad
    vars(result)["_parameters"] = {
        "weight": nn.Parameter(weight, requires_grad=grad),
        "bias": nn.Parameter(bias, requires_grad=grad),
    }
    return result


def fold_tensors(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that computes both, in the layer's dtype; float64 between.

    Raises:
        NotFolded: they are not finite.
    """
    with torch.no_grad():
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        scale, shift = fold_channels(norm, bias)
        values = weight.detach().double()
        if isinstance(layer, nn.ConvTranspose2d):  # [C, N / groups, kh, kw]
            by_group = torch.unflatten(values, 0, (layer.groups, -1))
            values = (by_group * scale.view(layer.groups, 1, -1, 1, 1)).flatten(0, 1)
        else:
            values = values * scale.view(-1, *[1] * (values.dim() - 1))
        folded, shift = values.to(weight.dtype), shift.to(weight.dtype)
        if not (folded.isfinite().all() and shift.isfinite().all()):
            raise NotFolded("the folded weights would not be finite: are its statistics?")
        return folded.contiguous(), shift


def out_channels(layer: nn.Module) -> int:
    """Features or channels of a float layer's output."""
    return int(getattr(layer, "out_features", None) or layer.out_channels)  # type: ignore[arg-type]


def norm_entry(norm: nn.Module, size: int, note: str = "", folded: str = "") -> Entry:
    """What the account says of a norm, whose tensors have `size` bytes."""
    return Entry(type(norm).__name__, (norm.num_features,), size, note, folded=folded)  # type: ignore[arg-type]


def _find_layer(
    norm: nn.Module,
    name: str,
    flow: Flow,
    model: nn.Module,
    parents: Mapping[int, nn.Module | None],
) -> nn.Module | str:
    """The layer that a norm can be folded into, or why there is none."""
    try:
        _check_norm(norm)
        layer = _layer_before(norm, name, flow, model)
        if id(layer) not in parents:
            raise NotFolded("the layer before it is part of a converted one")
        _check_layer(layer, norm, parents[id(layer)], model)
        fold_tensors(layer, norm)
    except NotFolded as error:
        return str(error)
    return layer


def _layer_before(norm: nn.Module, name: str, flow: Flow, model: nn.Module) -> nn.Module:
    try:
        return flow.input_of(norm)
    except NotFolded as error:
        # The nearest module above it that cannot be traced is why nothing is known.
        parts = name.split(".")[:-1]
        for count in range(len(parts), -1, -1):
            above = model.get_submodule(".".join(parts[:count]))
            why = flow.failures.get(id(above))
            if why is not None and type(above).__name__ not in ("ModuleList", "ModuleDict"):
                raise NotFolded(
                    f"{error}; torch.fx cannot trace {type(above).__name__} ({why})"
                ) from None
        raise


def _check_norm(norm: nn.Module) -> None:
    base = next((cls for cls in _BEFORE if isinstance(norm, cls)), None)
    if base is None:
        raise NotFolded(f"nn.{type(norm).__name__} is not supported yet")
    if not rules.same_forward(type(norm), base) or "forward" in vars(norm):
        raise NotFolded(f"{type(norm).__name__} overrides the forward of its base class")
    if norm.training:
        raise NotFolded("it is in training mode: call model.eval() first")
    if norm.running_mean is None or norm.running_var is None:
        raise NotFolded("it has no running statistics")
    tensors = [*norm.parameters(), *norm.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise NotFolded("it is lazy and not initialized")
    if any(tensor.device.type != "cpu" for tensor in tensors):
        raise NotFolded("its tensors are not on the CPU")
    if rules.hook_count(norm):
        raise NotFolded("it has hooks")
    if is_parametrized(norm):
        raise NotFolded("it is parametrized")


def _check_layer(
    layer: nn.Module, norm: nn.Module, parent: nn.Module | None, model: nn.Module
) -> None:
    base = next(cls for cls in _BEFORE if isinstance(norm, cls))
    if not isinstance(layer, _BEFORE[base]):
        raise NotFolded(f"it follows a {type(layer).__name__}")
    converter, reason = rules.find_converter(layer, parent)
    if converter is None or not rules.is_builtin(converter):
        raise NotFolded(
            "the layer before it: " + (reason or "its own converter might not take a folded one")
        )
    if rules.hook_count(layer):
        raise NotFolded("the layer before it has hooks, which might see its output")
    weight = layer._parameters["weight"]
    assert weight is not None
    if out_channels(layer) != norm.num_features:
        raise NotFolded(
            f"it has {norm.num_features} features, the layer before it {out_channels(layer)}"
        )
    assert isinstance(norm.running_var, Tensor)
    if torch.promote_types(weight.dtype, norm.running_var.dtype) != norm.running_var.dtype:
        raise NotFolded(
            f"its statistics are {norm.running_var.dtype}, the layer before it {weight.dtype}"
        )
    for other_name, other in model.named_modules():
        if other is not layer and any(p is weight for p in other._parameters.values()):
            raise NotFolded(f"the weight of the layer before it is tied to '{other_name}'")


def _check_same(model: nn.Module, fused: nn.Module, inputs: Any) -> None:
    with eval_mode([model, fused]), torch.inference_mode():
        wanted, found = (floating_tensors(run(side, inputs)) for side in (model, fused))
    for want, got in zip(wanted, found, strict=True):
        most = min(0.1, 1e4 * torch.finfo(want.dtype).eps)
        a, b = want.double().nan_to_num(), got.double().nan_to_num()
        error = float((a - b).norm() / a.norm()) if a.any() else float(b.norm())
        if not error <= most:
            raise RuntimeError(
                f"folding batch norms changed the output on example_inputs by {100 * error:.3g} %: "
                "the model calls its layers in another way than its structure shows; keep its "
                "batch norms (lowbit.quantize(..., fuse=False))"
            )
