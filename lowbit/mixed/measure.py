"""Qualities and times of a model whose layers are swapped.

What the float model returns is computed once and kept, for all batches. The damage that the choice
of schemes works on is a figure that adds up over layers as long as the errors are small and
independent: the KL divergence of a classification, and the energy of the noise over that of the
signal (one over the SQNR) otherwise.

A search looks at some of the batches and holds the others back: what was chosen among hundreds of
choices for few batches has adapted to their noise, and is confirmed on batches that chose nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit import tasks, timing
from lowbit.baselines import run
from lowbit.mixed.journal import Journal
from lowbit.mixed.layers import Assignment, Layer, Workbench
from lowbit.quality import Quality, QualityMeter
from lowbit.tasks.metric import metric_of
from lowbit.timing import Ratio, Timing

Progress = Callable[[str, float], None]
Forward = Callable[[nn.Module, Any], Any]


class _Reached(BaseException):  # no model's `except Exception` may stop it
    """The layer whose input was wanted has been called."""


class Steps:
    """Tells how far a run is and how long it will take, from the steps it has taken.

    Args:
        progress: called with the stage (the time left in it) and the share done; None is silent.
        total: number of steps.
        clock: returns seconds; for tests.
    """

    def __init__(
        self, progress: Progress | None, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._total, self._clock = progress, total, clock
        self._done = self._worked = 0
        self._begin = clock()

    def step(self, stage: str, restored: bool = False) -> None:
        """One more step is done; `restored`: it took no time, since it was on record."""
        self._done += 1
        self._worked += not restored
        left = self._total - self._done
        if self._progress is not None:
            seconds = (self._clock() - self._begin) / max(1, self._worked) * left
            note = f", {_duration(seconds)} left" if self._worked and left > 0 else ""
            self._progress(f"{stage}{note}", min(1.0, self._done / max(1, self._total)))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


@dataclass(frozen=True)
class Losses:
    """What a converted model loses.

    Attributes:
        quality: over all batches.
        damage: of each batch; None for one that has no such figure.
    """

    quality: Quality
    damage: tuple[float | None, ...]

    def mean(self, numbers: Iterable[int]) -> float:
        """Of the damage of some batches; of all, if none of them has the figure."""
        values = self._values(numbers) or self._values(range(len(self.damage)))
        return math.fsum(values) / len(values) if values else math.inf

    def _values(self, numbers: Iterable[int]) -> list[float]:
        found = [self.damage[number] for number in numbers]
        return [value for value in found if value is not None]

    def excess(self, other: Losses, numbers: Sequence[int]) -> tuple[float, float]:
        """How much more than another model is lost on some batches: the mean, its standard error.

        The error is that of the batches' differences; NaN with fewer than two.
        """
        pairs = [(self.damage[number], other.damage[number]) for number in numbers]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        count = len(differences)
        error = math.nan
        if count > 1 and all(map(math.isfinite, differences)):
            error = statistics.stdev(differences) / math.sqrt(count)
        return self.mean(numbers) - other.mean(numbers), error

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {"quality": self.quality.to_dict(), "damage": list(self.damage)}


def split(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of the batches to choose on, and of those to confirm on: every third.

    A single batch is both.
    """
    held = range(1, count, 3)
    looked = [number for number in range(count) if number not in held]
    return tuple(looked), tuple(held) or tuple(looked)


class Measurer:
    """Measures assignments of schemes to the layers of an entered workbench.

    Args:
        bench: the model.
        batches: at least one batch of inputs; the first one is run for times.
        task: see `lowbit.tasks`.
        forward: runs the model on a batch.
        journal: what is on record is not measured again.
        hold: whether to hold batches back, see `split`; else all are looked at.

    Attributes:
        calls: how often each layer is called for the first batch, in the order of the first calls.
        objective: name of the figure that the damage is made of.
        looked: numbers of the batches that `quality` is taken over.
        held: numbers of those to confirm on.
    """

    def __init__(
        self,
        bench: Workbench,
        batches: Sequence[Any],
        task: object,
        forward: Forward | None,
        journal: Journal,
        hold: bool = False,
    ) -> None:
        self.bench, self.journal = bench, journal
        everything = tuple(range(len(batches)))
        self.looked, self.held = split(len(batches)) if hold else (everything, everything)
        self._batches, self._task = batches, task
        self._forward = forward if forward is not None else run
        bench.set({})
        self.calls = self._count_calls()
        with torch.inference_mode():
            self._reference = [self._forward(bench.model, batch) for batch in batches]
        found = tasks.find(task)
        self.objective = "sqnr_db"
        if isinstance(found, tasks.Task):
            self.objective = found.objective or self.objective
        elif self._compare(self._reference[:1]).rows:
            self.objective = "kl_divergence"
        self._usable = [number for number in everything if self._has_figure(number)]

    def _count_calls(self) -> dict[str, int]:
        """Layers by their first call in the first batch, and how often each was called."""
        calls: dict[str, int] = {}
        handles = []
        for layer in self.bench.layers:

            def count(module: nn.Module, args: Any, name: str = layer.name) -> None:
                calls[name] = calls.get(name, 0) + 1

            handles.append(layer.module.register_forward_pre_hook(count))
        try:
            with torch.inference_mode():
                self._forward(self.bench.model, self._batches[0])
        finally:
            for handle in handles:
                handle.remove()
        return calls | {layer.name: 0 for layer in self.bench.layers if layer.name not in calls}

    def _has_figure(self, number: int) -> bool:
        """Whether the damage of a batch can be told: a box that is nowhere has no score."""
        reference, meter = self._reference[number], QualityMeter(self._task)
        try:
            meter.update(reference, reference, self._batches[number])
            return math.isfinite(self.damage(meter.result()))
        except ValueError:  # nothing in it to compare
            return False

    def _compare(self, outputs: Sequence[Any]) -> Quality:
        meter = QualityMeter(self._task)
        for reference, output, batch in zip(self._reference, outputs, self._batches, strict=False):
            meter.update(reference, output, batch)
        return meter.result()

    def on_record(self, assignment: Assignment) -> bool:
        """Whether `quality` has the answer without measuring."""
        return self._key(assignment) in self.journal

    def quality(self, assignment: Assignment) -> Quality:
        """Of the whole model with these schemes, over the batches that are looked at."""

        def measure() -> dict[str, Any]:
            self.bench.set(assignment)
            return self._losses(self.bench.model, self.looked).quality.to_dict()

        return Quality(**self.journal.get(self._key(assignment), measure))

    def _key(self, assignment: Assignment) -> str:
        held = len(self.looked) < len(self._batches)
        return key(assignment) + (f" on {list(self.looked)}" if held else "")

    def losses_of(self, model: nn.Module) -> Losses:
        """Of any model, over all batches."""
        return self._losses(model, range(len(self._batches)))

    def _losses(self, model: nn.Module, numbers: Iterable[int]) -> Losses:
        whole, damages = QualityMeter(self._task), []
        with torch.inference_mode():
            for number in numbers:
                reference, batch = self._reference[number], self._batches[number]
                output = self._forward(model, batch)
                whole.update(reference, output, batch)
                damages.append(self._damage_of(number, output))
        return Losses(whole.result(), tuple(damages))

    def _damage_of(self, number: int, output: Any) -> float | None:
        if number not in self._usable:
            return None
        meter = QualityMeter(self._task)
        meter.update(self._reference[number], output, self._batches[number])
        return self.damage(meter.result())

    def damage(self, quality: Quality) -> float:
        """The figure that adds up over layers: 0 for no loss; NaN counts as infinite."""
        return damage(quality.figures(), self.objective)

    def times(self, layer: Layer, seconds: float) -> dict[str, tuple[float, Ratio | None]]:
        """Seconds of a layer's calls for the first batch, "float" and by scheme.

        Measured on the input of the layer's first call, all schemes alternately, times the number
        of calls; with each scheme the ratio of float's time to its own.
        """
        count = self.calls[layer.name]
        if count == 0:
            return dict.fromkeys(("float", *layer.versions), (0.0, None))
        found = self.journal.get(f"times {layer.name}", lambda: self._times(layer, seconds))
        return {
            name: (count * entry["seconds"], Ratio(**entry["ratio"]))
            for name, entry in found.items()
        }

    def _times(self, layer: Layer, seconds: float) -> dict[str, Any]:
        args, kwargs = self._input(layer)
        sides: dict[str, Callable[[], Any]] = {"float": lambda: layer.module(*args, **kwargs)}
        if layer.norm is not None:
            norm, module = layer.norm, layer.module
            sides["float"] = lambda: norm(module(*args, **kwargs))
        for name, version in layer.versions.items():
            sides[name] = lambda version=version: version(*args, **kwargs)  # type: ignore[misc]
        with torch.inference_mode():
            timings = timing.alternate(sides, min_rounds=7, budget_seconds=seconds)
        return {
            name: {
                "seconds": timed.p50,
                "ratio": timing.ratio(timings["float"], timed).to_dict(),
            }
            for name, timed in timings.items()
        }

    def _input(self, layer: Layer) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with first, in the float model, for the first batch."""
        self.bench.set({})
        caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append((args, kwargs))
            raise _Reached

        handle = layer.module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.inference_mode():
                self._forward(self.bench.model, self._batches[0])
        except _Reached:
            pass
        finally:
            handle.remove()
        return caught[0]

    def time_models(self, models: Sequence[nn.Module], seconds: float) -> list[Timing]:
        """What each model takes for the first batch, measured alternately."""
        batch = self._batches[0]

        def call(model: nn.Module) -> Callable[[], Any]:
            return lambda: self._forward(model, batch)

        sides = {str(index): call(model) for index, model in enumerate(models)}
        with torch.inference_mode():
            return list(timing.alternate(sides, min_rounds=5, budget_seconds=seconds).values())


def key(assignment: Assignment) -> str:
    """An assignment as text, the same for the same choice."""
    chosen = {name: scheme for name, scheme in assignment.items() if scheme is not None}
    return "quality " + json.dumps(chosen, sort_keys=True)


def damage(figures: dict[str, float], name: str) -> float:
    """What a figure says is lost: 0 for nothing, and more for more; NaN counts as infinite."""
    value = figures.get(name, math.nan)
    if math.isnan(value):
        return math.inf
    if name.endswith("_db"):
        return 10.0 ** (-value / 10.0) if value > -3000.0 else math.inf
    return 1.0 - value if metric_of(name).higher_is_better else value
