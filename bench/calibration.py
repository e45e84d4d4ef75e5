"""Which observer keeps a network at a static scheme? EfficientNet-Lite0 on other photographs."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from lowbit.demo.calibration import Options, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, default = parser.add_argument, Options()
    add("--scheme", default=default.scheme, help="default: %(default)s")
    add("--crops", type=int, default=default.crops, metavar="N", help="a photograph to calibrate")
    add("--test-crops", type=int, default=default.test_crops, metavar="N", help="and to test")
    add("--observers", type=lambda text: tuple(text.split(",")), default=default.observers)
    add("--no-symmetric", dest="symmetric", action="store_false", help="affine activations alone")
    add("--graph", action="store_true", help="also captured as a graph")
    add("--json", action="store_true", help="print one JSON document")
    add("--page", type=Path, metavar="FILE", help="write the table as Markdown, too")
    given = vars(parser.parse_args())
    as_json, page = given.pop("json"), given.pop("page")
    try:
        result = run(Options(**given), lambda stage, _: print(stage, file=sys.stderr))
    except (ImportError, ValueError) as error:
        print(f"calibration.py: error: {error}", file=sys.stderr)
        return 1
    if page is not None:
        # As it was called: other options give another page.
        page.write_text(result.page(shlex.join(["python", *sys.argv])))
    print(json.dumps(result.to_dict(), indent=2) if as_json else result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
