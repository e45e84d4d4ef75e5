"""What did `bench/matrix.py` find? Writes the page of results and the roofline."""

import argparse
import os
import sys
from pathlib import Path

from lowbit.benchmark.matrix import load
from lowbit.benchmark.page import page
from lowbit.benchmark.roofline import roofline
from lowbit.benchmark.summary import summarize


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("results", type=Path, help="what bench/matrix.py wrote")
    add("--out", type=Path, help="Markdown file (default: standard output)")
    add("--plot", type=Path, metavar="FILE", help="draw the roofline (.png, .svg)")
    add("--shape", metavar="KxN", help="of the roofline (default: the one with the most results)")
    given = parser.parse_args()
    summary = summarize(load(given.results))
    picture = None
    if given.plot is not None:
        roofline(summary, given.plot, given.shape)
        picture = os.path.relpath(given.plot, given.out.parent if given.out else None)
    text = page(summary, picture)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
