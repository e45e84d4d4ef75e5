"""A float model against torch's INT8 and quantized models: time, size, memory and quality.

All sides are timed alternately in one process (`timing.alternate`) on the first batch, so that a
speed-up is the median of the rounds' ratios, with its spread. The quality is that of the outputs
against the float model's, over all batches (`quality.QualityMeter`).

Memory: after the timing each model runs the first batch once more while the kernel watches the
process's resident memory. The growth is what a warm call takes on top of the loaded models:
activations and temporaries, not weights, not buffers that a library keeps from call to call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowbit._core as _core
from lowbit import baselines, timing
from lowbit.calibration.data import Data, repeatable
from lowbit.comparison import Comparison, Row
from lowbit.errors import check_model, one_line
from lowbit.html.details import gather
from lowbit.html.packages import check_packages
from lowbit.quality import Quality, QualityMeter
from lowbit.schemes import Scheme
from lowbit.timing import MemoryUse, Timing

TORCH_INT8 = "torch int8"
_CALIBRATION_BATCHES = 8

Progress = Callable[[str, float], None]  # what is being done, share of it done
_Learned = Callable[[], Iterator[Any]] | None


def compare(
    model: nn.Module,
    candidates: Mapping[str, Any] | Sequence[str],
    inputs: Any,
    *,
    threads: int | None = None,
    budget_seconds: float = 10.0,
    torch_int8: bool = True,
    task: object = None,
    details: bool = False,
    labels: Sequence[str] | None = None,
    progress: Progress | None = None,
    calibration: Data | str | None = None,
) -> Comparison:
    """Compares quantized models with the float model and with torch's INT8.

    Args:
        model: the float model. It is run in eval mode; its training flags are restored.
        candidates: name -> quantized model (any module with the same outputs), or -> a scheme or
            recipe that `quantize` takes; or a list of recipes.
        inputs: one batch (a tensor, a tuple of positional or a mapping of keyword arguments), or a
            list or another iterable of such batches. The first batch is timed; the quality is
            taken over all of them, one at a time. The first 8 calibrate torch's static INT8 where
            there is no `calibration`.
        threads: for torch and lowbit during the comparison; None leaves `torch.get_num_threads()`.
        budget_seconds: wall time of the timing rounds of all sides together. Converting, saving,
            the first calls and the quality come on top.
        torch_int8: whether to include torch's INT8.
        task: "classification", "detection", "generation", "embeddings", "language", "other", a
            function of the float model's output and the candidate's (and the batch), or None to
            tell by the output: see `lowbit.tasks`.
        details: whether to take what `Comparison.save_html` shows beyond the tables, too: the
            accounts, the error of each layer, pictures. Needs `pip install 'lowbit[report]'`.
        labels: names of the classes, for the pictures in the details.
        progress: called with the stage and the share of it that is done.
        calibration: batches for the schemes among the candidates that learn from data, see
            `lowbit.calibration.batches`, and for torch's static INT8, so that both learn from the
            same. Not the inputs, if the quality shall be that on unseen ones; "inputs" takes the
            first 8 batches of these all the same.

    Raises:
        ModuleNotFoundError: details without the packages that they need.
        ValueError: no candidates, no inputs, a name that is taken, an invalid task or threads; a
            scheme that learns from calibration data without any.
        RuntimeError: a candidate fails on the inputs, or its outputs are not built like the float
            model's; the message names it.
    """
    check_model(model)
    report = progress if progress is not None else _no_progress
    batches = _batches(inputs)
    head = list(itertools.islice(batches, _CALIBRATION_BATCHES))
    if not head:
        raise ValueError("`inputs` holds no batch")
    QualityMeter(task)  # refuse an unknown task before the work, not after
    if details:
        check_packages()
    learned = _calibration(calibration, head)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_threads(threads))
        stack.enter_context(baselines.eval_mode([model]))
        reference = _dtype_name(model)
        chosen = _models(model, candidates, (reference, TORCH_INT8), report, learned)
        stack.enter_context(baselines.eval_mode(list(chosen.values())))
        sides: dict[str, nn.Module] = {reference: model}
        notes: dict[str, list[str]] = {name: [] for name in (reference, TORCH_INT8, *chosen)}
        baseline = _torch_int8(model, head, report, learned) if torch_int8 else None
        if baseline is not None:
            notes[TORCH_INT8].append(baseline.reason or baseline.label)
            if baseline.model is not None:
                sides[TORCH_INT8] = baseline.model
        sides |= chosen
        stack.enter_context(torch.inference_mode())
        calls = {name: _call(name, side, head[0]) for name, side in sides.items()}
        timings = timing.alternate(
            calls,
            min_rounds=5,
            budget_seconds=budget_seconds,
            progress=lambda share: report("timing", share),
        )
        if baseline is not None and baseline.first_seconds is not None:
            first = baseline.first_seconds  # its first call was made when the engines were raced
            timings[TORCH_INT8] = dataclasses.replace(timings[TORCH_INT8], first=first)
        memory = {name: timing.memory_use(call) for name, call in calls.items()}
        everything = itertools.chain(head, batches)
        qualities, count = _qualities(sides, everything, task, notes, report)
        batch_size, used_threads = _batch_size(head[0]), torch.get_num_threads()
        rows = [
            _row(name, sides, timings, memory[name], qualities.get(name), batch_size, notes[name])
            for name in sides
        ]
        settings = {
            "candidates": list(chosen),
            "budget_seconds": budget_seconds,
            "threads": used_threads,
            "torch_int8": torch_int8,
            "task": None if task is None else str(getattr(task, "__name__", task)),
        }
        detailed = (
            gather(sides, head, labels=labels, settings=settings, progress=report)
            if details
            else None
        )
    if baseline is not None and baseline.model is None:
        rows.insert(1, Row(TORCH_INT8, "torch", notes=tuple(notes[TORCH_INT8])))
    return Comparison(
        model=type(model).__name__,
        cpu=_cpu_name(),
        isa=_core.isa(),
        threads=used_threads,
        batch_size=batch_size,
        batches=count,
        torch_version=str(torch.__version__),
        rows=tuple(rows),
        details=detailed,
    )


def _torch_int8(
    model: nn.Module, batches: Sequence[Any], report: Progress, learned: _Learned
) -> baselines.Int8Baseline:
    report(TORCH_INT8, 0.0)
    if learned is None:
        found = baselines.torch_int8(model, batches)
    else:
        found = baselines.torch_int8(model, batches, calibration=list(learned()))
    report(TORCH_INT8, 1.0)
    return found


def _calibration(calibration: Any, head: list[Any]) -> _Learned:
    """A function that gives the batches to learn from, anew at each call."""
    if calibration is None:
        return None
    if isinstance(calibration, str):
        if calibration != "inputs":
            raise ValueError(
                f"`calibration` is {calibration!r}: pass batches, or 'inputs' to take the inputs"
            )
        return repeatable(head)
    return repeatable(calibration)


def _no_progress(stage: str, share: float) -> None:
    pass


def _dtype_name(model: nn.Module) -> str:
    """ "float32", or what the model's first floating parameter has."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(dtypes, torch.float32)).removeprefix("torch.")


def _cpu_name() -> str:
    from lowbit.info import cpu_info

    return str(cpu_info()["cpu"]["model"])


def _batches(inputs: Any) -> Iterator[Any]:
    if isinstance(inputs, (torch.Tensor, tuple, Mapping)):
        return iter([inputs])
    if isinstance(inputs, Iterable):
        return iter(inputs)
    raise ValueError(
        f"`inputs` is a {type(inputs).__name__}: expected a tensor, a tuple, a mapping, or an "
        "iterable of these"
    )


def _batch_size(batch: Any) -> int:
    """First dimension of the first tensor; 1 where there is none."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    for value in batch if isinstance(batch, (tuple, list)) else [batch]:
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return int(value.shape[0])
    return 1


def _models(
    model: nn.Module,
    candidates: Mapping[str, Any] | Sequence[str],
    reserved: Sequence[str],
    report: Progress,
    learned: _Learned,
) -> dict[str, nn.Module]:
    """The candidates as models, recipes converted."""
    from lowbit.convert import quantize

    if isinstance(candidates, str):
        candidates = [candidates]
    if not isinstance(candidates, Mapping):
        candidates = {str(recipe): recipe for recipe in candidates}
    if not candidates:
        raise ValueError("`candidates` is empty")
    for name in reserved:
        if name in candidates:
            raise ValueError(f"a candidate cannot be called {name!r}: that row is a baseline")
    models: dict[str, nn.Module] = {}
    for done, (name, candidate) in enumerate(candidates.items()):
        report("converting", done / len(candidates))
        if isinstance(candidate, nn.Module):
            models[name] = candidate
        elif candidate is None or not Scheme.parse(candidate).learns:
            models[name] = quantize(model, candidate)
        elif learned is None:
            raise ValueError(
                f"candidate {name!r} learns from calibration data: pass calibration=batches, or "
                "calibration='inputs' to let it learn from the inputs that it is compared on"
            )
        else:
            models[name] = quantize(model, candidate, calibration=learned)
    report("converting", 1.0)
    return models


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is not None and count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _call(name: str, model: nn.Module, batch: Any) -> Callable[[], Any]:
    def call() -> Any:
        try:
            return baselines.run(model, batch)
        except Exception as error:
            raise RuntimeError(f"{name!r} failed on the inputs: {error}") from error

    return call


def _qualities(
    sides: Mapping[str, nn.Module],
    batches: Iterable[Any],
    task: object,
    notes: Mapping[str, list[str]],
    report: Progress,
) -> tuple[dict[str, Quality], int]:
    """Quality of all sides but the first, against the first; and the number of batches.

    torch INT8 may fail where a candidate must not (a traced model knows one shape): it then gets
    a note in place of its quality.
    """
    (_, reference), *others = sides.items()
    meters = {name: QualityMeter(task) for name, _ in others}
    count = 0
    for count, batch in enumerate(batches, start=1):
        expected = baselines.run(reference, batch)
        for name, side in others:
            if name not in meters:
                continue
            try:
                meters[name].update(expected, baselines.run(side, batch), batch)
            except Exception as error:
                if name != TORCH_INT8:
                    raise RuntimeError(f"{name!r} failed on batch {count}: {error}") from error
                reason = one_line(error)
                notes[name].append(f"no quality, failed on batch {count}: {reason}")
                del meters[name]
        report(f"quality, batch {count}", 1.0)
    return {name: meter.result() for name, meter in meters.items()}, count


def _row(
    name: str,
    sides: Mapping[str, nn.Module],
    timings: Mapping[str, Timing],
    memory: MemoryUse | None,
    quality: Quality | None,
    batch_size: int,
    notes: Sequence[str],
) -> Row:
    reference, model = next(iter(sides)), sides[name]
    kind = "float" if name == reference else "torch" if name == TORCH_INT8 else "candidate"
    timed = timings[name]
    file_bytes, failure = _file_bytes(model)
    over_torch = timings.get(TORCH_INT8)
    return Row(
        name=name,
        kind=kind,
        timing=timed,
        samples_per_second=batch_size / timed.p50,
        speedup=timing.ratio(timings[reference], timed),
        speedup_over_torch=None if over_torch is None else timing.ratio(over_torch, timed),
        weight_bytes=baselines.weight_bytes(model),
        file_bytes=file_bytes,
        memory_growth_bytes=None if memory is None else memory.growth,
        peak_memory_bytes=None if memory is None else memory.peak,
        quality=quality,
        notes=(*notes, *([failure] if failure else [])),
    )


def _file_bytes(model: nn.Module) -> tuple[int | None, str]:
    """Size of the saved model, or why it cannot be saved."""
    from lowbit.nn.layer import LowbitLayer
    from lowbit.serialize import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        try:
            if any(isinstance(module, LowbitLayer) for module in model.modules()):
                save_file(model, path)
            else:
                torch.save(model.state_dict(), path)
        except Exception as error:  # foreign models: whatever their state_dict hooks raise
            return None, f"not saved: {one_line(error)}"
        return path.stat().st_size, ""
