"""`python -m lowbit`: the command `lowbit`."""

import sys

from lowbit.cli import main

sys.exit(main())
