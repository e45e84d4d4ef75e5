"""A process of a benchmark: `python -m lowbit.benchmark.worker OPTIONS`, OPTIONS as JSON.

Prints the result of every case as one line of JSON as soon as it is there, and nothing else: what
an engine's C code writes to standard output goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from lowbit.benchmark.networks import NetworkCase, NetworkResult, race
from lowbit.benchmark.peers.torch_isa import hold
from lowbit.benchmark.quality.study import QualityCase, QualityResult, measure
from lowbit.benchmark.result import Result
from lowbit.benchmark.run import Options, run
from lowbit.benchmark.static_networks import StaticCase, StaticResult
from lowbit.benchmark.static_networks import race as race_static


def main(arguments: Sequence[str]) -> None:
    """Runs the options that the first argument holds."""
    options = _tuples(json.loads(arguments[0]))
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def save(result: Result | NetworkResult | StaticResult | QualityResult) -> None:
        print(json.dumps(result.to_dict()), file=results, flush=True)

    hold(options.get("isa"))
    if "static" in options:
        save(race_static(StaticCase(**options)))
    elif "network" in options:
        save(race(NetworkCase(**options)))
    elif "quality" in options:
        save(measure(QualityCase(**options)))
    else:
        run(Options(**options), save=save)


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
