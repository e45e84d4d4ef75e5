"""What did `bench/matrix.py` and `bench/networks.py` find? Writes the page and the picture.

Linears make a roofline; convolutions, with what networks there are, a page and a picture of their
own. Give one or the other; files of several instruction sets make one page.
"""

import argparse
import os
import sys
from pathlib import Path

from lowbit.benchmark.conv_page import conv_page
from lowbit.benchmark.page import page
from lowbit.benchmark.rates import rates
from lowbit.benchmark.roofline import roofline
from lowbit.benchmark.runner import load
from lowbit.benchmark.summary import by_isa


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="what matrix.py and networks.py wrote")
    add("--out", type=Path, help="Markdown file (default: standard output)")
    add("--plot", type=Path, metavar="FILE", help="draw the picture (.png, .svg)")
    add("--shape", metavar="KxN", help="of the roofline (default: the one with the most results)")
    given = parser.parse_args()
    lines = [line for path in given.results for line in load(path)]
    networks = [line for line in lines if "network" in line["case"]]
    layers = [line for line in lines if "network" not in line["case"]]
    ops = {line["case"].get("op", "linear") for line in layers}
    if len(ops) != 1 or (networks and ops == {"linear"}):
        parser.error("needs results of linears, or of convolutions and networks")
    found = by_isa(layers)
    summary = next(iter(found.values()))
    picture = None
    if given.plot is not None:
        if ops == {"conv"}:
            rates(summary, given.plot)
        else:
            roofline(summary, given.plot, given.shape)
        picture = os.path.relpath(given.plot, given.out.parent if given.out else None)
    text = conv_page(found, networks, picture) if ops == {"conv"} else page(found, picture)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
