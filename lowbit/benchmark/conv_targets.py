"""What the convolution kernels are to reach. Every layer of a row has to.

All in channels_last unless said otherwise, on one and two threads, batch 1 and 8.
"""

from __future__ import annotations

from collections.abc import Callable

from lowbit.benchmark.shapes import HELD_KINDS, KINDS, ConvShape
from lowbit.benchmark.summary import Cell, Summary
from lowbit.benchmark.targets import Figure, Target, partner

LAST = " channels_last"
DENSE = ("dense 3x3", "dense 1x1")
RECIPES = ("w8a8", "w4a8", "w2a8", "w1a8", "w1a1")
_W8 = (f"w8a8{LAST}",)


def all_cells(cell: Cell) -> bool:
    """Whether a cell is compared at all."""
    return True


def _single(cell: Cell) -> bool:
    return cell.m == 1


def _wide(cell: Cell) -> bool:
    assert isinstance(cell.parsed, ConvShape)
    return cell.parsed.inputs >= 128


def times_int8(cell: Cell, summary: Summary) -> float | None:
    """How many times quicker than torch's INT8."""
    return cell.int8.median if cell.int8 else None


def _times_float32(cell: Cell, summary: Summary) -> float | None:
    return cell.float32.median if cell.float32 else None


def _peak(cell: Cell, summary: Summary) -> float | None:
    return cell.peak


def over_w8a8(cell: Cell, summary: Summary) -> float | None:
    """The time over that of W8A8 in the same layout."""
    recipe = cell.name.split()[0]
    int8 = partner(cell, summary, name=cell.name.replace(recipe, "w8a8"))
    return None if int8 is None else cell.seconds / int8.seconds


def quicker_than_w8a8(cell: Cell, summary: Summary) -> float | None:
    """How many times quicker than W8A8 in the same layout."""
    over = over_w8a8(cell, summary)
    return None if over is None else 1 / over


def over_channels_last(cell: Cell, summary: Summary) -> float | None:
    """The time of an NCHW layer over that of channels_last."""
    last = partner(cell, summary, name=cell.name + LAST)
    return None if last is None else cell.seconds / last.seconds


def _target(
    regime: str,
    kinds: tuple[str, ...],
    limit: float,
    figure: Figure = times_int8,
    names: tuple[str, ...] = _W8,
    holds: Callable[[Cell], bool] = all_cells,
    at_most: bool = False,
) -> Target:
    return Target(regime, names, holds, limit, figure, at_most, kinds, every=True)


CONV_TARGETS = (
    _target("dense 3x3 and 1x1: times torch INT8", DENSE, 1.0),
    _target("the same: of the dot peak", DENSE, 0.85, _peak),
    _target(
        "the same in fewer bits: time over W8A8's",
        DENSE,
        1.05,
        over_w8a8,
        tuple(f"{recipe}{LAST}" for recipe in RECIPES[1:4]),
        at_most=True,
    ),
    _target("7x7 maps, batch 1: times torch INT8", ("7x7 map",), 1.1, holds=_single),
    _target("first layers: times torch INT8", ("first layer",), 1.3),
    _target("depthwise: times torch INT8", ("depthwise",), 1.5),
    _target("the same: times torch float32 channels_last", ("depthwise",), 1.2, _times_float32),
    _target("grouped, dilated: times torch INT8", ("grouped", "dilated"), 1.0),
    _target(
        "W1A1, 128 channels and more: times W8A8",
        (*DENSE, "7x7 map"),
        3.0,
        quicker_than_w8a8,
        (f"w1a1{LAST}",),
        _wide,
    ),
    _target(
        "NCHW: time over channels_last", KINDS, 1.15, over_channels_last, RECIPES, at_most=True
    ),
)

HELD_TARGETS = (
    _target("dense: times torch INT8, held to it too", HELD_KINDS[:-1], 1.0),
    _target("depthwise: times torch INT8, held to it too", HELD_KINDS[-1:], 1.0),
)
"""Of an older instruction set."""
