"""How quick is a linear layer at each width, against other engines, for one row and for many?"""

import sys

from lowbit.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--op", "linear", *sys.argv[1:]]))
