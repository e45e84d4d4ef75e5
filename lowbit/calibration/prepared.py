"""What a prepared model is: float layers that know their scheme, and observe their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowbit.observers import Observer
from lowbit.rules import PREPARED
from lowbit.schemes import Scheme

OBSERVER = "input_observer"
"""The submodule of a layer that observes its input."""


class ObserverModule(nn.Module):
    """An observer as a part of a model: returns what it is called with.

    Its statistics are the buffers, hence in the state dict: calibration goes on where a loaded one
    ended. They stay on the CPU in their own dtype wherever the model goes.

    Attributes:
        observer: of `lowbit.observers`.
        what: what is observed, for error messages: "layer 'fc'".
    """

    def __init__(self, observer: Observer, what: str) -> None:
        super().__init__()
        self.observer = observer
        self.what = what
        # The very dict: what is loaded here, or assigned, the observer has.
        vars(self)["_buffers"] = observer.statistics

    def forward(self, x: Tensor) -> Tensor:
        """Observes x.

        Raises:
            TypeError: x is no floating-point tensor.
            ValueError: it holds NaN or Inf.
        """
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{self.what}: the input to calibrate on is {kind}, not floating-point")
        try:
            self.observer.observe(x)
        except ValueError as error:
            raise ValueError(
                f"{self.what}: {error} in its input; clean the calibration data, or keep the layer "
                "float by an override"
            ) from None
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ObserverModule:
        return self

    def extra_repr(self) -> str:
        kind = " symmetric" if self.observer.symmetric else ""
        return f"{self.observer.name}, {self.observer.activation}{kind}"


@dataclass(frozen=True)
class Preparation:
    """What is remembered of a layer that will convert, until it does.

    Attributes:
        scheme: what it will have.
        fuse: whether it may take an activation behind it along.
        notes: for the account.
    """

    scheme: Scheme
    fuse: bool
    notes: tuple[str, ...] = ()


def preparation_of(module: nn.Module) -> Preparation | None:
    """What `mark` left on a layer, if anything."""
    found = vars(module).get(PREPARED)
    return found if isinstance(found, Preparation) else None


def mark(layer: nn.Module, preparation: Preparation, observer: ObserverModule | None) -> None:
    """Makes a float layer one of a prepared model: with an observer, if its scheme is static."""
    vars(layer)[PREPARED] = preparation
    if observer is not None:
        layer.add_module(OBSERVER, observer)
        layer.register_forward_pre_hook(_observe_input, with_kwargs=True)


@dataclass(frozen=True)
class Learned:
    """What a layer was prepared for, and its observer, if its scheme is static."""

    preparation: Preparation
    observer: Observer | None


def learned(model: nn.Module) -> dict[int, Learned]:
    """The prepared layers of a model by their ids."""
    found = {}
    for module in model.modules():
        preparation = preparation_of(module)
        if preparation is not None:
            inner = module._modules.get(OBSERVER)
            observer = inner.observer if isinstance(inner, ObserverModule) else None
            found[id(module)] = Learned(preparation, observer)
    return found


def detach(model: nn.Module) -> Callable[[], None]:
    """Makes the prepared layers plain float layers again, in place.

    Returns:
        A function that undoes this.
    """
    undo: list[tuple[dict[Any, Any], dict[Any, Any]]] = []

    def drop(mapping: dict[Any, Any] | None, keys: Mapping[Any, Any]) -> None:
        if mapping is not None:
            undo.append((mapping, dict(mapping)))
            for key in keys:
                mapping.pop(key, None)

    for module in list(model.modules()):
        if preparation_of(module) is None:
            continue
        own = vars(module)
        hooks = own["_forward_pre_hooks"]
        ours = {key: None for key, hook in hooks.items() if hook is _observe_input}
        drop(hooks, ours)
        drop(own.get("_forward_pre_hooks_with_kwargs"), ours)
        drop(own["_modules"], {OBSERVER: None})
        drop(own, {PREPARED: None})

    def reattach() -> None:
        for mapping, before in undo:
            mapping.clear()  # the very dicts, in their old order: handles of hooks know them
            mapping.update(before)

    return reattach


def _observe_input(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    inputs = [*args, *kwargs.values()]
    if inputs:  # without, the layer's own forward complains
        layer._modules[OBSERVER](inputs[0])  # type: ignore[misc]
