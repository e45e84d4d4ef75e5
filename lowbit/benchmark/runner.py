"""Runs cases in processes of their own and saves each result when it is there.

No engine's caches, threads or crash reach another process's cases. Each result is appended to a
file of JSON lines as soon as it is done, and a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

Lines = Generator[str, None, None]


@dataclass(frozen=True)
class SavedCase(ABC):
    """What is measured and saved as a whole; equal cases of two runs are the same measurement."""

    @property
    def key(self) -> str:
        """What distinguishes a measurement from another one."""
        return _key(dataclasses.asdict(self))

    @property
    @abstractmethod
    def cost(self) -> float:
        """Roughly how many seconds it takes: the proportions foretell the end of a run."""

    def beside(self, other: Any) -> bool:
        """Whether two cases of the same kind can share a process; by default each has its own."""
        return bool(self == other)

    def options(self, batch: Sequence[Any]) -> dict[str, Any]:
        """What the worker is told, for cases that share a process, this one the first of them.

        By default the case's own fields.
        """
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def command(batch: Sequence[SavedCase]) -> list[str]:
    """The command line of the process for cases that can share one."""
    options = json.dumps(batch[0].options(batch))
    return [sys.executable, "-m", "lowbit.benchmark.worker", options]


def run(
    cases: Sequence[SavedCase],
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
        ValueError: a line of the file is not one of a benchmark.
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


def _append(path: Path, case: SavedCase, result: Any) -> None:
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = {"case": dataclasses.asdict(case), "finished": finished, "result": result}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _key(case: dict[str, Any]) -> str:
    # Lines from before there were convolutions do not name their operation.
    return json.dumps(({"op": "linear"} if "shape" in case else {}) | case, sort_keys=True)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The key and the content of every line of a file; none if there is no file."""
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            key = _key(line["case"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a result of a benchmark") from error
        found.append((key, line))
    return found


def load(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, in the order of measuring; of equal cases the last.

    Raises:
        ValueError: a line is not one of a benchmark, or there is none.
    """
    found = dict(_lines(path))
    if not found:
        raise ValueError(f"{path} holds no results")
    return list(found.values())
