"""lowbit.info: what `lowbit info` says about the machine, the kernels and the threads."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from lowbit import _core
from lowbit.info import (
    cache_bytes,
    cpu_info,
    describe,
    openmp_verdict,
    version,
)


def test_is_json_with_all_parts():
    info = json.loads(json.dumps(cpu_info(), allow_nan=False))
    assert list(info) == ["cpu", "isa", "kernels", "threads", "versions"]
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["lowbit"] == version()
    assert re.fullmatch(r"\d+\.\d+.*", version())
    assert info["cpu"]["model"]
    assert 1 <= info["cpu"]["usable_cpus"] <= info["cpu"]["logical_cpus"]


def test_names_the_kernel_of_every_format_and_activation(isa):
    info = cpu_info()
    assert info["isa"]["chosen"] == isa
    assert list(info["kernels"]) == list(_core.FORMATS)
    for weights, row in info["kernels"].items():
        assert row == {a: _core.kernel_name(weights, a) for a in _core.ACTIVATIONS}
        assert all(isa in name for name in row.values())


def test_lists_the_isas_built_in():
    built_in = cpu_info()["isa"]["built_in"]
    assert [row["name"] for row in built_in] == [row["name"] for row in _core.isas()]
    assert any(row["usable"] and row["name"] == _core.isa() for row in built_in)


def test_threads_are_those_of_torch(use_threads):
    use_threads(1)
    assert cpu_info()["threads"]["torch"] == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
def test_a_process_has_one_openmp_pool():
    """A fresh one: engines that other tests race against may bring their own runtime."""
    code = "import json, lowbit; print(json.dumps(lowbit.cpu_info()['threads']))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    threads = json.loads(done.stdout)
    assert threads["one_pool"] is True
    assert len(threads["openmp_runtimes"]) == 1


def test_caches_as_linux_lists_them(tmp_path):
    caches = {
        "index0": ("1", "Data", "48K"),
        "index1": ("1", "Instruction", "32K"),
        "index2": ("2", "Unified", "1024K"),
        "index3": ("3", "Unified", "32M"),
        "index4": ("4", "Unified", "much"),
    }
    for index, values in caches.items():
        (tmp_path / index).mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (tmp_path / index / name).write_text(f"{value}\n")
    (tmp_path / "index5").mkdir()  # says nothing
    assert cache_bytes(tmp_path) == {"l1": 48 << 10, "l2": 1 << 20, "l3": 32 << 20}
    assert cache_bytes(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("libraries", "words"),
    [
        (None, "cannot be listed"),
        ([], "one thread"),
        (["/a/libgomp.so.1"], "one pool"),
        (["/a/libgomp.so.1", "/b/libiomp5.so"], "2 are loaded"),
    ],
)
def test_says_how_many_openmp_pools_there_are(libraries, words):
    assert words in openmp_verdict(libraries)


def test_text_holds_what_a_bug_report_needs(use_isa):
    use_isa("scalar")
    info = cpu_info()
    text = describe(info)
    assert f"{info['cpu']['model']} ({info['cpu']['architecture']})" in text
    assert "scalar (in use)" in text
    assert torch.__version__ in text
    for row in info["kernels"].values():
        assert all(name in text for name in row.values())


def test_text_marks_an_isa_that_cannot_run_and_a_limit():
    info = cpu_info()
    info["isa"] |= {
        "LOWBIT_MAX_ISA": "scalar",
        "chosen": "scalar",
        "built_in": [{"name": "other", "usable": False}, {"name": "scalar", "usable": True}],
    }
    text = describe(info)
    assert "scalar (LOWBIT_MAX_ISA=scalar)" in text
    assert "other (not usable here), scalar (in use)" in text
