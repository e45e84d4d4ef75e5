"""Holds torch to an older instruction set, for a fair race with lowbit held to the same."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch

_VARIABLES = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avxvnni": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
}
# `fbgemm::fbgemmForceIsa(inst_set_t)`; no variable holds FBGEMM, which has no AVX-VNNI either.
_FORCE = "_ZN6fbgemm14fbgemmForceIsaENS_10inst_set_tE"
_FBGEMM_AVX2 = 1

HELD_PEERS = ("torch-float32", "torch-int8")
"""The peers that all of this reaches."""


def holds(isa: str | None) -> bool:
    """Whether `isa` is one that torch has to be held to."""
    return isa in _VARIABLES


def hold(isa: str | None) -> None:
    """Holds ATen, oneDNN and FBGEMM of this process to `isa`, if it is an older one.

    To be called before torch computes anything: they ask for the variables once.

    Raises:
        OSError: this torch has FBGEMM, and it cannot be held.
    """
    if isa not in _VARIABLES:
        return
    os.environ |= _VARIABLES[isa]
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return
    folder = Path(torch.__file__).parent / "lib"
    for library in sorted(folder.glob("libtorch_cpu*")):
        with contextlib.suppress(AttributeError):
            force = getattr(ctypes.CDLL(str(library)), _FORCE)
            force.restype, force.argtypes = None, (ctypes.c_int,)
            force(_FBGEMM_AVX2)
            return
    raise OSError("this build of torch does not let FBGEMM be held to AVX2")
