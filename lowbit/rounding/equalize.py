"""Cross-layer equalization: channels between two layers get one range on both sides.

Nagel, van Baalen, Blankevoort, Welling: "Data-Free Quantization through Weight Equalization and
Bias Correction", 2019, section 4.1. What lies between the two has to pass a positive factor on:
ReLU, LeakyReLU and PReLU do.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.convert import child_slots
from lowbit.dataflow import Flow, NotFolded
from lowbit.fuse import fuse
from lowbit.report import Entry, count_bytes, entry_of, own_tensors, set_entry, weight_shape

_EQUIVARIANT = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_MOST_PASSES = 40
_ENOUGH = 1e-3  # largest change of a factor, at which the passes end


@dataclass(frozen=True)
class _Pair:
    """Two layers whose weights are scaled against each other, by their names."""

    first: str
    second: str
    between: tuple[nn.Module, ...]


def equalize(
    model: nn.Module, *, relu6: Literal["keep", "relu"] = "keep", fuse_norms: bool = True
) -> nn.Module:
    """A copy of a model that computes the same, its channels scaled so that they quantize better.

    For every two layers of which the first feeds the second alone, with nothing but ReLU, LeakyReLU
    or PReLU between, each channel's weights and bias in the first are divided, and the second's
    multiplied, by the factor that makes their largest magnitudes equal. Chains (convolution,
    depthwise convolution, projection) are passed over until nothing moves. Needs no data.

    Weights with one scale per output channel gain in the second layer only, where the factors lie
    along K; activations gain as their channels come nearer to each other.

    Args:
        model: a float model in eval mode; untouched.
        relu6: what to do with pairs that have an `nn.ReLU6` between them, which does not pass
            factors on. "keep" leaves such a pair as it is. "relu" makes it an `nn.ReLU`: the copy
            then computes something else where the float model clips at 6, and only a measurement
            tells what that costs.
        fuse_norms: whether to fold batch norms first, as `lowbit.fuse` does. A norm that stays
            between two layers keeps them from being a pair.

    Returns:
        The copy; quantize it. Its account (`lowbit.summary` of the quantized model) says of each
        layer what it was equalized with.

    Raises:
        ValueError: `relu6` is none of the two.
    """
    if relu6 not in ("keep", "relu"):
        raise ValueError(f"relu6 is 'keep' or 'relu', not {relu6!r}")
    result = fuse(model) if fuse_norms else copy.deepcopy(model)
    pairs, clipped = _find_pairs(result, relu6 == "relu")
    if not pairs:
        warnings.warn(
            "nothing was equalized: no layer feeds another one through ReLU alone"
            + (f"; {len(clipped)} pairs have ReLU6 between them" if clipped else ""),
            stacklevel=2,
        )
        return result
    modules = dict(result.named_modules())
    with torch.no_grad():
        for _ in range(_MOST_PASSES):
            moved = [_balance(modules[pair.first], modules[pair.second]) for pair in pairs]
            if max(moved) < _ENOUGH:
                break
    _replace_relu6(result, pairs)
    for pair in pairs:
        _note(modules[pair.first], f"equalized with '{pair.second}'")
        _note(modules[pair.second], f"equalized with '{pair.first}'")
    return result


def _find_pairs(model: nn.Module, through_relu6: bool) -> tuple[list[_Pair], list[_Pair]]:
    """Pairs to equalize, and those that have ReLU6 between them where it stays."""
    flow = Flow(model)
    names = {id(module): name for name, module in model.named_modules()}
    tied = _tied(model)
    pairs: list[_Pair] = []
    clipped: list[_Pair] = []
    for name, module in model.named_modules():
        if not _fits(module) or id(module) in tied:
            continue
        try:
            before, between = flow.path_to(module, _passes)
        except NotFolded:
            continue
        if not _fits(before) or id(before) in tied or _out(before) != _inputs(module):
            continue
        pair = _Pair(names[id(before)], name, tuple(between))
        has_relu6 = any(isinstance(m, nn.ReLU6) for m in between)
        (clipped if has_relu6 and not through_relu6 else pairs).append(pair)
    return pairs, clipped


def _passes(module: nn.Module) -> bool:
    return isinstance(module, (*_EQUIVARIANT, nn.ReLU6))


def _fits(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(module, _LAYERS) and weight is not None and weight.is_floating_point()


def _tied(model: nn.Module) -> set[int]:
    """Modules whose weight another one has, too."""
    owners: dict[int, list[int]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(id(module))
    return {owner for group in owners.values() if len(group) > 1 for owner in group}


def _out(module: Any) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


def _inputs(module: Any) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels)


def _by_input(module: Any) -> Tensor:
    """A view of the weight by input channels: [groups, channels of a group, everything else]."""
    weight: Tensor = module.weight
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)


def _balance(first: Any, second: Any) -> float:
    """Scales one pair; returns how far the largest factor is from 1."""
    before = first.weight.flatten(1).abs().amax(dim=1).double()
    after = _by_input(second).abs().amax(dim=(2, 3)).flatten().double()
    # A channel that one side does not use stays as it is.
    factor = torch.where((before > 0) & (after > 0), (before / after).sqrt(), 1.0)
    factor = factor.clamp(1e-4, 1e4)
    own = factor.to(first.weight.dtype)
    first.weight.div_(own.view(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.div_(own)
    view = _by_input(second)
    view.mul_(own.view(view.shape[0], view.shape[1], 1, 1))
    return float((factor - 1).abs().max())


def _replace_relu6(model: nn.Module, pairs: list[_Pair]) -> None:
    slots = child_slots(model)
    for pair in pairs:
        for module in pair.between:
            if isinstance(module, nn.ReLU6):
                for parent, key in slots.get(id(module), []):
                    parent._modules[key] = nn.ReLU(inplace=module.inplace)


def _note(module: nn.Module, text: str) -> None:
    entry = entry_of(module)
    if entry is None:
        size = count_bytes(own_tensors(module), set())
        entry = Entry(type(module).__name__, weight_shape(module), size)
    folded = f"{entry.folded}; {text}" if entry.folded else text
    values = {**vars(entry), "folded": folded}
    set_entry(module, Entry(**values))
