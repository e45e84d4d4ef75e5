"""One OpenMP runtime for torch and the extension, which is linked with none.

torch's wheels bring a runtime, under the name `libgomp.so.1` or under one of their own
(`torch.libs/libgomp-98df74fd.so.1.0.0`). An extension that asks for `libgomp.so.1` would get a
second one beside the latter, with threads that compete for the same cores, or find none at all.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

_LIBRARY = re.compile(r"^lib(gomp|iomp5|omp)\b.*\.(so|dylib)")
# What the extension calls to start a team: GCC's interface, which the runtimes of LLVM and Intel
# have as well, or that of LLVM.
_ENTRY = "__kmpc_fork_call" if sys.platform == "darwin" else "GOMP_parallel"


def openmp_libraries(maps: str) -> list[str]:
    """The OpenMP runtimes named in the text of a `/proc/<pid>/maps`: paths, sorted, each once."""
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/") > 1}
    return sorted(path for path in paths if _is_openmp(path))


def loaded_openmp_libraries() -> list[str] | None:
    """The OpenMP runtimes of this process; None where they cannot be listed."""
    try:
        return openmp_libraries(Path("/proc/self/maps").read_text())
    except OSError:
        return None


def torch_first(libraries: Iterable[str], package: Path) -> list[str]:
    """Paths of libraries, those that the torch installed in the folder `package` brings first."""
    folders = (package, package.with_name(f"{package.name}.libs"))
    return sorted(libraries, key=lambda path: not any(f in Path(path).parents for f in folders))


def share_openmp() -> None:
    """Makes torch's OpenMP runtime visible to the extension, which is loaded next.

    Raises:
        ImportError: torch has none, and the system no `libgomp.so.1`.
    """
    if sys.platform == "win32" or _visible():  # on Windows, the extension is linked with one
        return
    package = Path(torch.__file__).parent
    libraries = loaded_openmp_libraries()
    if libraries is None:
        libraries = [str(path) for path in (package / "lib").iterdir() if _is_openmp(str(path))]
    for library in (*torch_first(libraries, package), "libgomp.so.1"):
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if _visible():
            return
    raise ImportError(
        "no OpenMP runtime: this torch brings none, and there is no libgomp.so.1. Install it "
        "(Debian: libgomp1, Fedora: libgomp)."
    )


def _is_openmp(path: str) -> bool:
    return bool(_LIBRARY.match(path.rsplit("/", 1)[-1]))


def _visible() -> bool:
    """Whether a library loaded now would find an OpenMP runtime without asking for one."""
    return hasattr(ctypes.CDLL(None), _ENTRY)
