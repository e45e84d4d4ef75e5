"""What does each further thread bring? Powers of two up to the CPUs that this process may use."""

import sys

from lowbit.cli import main
from lowbit.info import cpu_info

if __name__ == "__main__":
    cpus = cpu_info()["cpu"]["usable_cpus"]
    counts = ",".join(str(1 << i) for i in range(cpus.bit_length()))
    options = ["--threads", counts, "--shapes", "4096x4096", "--m", "1,32,512"]
    sys.exit(main(["bench", *options, *sys.argv[1:]]))
