"""How quick are whole networks, next to torch's float32 and INT8? EfficientNet-Lite0 and MiniLM.

Runs every case in a process of its own and appends it to a file; a second call goes on where the
first one stopped. `bench/results.py` puts the figures on the page of convolutions.
"""

import argparse
import sys
from pathlib import Path

from lowbit.benchmark import networks
from lowbit.benchmark.command import numbers, words
from lowbit.benchmark.runner import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("networks.jsonl"), help="default: %(default)s")
    add("--networks", type=words, default=tuple(networks.NETWORKS), metavar="NAME,...")
    add("--threads", type=numbers, default=(1, 2), metavar="1,2")
    add("--formats", type=words, default=("w8a8",), metavar="w8a8,...")
    add("--isa", help="hold lowbit and torch to an instruction set (avx2, avxvnni)")
    add("--seconds", type=float, default=6.0, help="for the rounds of a case")
    add("--minutes", type=float, help="begin no case after so many minutes")
    given = parser.parse_args()
    if unknown := set(given.networks) - set(networks.NETWORKS):
        parser.error(f"unknown {', '.join(unknown)}: use {', '.join(networks.NETWORKS)}")
    cases = networks.cases(
        given.networks,
        given.threads,
        formats=given.formats,
        isa=given.isa,
        seconds=given.seconds,
    )
    left = run(cases, given.out, minutes=given.minutes)
    if left:
        print(f"{left} of {len(cases)} cases are left: run the same command again", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
