"""Mixed schemes that `lowbit.search` finds against uniform ones of the same bytes.

Quantizers learn from one part of the data, the search looks at another, and what it finds is judged
on a third (`mixed_networks`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.baselines import weight_bytes
from lowbit.benchmark.mixed_networks import NETWORKS, Network
from lowbit.mixed.found import Found
from lowbit.mixed.journal import Journal, fingerprint
from lowbit.mixed.layers import Conversion
from lowbit.mixed.search import search_many
from lowbit.report import summary
from lowbit.schemes import Scheme

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        network: a name in `NETWORKS`.
        learned: whether the schemes are those that learn from data.
        schemes: what the search may choose from; None for the network's. The first is the one whose
            half the target is about.
        uniform: schemes for the whole model, judged beside what the search finds for their bytes.
        rounds: of refinement.
        quantize: further arguments of `lowbit.quantize`.
    """

    network: str
    learned: bool = True
    schemes: tuple[str, ...] | None = None
    uniform: tuple[str, ...] | None = None
    rounds: int = 1
    quantize: Mapping[str, Any] | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """`schemes`, or the network's."""
        return self.schemes or _network(self).schemes[0 if self.learned else 1]

    @property
    def uniforms(self) -> tuple[str, ...]:
        """`uniform`, or the network's."""
        return self.uniform or _network(self).uniform[0 if self.learned else 1]


def _network(options: Options) -> Network:
    return NETWORKS[options.network]


@dataclass(frozen=True)
class Line:
    """One model.

    Attributes:
        name: a scheme, or what was searched for.
        bytes: parameters and buffers.
        layer_bytes: of these, what belongs to layers that convert.
        figures: on the data to judge by, by the headers of the network.
        mixed: whether it was searched for.
        layers: how many layers have each scheme.
        seconds: of the processor that converting it took; of a mix, that its search took, what it
            shares with the searches before it left out.
    """

    name: str
    bytes: int
    layer_bytes: int
    figures: Mapping[str, float]
    mixed: bool
    layers: Mapping[str, int]
    seconds: float


def run(options: Options, folder: Path, progress: Progress) -> list[Line]:
    """Measures everything; goes on from what lies in `folder`."""
    network = _network(options)
    folder.mkdir(parents=True, exist_ok=True)
    model, data = network.load(), network.data()
    forward = network.forward
    conversion = Conversion(
        calibration=data.learn, forward_fn=forward, options=dict(options.quantize or {})
    )
    header = {"model": fingerprint(model), "options": repr(options)}
    journal = Journal(folder / "judged.jsonl", header)
    clock = [time.process_time()]

    def lap() -> float:
        before, clock[0] = clock[0], time.process_time()
        return clock[0] - before

    with torch.inference_mode():
        wanted = [forward(model, x) for x in data.tests]

    def judged(copy: nn.Module) -> dict[str, Any]:
        seconds = lap()
        with torch.inference_mode():
            outputs = [forward(copy, x) for x in data.tests]
        figures = network.figures(torch.cat(wanted), torch.cat(outputs))
        clock[0] = time.process_time()  # judging is no part of what a search costs
        return {"bytes": weight_bytes(copy), "figures": figures, "seconds": seconds}

    def uniform(scheme: Scheme) -> dict[str, Any]:
        lap()
        copy = conversion.quantize(model, scheme)
        own = sum(row.bytes_after for row in summary(copy).converted)
        return judged(copy) | {"layer_bytes": own}

    lines = []
    for name in options.uniforms:
        progress(name, 0.0)
        found = journal.get(name, partial(uniform, Scheme.parse(name)))
        lines.append(Line(name=name, mixed=False, layers={}, **found))
    fixed = lines[0].bytes - lines[0].layer_bytes  # what no scheme converts
    limits = searched_for(lines)
    missing = [limit for limit in limits if f"{limit} bytes" not in journal]

    def keep(found: Found, copy: nn.Module) -> None:
        entry = judged(copy) | {"schemes": found.overrides}
        journal.get(f"{missing.pop(0)} bytes", partial(dict, entry))

    if missing:
        lap()
        search_many(
            model,
            data.look,
            list(missing),
            options.choices,
            task=network.task,
            allow_slower=True,
            rounds=options.rounds,
            front=0,
            forward_fn=forward,
            calibration=data.learn,
            options=options.quantize,
            resume=folder / "search.jsonl",
            progress=progress,
            each=keep,
        )
    for limit, name in limits.items():
        entry = dict(journal.get(f"{limit} bytes", dict))
        chosen = [scheme or "float" for scheme in entry.pop("schemes").values()]
        counts = {scheme: chosen.count(scheme) for scheme in dict.fromkeys(sorted(chosen))}
        size = entry["bytes"] - fixed
        lines.append(Line(name=name, mixed=True, layers=counts, layer_bytes=size, **entry))
    return lines


def searched_for(lines: Sequence[Line]) -> dict[int, str]:
    """Bytes to search for, and what they are.

    Half of the first scheme's layers, and those of each scheme between the largest and the
    smallest: at these two there is nothing to choose. Schemes of one size share a search.
    """
    sizes = sorted(line.bytes for line in lines)
    first = lines[0]
    half = first.bytes - (first.layer_bytes + 1) // 2
    found = {half: f"half of {first.name}"}
    for line in lines:
        if sizes[0] < line.bytes < sizes[-1]:
            found.setdefault(line.bytes, f"as {line.name}")
    return found
