"""A task that is a function of the user."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lowbit.tasks.task import Meter, Task


@dataclass(frozen=True)
class Function(Task):
    """A function's figures.

    Attributes:
        function: of (reference output, output) or (reference output, output, batch). Returns a
            number, a tensor of any shape (one number per sample, say), or a mapping from names to
            these.
    """

    function: Callable[..., Any]
    name: ClassVar[str] = "function"

    def meter(self) -> Meter:
        """A new meter."""
        return _Meter(self.function)


class _Meter:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._label = getattr(function, "__name__", "function").strip("<>")
        self._with_batch = _takes(function, 3)
        self._sums: dict[str, tuple[float, int]] = {}

    def update(self, reference: Any, output: Any, batch: Any) -> None:
        inputs = (reference, output, batch) if self._with_batch else (reference, output)
        found = self._function(*inputs)
        if not isinstance(found, Mapping):
            found = {self._label: found}
        for name, value in found.items():
            try:
                numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
            except (TypeError, ValueError, RuntimeError) as error:
                kind = type(value).__name__
                raise ValueError(
                    f"the task's function returned a {kind} for {name!r}: expected a number, a "
                    "tensor, or a mapping from names to these"
                ) from error
            total, count = self._sums.get(str(name), (0.0, 0))
            self._sums[str(name)] = total + float(numbers.sum()), count + numbers.numel()

    def result(self) -> dict[str, float]:
        return {
            name: total / count if count else math.nan
            for name, (total, count) in self._sums.items()
        }


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a built-in without a signature
        return False
    return True
