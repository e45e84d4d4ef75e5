"""Choices converted for good, as `lowbit.quantize` makes them, and which of them is returned.

Layers that learn from data come out otherwise among other layers: `quantize` has each make up for
the errors of those before it, which layers put into the model one by one cannot. So the best
choices are converted as a whole, with the uniform schemes beside them, and judged by that. A mix
is returned only if it loses less than every uniform scheme on the batches that it was chosen on,
and no more on those held back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowbit.baselines import eval_mode, weight_bytes
from lowbit.mixed.choices import Choices
from lowbit.mixed.layers import Assignment, Conversion
from lowbit.mixed.measure import Losses, Measurer, Steps, key
from lowbit.quality import Quality
from lowbit.schemes import Scheme


@dataclass(frozen=True)
class Final:
    """A choice, converted.

    Attributes:
        choice: an index into each layer's options.
        uniform: the scheme, where it is one for all layers; else "".
        bytes: parameters and buffers.
        losses: of the converted model.
    """

    choice: tuple[int, ...]
    uniform: str
    bytes: int
    losses: Losses


@dataclass(frozen=True)
class Confirmation:
    """What is returned against the best uniform scheme that keeps to the budget.

    Damage is the objective where less is better (KL divergence), else one over the SQNR as a ratio
    of energies, or one less the figure.

    Attributes:
        uniform: that scheme; None where none keeps to the budget.
        batches: how many were held back from the search; 0 where it saw all there are.
        damage, uniform_damage: of what is returned and of the uniform scheme, mean over the
            batches held back (over all where there are none).
        excess: the first less the second.
        standard_error: of that difference, from its spread over the batches; NaN for one batch.
    """

    uniform: str | None
    batches: int
    damage: float
    uniform_damage: float
    excess: float
    standard_error: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


class Finals:
    """Converts choices of a workbench's layers, once each.

    Args:
        model: the float model that the measurer's workbench swaps layers of.
        measurer: measures them.
        conversion: converts them.
        names: of the schemes.
        steps: is told of every conversion.
    """

    def __init__(
        self,
        model: nn.Module,
        measurer: Measurer,
        conversion: Conversion,
        names: Sequence[str],
        steps: Steps,
    ) -> None:
        self._model, self._measurer, self._conversion = model, measurer, conversion
        self._names, self._steps = names, steps
        self.learn = bool(conversion.options) or any(Scheme.parse(name).learns for name in names)
        """Whether layers learn from data together."""
        self._found: dict[tuple[int, ...], Final] = {}
        self._fresh: nn.Module | None = None
        self._best: tuple[Final, nn.Module] | None = None

    def converted(self, assignment: Assignment) -> nn.Module:
        """A copy of the float model with these schemes, as `quantize` makes it."""
        self._measurer.bench.set({})
        overrides = self._measurer.bench.overrides(assignment)
        if not any(overrides.values()):
            return copy.deepcopy(self._model)
        return self._conversion.quantize(self._model, None, overrides)

    def measure(self, choices: Choices, choice: Sequence[int]) -> Final:
        """A choice, converted and measured; the model is kept while none loses less."""
        found = tuple(choice)
        if found not in self._found:
            uniform = [name for name in self._names if choices.choice_of(name) == found]
            self._fresh = None
            size, losses = self.losses(choices.assignment(found))
            final = Final(found, uniform[0] if uniform else "", size, losses)
            self._found[found] = final
            if self._fresh is not None and (self._best is None or self._less(self._best[0], final)):
                self._best = final, self._fresh
            self._fresh = None
        return self._found[found]

    def _less(self, best: Final, final: Final) -> bool:
        looked = self._measurer.looked
        return final.losses.mean(looked) < best.losses.mean(looked)

    def take(self, choices: Choices, final: Final) -> nn.Module:
        """The converted model of a choice, which then is the caller's."""
        if self._best is not None and self._best[0] is final:
            model = self._best[1]
            self._best = None
            return model
        return self.converted(choices.assignment(final.choice))

    def losses(self, assignment: Assignment) -> tuple[int, Losses]:
        """Bytes and losses of an assignment, converted."""

        def measure() -> dict[str, Any]:
            copied = self.converted(assignment)
            with eval_mode([copied]):
                losses = self._measurer.losses_of(copied)
            self._fresh = copied
            return {"bytes": weight_bytes(copied), **losses.to_dict()}

        name = f"final {key(assignment)}"
        restored = name in self._measurer.journal
        entry = self._measurer.journal.get(name, measure)
        self._steps.step("converting choices", restored)
        return entry["bytes"], Losses(Quality(**entry["quality"]), tuple(entry["damage"]))

    def pick(self, mixes: Iterable[Final], uniforms: Sequence[Final]) -> Final:
        """The mix that loses least, if no uniform scheme is better, or else the best of those."""
        looked, held = self._measurer.looked, self._measurer.held
        if not uniforms:
            return min(mixes, key=lambda final: final.losses.mean(looked))
        least = min(final.losses.mean(looked) for final in uniforms)
        least_held = min(final.losses.mean(held) for final in uniforms)
        for final in sorted(mixes, key=lambda final: final.losses.mean(looked)):
            if final.losses.mean(looked) < least and final.losses.mean(held) <= least_held:
                return final
        return min(uniforms, key=lambda final: final.losses.mean({*looked, *held}))

    def confirm(self, losses: Losses, uniforms: Sequence[Final]) -> Confirmation:
        """What the batches held back say of a model, against the best uniform scheme."""
        held = self._measurer.held
        hidden = 0 if set(held) <= set(self._measurer.looked) else len(held)
        best = min(uniforms, key=lambda final: final.losses.mean(held), default=None)
        mean = losses.mean(held)
        if best is None:
            return Confirmation(None, hidden, mean, math.nan, math.nan, math.nan)
        excess, error = losses.excess(best.losses, held)
        return Confirmation(best.uniform, hidden, mean, best.losses.mean(held), excess, error)
