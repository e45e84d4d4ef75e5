"""The page of static networks, in Markdown, from lines of `bench/static.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from lowbit.benchmark.static_networks import (
    FLOAT32,
    INT8,
    MODELS,
    OPENVINO,
    OVER_FLOAT32,
    STATIC,
)

Line = Mapping[str, Any]

_SHOWN_STEPS = 15
_TOP1, _PERCENT = 0.97, 100


def static_page(lines: Sequence[Line], command: str = "python bench/static.py") -> str:
    """The page.

    Args:
        lines: of `lowbit.benchmark.runner.load`.
        command: what wrote them.
    """
    parts = [
        "# Static networks: results",
        f"Written by `{command}`; not to be edited.",
        "Networks at w8a8-static, in integers from end to end, against torch's float32 "
        "(channels_last), torch's INT8 (FX, the quicker engine), our dynamic w8a8 and OpenVINO's "
        "INT8, on the same calibration images. Each case is a process of its own, its sides timed "
        "alternately, from float32 to float32. Times are medians; a ratio is the median of the "
        "rounds' ratios.",
        _environment(lines),
        "## Time",
        _times(lines),
        "## Targets",
        _targets(lines),
        "## Quality",
        _quality(lines),
        "## Where the time goes",
        _breakdown(lines),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rows(line: Line) -> dict[str, Any]:
    return {row["name"]: row for row in line["result"]["rows"]}


def _label(line: Line) -> list[Any]:
    case = line["case"]
    return [case["static"], case["batch"], case["threads"]]


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _environment(lines: Sequence[Line]) -> str:
    found = lines[0]["result"]["environment"]
    return f"Measured on: {found['cpu']['model']}, {found['isa']['chosen']}."


def _times(lines: Sequence[Line]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in _rows(line)))
    rows = []
    for line in lines:
        found = _rows(line)
        times = [
            f"{1e3 * found[n]['timing']['p50_seconds']:.2f}" if n in found else "" for n in names
        ]
        rows.append([*_label(line), *times])
    headers = ["network", "batch", "threads", *(f"{name}, ms" for name in names)]
    return _table(rows, headers)


def _ratio(line: Line, other: str) -> float | None:
    """How many times quicker than another side the static network is."""
    versus = _rows(line)[STATIC]["versus"].get(other)
    return None if versus is None else float(versus["median"])


def _targets(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        model = MODELS[line["case"]["static"]]
        cells = []
        for other, target in ((FLOAT32, OVER_FLOAT32), (INT8, model.over_int8), (OPENVINO, 1.0)):
            ratio = _ratio(line, other)
            if ratio is None:
                cells.append("not measured")
            else:
                verdict = "met" if ratio >= target else "missed"
                cells.append(f"{ratio:.2f} (target {target:g}: {verdict})")
        rows.append([*_label(line), *cells])
    headers = ["network", "batch", "threads", "x float32", "x torch int8", "x OpenVINO int8"]
    return "How many times quicker w8a8-static is.\n\n" + _table(rows, headers)


def _quality(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        for name, row in _rows(line).items():
            quality = row.get("quality")
            if not quality or name == FLOAT32:
                continue
            top1 = _PERCENT * quality["top1_agreement"]
            images = quality["rows"]
            network = line["case"]["static"]
            rows.append([network, name, f"{quality['sqnr_db']:.2f}", f"{top1:.1f}", images])
    if not rows:
        return "Not measured."
    headers = ["network", "side", "SQNR, dB", "same first guess, %", "images"]
    target = f"Target: {_PERCENT * _TOP1:g} % at least, and no less SQNR than torch's INT8."
    return f"Against float32, on images that were not calibrated on. {target}\n\n" + _table(
        rows, headers
    )


def _breakdown(lines: Sequence[Line]) -> str:
    parts = []
    for line in lines:
        steps = [tuple(step) for step in line["result"]["steps"]]
        if not steps or line["case"]["threads"] != 1:
            continue
        layers = [tuple(layer) for layer in line["result"]["layers"]]
        network = line["case"]["static"]
        parts.append(f"### {network}, batch 1, one thread")
        parts.append(_by_kind(steps, layers))
        slowest = sorted(steps, key=lambda step: -step[2])[:_SHOWN_STEPS]
        rows = [[name, kind, f"{1e6 * seconds:.0f}"] for name, kind, seconds in slowest]
        parts.append("Our slowest steps:\n\n" + _table(rows, ["call", "step", "us"]))
        slowest = sorted(layers, key=lambda layer: -layer[2])[:_SHOWN_STEPS]
        rows = [[name, kind, f"{1e6 * seconds:.0f}"] for name, kind, seconds in slowest]
        if rows:
            parts.append("OpenVINO's slowest layers:\n\n" + _table(rows, ["layer", "kernel", "us"]))
    return "\n\n".join(parts)


def _by_kind(
    steps: Sequence[tuple[str, str, float]], layers: Sequence[tuple[str, str, float]]
) -> str:
    """Sums of the steps of each operation, and of OpenVINO's kernels."""
    tables = []
    for title, found in (("Ours", steps), ("OpenVINO's", layers)):
        sums: dict[str, tuple[int, float]] = {}
        for _, kind, seconds in found:
            count, total = sums.get(kind, (0, 0.0))
            sums[kind] = count + 1, total + seconds
        ordered = sorted(sums.items(), key=lambda item: -item[1][1])
        rows = [[kind, count, f"{1e6 * total:.0f}"] for kind, (count, total) in ordered]
        rows.append(["all", len(found), f"{1e6 * sum(step[2] for step in found):.0f}"])
        if found:
            tables.append(f"{title}:\n\n" + _table(rows, ["kind", "steps", "us"]))
    return "\n\n".join(tables)
