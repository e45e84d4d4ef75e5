"""One OpenMP runtime in the process, whatever its name and whoever is imported first."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit import _core, openmp
from lowbit.info import cpu_info
from lowbit.openmp import loaded_openmp_libraries, openmp_libraries, share_openmp, torch_first

needs_maps = pytest.mark.skipif(loaded_openmp_libraries() is None, reason="reads /proc/self/maps")

MAPS = """\
7f00-7f01 r--p 00000000 08:01 12   /usr/lib/x86_64-linux-gnu/libc.so.6
7f01-7f02 r--p 00000000 08:01 34   /venv/lib/torch/lib/libgomp.so.1
7f02-7f03 r-xp 00001000 08:01 34   /venv/lib/torch/lib/libgomp.so.1
7f03-7f04 r--p 00000000 08:01 56   /opt/my tools/lib/libiomp5.so
7f04-7f05 r--p 00000000 08:01 78   /usr/lib/libompl.so.16
7f05-7f06 rw-p 00000000 00:00 0    [heap]
7f06-7f07 rw-p 00000000 00:00 0
"""


def run_python(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_finds_openmp_runtimes_in_a_memory_map():
    found = openmp_libraries(MAPS)
    assert found == ["/opt/my tools/lib/libiomp5.so", "/venv/lib/torch/lib/libgomp.so.1"]


@pytest.mark.parametrize("own", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-98df74fd.so.1.0.0"])
def test_torchs_own_runtime_comes_first(own):
    others = ["/site/numpy.libs/libgomp-d22c30c5.so.1", "/usr/lib/libgomp.so.1"]
    found = torch_first([*others, f"/site/{own}"], Path("/site/torch"))
    assert found == [f"/site/{own}", *others]


@needs_maps
@pytest.mark.parametrize("order", ["import torch, lowbit", "import lowbit, torch"])
def test_one_runtime_in_either_order(order):
    code = """
from lowbit.openmp import loaded_openmp_libraries
torch.ones(256, 256) @ torch.ones(256, 256)
lowbit.nn.Linear(2048, 1024)(torch.ones(64, 2048))
print(len(loaded_openmp_libraries()))
"""
    assert run_python(order + code) == "1\n"


@needs_maps
def test_info_tells_that_there_is_one_pool():
    threads = cpu_info()["threads"]
    assert threads["one_pool"] is (len(threads["openmp_runtimes"]) == 1)
    assert threads["openmp_max"] == _core.openmp_threads()


# Loads the extension by its path, without torch and so without a runtime.
LOAD = """
import ctypes, importlib.util, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
core = load("lowbit._core", sys.argv[1])
"""


@needs_maps
def test_the_extension_brings_no_runtime():
    code = 'print("omp" in open("/proc/self/maps").read().replace(sys.argv[1], ""))'
    assert run_python(LOAD + code, _core.__file__) == "False\n"


@needs_maps
@pytest.mark.parametrize("where", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-0123.so.1.0.0"])
def test_a_runtime_of_any_name_is_found(where, tmp_path):
    """Even where torch has loaded it for itself alone."""
    library = tmp_path / where
    for folder in (tmp_path / "torch", library.parent):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(torch_first(loaded_openmp_libraries(), Path(torch.__file__).parent)[0], library)
    code = """
import types
torch = types.ModuleType("torch")
torch.__file__ = sys.argv[3]
sys.modules["torch"] = torch
openmp = load("openmp", sys.argv[2])
ctypes.CDLL(sys.argv[4], mode=ctypes.RTLD_LOCAL)
print(openmp._visible(), end=" ")
openmp.share_openmp()
print(core.openmp_threads() >= 1, *openmp.loaded_openmp_libraries())
"""
    package = tmp_path / "torch" / "__init__.py"
    out = run_python(LOAD + code, _core.__file__, openmp.__file__, str(package), str(library))
    assert out == f"False True {library}\n"


def test_no_runtime_at_all_is_an_import_error(monkeypatch):
    def refuse(*_, **__):
        raise OSError

    monkeypatch.setattr(openmp, "_visible", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    if sys.platform == "win32":
        share_openmp()
    else:
        with pytest.raises(ImportError, match=r"no OpenMP runtime.*libgomp\.so\.1.*libgomp1"):
            share_openmp()
