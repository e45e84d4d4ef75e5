"""Times the candidates of one case alternately and turns the times into rows."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from lowbit.benchmark.candidate import Candidate, Forward
from lowbit.benchmark.case import Case
from lowbit.benchmark.ceilings import Ceilings
from lowbit.benchmark.result import Group, Row
from lowbit.timing import Timing, alternate, ratio

MAX_COPIES = 256
"""Copies of one layer at most; a layer so small that this is not enough is timed from the cache."""


SPIN_SECONDS = 0.01
"""How long to wait for the threads of another engine's pool to go to sleep."""

SETTLE_CALLS, SETTLE_SECONDS = 500, 0.01
"""After that pause a side is called for so long, and so often at most, before it is timed: a core
that slept takes milliseconds to wake fully, and has lost what its caches held."""

LONG_SECONDS = 0.02
"""A call of so many seconds needs no untimed call before it: threads wake in microseconds, and
weights are read in a millisecond or two."""


FEW_OUTPUTS = 64
"""The error of fewer numbers says nothing: a sum can be close to zero by chance."""


def measure(
    case: Case,
    candidates: list[Candidate],
    ceilings: Ceilings,
    *,
    rotate_bytes: int,
    budget_seconds: float,
    min_rounds: int,
) -> Group:
    """Times all candidates of a case against each other.

    Args:
        case: layer and input.
        candidates: in the order of the table.
        ceilings: for the number of threads in use.
        rotate_bytes: if positive, every candidate runs through that many bytes of copies of its
            weights, one after the other, so that each call reads them from memory.
        budget_seconds: for all rounds together.
        min_rounds: rounds at least.

    Returns:
        The group. A candidate that could not be built or run is in `failed`, with the reason.
    """
    if rotate_bytes > 0:
        enough = all(MAX_COPIES * c.weight_bytes >= rotate_bytes for c in candidates)
        rotate_bytes = rotate_bytes if enough else 0
    sides: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    built: list[Candidate] = []
    with torch.inference_mode():
        reference = case.layer(case.x)
        output_bytes = reference.nbytes
        for candidate in candidates:
            copies = max(1, -(-rotate_bytes // candidate.weight_bytes))
            found = _build(candidate, copies, case.x, reference)
            if isinstance(found, str):
                failed[candidate.name] = found
                continue
            forwards, errors[candidate.name] = found
            sides[candidate.name] = _rotation(forwards, case.x)
            built.append(candidate)
            del found, forwards  # they hold the copies of the weights
        timings: dict[str, Timing] = {}
        if sides:
            trial = _trial(sides)
            calls = _calls_per_round(trial)
            timings = alternate(
                _settled(sides, trial, calls),
                budget_seconds=budget_seconds,
                min_rounds=min_rounds,
                calls_per_round=calls,
            )
    sides.clear()
    gc.collect()
    moved = case.x.nbytes + output_bytes
    rows = _rows(case, built, timings, errors, ceilings, moved, from_memory=rotate_bytes > 0)
    return Group(
        case.op,
        case.shape,
        case.m,
        ceilings,
        rotate_bytes,
        case.macs,
        moved,
        rows,
        failed,
    )


def _settled(
    sides: dict[str, Callable[[], Any]], trial: dict[str, float], calls: int
) -> dict[str, Callable[[], Any]]:
    """The same sides, each after a pause and untimed calls of its own.

    Threads of an engine go on spinning for milliseconds after its call, and would take the cores
    from the next one, on one thread as well: an engine with a pool of its own keeps it busy. After
    the pause the untimed calls wake that one's threads, as the layers before do in a model, and
    bring weights that are not rotated back into the caches, from which the other engines have
    pushed them. A call that takes long by itself, in the `trial`, does not show either. `calls` is
    how often every side is called in a round.
    """

    def settle(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        count = itertools.count()
        untimed = math.ceil(min(SETTLE_CALLS, SETTLE_SECONDS / trial[name]))
        untimed = 0 if trial[name] >= LONG_SECONDS else untimed

        def pause_and_call() -> None:
            if next(count) % calls == 0:  # once in a round
                time.sleep(SPIN_SECONDS)
                for _ in range(untimed):
                    call()

        return pause_and_call

    settled: dict[str, Callable[[], Any]] = {}
    for name, call in sides.items():
        settled[f"before {name}"] = settle(name, call)
        settled[name] = call
    return settled


def _trial(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of a call of each side, roughly."""
    found = alternate(sides, warmup=1, min_rounds=1, max_rounds=1, budget_seconds=0)
    return {name: timing.p50 for name, timing in found.items()}


def _calls_per_round(trial: dict[str, float]) -> int:
    """Enough calls that the clock does not matter to the quickest side, if no side is slow."""
    quickest, slowest = min(trial.values()), max(trial.values())
    return max(1, min(int(100e-6 / quickest), int(5e-3 / slowest)))


def relative_error(reference: torch.Tensor, output: torch.Tensor) -> float:
    """Euclidean norm of the difference over that of the reference."""
    output = output.dequantize() if output.is_quantized else output
    if output.shape != reference.shape:
        raise ValueError(f"output shape {list(output.shape)}, expected {list(reference.shape)}")
    return float((output - reference).norm() / reference.norm())


def _build(
    candidate: Candidate, copies: int, x: torch.Tensor, reference: torch.Tensor
) -> tuple[list[Forward], float] | str:
    """Copies of a layer that have run once and their error, or why the layer cannot be had."""
    try:
        forwards = [candidate.build() for _ in range(copies)]
        error = max(relative_error(reference, forward(x)) for forward in forwards)
        few = reference.numel() < FEW_OUTPUTS and math.isfinite(error)
        if not (error <= candidate.most_error or few):  # or NaN
            raise ArithmeticError(
                f"relative error {error:.3g}, at most {candidate.most_error} is this layer"
            )
        return forwards, error
    except Exception as error:  # an engine may refuse in any way
        return reason(error)


def _rotation(forwards: list[Forward], x: torch.Tensor) -> Callable[[], Any]:
    if len(forwards) == 1:
        (forward,) = forwards
        return lambda: forward(x)
    following = itertools.cycle(forwards).__next__
    return lambda: following()(x)


def _rows(
    case: Case,
    candidates: list[Candidate],
    timings: dict[str, Timing],
    errors: dict[str, float],
    ceilings: Ceilings,
    activation_bytes: int,
    from_memory: bool,
) -> list[Row]:
    float32 = _quickest(timings, "torch float32")
    int8 = _quickest(timings, "torch int8")
    rows = []
    for candidate in candidates:
        timing = timings[candidate.name]
        read = candidate.weight_bytes / timing.p50
        computing = None
        if candidate.probe is not None:
            peak = ceilings.macs_per_second(candidate.probe)
            computing = case.macs * candidate.passes / peak
        # A linear's few rows are small beside its weights, a convolution's images are not.
        moved = candidate.weight_bytes + (activation_bytes if case.op == "conv" else 0)
        source, rate = ceilings.bytes_per_second(moved, from_memory)
        reading = moved / rate
        if candidate.probe is not None and (computing or 0.0) >= reading:
            source = candidate.probe
        peer = fastest_peer(candidate, candidates, timings) if candidate.own else None
        rows.append(
            Row(
                name=candidate.name,
                timing=timing,
                versus_float32=ratio(float32, timing) if float32 else None,
                versus_torch_int8=ratio(int8, timing) if int8 else None,
                macs_per_second=case.macs / timing.p50,
                fraction_of_peak=None if computing is None else computing / timing.p50,
                bytes_per_second=read,
                fraction_of_read=read / ceilings.read if from_memory else None,
                weight_bytes=candidate.weight_bytes,
                relative_error=errors[candidate.name],
                own=candidate.own,
                layout=candidate.layout,
                rival=candidate.rival,
                widths=candidate.widths,
                activation_bits=candidate.activation_bits,
                bound=source,
                fraction_of_bound=max(computing or 0.0, reading) / timing.p50,
                peer=peer.name if peer else None,
                peer_rivals=peer is not None and candidate.rivals(peer),
                versus_peer=ratio(timings[peer.name], timing) if peer else None,
            )
        )
    return rows


def fastest_peer(
    candidate: Candidate, candidates: list[Candidate], timings: dict[str, Timing]
) -> Candidate | None:
    """The quickest of the peers that offer a candidate's width; if none does, of the 8-bit ones."""
    peers = [other for other in candidates if candidate.races(other)]
    rivals = [other for other in peers if candidate.rivals(other)]
    rivals = rivals or [other for other in peers if 8 in other.widths]
    return min(rivals, key=lambda other: timings[other.name].p50, default=None)


def _quickest(timings: dict[str, Timing], prefix: str) -> Timing | None:
    """The best variant of an engine (memory format, backend): what a ratio is taken against."""
    variants = [timing for name, timing in timings.items() if name.startswith(prefix)]
    return min(variants, key=lambda timing: timing.p50, default=None)


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
