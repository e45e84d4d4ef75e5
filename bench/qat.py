"""What does training win back? A small network on Fashion-MNIST: float32, then every width.

Needs the images: Debian's package dataset-fashion-mnist, or their folder with --data.
"""

import argparse
import json
import sys
from pathlib import Path

from lowbit.qat.fashion.data import FOLDER
from lowbit.qat.fashion.run import Options, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, default = parser.add_argument, Options()
    add("--data", type=Path, default=FOLDER, metavar="FOLDER", help="default: %(default)s")
    add("--schemes", type=lambda text: tuple(text.split(",")), default=default.schemes)
    add("--float-epochs", type=float, default=default.float_epochs, help="default: %(default)s")
    add("--epochs", type=float, default=default.epochs, help="of each scheme (%(default)s)")
    add("--seed", type=int, default=default.seed)
    add("--seconds", type=float, default=default.seconds, help="for the timing of a batch size")
    add("--train-images", type=int, metavar="N", help="only the first N (default: all)")
    add("--test-images", type=int, metavar="N", help="only the first N (default: all)")
    add("--checkpoints", type=Path, metavar="FOLDER", help="keep trained weights, and go on there")
    add("--json", action="store_true", help="print one JSON document")
    add("--page", type=Path, metavar="FILE", help="write the table as Markdown, too")
    given = vars(parser.parse_args())
    folder, checkpoints = given.pop("data"), given.pop("checkpoints")
    as_json, page = given.pop("json"), given.pop("page")
    try:
        result = run(Options(**given), folder, checkpoints)
    except (OSError, ValueError) as error:
        print(f"qat.py: error: {error}", file=sys.stderr)
        return 1
    if page is not None:
        page.write_text(result.page(f"python bench/qat.py --page {page}"))
    print(json.dumps(result.to_dict(), indent=2) if as_json else result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
