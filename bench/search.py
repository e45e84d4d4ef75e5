"""Do mixed schemes that `lowbit.search` finds beat uniform ones of the same bytes?

Keeps what it has measured in a folder, and goes on from there when it is called again.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from lowbit.benchmark.command import words
from lowbit.benchmark.mixed import Options, run
from lowbit.benchmark.mixed_networks import NETWORKS
from lowbit.benchmark.mixed_page import page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    names = ", ".join(NETWORKS)
    add("--networks", type=words, default=tuple(NETWORKS), help=f"of {names} (default: all)")
    add("--without-data", action="store_true", help="schemes that learn nothing")
    add("--schemes", type=words, help="to choose from (default: the network's)")
    add("--uniform", type=words, help="to compare with (default: the network's)")
    add("--rounds", type=int, default=1, help="of refinement (default: %(default)s)")
    add("--folder", type=Path, default=Path("search"), help="default: %(default)s")
    add("--threads", type=int, metavar="N", help="default: torch's choice")
    add("--page", type=Path, metavar="FILE", help="write the tables as Markdown, too")
    given = parser.parse_args()
    for name in given.networks:
        if name not in NETWORKS:
            parser.error(f"no network {name!r}: they are {names}")
    if given.threads is not None:
        torch.set_num_threads(given.threads)

    def progress(stage: str, share: float) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{stage} {100 * share:.0f} %", end="", file=sys.stderr, flush=True)

    found = {}
    for name in given.networks:
        options = Options(name, not given.without_data, given.schemes, given.uniform, given.rounds)
        folder = given.folder / (f"{name}-without-data" if given.without_data else name)
        found[name] = run(options, folder, progress)
    text = page(found, shlex.join(["python", "bench/search.py", *sys.argv[1:]]))
    if given.page is not None:
        given.page.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
