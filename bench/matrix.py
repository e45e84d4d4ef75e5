"""How far from the machine's limits, and how far ahead of every peer, at all widths and sizes?

Linear layers, or with `--layers conv` convolutions. Runs every shape in a process of its own and
appends each case to a file; a second call goes on where the first one stopped. `bench/results.py`
makes the page and the picture.
"""

import argparse
import sys
from pathlib import Path

from lowbit.benchmark import matrix
from lowbit.benchmark.command import numbers, words
from lowbit.benchmark.peers.torch_isa import HELD_PEERS, holds
from lowbit.benchmark.runner import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--layers", choices=("linear", "conv"), default="linear", help="default: %(default)s")
    add("--out", type=Path, help="default: matrix.jsonl, or conv.jsonl")
    add("--shapes", type=words, metavar="KxN,...", help="or INxOUTkKERNEL[sS][dD][gG]@SIZE,...")
    add("--m", type=numbers, metavar="1,512", help="rows, or images of a batch")
    add("--threads", type=numbers, default=matrix.THREADS, metavar="1,2")
    add("--weights", type=words, default=matrix.WEIGHTS, metavar="memory,cache", help="of linears")
    add("--formats", type=words, metavar="w8a8,...")
    add("--grouped", action="store_true", help="the formats with scales for groups in addition")
    add("--ragged", action="store_true", help="ragged shapes in addition, without peers")
    add("--peers", type=words, metavar="NAME,...", help="or 'none' (default: all)")
    add("--isa", help="hold lowbit, and torch, to an instruction set (avx2, avxvnni)")
    add("--seconds", type=float, default=3.0, help="for the rounds of a case")
    add("--quick", action="store_true", help="convolutions: five shapes, 0.5 seconds each")
    add("--minutes", type=float, help="begin no case after so many minutes")
    add("--list", action="store_true", help="show the cases and run none")
    given = parser.parse_args()
    conv = given.layers == "conv"
    if conv and (given.grouped or given.ragged):
        parser.error("--grouped and --ragged are of linears")
    if given.quick and not conv:
        parser.error("--quick is of convolutions")
    held = holds(given.isa)
    common = {
        "peers": HELD_PEERS if held and given.peers is None else given.peers,
        "isa": given.isa,
        "seconds": 0.5 if given.quick else given.seconds,
    }
    if given.peers == ("none",):
        common["peers"] = ()
    if conv:
        shapes = matrix.CONV_HELD if held else matrix.CONV_SHAPES
        shapes = given.shapes or (matrix.CONV_QUICK if given.quick else shapes)
        common |= {"formats": given.formats or matrix.CONV_FORMATS}
        cases = matrix.conv_cases(shapes, given.m or matrix.CONV_BATCHES, given.threads, **common)
    else:
        formats = (given.formats or matrix.FORMATS) + (
            matrix.GROUPED_FORMATS if given.grouped else ()
        )
        sizes = given.m or matrix.M, given.threads
        cases = matrix.cases(
            given.shapes or matrix.SHAPES, *sizes, given.weights, **common, formats=formats
        )
        if given.ragged:
            cases += matrix.ragged_cases(*sizes, **common)
    if given.list:
        print(*cases, sep="\n")
        return 0
    out = given.out or Path("conv.jsonl" if conv else "matrix.jsonl")
    left = run(cases, out, minutes=given.minutes)
    if left:
        print(f"{left} of {len(cases)} cases are left: run the same command again", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
