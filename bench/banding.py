"""Does INT8 show in an image? A demosaicking network on smooth scenes and photographs.

Needs scikit-image and matplotlib (pip install '.[demo]') and the network's weights
(pip install --no-deps demosaicnet==0.0.14).
"""

import argparse
import os
import sys
from pathlib import Path

from lowbit.banding.picture import draw
from lowbit.banding.run import SCHEMES, SIDE, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--schemes", type=lambda text: tuple(text.split(",")), default=SCHEMES)
    add("--side", type=int, default=SIDE, help="pixels of the smooth scenes (%(default)s)")
    add("--plot", type=Path, metavar="FILE", help="draw crops side by side")
    add("--page", type=Path, metavar="FILE", help="write the table as Markdown, too")
    given = parser.parse_args()
    try:
        result = run(given.schemes, given.side)
        if given.plot is not None:
            draw(result, given.plot)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"banding.py: error: {error}", file=sys.stderr)
        return 1
    print(result)
    if given.page is not None:
        command = " ".join(["python bench/banding.py", *sys.argv[1:]])
        picture = None
        if given.plot is not None:
            picture = os.path.relpath(given.plot, given.page.parent)
        given.page.write_text(result.page(command, picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
