"""Chooses a scheme for each layer: the least loss that a budget allows.

1. Each layer's damage to the output is measured, alone, at each scheme (`sensitivity`), and the
   choice of least total damage is found exactly as a knapsack (`knapsack`), as if damages added up.
2. They do not quite: at few bits errors are neither small nor independent. So choices are measured
   as a whole, and around the best one every single change of a layer is measured again in its
   context; the knapsack of these differences, with a growing price on every change, proposes the
   next choices (`choices`). Nothing is taken on trust: only measured choices can win, and the
   uniform ones are among them.
3. The best choices, and the uniform ones that keep to the budget, are converted for good and
   compared as wholes. A mix that is not confirmed on batches that the search has not looked at
   gives way to the best uniform scheme (`finals`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit import timing
from lowbit.baselines import eval_mode, weight_bytes
from lowbit.calibration.data import Data
from lowbit.mixed.budget import Budget
from lowbit.mixed.choices import Choices, Trial, make_options
from lowbit.mixed.effects import Sensitivity
from lowbit.mixed.finals import Final, Finals
from lowbit.mixed.found import Found, Point
from lowbit.mixed.layers import Conversion
from lowbit.mixed.measure import Forward, Losses, Measurer, Progress, Steps
from lowbit.mixed.sensitivity import effects, session
from lowbit.plan import Filter, SchemeLike
from lowbit.schemes import Scheme
from lowbit.timing import Ratio

SCHEMES = ("w8a8", "w4a8", "w4a8-g32", "w2a8-g32")
_TRIES = 6
_FINALS = 3
"""Mixes that are converted for a budget; each takes what `quantize` does."""


def search(
    model: nn.Module,
    data: Data,
    budget: str | int | float | Budget,
    schemes: Sequence[SchemeLike] | SchemeLike = SCHEMES,
    *,
    task: object = None,
    allow_slower: bool = False,
    rounds: int = 2,
    front: int = 8,
    seconds: float = 2.0,
    filter_fn: Filter | None = None,
    fuse: bool = True,
    forward_fn: Forward | None = None,
    steps: int | None = None,
    calibration: Data | None = None,
    options: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Finds the scheme of each layer that loses least within a budget.

    Args:
        model: the float model. Its layers are swapped while this runs; it is unchanged at the end,
            after an error too.
        data: batches to measure on, as for `lowbit.sensitivity`. Every third is held back: it
            chooses nothing, and confirms that the mix is better than the uniform schemes of its
            size. With few batches the search chooses for their noise: give at least six, of inputs
            as different as those that the model will see. Take others to judge the result.
        budget: of the whole model's parameters and buffers: bytes (an int, "2.4MB"), a share of
            the float model's ("30%") or of a scheme's ("50% of w8a8"); or of the first batch's time
            on this machine ("3ms"); or a quality to keep at the least bytes ("20dB",
            "top1_agreement>=0.93").
        schemes: what a layer may become, besides staying float.
        task: what the outputs are, see `lowbit.tasks`.
        allow_slower: whether a layer may become slower than it is in float. By default one that
            lowbit would slow at a scheme, measured on the layer's own input, is not given it.
        rounds: of refinement. Each measures every other scheme of every layer once. Where layers
            learn from data there are none: they learn together, so that no layer can be judged
            by itself in its context; up to four mixes are converted as a whole instead.
        front: choices measured for the Pareto front, besides those that the search makes.
        seconds: for timing the result against the float model.
        filter_fn, fuse, forward_fn, steps, calibration, options, resume, progress: as for
            `lowbit.sensitivity`.

    Returns:
        The schemes, and what they keep: `lowbit.quantize(model, None, overrides=found.overrides)`.
        With the same arguments the same, but for what depends on times.

    Raises:
        ValueError: as `sensitivity`; the budget is none, or cannot be met: the message says what
            can.
    """
    (found,) = search_many(
        model,
        data,
        [budget],
        schemes,
        task=task,
        allow_slower=allow_slower,
        rounds=rounds,
        front=front,
        seconds=seconds,
        filter_fn=filter_fn,
        fuse=fuse,
        forward_fn=forward_fn,
        steps=steps,
        calibration=calibration,
        options=options,
        resume=resume,
        progress=progress,
    )
    return found


def search_many(
    model: nn.Module,
    data: Data,
    budgets: Sequence[str | int | float | Budget],
    schemes: Sequence[SchemeLike] | SchemeLike = SCHEMES,
    *,
    task: object = None,
    allow_slower: bool = False,
    rounds: int = 2,
    front: int = 8,
    seconds: float = 2.0,
    filter_fn: Filter | None = None,
    fuse: bool = True,
    forward_fn: Forward | None = None,
    steps: int | None = None,
    calibration: Data | None = None,
    options: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    each: Callable[[Found, nn.Module], None] | None = None,
) -> list[Found]:
    """`search` for several budgets: what does not depend on them is done once.

    Each search may use what those before it have measured, so the order matters.

    Args and errors are those of `search`, and:
        budgets: one for each result.
        each: is called with every result, as soon as it is there, and its converted model.
    """
    parsed = [Budget.parse(budget) for budget in budgets]
    if rounds < 0 or front < 0:
        raise ValueError(f"rounds and front are at least 0, not {rounds} and {front}")
    conversion = Conversion(filter_fn, fuse, calibration, forward_fn, dict(options or {}))
    latency = not allow_slower or any(wanted.kind == "seconds" for wanted in parsed)
    with session(
        model,
        data,
        schemes,
        task=task,
        conversion=conversion,
        forward_fn=forward_fn,
        steps=steps,
        resume=resume,
        progress=progress,
        hold=True,
    ) as (measurer, names, count):
        for wanted in parsed:
            if wanted.kind == "quality":  # refuses an unknown figure early
                wanted.meets(measurer.quality({}).figures())
        measured = effects(measurer, names, count, False, latency, progress)
        rows, notes = make_options(measurer, measured, allow_slower)
        changes = sum(len(row.schemes) - 1 for row in rows)
        todo = Steps(progress, len(parsed) * (rounds * changes + 10) + len(names) + front)
        trials: dict[tuple[int, ...], Trial] = {}
        finals = Finals(model, measurer, conversion, names, todo)
        results = []
        for wanted in parsed:
            cost = "seconds" if wanted.kind == "seconds" else "bytes"
            choices = Choices(measurer, rows, cost, todo, trials)
            for name in names:
                choices.measure(choices.choice_of(name), "uniform")
            run = _Run(model, measurer, conversion, choices, finals, names, rounds, seconds)
            result = run.meet(wanted, bool(notes))
            choices.along(front)
            uniform = [
                run.uniform(name, result.float_seconds if latency else None, measured)
                for name in names
            ]
            overrides = measurer.bench.overrides(choices.assignment(result.choice))
            found = Found(
                model=type(model).__name__,
                budget=str(wanted),
                objective=measurer.objective,
                overrides=overrides,
                notes={
                    name: notes.get(name, "fits the budget")
                    for name, scheme in overrides.items()
                    if scheme is None
                },
                float_bytes=measurer.bench.bytes({}),
                bytes=result.bytes,
                quality=result.losses.quality,
                confirmation=finals.confirm(result.losses, run.fitting),
                float_seconds=result.float_seconds,
                seconds=result.seconds,
                speedup=result.speedup,
                uniform=tuple(uniform),
                front=run.front(cost, latency, result.float_seconds, names),
                threads=torch.get_num_threads(),
                measured=len(trials),
            )
            results.append(found)
            if each is not None:
                each(found, result.model)
        return results


@dataclass(frozen=True)
class _Result:
    """A choice, converted for good, measured and timed."""

    model: nn.Module
    choice: tuple[int, ...]
    bytes: int
    losses: Losses
    float_seconds: float
    seconds: float
    speedup: Ratio


class _Run:
    """One search, by the kind of its budget."""

    def __init__(
        self,
        model: nn.Module,
        measurer: Measurer,
        conversion: Conversion,
        choices: Choices,
        finals: Finals,
        names: Sequence[str],
        rounds: int,
        seconds: float,
    ) -> None:
        self._model, self._measurer, self._conversion = model, measurer, conversion
        self._choices, self._finals, self._names = choices, finals, names
        self._rounds, self._seconds = rounds, seconds
        self._float_bytes = measurer.bench.bytes({})
        self.fitting: list[Final] = []
        """The uniform schemes that keep to the budget, once it has been met."""

    def meet(self, wanted: Budget, some_slower: bool) -> _Result:
        """The best choice that keeps to the budget.

        Raises:
            ValueError: none does.
        """
        if wanted.kind == "quality":
            return self.floor(wanted)
        if wanted.kind == "seconds":
            return self.within_seconds(wanted.value)
        return self.within_bytes(self.bytes_of(wanted), some_slower)

    def uniform(self, name: str, float_seconds: float | None, measured: Sensitivity) -> Point:
        """One scheme for every layer that it converts, slower ones too."""
        assignment = self._measurer.bench.uniform(name)
        size, losses = self._finals.losses(assignment)
        seconds = float_seconds
        if seconds is not None:
            for layer in measured.layers:
                if name in layer.schemes:
                    seconds += layer.schemes[name].seconds or 0.0
                    seconds -= layer.float_seconds or 0.0
        return Point(name, assignment, size, seconds, losses.quality)

    def bytes_of(self, budget: Budget) -> float:
        """The limit in bytes."""
        if budget.of is None:
            return budget.value
        if budget.of == "float":
            return budget.value * self._float_bytes
        bench = self._measurer.bench
        if any(budget.of in layer.versions for layer in bench.layers):
            return budget.value * bench.bytes(bench.uniform(budget.of))
        # How weights are rounded does not change their bytes, but may need data.
        scheme = dataclasses.replace(Scheme.parse(budget.of), quantizer=None)
        return budget.value * weight_bytes(
            Conversion(self._conversion.filter_fn, self._conversion.fuse).quantize(
                self._model_in_float(), scheme
            )
        )

    def within_bytes(self, limit: float, some_slower: bool) -> _Result:
        """The least damage of at most `limit` bytes."""
        allowed = limit
        for attempt in range(_TRIES):
            room = allowed - self._float_bytes
            if room < self._choices.least_cost - 0.5:
                break
            best = self._best(room, allowed, self._rounds if attempt == 0 else 0)
            if best is None:
                break
            if best.bytes <= limit:
                return self._result(best)
            allowed -= best.bytes - limit
        least = self._float_bytes + self._choices.least_cost
        hint = "; layers that would be slower stay float, allow them with allow_slower=True"
        raise ValueError(
            f"a budget of {limit / 1e6:.3f} MB cannot be met: with these schemes the model has at "
            f"least {least / 1e6:.3f} MB{hint if some_slower else ''}"
        )

    def _best(self, room: float, max_bytes: float, rounds: int) -> Final | None:
        """The choice to return, of those that cost at most `room` and weigh no more than asked.

        Args:
            room: what it may cost, against float.
            max_bytes: of the whole model.
            rounds: of refinement.
        """
        choices, finals = self._choices, self._finals

        def best() -> Trial | None:
            return choices.least_damage(room, max_bytes)

        def propose() -> None:
            choices.propose_within(room)

        propose()
        # Layers that learn make up for those before them: in a model of layers that did not learn
        # together a refinement finds what is best for that model.
        for _ in range(0 if finals.learn else rounds):
            before = best()
            choices.refine(best, propose)
            if best() is before:
                break
        allowed = choices.allowed(room, max_bytes)
        if not allowed:
            return None
        uniforms = {choices.choice_of(name) for name in self._names}
        fitting = sorted(uniforms & {trial.choice for trial in allowed})
        self.fitting = [finals.measure(choices, choice) for choice in fitting]
        mixes = [trial.choice for trial in allowed if trial.choice not in fitting][:_FINALS]
        if finals.learn and self.fitting:
            base = min(self.fitting, key=lambda f: f.losses.mean(self._measurer.looked))
            ways = choices.exchanges(base.choice, room)
            mixes = [
                choice
                for choice in ways
                if choice not in fitting
                and self._measurer.bench.bytes(choices.assignment(choice)) <= max_bytes
            ]
        return finals.pick([finals.measure(choices, choice) for choice in mixes], self.fitting)

    def within_seconds(self, limit: float) -> _Result:
        """The least damage that takes at most `limit` seconds for the first batch."""
        allowed, fastest = limit, math.inf
        float_seconds = self._measurer.time_models([self._model_in_float()], self._seconds)[0].p50
        for attempt in range(_TRIES):
            room = max(allowed - float_seconds, self._choices.least_cost)
            best = self._best(room, math.inf, self._rounds if attempt == 0 else 0)
            assert best is not None  # the cheapest choice costs no more than that
            final = self._result(best)
            fastest = min(fastest, final.seconds)
            if final.seconds <= limit:
                return final
            if room == self._choices.least_cost and attempt > 1:
                break
            allowed -= 1.2 * (final.seconds - limit)
        raise ValueError(
            f"a budget of {limit * 1e3:.3f} ms cannot be met: the fastest choice of these schemes "
            f"took {fastest * 1e3:.3f} ms on this machine, the float model "
            f"{float_seconds * 1e3:.3f} ms"
        )

    def floor(self, wanted: Budget) -> _Result:
        """The least bytes that keep to a quality."""

        def best() -> Trial | None:
            return self._choices.cheapest(wanted, refused)

        def propose() -> None:
            self._choices.propose_above(wanted)

        refused: list[tuple[int, ...]] = []
        self._choices.measure([0] * len(self._measurer.bench.layers), "float")
        propose()
        for _ in range(self._rounds):
            before = best()
            self._choices.refine(best, propose)
            if best() is before:
                break
        # Layers that learn from data come out otherwise among other layers.
        uniforms = [
            self._finals.measure(self._choices, self._choices.choice_of(name))
            for name in (self._names if self._finals.learn else ())
        ]
        kept = [final for final in uniforms if wanted.meets(final.losses.quality.figures())]
        for _ in range(_TRIES):
            trial = best()
            if trial is None:
                break
            final = self._finals.measure(self._choices, trial.choice)
            if wanted.meets(final.losses.quality.figures()):
                kept.append(final)
                break
            refused.append(trial.choice)
        if kept:
            return self._result(min(kept, key=lambda final: final.bytes))
        raise ValueError(f"no choice of these schemes keeps {wanted}; float32 may not either")

    def _model_in_float(self) -> nn.Module:
        self._measurer.bench.set({})
        return self._model

    def _result(self, final: Final) -> _Result:
        """The converted model, timed."""
        copy = self._finals.take(self._choices, final)
        model = self._model_in_float()
        with eval_mode([copy]):
            before, after = self._measurer.time_models([model, copy], self._seconds)
        ratio = timing.ratio(before, after)
        return _Result(copy, final.choice, final.bytes, final.losses, before.p50, after.p50, ratio)

    def front(
        self, cost: str, latency: bool, float_seconds: float, names: Sequence[str]
    ) -> tuple[Point, ...]:
        """The trials that no other one beats in both cost and damage, cheapest first."""
        choices = self._choices

        def price(trial: Trial) -> float:
            return choices.cost(trial.choice) if cost == "seconds" else trial.bytes

        labels = {choices.choice_of(name): name for name in names}
        points, least = [], math.inf
        for trial in sorted(choices.trials.values(), key=lambda t: (price(t), t.damage, t.choice)):
            if trial.damage < least:
                least = trial.damage
                seconds = float_seconds + choices.seconds(trial.choice) if latency else None
                points.append(
                    Point(
                        labels.get(trial.choice, ""),
                        choices.assignment(trial.choice),
                        trial.bytes,
                        seconds,
                        trial.quality,
                    )
                )
        return tuple(points)
