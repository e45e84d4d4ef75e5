"""lowbit.benchmark.peers.torch_isa: in a process of its own, since torch cannot be let go again."""

import os
import platform
import subprocess
import sys

import pytest

from lowbit.benchmark.peers import PEERS
from lowbit.benchmark.peers.torch_isa import HELD_PEERS, hold, holds

CODE = """
import os, torch
from lowbit.benchmark.peers.torch_isa import hold
hold("avx2")
print(torch.backends.cpu.get_cpu_capability(), os.environ["ONEDNN_MAX_CPU_ISA"])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone")
def test_torch_is_held():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["AVX2", "AVX2"], ["DEFAULT", "AVX2"])


def test_others_are_not_to_be_held():
    assert holds("avx2")
    assert holds("avxvnni")
    assert not holds("scalar")
    assert not holds(None)
    before = dict(os.environ)
    hold("scalar")
    hold(None)
    assert dict(os.environ) == before


def test_what_can_be_held_is_a_peer():
    assert set(HELD_PEERS) <= set(PEERS)
