"""A process of the matrix: `python -m lowbit.benchmark.worker OPTIONS`, OPTIONS as JSON.

Prints the result of every case as one line of JSON as soon as it is there, and nothing else: what
an engine's C code writes to standard output goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from lowbit.benchmark.result import Result
from lowbit.benchmark.run import Options, run


def main(arguments: Sequence[str]) -> None:
    """Runs the options that the first argument holds."""
    options = _options(json.loads(arguments[0]))
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def save(result: Result) -> None:
        print(json.dumps(result.to_dict()), file=results, flush=True)

    run(options, save=save)


def _options(given: dict[str, Any]) -> Options:
    """JSON knows no tuples."""
    tuples: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in given.items()
    }
    return Options(**tuples)


if __name__ == "__main__":
    main(sys.argv[1:])
