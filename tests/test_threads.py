"""One OpenMP pool for torch and lowbit: turns of both start no thread that one alone had not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, threading, time
import torch
import lowbit

torch.set_num_threads(1)  # filling them would wake a worker
layer = lowbit.nn.Linear(2048, 1024)
x, a = torch.ones(64, 2048), torch.ones(1024, 1024)
torch.set_num_threads(2)

def run_torch():
    (a @ a).exp().sum()

def run_lowbit():
    layer(x)

def threads():
    return len(os.listdir("/proc/self/task"))

def take_turns():
    counts = [threads() - before]
    for run in order * 10:
        run()
        counts.append(threads() - before)
    print(*counts)

before = threads()
order = [run_torch, run_lowbit] if sys.argv[1] == "torch" else [run_lowbit, run_torch]
take_turns()
other = threading.Thread(target=take_turns)
other.start()
other.join()
end = time.monotonic() + 60
while threads() > before + 1 and time.monotonic() < end:  # its worker ends after it
    time.sleep(0.01)
take_turns()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("first", ["torch", "lowbit"])
def test_torch_and_lowbit_take_turns_on_one_pool(first):
    """Whoever comes first in a Python thread wakes one worker, and the other one uses it."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, first],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    main, other, again = ([int(n) for n in line.split()] for line in result.stdout.splitlines())
    assert main == [0] + [1] * 20
    assert other == [2] + [3] * 20  # it counts itself
    assert again == [1] * 21


LIMITED = """
import torch
import lowbit

torch.manual_seed(0)
cases = [
    (lowbit.nn.Linear.from_float(torch.nn.Linear(8192, 128), "w8a8"), torch.randn(18, 8192)),
    (lowbit.nn.Linear.from_float(torch.nn.Linear(1024, 1000), "w1a1"), torch.randn(77, 1024)),
    (lowbit.nn.Conv2d.from_float(torch.nn.Conv2d(64, 96, 3), "w8a8"), torch.randn(1, 64, 30, 31)),
    (
        lowbit.nn.Conv2d.from_float(torch.nn.Conv2d(96, 96, 3, groups=96), "w8a8"),
        torch.randn(3, 96, 40, 41),
    ),
]
for layer, x in cases:
    torch.set_num_threads(1)
    wanted = layer(x)
    for threads in (2, 3, 5, 8):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), wanted), (layer, threads)
"""


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_teams_may_be_smaller_than_asked_for(limit):
    """OMP_THREAD_LIMIT gives fewer threads than torch.set_num_threads asked for."""
    result = subprocess.run(
        [sys.executable, "-c", LIMITED],
        env=os.environ | {"OMP_THREAD_LIMIT": str(limit)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
