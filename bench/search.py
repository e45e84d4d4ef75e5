"""Do mixed schemes beat uniform ones of the same bytes? EfficientNet-Lite0, by `lowbit.search`.

Keeps what it has measured in a folder, and goes on from there when it is called again.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from lowbit.benchmark.command import words
from lowbit.benchmark.mixed import Options, page, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, default = parser.add_argument, Options()
    add("--schemes", type=words, default=default.schemes, help="to choose from")
    add("--uniform", type=words, default=default.uniform, help="to compare with")
    add("--batches", type=int, default=default.batches, help="of 8 crops, to search on")
    add("--test-batches", type=int, default=default.test_batches, help="of 8 crops, to judge by")
    add("--rounds", type=int, default=default.rounds, help="of refinement (%(default)s)")
    add("--folder", type=Path, default=Path("search"), help="default: %(default)s")
    add("--threads", type=int, metavar="N", help="default: torch's choice")
    add("--page", type=Path, metavar="FILE", help="write the table as Markdown, too")
    given = vars(parser.parse_args())
    folder, threads, target = given.pop("folder"), given.pop("threads"), given.pop("page")
    if threads is not None:
        torch.set_num_threads(threads)
    folder.mkdir(exist_ok=True)

    def progress(stage: str, share: float) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{stage} {100 * share:.0f} %", end="", file=sys.stderr, flush=True)

    lines = run(Options(**given), folder, progress)
    text = page(lines, shlex.join(["python", "bench/search.py", *sys.argv[1:]]))
    if target is not None:
        target.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
