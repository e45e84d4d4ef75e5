"""How quick is a convolution at each width, against other engines: 3x3, 1x1, strided, depthwise?"""

import sys

from lowbit.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--op", "conv", *sys.argv[1:]]))
