"""How far from the machine's limits, and how far ahead of every peer, at all widths and sizes?

Runs every case in a process of its own and appends it to a file; a second call goes on where the
first one stopped. `bench/results.py` makes the page and the picture.
"""

import argparse
import sys
from pathlib import Path

from lowbit.benchmark import matrix


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("matrix.jsonl"), help="default: %(default)s")
    add("--shapes", type=words, default=matrix.SHAPES, metavar="KxN,...")
    add("--m", type=numbers, default=matrix.M, metavar="1,512")
    add("--threads", type=numbers, default=matrix.THREADS, metavar="1,2")
    add("--weights", type=words, default=matrix.WEIGHTS, metavar="memory,cache")
    add("--formats", type=words, default=matrix.FORMATS, metavar="w8a8,...")
    add("--grouped", action="store_true", help="the formats with scales for groups in addition")
    add("--peers", type=words, metavar="NAME,...", help="or 'none' (default: all)")
    add("--isa", help="force an instruction set")
    add("--seconds", type=float, default=3.0, help="for the rounds of a case")
    add("--minutes", type=float, help="begin no case after so many minutes")
    add("--list", action="store_true", help="show the cases and run none")
    given = parser.parse_args()
    cases = matrix.cases(
        given.shapes,
        given.m,
        given.threads,
        given.weights,
        formats=given.formats + (matrix.GROUPED_FORMATS if given.grouped else ()),
        peers=() if given.peers == ("none",) else given.peers,
        isa=given.isa,
        seconds=given.seconds,
    )
    if given.list:
        print(*cases, sep="\n")
        return 0
    left = matrix.run(cases, given.out, minutes=given.minutes)
    if left:
        print(f"{left} of {len(cases)} cases are left: run the same command again", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
