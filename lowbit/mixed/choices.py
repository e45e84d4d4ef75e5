"""Choices of one scheme per layer: proposed by knapsacks, measured as a whole, refined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lowbit.mixed.budget import Budget
from lowbit.mixed.effects import Sensitivity
from lowbit.mixed.knapsack import Knapsack
from lowbit.mixed.measure import Measurer, Steps
from lowbit.quality import Quality

_PRICES = (0.0, 0.25, 1.0, 4.0)
_BISECTIONS = 10


@dataclass
class Options:
    """One layer's options: float first, then the schemes that may be chosen.

    Attributes:
        name: of the layer.
        schemes: None for float.
        damage: alone.
        bytes: what the whole model grows by when the layer leaves float.
        seconds: the same of the time of the first batch.
    """

    name: str
    schemes: list[str | None] = field(default_factory=lambda: [None])
    damage: list[float] = field(default_factory=lambda: [0.0])
    bytes: list[float] = field(default_factory=lambda: [0.0])
    seconds: list[float] = field(default_factory=lambda: [0.0])


@dataclass(frozen=True)
class Trial:
    """A choice (an index into each layer's options) that was measured."""

    choice: tuple[int, ...]
    bytes: int
    quality: Quality
    damage: float


def make_options(
    measurer: Measurer, effects: Sensitivity, allow_slower: bool
) -> tuple[list[Options], dict[str, str]]:
    """The options of all layers, and why some stay float.

    A scheme counts as slower when three of four rounds were: what differs by less is noise.
    """
    bench = measurer.bench
    base = bench.bytes({})
    found, notes = [], {}
    for layer in effects.layers:
        options = Options(layer.name)
        slower = {}
        for scheme, effect in layer.schemes.items():
            if not allow_slower and effect.speedup is not None and effect.speedup.p75 < 1.0:
                slower[scheme] = 1.0 / effect.speedup.median
                continue
            options.schemes.append(scheme)
            options.damage.append(measurer.damage(effect.alone))
            options.bytes.append(float(bench.bytes({layer.name: scheme}) - base))
            options.seconds.append((effect.seconds or 0.0) - (layer.float_seconds or 0.0))
        if slower:
            ratios = ", ".join(f"{scheme} {ratio:.2f}" for scheme, ratio in slower.items())
            notes[layer.name] = f"would be slower, times float: {ratios}"
        found.append(options)
    return found, notes


class Choices:
    """Finds a choice that keeps to a limit.

    Args:
        measurer: measures choices.
        options: of all layers.
        cost: "bytes" or "seconds": what a limit is on, and what is saved under a floor of
            quality.
        steps: is told of every measurement.
        trials: what was measured before, with the same options; added to.

    Attributes:
        trials: all choices measured so far.
    """

    def __init__(
        self,
        measurer: Measurer,
        options: Sequence[Options],
        cost: str,
        steps: Steps,
        trials: dict[tuple[int, ...], Trial] | None = None,
    ) -> None:
        self._measurer, self._options, self._steps = measurer, options, steps
        self._costs: list[list[float]] = [getattr(row, cost) for row in options]
        self._tables = [[row.damage for row in options]]
        self.trials: dict[tuple[int, ...], Trial] = {} if trials is None else trials

    @property
    def least_cost(self) -> float:
        """What the cheapest choice costs, against float."""
        return math.fsum(min(row) for row in self._costs)

    def cost(self, choice: Sequence[int]) -> float:
        """Of a choice, against float; negative where it saves."""
        return math.fsum(row[index] for row, index in zip(self._costs, choice, strict=True))

    def seconds(self, choice: Sequence[int]) -> float:
        """Of a choice, against float: the sum over the layers."""
        rows = zip(self._options, choice, strict=True)
        return math.fsum(row.seconds[index] for row, index in rows)

    def assignment(self, choice: Sequence[int]) -> dict[str, str | None]:
        """From the layers' names to schemes."""
        rows = zip(self._options, choice, strict=True)
        return {row.name: row.schemes[index] for row, index in rows}

    def choice_of(self, scheme: str) -> tuple[int, ...]:
        """One scheme wherever it may be chosen, float elsewhere."""
        return tuple(
            row.schemes.index(scheme) if scheme in row.schemes else 0 for row in self._options
        )

    def measure(self, choice: Sequence[int], stage: str) -> Trial:
        """A choice as a whole."""
        found = tuple(choice)
        if found not in self.trials:
            assignment = self.assignment(found)
            restored = self._measurer.on_record(assignment)
            quality = self._measurer.quality(assignment)
            size = self._measurer.bench.bytes(assignment)
            self.trials[found] = Trial(found, size, quality, self._measurer.damage(quality))
            self._steps.step(stage, restored)
        return self.trials[found]

    def refine(self, best: Callable[[], Trial | None], propose: Callable[[], None]) -> None:
        """One round: measures every single change of the best choice, and proposes with that.

        Args:
            best: the best of `trials`.
            propose: solves and measures with the newest differences.
        """
        now = best()
        if now is None or not math.isfinite(now.damage):
            return
        table = []
        for index, row in enumerate(self._options):
            differences = []
            for option in range(len(row.schemes)):
                changed = [*now.choice]
                changed[index] = option
                stage = f"{row.name} in its context"
                differences.append(self.measure(changed, stage).damage - now.damage)
            table.append(differences)
        scale = (abs(now.damage) or 1.0) / max(1, len(self._options))
        # A choice far from the one measured is less sure: each change has its price.
        self._tables = [
            [
                [value + price * scale * (o != i) for o, value in enumerate(row)]
                for row, i in zip(table, now.choice, strict=True)
            ]
            for price in _PRICES
        ]
        propose()

    def propose_within(self, limit: float) -> None:
        """Measures what each table finds to lose least at a cost of at most `limit`."""
        for table in self._tables:
            choice = Knapsack(table, self._costs).solve(limit)
            if choice is not None:
                self.measure(choice, "refining")

    def exchanges(self, base: Sequence[int], limit: float) -> list[tuple[int, ...]]:
        """Choices of a cost of at most `limit` on the way from one to the knapsack's.

        Each layer that is not as in `base` has a price, from one to the next a lower one: first
        only exchanges that gain much are made, at last all that gain, if damages add up. Where that
        is none it is the best choice that costs less than `base`: damages may not add up.
        """
        damages = [row.damage for row in self._options]
        total = math.fsum(row[index] for row, index in zip(damages, base, strict=True))
        below = math.nextafter(self.cost(base), -math.inf)
        found: dict[tuple[int, ...], None] = {}
        for price in sorted(_PRICES, reverse=True):
            extra = price * total / len(damages) if math.isfinite(total) else 0.0
            table = [
                [damage + extra * (option != index) for option, damage in enumerate(row)]
                for row, index in zip(damages, base, strict=True)
            ]
            knapsack = Knapsack(table, self._costs)
            choice = knapsack.solve(limit)
            if choice == list(base):
                choice = knapsack.solve(below)
            if choice is not None and choice != list(base):  # nothing is cheaper than the cheapest
                found[tuple(choice)] = None
        return list(found)

    def propose_above(self, floor: Budget) -> None:
        """Looks for the cheapest choice of each table that keeps to a floor of quality."""
        for table in self._tables:
            knapsack = Knapsack(table, self._costs)
            low, high = knapsack.least, min(0.0, knapsack.most)
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                choice = knapsack.solve(middle)
                if choice is not None and floor.meets(
                    self.measure(choice, "refining").quality.figures()
                ):
                    high = middle
                else:
                    low = middle

    def along(self, count: int) -> None:
        """Measures `count` choices spread over all costs: points for the Pareto front."""
        knapsack = Knapsack([row.damage for row in self._options], self._costs)
        span = knapsack.most - knapsack.least
        for index in range(count):
            # Denser where it is cheap: that is where the loss changes.
            limit = knapsack.least + span * (index / max(1, count - 1)) ** 2
            choice = knapsack.solve(limit)
            if choice is not None:
                self.measure(choice, "Pareto front")

    def allowed(self, limit: float, max_bytes: float) -> list[Trial]:
        """The trials that cost at most `limit` and weigh no more, the least damage first."""
        found = [
            trial
            for trial in self.trials.values()
            if self.cost(trial.choice) <= limit and trial.bytes <= max_bytes
        ]
        return sorted(found, key=lambda t: (t.damage, t.bytes, t.choice))

    def least_damage(self, limit: float, max_bytes: float) -> Trial | None:
        """The first of `allowed`."""
        return next(iter(self.allowed(limit, max_bytes)), None)

    def cheapest(self, floor: Budget, without: Iterable[tuple[int, ...]] = ()) -> Trial | None:
        """The trial that costs least, of those that keep to a floor of quality."""
        allowed = [
            trial
            for trial in self.trials.values()
            if trial.choice not in set(without) and floor.meets(trial.quality.figures())
        ]
        return min(allowed, key=lambda t: (self.cost(t.choice), t.damage, t.choice), default=None)
