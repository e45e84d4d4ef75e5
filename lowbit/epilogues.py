"""Which activations can be computed by the layers before them, in their epilogues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lowbit import rules
from lowbit.dataflow import Flow, NotFolded
from lowbit.nn.floats import FLOAT_EPILOGUES
from lowbit.report import Entry, is_unit, walk

ACTIVATIONS = tuple(FLOAT_EPILOGUES.values())
"""The float modules that an epilogue computes."""


@dataclass(frozen=True)
class Absorbed:
    """An activation that layers compute.

    Attributes:
        module: the activation.
        layers: the layers before its calls, with their names.
        epilogue: what it is called by the layers.
    """

    module: nn.Module
    layers: tuple[tuple[nn.Module, str], ...]
    epilogue: str

    @property
    def layer_note(self) -> str:
        return f"followed by {type(self.module).__name__}, computed in its epilogue"

    def entry(self) -> Entry:
        """What is kept of the activation. It has no weights, hence no shape and no row."""
        names = ", ".join(f"'{name}'" for _, name in self.layers)
        return Entry(type(self.module).__name__, (), 0, folded=f"computed by {names}")


def find_absorbed(
    model: nn.Module, flow: Flow, layers: Mapping[int, str], norms: set[int]
) -> list[Absorbed]:
    """The activations of a model of which every call follows a layer that can compute it.

    Args:
        model: the float model.
        flow: of the model.
        layers: names of the layers that get an epilogue where one follows, by id.
        norms: ids of the batch norms that are folded.
    """
    parents: dict[int, list[nn.Module]] = {}
    modules: dict[int, nn.Module] = {}
    passed = set(norms)
    for _, module, parent in walk(model, is_unit):
        modules.setdefault(id(module), module)
        if parent is not None:
            parents.setdefault(id(module), []).append(parent)
        if type(module) is nn.Identity and not rules.hook_count(module):
            passed.add(id(module))
    found = []
    for key, module in modules.items():
        epilogue = _epilogue_of(module)
        if epilogue is None or not all(map(flow.sees, _callers(key, parents))):
            continue
        try:
            before = flow.layers_before(module, passed)
        except NotFolded:
            continue
        if all(id(layer) in layers for layer in before):
            named = tuple((layer, layers[id(layer)]) for layer in before)
            found.append(Absorbed(module, named, epilogue))
    return found


def _epilogue_of(module: nn.Module) -> str | None:
    """The epilogue that computes what this module does, if one does."""
    for epilogue, base in FLOAT_EPILOGUES.items():
        if isinstance(module, base):
            plain = rules.same_forward(type(module), base) and "forward" not in vars(module)
            return epilogue if plain and not rules.hook_count(module) else None
    return None


def _callers(key: int, parents: Mapping[int, list[nn.Module]]) -> list[nn.Module]:
    """The modules whose forward may call this one: its parents, containers' parents for them."""
    callers = []
    for parent in parents.get(key, []):
        if isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
            callers += _callers(id(parent), parents)
        else:
            callers.append(parent)
    return callers
