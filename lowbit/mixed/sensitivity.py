"""Each layer's effect on the output, when it alone is quantized and accumulated.

Layers are swapped in place, one after the other, and the model is what it was at the end: the only
memory taken is that of the lowbit layers, of the batches and of the float model's outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit import _core, tasks
from lowbit.calibration.data import Data, batches
from lowbit.mixed.effects import Effect, LayerEffect, Sensitivity
from lowbit.mixed.journal import Journal, data_fingerprint, fingerprint
from lowbit.mixed.layers import Conversion, Layer, Workbench, parse_schemes
from lowbit.mixed.measure import Forward, Measurer, Progress, Steps
from lowbit.plan import Filter, SchemeLike
from lowbit.quality import Quality
from lowbit.timing import Ratio

SECONDS_PER_LAYER = 0.1


def sensitivity(
    model: nn.Module,
    data: Data,
    schemes: Sequence[SchemeLike] | SchemeLike,
    *,
    task: object = None,
    accumulated: bool = True,
    latency: bool = True,
    filter_fn: Filter | None = None,
    fuse: bool = True,
    forward_fn: Forward | None = None,
    steps: int | None = None,
    calibration: Data | None = None,
    options: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measures what each layer loses, weighs and takes at each scheme.

    Args:
        model: the float model. Its layers are swapped while this runs; it is unchanged at the end,
            after an error too.
        data: batches to measure on, as `lowbit.calibration.batches` takes them; all of them, and
            the float model's outputs, are kept. The first one is what times are measured with.
        schemes: recipes or `Scheme`s.
        task: what the outputs are, see `lowbit.tasks`.
        accumulated: whether to measure the quality with all layers up to each one quantized, too.
        latency: whether to measure times: of each float layer and its versions alternately, on the
            layer's own input, with the threads of torch.
        filter_fn, fuse: as for `lowbit.quantize`.
        forward_fn: `forward_fn(model, batch)` runs the model on a batch, where neither
            `model(batch)`, `model(*batch)` nor `model(**batch)` does.
        steps: the most batches to take of `data`.
        calibration: batches for the schemes that learn from data; others than those of `data`.
        options: further arguments of `lowbit.quantize`.
        resume: a JSON-lines file to which every result is written as soon as it is there. A run
            with the same arguments goes on from it. Layers that learn from data are kept in files
            beside it.
        progress: called with the stage (the time left in it) and the share done.

    Returns:
        The effects. With the same arguments the same, but for the times.

    Raises:
        ValueError: as `quantize`; no batch; no layer converts; the file to resume belongs to
            another run.
    """
    with session(
        model,
        data,
        schemes,
        task=task,
        conversion=Conversion(filter_fn, fuse, calibration, forward_fn, dict(options or {})),
        forward_fn=forward_fn,
        steps=steps,
        resume=resume,
        progress=progress,
    ) as (measurer, names, count):
        return effects(measurer, names, count, accumulated, latency, progress)


@contextlib.contextmanager
def session(
    model: nn.Module,
    data: Data,
    schemes: Sequence[SchemeLike] | SchemeLike,
    *,
    task: object,
    conversion: Conversion,
    forward_fn: Forward | None,
    steps: int | None,
    resume: str | Path | None,
    progress: Progress | None,
    hold: bool = False,
) -> Iterator[tuple[Measurer, list[str], int]]:
    """A measurer of the model, the names of the schemes and the number of batches.

    The arguments are those of `sensitivity`, and `hold` as for `Measurer`. When left, the model is
    what it was.
    """
    found = tasks.find(task)
    parsed = parse_schemes(schemes)
    inputs = list(batches(data, steps))
    header = {
        "model": fingerprint(model),
        "data": data_fingerprint(inputs),
        "schemes": [scheme.to_dict() for scheme in parsed.values()],
        "task": _task_text(found),
        "calibration": _calibration_text(conversion.calibration),
        "options": repr((conversion.fuse, sorted(conversion.options.items()))),
        "isa": _core.isa(),
        "threads": torch.get_num_threads(),
    }
    journal = Journal(resume, header)
    report = progress if progress is not None else _silent
    kept = None if resume is None else _kept(Path(resume), header)
    with Workbench(model, parsed, conversion, report, kept) as bench:
        report("float outputs", 0.0)
        yield Measurer(bench, inputs, task, forward_fn, journal, hold), list(parsed), len(inputs)


def _kept(resume: Path, header: Mapping[str, Any]) -> Callable[[str], Path]:
    """Where the layers of schemes that learn are kept: beside the journal, named after its run."""
    run = data_fingerprint({key: header[key] for key in ("model", "options", "calibration")})
    return lambda scheme: resume.with_name(f"{resume.stem}.{run}.{scheme}.safetensors")


def _calibration_text(calibration: Data | None) -> str:
    """What tells calibration data from others, as far as they can be read twice."""
    if isinstance(calibration, (list, tuple)):
        return data_fingerprint(calibration)
    return type(calibration).__name__


def _task_text(task: tasks.Task | str | None) -> str:
    if isinstance(task, tasks.Function):
        return f"function {getattr(task.function, '__qualname__', type(task.function).__name__)}"
    return repr(task)


def _silent(stage: str, share: float) -> None:
    pass


def effects(
    measurer: Measurer,
    names: list[str],
    count: int,
    accumulated: bool,
    latency: bool,
    progress: Progress | None,
) -> Sensitivity:
    """The effects of all layers, with a measurer of `session`."""
    layers = {layer.name: layer for layer in measurer.bench.layers}
    order = [layers[name] for name in measurer.calls]  # of execution
    pairs = [(layer, name) for layer in order for name in layer.versions]
    todo = Steps(progress, len(pairs) * (2 if accumulated else 1) + len(order) * latency)
    alone = {
        (layer.name, name): _measured(
            measurer, {layer.name: name}, todo, f"{name}, {layer.name} alone"
        )
        for layer, name in pairs
    }
    up_to: dict[tuple[str, str], Quality] = {}
    for name in names if accumulated else ():
        chosen: dict[str, str | None] = {}
        for layer in order:
            if name in layer.versions:
                chosen[layer.name] = name
                stage = f"{name}, up to {layer.name}"
                up_to[layer.name, name] = _measured(measurer, chosen, todo, stage)
    times = {}
    for layer in order:
        if latency:
            restored = f"times {layer.name}" in measurer.journal
            times[layer.name] = measurer.times(layer, SECONDS_PER_LAYER)
            todo.step(f"time of {layer.name}", restored)

    def row(layer: Layer) -> LayerEffect:
        unknown: dict[str, tuple[float, Ratio | None]] = {}
        timed = times.get(layer.name, unknown)
        own = {
            name: Effect(
                alone=alone[layer.name, name],
                accumulated=up_to.get((layer.name, name)),
                bytes=layer.bytes(name),
                seconds=timed[name][0] if latency else None,
                speedup=timed[name][1] if latency else None,
            )
            for name in names
            if name in layer.versions
        }
        return LayerEffect(
            name=layer.name,
            kind=layer.kind,
            shape=layer.shape,
            calls=measurer.calls[layer.name],
            float_bytes=layer.float_bytes,
            float_seconds=timed["float"][0] if latency else None,
            schemes=own,
        )

    return Sensitivity(
        model=type(measurer.bench.model).__name__,
        objective=measurer.objective,
        schemes=tuple(names),
        batches=count,
        threads=torch.get_num_threads(),
        layers=tuple(map(row, order)),
    )


def _measured(
    measurer: Measurer, assignment: Mapping[str, str | None], todo: Steps, stage: str
) -> Quality:
    restored = measurer.on_record(assignment)
    quality = measurer.quality(assignment)
    todo.step(stage, restored)
    return quality
