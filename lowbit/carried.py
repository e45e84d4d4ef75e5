"""What a float layer hands to the lowbit layer in its place: hooks, attributes of its user."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowbit import rules

_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
# What every float layer's __dict__ holds; anything else on a layer was put there by its user.
_FLOAT_ATTRIBUTES = vars(nn.Linear(1, 1, device="meta")) | vars(nn.Conv2d(1, 1, 1, device="meta"))


def carried_state(module: nn.Module, builtin: bool) -> dict[str, Any]:
    """What of a float layer's `__dict__` its lowbit layer gets.

    Args:
        module: the float layer.
        builtin: whether one of lowbit's own converters made the lowbit layer. Others carry over
            attributes as they see fit.
    """
    own = vars(module)
    carried = {name: own[name] for name in (*rules.HOOKS, *_HOOK_FLAGS) if own.get(name)}
    if "_backward_hooks" in carried:
        carried["_is_full_backward_hook"] = own.get("_is_full_backward_hook")
    if builtin:
        carried |= {name: own[name] for name in own if name not in _FLOAT_ATTRIBUTES}
    return carried


def carry_over(carried: dict[str, Any], layer: nn.Module) -> None:
    """Give a lowbit layer what `carried_state` found."""
    for name, value in carried.items():
        if name in rules.HOOKS or name in _HOOK_FLAGS:
            # The same dict: the handles that its hooks were registered with can still remove them.
            value.update(vars(layer)[name] or {})
            vars(layer)[name] = value
        elif name == "_is_full_backward_hook" or not hasattr(layer, name):
            vars(layer)[name] = value
