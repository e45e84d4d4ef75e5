"""Finding the tensors that a task is about in what a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The floating tensors, depth first, with the key or field name that is nearest to each.

    Args:
        output: a tensor, or any nesting of mappings (Hugging Face's `ModelOutput` is one), lists,
            tuples and dataclasses. Integer tensors and other objects are passed over.
        name: of the output itself.
    """
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_tensors(value, str(key))
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from named_tensors(value, name)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from named_tensors(getattr(output, field.name), field.name)


def pick(output: Any, names: Sequence[str], what: str) -> torch.Tensor:
    """The first tensor with one of the names, or else the only floating tensor, as float64.

    Raises:
        ValueError: neither exists.
    """
    tensors = list(named_tensors(output))
    for wanted in names:
        for name, tensor in tensors:
            if name == wanted:
                return tensor.detach().double()
    if len(tensors) != 1:
        listed = ", ".join(f"'{name}'" for name in names)
        raise ValueError(
            f"{what}: the output has {len(tensors)} floating tensors, and none is named {listed}"
        )
    return tensors[0][1].detach().double()


def pair(
    reference: Any, output: Any, names: Sequence[str], what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pick` from both outputs.

    Raises:
        ValueError: as `pick`; or the two tensors differ in shape.
    """
    found = pick(reference, names, what), pick(output, names, what)
    if found[0].shape != found[1].shape:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in found)
        raise ValueError(f"{what}: the outputs differ in shape: {shapes}")
    return found
