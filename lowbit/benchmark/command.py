"""The arguments of `lowbit bench`. Imports nothing heavy: every command's `--help` passes here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lowbit.argument_types import numbers, words

if TYPE_CHECKING:
    from lowbit.benchmark.run import Options

QUICK = {
    "shapes": ("4096x4096",),
    "m": (1, 512),
    "formats": ("w8a8", "w4a8", "w2a8", "w1a1"),
    "rotate_bytes": 128 << 20,
    "budget_seconds": 1.0,
    "min_rounds": 5,
    "probe_seconds": 0.1,
}
QUICK_CONV = {"shapes": ("64x64k3@56", "96x96k3g96@112"), "m": (1,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowbit bench`, except those that all commands share."""
    parser.add_argument("--op", choices=("linear", "conv"), default="linear")
    parser.add_argument(
        "--shapes",
        type=words,
        metavar="SHAPE,...",
        help="linear: INxOUT, e.g. 4096x11008; conv: "
        "INxOUTkKERNEL[sSTRIDE][dDILATION][gGROUPS]@SIZE, e.g. 64x128k3s2@56",
    )
    parser.add_argument("--m", type=numbers, metavar="1,512", help="rows, or images of a batch")
    parser.add_argument("--formats", type=words, metavar="w8a8,...", help="lowbit's recipes")
    parser.add_argument(
        "--threads",
        dest="thread_counts",
        type=numbers,
        metavar="1,2",
        help="numbers of threads (default: 1)",
    )
    parser.add_argument(
        "--peers", type=words, metavar="NAME,...", help="engines to race, or 'none' (default: all)"
    )
    parser.add_argument(
        "--weights",
        choices=("memory", "cache"),
        default="memory",
        help="where the weights of few rows come from (linear; default: %(default)s)",
    )
    parser.add_argument("--isa", metavar="NAME", help="force an instruction set of `lowbit info`")
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter timing")


def options(arguments: argparse.Namespace) -> Options:
    """The options that the arguments ask for; what is not given takes its default."""
    from lowbit.benchmark.run import Options

    chosen: dict[str, Any] = {"op": arguments.op}
    if arguments.op == "conv":
        from lowbit.benchmark.case import CONV_SHAPES

        chosen |= {"shapes": CONV_SHAPES, "m": (1, 8)}
    if arguments.quick:
        chosen |= QUICK
        if arguments.op == "conv":
            chosen |= QUICK_CONV
    for name in ("shapes", "m", "formats", "peers"):
        if getattr(arguments, name) is not None:
            chosen[name] = getattr(arguments, name)
    if arguments.thread_counts is not None:
        chosen["threads"] = arguments.thread_counts
    if chosen.get("peers") == ("none",):
        chosen["peers"] = ()
    if arguments.weights == "cache":
        chosen["rotate_bytes"] = 0
    if arguments.isa is not None:
        chosen["isa"] = arguments.isa
    if arguments.seconds is not None:
        chosen["budget_seconds"] = arguments.seconds
    return Options(**chosen)
