"""What the demo found, and the text that it prints: every word on a width is computed from that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from lowbit.compare import TORCH_INT8
from lowbit.comparison import Comparison
from lowbit.demo.network import Prediction
from lowbit.demo.schemes import MIXED_RECIPE
from lowbit.report import Report


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        predictions: model ("float32" first) -> photograph -> prediction.
        reports: scheme -> the account of its conversion.
        comparison: speed, size and quality over all views of all photographs.
    """

    predictions: dict[str, dict[str, Prediction]]
    reports: dict[str, Report]
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {
            "predictions": {
                model: {photo: vars(seen) for photo, seen in row.items()}
                for model, row in self.predictions.items()
            },
            "reports": {name: report.to_dict() for name, report in self.reports.items()},
            "comparison": self.comparison.to_dict(),
        }

    def __str__(self) -> str:
        accounts = "\n".join(account(name, report) for name, report in self.reports.items())
        quality = self.comparison[next(iter(self.reports))].quality
        assert quality is not None  # only float32 has none
        photos = len(self.predictions["float32"])
        views = (
            f"{quality.rows} views of {photos} photographs, channels_last; static schemes and "
            "torch INT8\nlearned their scales from the same"
        )
        return "\n\n".join(
            [
                "What the network sees: its first guess, how sure it is (* differs from float32)",
                prediction_tables(self.predictions, shutil.get_terminal_size((100, 24)).columns),
                f"The account ('mixed' is {MIXED_RECIPE})\n\n{accounts}",
                f"Speed, size and quality: {views}\n\n{self.comparison}",
                "In plain words\n\n" + "\n".join(verdicts(self)),
                NEXT,
            ]
        )


KEEPS, LOSES = 0.9, 0.5
"""Shares of the views with float32's first guess: from the one on a width keeps the network, below
the other it loses it."""

_NAME = 11  # width of the column of schemes

NEXT = """What to try next

  lowbit compare package.module:factory --input-shape 1,3,224,224     your own model
  lowbit convert package.module:factory -o model.safetensors --scheme w8a8
  lowbit bench --quick                                                one layer, every width
  lowbit info                                                         what runs on this CPU"""


def prediction_tables(predictions: dict[str, dict[str, Prediction]], width: int) -> str:
    """One row per model, one column per photograph; wrapped into several tables of `width`."""
    names = list(next(iter(predictions.values())))
    columns = {
        name: [_cell(row[name], predictions["float32"][name]) for row in predictions.values()]
        for name in names
    }
    for count in range(1, len(names) + 1):  # as few tables as fit, of about the same width
        size = -(-len(names) // count)
        tables = [
            _table(list(predictions), {name: columns[name] for name in names[at : at + size]})
            for at in range(0, len(names), size)
        ]
        if all(len(line) <= width for table in tables for line in table.splitlines()):
            break
    return "\n\n".join(tables)


def _table(models: list[str], columns: dict[str, list[str]]) -> str:
    rows = [[model, *cells] for model, *cells in zip(models, *columns.values(), strict=True)]
    return tabulate(rows, ["", *columns], disable_numparse=True)


def _cell(seen: Prediction, reference: Prediction) -> str:
    mark = "*" if seen.label != reference.label else " "
    return f"{mark}{seen.label} {100 * seen.probability:.0f} %"


def account(name: str, report: Report) -> str:
    """The account of a conversion in one line."""
    kept = f", {len(report.kept)} kept float" if report.kept else ""
    return (
        f"  {name:<{_NAME}} {len(report.converted)} layers converted{kept}, "
        f"{report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB "
        f"({report.ratio:.1f} times smaller)"
    )


def agreement(demo: Demo, name: str) -> float:
    """Share of the views, 0..1, on which a candidate's first guess is float32's."""
    quality = demo.comparison[name].quality
    assert quality is not None  # only float32 has none
    assert quality.top1_agreement is not None  # the task is a classification
    return quality.top1_agreement


def speed(demo: Demo) -> str:
    """The quickest width that keeps the network, against float32 and torch INT8."""
    rows = [demo.comparison[name] for name in demo.reports if agreement(demo, name) >= KEEPS]
    timed = {row.timing.p50: row for row in rows if row.timing and row.speedup}
    if not timed:
        return "No width keeps this network."
    row = timed[min(timed)]
    assert row.speedup is not None  # by the choice above
    words = f"{row.name} is the quickest that keeps it: {row.speedup.median:.2f} times as quick as "
    words += "float32"
    quality = demo.comparison[TORCH_INT8].quality
    if row.speedup_over_torch is not None and quality is not None and quality.top1_agreement:
        words += (
            f", {row.speedup_over_torch.median:.2f} times as quick as torch INT8,\n  which has "
            f"float32's first guess on {100 * quality.top1_agreement:.0f} % of the views"
        )
    return f"{words}."


def verdicts(demo: Demo) -> Iterator[str]:
    """What each width does to this network, in plain words, computed from the results."""
    for name in demo.reports:
        share = agreement(demo, name)
        word = "keeps" if share >= KEEPS else "damages" if share >= LOSES else "loses"
        seen = demo.predictions[name].values()
        yield (
            f"  {name:<{_NAME}} {word} the network: float32's first guess on {100 * share:.0f} % "
            f"of the views, right on {sum(p.fits for p in seen)} of {len(seen)} photographs"
        )
    yield f"\n  {speed(demo)}"
    lost = [name for name in demo.reports if agreement(demo, name) < LOSES]
    if lost:
        yield (
            f"\n  {', '.join(lost)}: plain rounding loses a trained network of this kind.\n"
            "  A compact convolution network has no slack. What helps: 8 bits where it hurts most, "
            "as in 'mixed',\n  calibration, better rounding, and training with the width in mind."
        )
