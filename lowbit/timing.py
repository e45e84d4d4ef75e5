"""Measuring time and memory: the one home for both.

Two figures that are to be compared are taken alternately, round by round, in one process: whatever
else the machine does then falls on both sides, and the ratio within a round is worth more than the
ratio of two averages. `alternate` measures, `ratio` compares.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """What one side took, in seconds.

    Attributes:
        first: the side's first call, before any warm-up.
        seconds: one figure per round, in the order of the rounds.
    """

    first: float
    seconds: tuple[float, ...]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.seconds)

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return float(np.mean(self.seconds))

    @property
    def std(self) -> float:
        """Sample standard deviation (n - 1); 0 with a single round."""
        return float(np.std(self.seconds, ddof=1)) if self.rounds > 1 else 0.0

    @property
    def p50(self) -> float:
        """Median."""
        return self.percentile(50)

    @property
    def p95(self) -> float:
        """95th percentile."""
        return self.percentile(95)

    def percentile(self, percent: float) -> float:
        """Percentile with linear interpolation between the rounds."""
        return float(np.percentile(self.seconds, percent))

    def to_dict(self) -> dict[str, float | int]:
        """The figures, in seconds, without the single rounds."""
        return {
            "first_seconds": self.first,
            "mean_seconds": self.mean,
            "std_seconds": self.std,
            "p50_seconds": self.p50,
            "p95_seconds": self.p95,
            "rounds": self.rounds,
        }


@dataclass(frozen=True)
class Ratio:
    """How many times longer one side took than another: the median of the rounds' ratios.

    Attributes:
        median, p10, p25, p75, p90: percentiles of the ratio over the rounds.
        rounds: number of rounds.
    """

    median: float
    p10: float
    p25: float
    p75: float
    p90: float
    rounds: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name."""
        return {
            "median": self.median,
            "p10": self.p10,
            "p25": self.p25,
            "p75": self.p75,
            "p90": self.p90,
            "rounds": self.rounds,
        }

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.p10:.2f}-{self.p90:.2f})"


def ratio(a: Timing, b: Timing) -> Ratio:
    """Time of `a` over time of `b`, round by round; the speed-up of `b` over `a`.

    Args:
        a: numerator, from the same `alternate` call as `b`.
        b: denominator.

    Raises:
        ValueError: the two do not have the same number of rounds (or none), or `b` took no time.
    """
    if a.rounds != b.rounds or a.rounds == 0:
        raise ValueError(f"the sides have {a.rounds} and {b.rounds} rounds: not timed together")
    if min(b.seconds) <= 0.0:
        raise ValueError("a round of the denominator took no measurable time")
    quotients = np.asarray(a.seconds) / np.asarray(b.seconds)
    p10, p25, median, p75, p90 = (float(p) for p in np.percentile(quotients, [10, 25, 50, 75, 90]))
    return Ratio(median, p10, p25, p75, p90, a.rounds)


def alternate(
    sides: Mapping[str, Callable[[], Any]],
    *,
    min_rounds: int = 10,
    max_rounds: int = 10_000,
    budget_seconds: float = 5.0,
    warmup: int = 2,
    calls_per_round: int = 1,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times several sides alternately.

    Every side is called once (its first call, kept apart), then `warmup` times, and then all sides
    take turns, in the given order, round after round, until the budget is spent. The garbage
    collector is off while a round runs.

    Args:
        sides: name -> callable without arguments.
        min_rounds: rounds taken even if the budget does not suffice.
        max_rounds: rounds after which it stops although budget is left.
        budget_seconds: wall time of all rounds together, seconds.
        warmup: untimed calls of every side after its first call.
        calls_per_round: calls in succession that one round's figure is the mean of. 1 keeps
            every call's own time; more is for what is shorter than some 20 microseconds.
        progress: called with the share of the work done, 0..1, after every round.
        clock: returns seconds; for tests.

    Returns:
        name -> Timing, all with the same number of rounds, in the order of `sides`.

    Raises:
        ValueError: no sides, or a count below 1 (`warmup`: below 0).
    """
    if not sides:
        raise ValueError("nothing to time: `sides` is empty")
    if min_rounds < 1 or max_rounds < min_rounds or calls_per_round < 1 or warmup < 0:
        raise ValueError(
            f"need 1 <= min_rounds <= max_rounds, calls_per_round >= 1 and warmup >= 0, got "
            f"{min_rounds}, {max_rounds}, {calls_per_round} and {warmup}"
        )
    first: dict[str, float] = {}
    for name, call in sides.items():
        first[name] = _time(call, 1, clock)
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    begin = clock()
    for done in range(1, max_rounds + 1):
        with _no_garbage_collection():
            for name, call in sides.items():
                seconds[name].append(_time(call, calls_per_round, clock))
        elapsed = clock() - begin
        if progress is not None:
            spent = 1.0 if budget_seconds <= 0 else elapsed / budget_seconds
            progress(min(1.0, max(done / max_rounds, min(done / min_rounds, spent))))
        if done >= min_rounds and elapsed >= budget_seconds:
            break
    return {name: Timing(first[name], tuple(seconds[name])) for name in sides}


def _time(call: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    """Mean seconds of `calls` calls."""
    begin = clock()
    for _ in range(calls):
        call()
    return (clock() - begin) / calls


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class ResidentMemory:
    """Resident memory of this process, bytes.

    Attributes:
        current: now; None where the system does not say.
        peak: the most since the process began, or since the last `reset_peak` that succeeded.
    """

    current: int | None
    peak: int | None


def resident_memory(status: Path = Path("/proc/self/status")) -> ResidentMemory:
    """Current and peak resident memory (Linux: VmRSS and VmHWM; elsewhere getrusage's peak)."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return ResidentMemory(None, _peak_from_getrusage())
    found = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    current, peak = (
        int(found[key][0]) * 1024 if found.get(key) else None for key in ("VmRSS", "VmHWM")
    )
    return ResidentMemory(current, peak if peak is not None else _peak_from_getrusage())


def _peak_from_getrusage() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def reset_peak(clear_refs: Path = Path("/proc/self/clear_refs")) -> bool:
    """Sets the peak resident memory to the current one. False where the system refuses."""
    try:
        clear_refs.write_text("5")
    except OSError:
        return False
    return True


_COUNTING_SLACK_BYTES = 4 << 20


@dataclass(frozen=True)
class MemoryUse:
    """Resident memory while something ran, bytes.

    Attributes:
        growth: how far the process rose above where it stood before.
        peak: the process's highest resident memory meanwhile, everything that lives in it included.
    """

    growth: int
    peak: int


def memory_use(call: Callable[[], Any]) -> MemoryUse | None:
    """Resident memory that one call takes on top of what the process holds.

    Free memory is handed back to the system first, so that the call cannot hide in what earlier
    work left behind. Buffers that a library keeps between calls were taken by earlier calls, and
    are not in the growth. The kernel counts in batches: take differences below 0.5 MB as zero.

    Returns:
        None where the system cannot reset its peak or does not tell it.
    """
    gc.collect()
    _return_free_memory()
    if not reset_peak():
        return None
    before = resident_memory()
    call()
    after = resident_memory()
    if before.current is None or before.peak is None or after.peak is None:
        return None
    if before.peak > before.current + _COUNTING_SLACK_BYTES:  # accepted, and without effect
        return None
    return MemoryUse(max(0, after.peak - before.current), after.peak)


def _return_free_memory() -> None:
    """glibc's malloc_trim, where there is one."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
