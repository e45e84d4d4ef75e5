"""Conversion of models: the memory that it takes, and when it gives memory back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
from torch import nn

import lowbit

MEMORY = textwrap.dedent(
    """
    import gc, sys, torch
    import lowbit
    from torch import nn

    def status(key):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024

    def reset_peak():
        gc.collect()
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")

    torch.set_num_threads(1)
    lowbit.quantize(nn.Sequential(nn.Linear(256, 256)), "w4a8")  # warm up
    layer = 16  # MiB
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(12)])
    reset_peak()
    before = status("VmRSS")
    if sys.argv[1] == "copy":
        result = lowbit.quantize(model, "w4a8-minmax")
    else:
        lowbit.quantize_(model, "w4a8-minmax")
    print(before, status("VmHWM"), status("VmRSS"))
    """
)


def run_memory(mode):
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, mode],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        # Freed memory goes back to the system at once, so that what is resident is what is used.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if "PermissionError" in result.stderr:
        pytest.skip("the peak of the resident memory cannot be reset here")
    assert result.returncode == 0, result.stderr
    return [float(number) for number in result.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["copy", "in place"])
def test_memory_peaks_near_model_and_result(mode):
    before, peak, after = run_memory(mode)
    layer, packed = 16.0, 12 * 2.0  # MiB: one float layer, and the result
    # The promise. A copy of the float model would be 12 layers.
    slack = layer
    if mode == "copy":
        assert peak - before < packed + slack
        assert after - before < packed + layer / 2
    else:
        assert peak - before < slack
        assert before - after > 12 * layer - packed - layer / 2  # the float weights are gone


def test_each_float_weight_is_released_before_the_next_layer(monkeypatch):
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    alive = [weakref.ref(layer.weight) for layer in model]
    counts = []
    from_float = lowbit.nn.Linear.from_float.__func__

    def counting(cls, module, scheme):
        counts.append(sum(ref() is not None for ref in alive))
        return from_float(cls, module, scheme)

    monkeypatch.setattr(lowbit.nn.Linear, "from_float", classmethod(counting))
    gc.disable()
    try:
        lowbit.quantize_(model, "w4a8")
    finally:
        gc.enable()
    assert counts == [4, 3, 2, 1]
    assert not any(ref() is not None for ref in alive)
