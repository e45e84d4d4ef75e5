"""The page of what each quantizer keeps: one table for each network, methods in order of effort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from lowbit.benchmark.quality.study import NETWORKS, Method, Network, QualityResult

Results = Mapping[tuple[str, str], QualityResult]
"""(network, method) -> result."""


def results(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], QualityResult]:
    """What the lines of a file of `lowbit.benchmark.runner` hold; other cases are passed over."""
    return {
        (line["case"]["quality"], line["case"]["method"]): QualityResult(**line["result"])
        for line in lines
        if "quality" in line["case"]
    }


def page(found: Results, command: str) -> str:
    """The page in Markdown.

    Args:
        found: results; rows without one are left out.
        command: what made it.
    """
    parts = ["# Quality of the weight quantizers", f"Written by `{command}`.", INTRODUCTION]
    for name, network in NETWORKS.items():
        rows = [(m, found[name, m.label]) for m in network.methods if (name, m.label) in found]
        if rows:
            parts += [f"## {network.title}", NOTES[name], table(network, rows)]
            parts += [verdict(network, goal, rows) for goal in network.targets]
    return "\n\n".join(parts) + "\n"


def table(network: Network, rows: Sequence[tuple[Method, QualityResult]]) -> str:
    """A row for each method."""
    cells = []
    for method, result in rows:
        target = network.targets.get(method.goal)
        met = ""
        if target is not None:
            met = "yes" if network.meets(method.goal, result.score) else "no"
        cells.append(
            [
                method.label,
                "yes" if method.data else "",
                _score(network, result),
                *([] if result.clear is None else [f"{result.clear:.{network.digits}f}"]),
                "" if target is None else f"{target:g}",
                met,
                f"{result.size:,}",
                f"{result.seconds:.0f}",
            ]
        )
    sure = [] if rows[0][1].clear is None else ["without near ties"]
    headers = ["method", "data", network.unit, *sure, "target", "met", "bytes", "seconds"]
    right = ("left", "left", "right", *("right" for _ in sure), "right", "left", "right", "right")
    return tabulate(cells, headers, "github", colalign=right, disable_numparse=True)


def _score(network: Network, result: QualityResult) -> str:
    text = f"{result.score:.{network.digits}f}"
    return f"{text} ±{result.deviation:.{network.digits}f}" if result.deviation else text


def verdict(network: Network, goal: str, rows: Sequence[tuple[Method, QualityResult]]) -> str:
    """The best method of a target, and by how much."""
    own = [(m, r) for m, r in rows if m.goal == goal]
    if not own:
        return f"{goal}: not measured."
    method, best = max(own, key=lambda row: network.better * row[1].score)
    reached = "reached" if network.meets(goal, best.score) else "not reached"
    text = (
        f"{goal}: target {network.targets[goal]:g} {reached}, "
        f"{best.score:.{network.digits}f} with {method.label}"
    )
    full = next((r for m, r in rows if m.label == "w8a8"), None)
    if full is not None and full.size != best.size:
        text += f", {100 * best.size / full.size:.1f} % of w8a8's bytes"
    waiting = sum(m.goal == goal for m in network.methods) - len(own)
    return f"{text}{f' ({waiting} of its methods not measured)' if waiting else ''}."


INTRODUCTION = (
    "`data`: whether the method sees calibration data, which are other images and texts than those "
    "tested. `seconds`: what `lowbit.quantize` took, calibration included. `bytes`: all parameters "
    "and buffers of the converted model. `lowbit/benchmark/quality/study.py` has what each method "
    "is, the layers of `mixed` among it."
)

NOTES = {
    "efficientnet": (
        "Calibration: 90 crops of thirty photographs; `more photographs`: a crop of each of these "
        "and of each of 258 that GCompris has, without labels; `2304 crops for the classifier`: "
        "eight of each for the last layer, which sees one row of a crop; `distilled` learns from "
        "480 of the thirty, with other colours, or from new ones of the 288 at each pass. Test: "
        "480 crops of forty other photographs, sides of 0.7 to 1 of the "
        "shorter side, half of them mirrored. ± is the standard error, from the means of the "
        "photographs. In float32, 94 of the crops, of 23 photographs, have less than 5 points of "
        "probability between the first guess and the second. `without near ties` is the agreement "
        "on the other 386. `float32 weights` rounds activations alone, dynamically: what no choice "
        "of weights gets past. Published figures are accuracies on ImageNet, which these are not: "
        "74.9 % in float32 and 74.2 % at w8a8 "
        "(github.com/Intelligent-Microsystems-Lab/HeterogeneousQuantization, "
        "examples/efficientnet); below 8 bits we found none for this network. The nearest are of "
        "MobileNetV2, 72.7 % in float32: at 4-bit weights and 8-bit activations 24.8 to 27.0 % "
        "rounded to nearest and 71.8 % with AdaRound (github.com/ModelTC/MQBench, "
        "docs/source/benchmark/ImageClassification)."
    ),
    "minilm": (
        "Calibration: 1000 sentences of the docstrings of Python's library. Test: 500 of NumPy's. "
        "The embedding is the mean over tokens. The token embeddings stay float32 and are most of "
        "the bytes."
    ),
    "fashion": (
        "Calibration: 1000 training images, without their labels. Test: 10,000. The first and the "
        "last layer are w8a8, as in [QAT.md](QAT.md)."
    ),
}
