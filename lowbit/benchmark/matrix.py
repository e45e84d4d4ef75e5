"""The whole matrix of the linear benchmark: every shape, M, number of threads and place of weights.

The cases of one shape run in a process of their own (`worker.py`), so that no engine's caches,
threads or crash reach the other shapes, and each is appended to a file of JSON lines as soon as it
is done. A run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lowbit.benchmark.measure import MAX_COPIES
from lowbit.benchmark.run import STREAM_M, Options

SHAPES = (
    "4096x4096",
    "4096x14336",
    "11008x4096",
    "768x3072",
    "3072x768",
    "1024x1024",
    "384x1536",
)
M = (1, 4, 8, 32, 128, 512)
THREADS = (1, 2)
FORMATS = ("w8a8", "w4a8", "w2a8", "w1a8", "w1a1", "w8a16", "w4a16")
GROUPED_FORMATS = ("w8a8-g128", "w4a8-g128", "w4a8-g32", "w2a8-g128", "w2a8-g32", "w1a8-g128")
WEIGHTS = ("memory", "cache")

Lines = Generator[str, None, None]


@dataclass(frozen=True)
class MatrixCase:
    """One group of the matrix; equal cases of two runs are the same measurement.

    Attributes:
        shape, m, threads: as in `Options`.
        weights: "memory" or "cache", where the weights come from.
        formats: lowbit's recipes.
        peers: engines to race; None for all.
        isa: forces an ISA; None keeps the one in use.
        seconds: for the rounds.
    """

    shape: str
    m: int
    threads: int
    weights: str
    formats: tuple[str, ...] = FORMATS
    peers: tuple[str, ...] | None = None
    isa: str | None = None
    seconds: float = 3.0

    def __str__(self) -> str:
        return f"{self.shape} M={self.m} T={self.threads} {self.weights}"

    @property
    def key(self) -> str:
        """What distinguishes a measurement from another one."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def beside(self, other: MatrixCase) -> bool:
        """Whether the two differ in M alone, and can share a process."""
        return dataclasses.replace(self, m=other.m) == other

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        k, n = map(int, self.shape.split("x"))
        return self.m * k * n

    @property
    def cost(self) -> float:
        """Roughly how many seconds it takes: to build, in many copies or one, and to time.

        Measured with all peers on one machine; only the proportions matter, to foretell the end.
        """
        weights = self.macs / self.m / 1e6
        building = 35.0 + weights / 2 if self.weights == "memory" else 3.0 + weights / 6
        return building + max(self.seconds, 5e-9 * self.macs / math.sqrt(self.threads))


def command(batch: Sequence[MatrixCase]) -> list[str]:
    """The command line of the process for cases that differ in M alone."""
    case = batch[0]
    options = {
        "shapes": [case.shape],
        "m": [case.m for case in batch],
        "threads": [case.threads],
        "formats": case.formats,
        "isa": case.isa,
        "budget_seconds": case.seconds,
    }
    if case.peers is not None:
        options["peers"] = case.peers
    if case.weights == "cache":
        options["rotate_bytes"] = 0
    return [sys.executable, "-m", "lowbit.benchmark.worker", json.dumps(options)]


def cases(
    shapes: Iterable[str] = SHAPES,
    ms: Iterable[int] = M,
    threads: Iterable[int] = THREADS,
    weights: Sequence[str] = WEIGHTS,
    **common: Any,
) -> list[MatrixCase]:
    """All cases of the subsets given; `common` holds the other fields of `MatrixCase`.

    Weights come from memory only where it makes a difference (few rows) and can be arranged: the
    narrowest weights of a layer, in as many copies as are allowed, must exceed the caches.
    """
    found = []
    for count in threads:
        for shape in shapes:
            for place in weights:
                for m in ms:
                    case = MatrixCase(shape, m, count, place, **common)
                    if place == "cache" or (m <= STREAM_M and _rotates(case)):
                        found.append(case)
    return found


def _rotates(case: MatrixCase) -> bool:
    narrowest = case.macs // case.m // 8
    return MAX_COPIES * narrowest >= Options.rotate_bytes


def run(
    cases: Sequence[MatrixCase],
    path: Path,
    *,
    minutes: float | None = None,
    stream: Callable[[list[str]], Lines] | None = None,
) -> int:
    """Runs the cases that the file does not hold yet.

    Args:
        cases: what to run.
        path: file of JSON lines, made if it does not exist.
        minutes: after that many minutes the run ends with the case that it is at; None for all.
        stream: runs a command and yields what it prints, line by line; for tests.

    Returns:
        How many of the cases are not done: those that failed, and those that time ran out for.

    Raises:
        ValueError: a line of the file is not one of this benchmark.
    """
    done = {key for key, _ in _lines(path)}
    waiting = [case for case in cases if case.key not in done]
    left = len(waiting)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with tqdm(total=sum(c.cost for c in waiting), bar_format=_BAR, disable=None) as bar:
        while waiting:
            batch = list(itertools.takewhile(lambda case: case.beside(waiting[0]), waiting))
            bar.set_description(str(batch[0]))
            with contextlib.closing((stream or _stream)(command(batch))) as texts:
                for case, text in zip(batch, texts, strict=False):
                    _append(path, case, json.loads(text))
                    waiting.remove(case)
                    left -= 1
                    bar.update(case.cost)
                    bar.set_description(str(waiting[0]) if waiting else "")
                    if end is not None and time.monotonic() > end:
                        return left
            if waiting and waiting[0] in batch:  # its process ended without a result
                tqdm.write(f"{waiting[0]}: failed", file=sys.stderr)
                bar.update(waiting.pop(0).cost)
    return left


_BAR = "{percentage:3.0f} %|{bar:20}| {elapsed} gone, {remaining} to go: {desc}"


def _stream(command: list[str]) -> Lines:
    """What a process prints; it is ended when the caller wants no more."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield from process.stdout
        finally:
            process.terminate()


def _append(path: Path, case: MatrixCase, result: Any) -> None:
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = {"case": dataclasses.asdict(case), "finished": finished, "result": result}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The key and the content of every line of a file; none if there is no file."""
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            key = json.dumps(line["case"], sort_keys=True)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a result of the matrix") from error
        found.append((key, line))
    return found


def load(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, in the order of measuring; of equal cases the last.

    Raises:
        ValueError: a line is not one of this benchmark, or there is none.
    """
    found = dict(_lines(path))
    if not found:
        raise ValueError(f"{path} holds no results")
    return list(found.values())
