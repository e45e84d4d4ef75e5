"""What does each weight quantizer keep of a network? EfficientNet-Lite0, MiniLM, Fashion-MNIST.

Runs every case in a process of its own and appends it to a file; a second call goes on where the
first one stopped, and writes the page of what there is.
"""

import argparse
import sys
from pathlib import Path

from lowbit.benchmark.command import words
from lowbit.benchmark.quality import page, study
from lowbit.benchmark.runner import load, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("quality.jsonl"), help="default: %(default)s")
    add("--networks", type=words, default=tuple(study.NETWORKS), metavar="NAME,...")
    add("--methods", metavar="TEXT", default="", help="only those whose label contains this")
    add("--minutes", type=float, help="begin no case after so many minutes")
    add("--page", type=Path, metavar="FILE", help="write the tables as Markdown")
    add("--list", action="store_true", help="show the cases, run none")
    given = parser.parse_args()
    if unknown := set(given.networks) - set(study.NETWORKS):
        parser.error(f"unknown {', '.join(unknown)}: use {', '.join(study.NETWORKS)}")
    cases = [case for case in study.cases(given.networks) if given.methods in case.method]
    if given.list:
        print(*cases, sep="\n")
        return 0
    left = run(cases, given.out, minutes=given.minutes)
    if given.page is not None:
        text = page.page(
            page.results(load(given.out)), f"python bench/quality.py --page {given.page}"
        )
        given.page.write_text(text)
    if left:
        print(f"{left} of {len(cases)} cases are left: run the same command again", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
