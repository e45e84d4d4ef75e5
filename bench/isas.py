"""How does the same layer run on each instruction set of this CPU? Best first, lowbit alone."""

import sys

from lowbit import _core
from lowbit.cli import main

if __name__ == "__main__":
    options = ["--shapes", "4096x4096", "--m", "1,512", "--peers", "torch-float32"]
    names = [row["name"] for row in _core.isas() if row["usable"] and row["name"] != "scalar"]
    codes = [main(["bench", "--isa", name, *options, *sys.argv[1:]]) for name in names]
    sys.exit(max(codes))
