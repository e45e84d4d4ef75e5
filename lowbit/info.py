"""What `lowbit` runs on: the CPU, its kernels, the threads and their runtime, the versions.

Attach the output of `lowbit info` to a bug report: it holds what decides which code runs.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lowbit._core as _core
from lowbit.openmp import loaded_openmp_libraries


def cpu_info() -> dict[str, Any]:
    """Describes the machine, the instruction sets, the kernels, the threads and the versions.

    Returns:
        A dict that `json.dumps` takes, with the keys `cpu`, `isa`, `kernels`, `threads` and
        `versions`. `kernels[format][activation]` is the name of the kernel in use, the same string
        that a layer's repr and the benchmarks show.
    """
    return {
        "cpu": {
            "model": _cpu_model(),
            "architecture": platform.machine(),
            "logical_cpus": os.cpu_count(),
            "usable_cpus": _usable_cpus(),
            "caches": cache_bytes(),
            "features": _core.cpu_features(),
        },
        "isa": {
            "chosen": _core.isa(),
            "LOWBIT_MAX_ISA": os.environ.get("LOWBIT_MAX_ISA"),
            "built_in": _core.isas(),
        },
        "kernels": {
            weights: {
                activation: _core.kernel_name(weights, activation)
                for activation in _core.ACTIVATIONS
            }
            for weights in _core.FORMATS
        },
        "threads": _threads(),
        "versions": {
            "lowbit": version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "build": dict(_core.build_info()),
        },
    }


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the first CPU's caches for data, by level: "l1", "l2", "l3", as far as known.

    Args:
        folder: where Linux lists them.
    """
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and (match := re.fullmatch(r"(\d+)([KMG]?)", size)):
            found[f"l{level}"] = int(match[1]) * units[match[2]]
    return found


def version() -> str:
    """The version of the installed package, or that of the extension in a source checkout."""
    try:
        return metadata.version("lowbit")
    except metadata.PackageNotFoundError:
        return str(_core.build_info()["version"])


def openmp_verdict(libraries: list[str] | None) -> str:
    """One sentence on the loaded OpenMP runtimes; None means that they could not be listed."""
    if libraries is None:
        return "cannot be listed on this system"
    if not libraries:
        return "none is loaded: layers run on one thread"
    if len(libraries) == 1:
        return "one pool, shared with torch"
    return (
        f"{len(libraries)} are loaded: their thread pools compete for the same cores. "
        "Import torch before anything else that brings an OpenMP runtime, or uninstall that."
    )


def _threads() -> dict[str, Any]:
    libraries = loaded_openmp_libraries()
    return {
        "torch": torch.get_num_threads(),
        "openmp_max": _core.openmp_threads(),
        "openmp_runtimes": libraries,
        "one_pool": None if libraries is None else len(libraries) == 1,
        "verdict": openmp_verdict(libraries),
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    # x86 has "model name"; ARM names no model, only an implementer and a part number.
    if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        return match[1].strip()
    fields = dict(re.findall(r"^(CPU implementer|CPU part)\s*:\s*(\S+)$", text, re.MULTILINE))
    if fields:
        return " ".join(f"{name} {value}" for name, value in fields.items())
    return platform.processor() or "unknown"


def _usable_cpus() -> int | None:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def describe(info: dict[str, Any]) -> str:
    """The text of `lowbit info` for what `cpu_info` returned."""
    cpu, isa, threads, versions = info["cpu"], info["isa"], info["threads"], info["versions"]
    present = [name for name, present in cpu["features"].items() if present]
    limit = isa["LOWBIT_MAX_ISA"]
    built_in = ", ".join(_isa_mark(row, isa["chosen"]) for row in isa["built_in"])
    build = ", ".join(f"{name} {value}" for name, value in versions["build"].items() if value)
    runtimes = threads["openmp_runtimes"] or []
    lines = [
        ("CPU", f"{cpu['model']} ({cpu['architecture']})"),
        ("CPUs", f"{cpu['logical_cpus']} logical, {cpu['usable_cpus']} usable by this process"),
        ("features", " ".join(present) or "none of those that kernels ask for"),
        ("ISA in use", isa["chosen"] + (f" (LOWBIT_MAX_ISA={limit})" if limit else "")),
        ("ISAs built in", built_in),
        ("threads", f"{threads['torch']} (torch.get_num_threads), OpenMP {threads['openmp_max']}"),
        ("OpenMP runtime", threads["verdict"]),
        *(("", path) for path in runtimes),
        ("lowbit", versions["lowbit"]),
        ("torch", versions["torch"]),
        ("python", f"{versions['python']} on {versions['platform']}"),
        ("build", build),
    ]
    width = max(len(name) for name, _ in lines) + 2
    text = "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in lines)
    return f"{text}\n\n{_kernel_table(info['kernels'])}"


def _isa_mark(row: dict[str, Any], chosen: str) -> str:
    if row["name"] == chosen:
        return f"{row['name']} (in use)"
    return str(row["name"]) if row["usable"] else f"{row['name']} (not usable here)"


def _kernel_table(kernels: dict[str, dict[str, str]]) -> str:
    from tabulate import tabulate

    activations = list(next(iter(kernels.values())))
    rows = [[weights, *(row[a] for a in activations)] for weights, row in kernels.items()]
    headers = ["weights", *(f"{a} activations" for a in activations)]
    return tabulate(rows, headers=headers, disable_numparse=True)
