"""Mixed schemes that `lowbit.search` finds against uniform ones of the same bytes.

EfficientNet-Lite0 over crops of photographs. Quantizers learn from one half of the photographs to
calibrate with, the search looks at the other half, and what it finds is judged on crops of further
photographs (`lowbit.benchmark.quality.photographs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from lowbit.baselines import run as run_model
from lowbit.baselines import weight_bytes
from lowbit.benchmark.quality import photographs
from lowbit.mixed.found import Found
from lowbit.mixed.journal import Journal, fingerprint
from lowbit.mixed.layers import Conversion
from lowbit.mixed.search import search_many
from lowbit.quality import Quality, QualityMeter
from lowbit.schemes import Scheme

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        schemes: what the search may choose from; the first is the one whose half the target is
            about.
        uniform: schemes for the whole model, judged beside what the search finds for their bytes.
        batches: of 8 crops, that the search looks at.
        test_batches: of 8 crops, that the results are judged on.
        rounds: of refinement.
        quantize: further arguments of `lowbit.quantize`.
    """

    schemes: tuple[str, ...] = ("w8a8", "w8a16", "w4a8-descent", "w2a8-g64-descent")
    uniform: tuple[str, ...] = ("w8a8", "w4a8-descent", "w4a8-g32-descent", "w2a8-g64-descent")
    batches: int = 5
    test_batches: int = 30
    rounds: int = 1
    quantize: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Line:
    """One model.

    Attributes:
        name: a scheme, or what was searched for.
        bytes: parameters and buffers.
        quality: on the crops to judge by.
        mixed: whether it was searched for.
        layers: how many layers have each scheme.
    """

    name: str
    bytes: int
    quality: Quality
    mixed: bool
    layers: Mapping[str, int]


def run(options: Options, folder: Path, progress: Progress) -> list[Line]:
    """Measures everything; goes on from what lies in `folder`."""
    model = photographs.load()
    # Of other photographs, too: learned layers do better on crops of those that they have seen.
    learn, look = (photographs.calibration(photographs.CALIBRATION[i::2]) for i in (0, 1))
    look = look[: options.batches]
    tests = photographs.tests()
    tests = tests[:: max(1, len(tests) // options.test_batches)]
    conversion = Conversion(calibration=learn, options=dict(options.quantize or {}))
    header = {"model": fingerprint(model), "options": repr(options)}
    journal = Journal(folder / "judged.jsonl", header)
    with torch.inference_mode():
        wanted = [run_model(model, x) for x in tests]

    def judged(copy: nn.Module) -> dict[str, Any]:
        meter = QualityMeter("classification")
        with torch.inference_mode():
            for reference, x in zip(wanted, tests, strict=True):
                meter.update(reference, run_model(copy, x), x)
        return {"bytes": weight_bytes(copy), "quality": meter.result().to_dict()}

    def uniform(scheme: Scheme) -> dict[str, Any]:
        return judged(conversion.quantize(model, scheme))

    lines = []
    for name in options.uniform:
        progress(name, 0.0)
        entry = journal.get(name, partial(uniform, Scheme.parse(name)))
        lines.append(Line(name, entry["bytes"], Quality(**entry["quality"]), False, {}))
    limits = _limits(lines)
    missing = [limit for limit in limits if f"{limit} bytes" not in journal]

    def keep(found: Found, copy: nn.Module) -> None:
        entry = judged(copy) | {"schemes": found.overrides}
        journal.get(f"{missing.pop(0)} bytes", partial(dict, entry))

    if missing:
        search_many(
            model,
            look,
            list(missing),
            options.schemes,
            task="classification",
            allow_slower=True,
            rounds=options.rounds,
            front=0,
            calibration=learn,
            options=options.quantize,
            resume=folder / "search.jsonl",
            progress=progress,
            each=keep,
        )
    for limit, name in limits.items():
        entry = journal.get(f"{limit} bytes", dict)
        chosen = [scheme or "float" for scheme in entry["schemes"].values()]
        counts = {scheme: chosen.count(scheme) for scheme in dict.fromkeys(sorted(chosen))}
        lines.append(Line(name, entry["bytes"], Quality(**entry["quality"]), True, counts))
    return lines


def _limits(lines: Sequence[Line]) -> dict[int, str]:
    """Bytes to search for, and what they are.

    Half of the first scheme's, and those of each scheme between the largest and the smallest: at
    these two there is nothing to choose.
    """
    sizes = sorted(line.bytes for line in lines)
    limits = {lines[0].bytes // 2: f"half of {lines[0].name}"}
    between = [line for line in lines if sizes[0] < line.bytes < sizes[-1]]
    return limits | {line.bytes: f"as {line.name}" for line in between}


def page(lines: Sequence[Line], command: str, target: float = 0.93) -> str:
    """The table in Markdown, smallest first, and what it says of the target."""
    cells = [
        [
            "mixed" if line.mixed else "uniform",
            line.name,
            f"{line.bytes:,}",
            _share(line.quality.top1_agreement),
            f"{line.quality.kl_divergence:.3g}",
            f"{line.quality.sqnr_db:.1f}",
            ", ".join(f"{count} {name}" for name, count in line.layers.items()),
        ]
        for line in sorted(lines, key=lambda line: (line.bytes, line.mixed))
    ]
    headers = ["", "scheme", "bytes", "top-1 agreement, %", "KL, nats", "SQNR, dB", "layers"]
    align = ("left", "left", "right", "right", "right", "right", "left")
    table = tabulate(cells, headers, "github", colalign=align, disable_numparse=True)
    half = next(line for line in lines if line.mixed and line.name.startswith("half"))
    agreement = half.quality.top1_agreement or 0.0
    verdict = "reached" if agreement >= target else "not reached"
    rows = lines[0].quality.rows
    mixed = {line.name: line for line in lines if line.mixed}
    better = [
        f"{line.name} {_share(line.quality.top1_agreement)} -> "
        f"{_share(mixed[f'as {line.name}'].quality.top1_agreement)} % (KL "
        f"{line.quality.kl_divergence:.3g} -> "
        f"{mixed[f'as {line.name}'].quality.kl_divergence:.3g})"
        for line in lines
        if f"as {line.name}" in mixed
    ]
    return (
        "\n\n".join(
            [
                "# Mixed schemes against uniform ones",
                f"Written by `{command}`. EfficientNet-Lite0, {rows} crops of six photographs; the "
                "search and the quantizers saw crops of eleven others. Bytes are all that is asked "
                "for: a layer may get slower than in float32, which `lowbit.search` keeps from by "
                "default.",
                table,
                f"At most the same bytes, uniform -> mixed: {'; '.join(better)}.",
                f"Target, {_share(target)} % at half the bytes of {lines[0].name}: {verdict}, "
                f"{_share(agreement)} % with {half.bytes:,} bytes.",
            ]
        )
        + "\n"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
