"""How quick are static networks in integers, next to torch's and OpenVINO's INT8?

Runs every case in a process of its own and appends it to a file; a second call goes on where the
first one stopped, and writes the page once all are there.
"""

import argparse
import sys
from pathlib import Path

from lowbit.benchmark import static_networks
from lowbit.benchmark.command import numbers, words
from lowbit.benchmark.runner import load, run
from lowbit.benchmark.static_page import static_page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("static.jsonl"), help="default: %(default)s")
    add("--networks", type=words, default=tuple(static_networks.MODELS), metavar="NAME,...")
    add("--batches", type=numbers, default=(1, 8), metavar="1,8")
    add("--threads", type=numbers, default=(1, 2), metavar="1,2")
    add("--seconds", type=float, default=6.0, help="for the rounds of a case")
    add("--minutes", type=float, help="begin no case after so many minutes")
    add("--page", type=Path, help="write the page here")
    given = parser.parse_args()
    if unknown := set(given.networks) - set(static_networks.MODELS):
        parser.error(f"unknown {', '.join(unknown)}: use {', '.join(static_networks.MODELS)}")
    cases = static_networks.cases(
        given.networks, given.batches, given.threads, seconds=given.seconds
    )
    left = run(cases, given.out, minutes=given.minutes)
    if left:
        print(f"{left} of {len(cases)} cases are left: run the same command again", file=sys.stderr)
    elif given.page is not None:
        command = f"python bench/static.py --out {given.out.name} --page {given.page}"
        given.page.write_text(static_page(load(given.out), command))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
