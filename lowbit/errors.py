"""Errors: those of other people's code told in a line, and the one for what is no model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def one_line(error: Exception) -> str:
    """An error as its type and the first line of its text, at most 200 characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def check_model(model: object) -> None:
    """Refuses what is passed for a model and is none.

    Raises:
        TypeError: a state dict, a class, a path, or anything else that is no `nn.Module`.
    """
    if isinstance(model, nn.Module):
        return
    what, remedy = f"a {type(model).__name__}", ""
    if isinstance(model, type) and issubclass(model, nn.Module):
        what, remedy = f"the class {model.__name__}", ": pass an instance"
    elif isinstance(model, Mapping) and any(isinstance(v, Tensor) for v in model.values()):
        what, remedy = "a state dict", ": build the model, and load the state dict into it first"
    raise TypeError(f"the model is {what}, not a torch.nn.Module{remedy}")
