"""ggml's C interface through ctypes: as much of it as one matrix multiplication takes.

The libraries are those that `llama-cpp-python` builds and installs (`llama_cpp/lib`), or lie in the
folder that the environment variable `LOWBIT_GGML` names.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.benchmark.peers.blocks import Array

VARIABLE = "LOWBIT_GGML"
FLOAT32 = 0  # ggml_type
_LIBRARIES = ("ggml-base", "ggml-cpu")
_ALIGNMENT = 64  # bytes; torch's own allocations have it
_WEIGHTS = 1  # ggml_backend_buffer_usage


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SILENT = _LogCallback(lambda level, text, data: None)  # it tells of every weight that it repacks

# name -> result type, argument types
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_add_inplace": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_buffer_set_usage": (None, (c_void_p, c_int)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (c_void_p, c_void_p)),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_get_default_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_get_device": (c_void_p, (c_void_p,)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_view_init": (c_int, (c_void_p,)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_graph_overhead": (c_size_t, ()),
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_log_set": (None, (_LogCallback, c_void_p)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_version": (c_char_p, ()),
}


def library_paths(folder: Path) -> list[Path] | None:
    """The libraries in a folder, in the order of loading; None if it lacks one."""
    found = [sorted(folder.glob(f"*{name}.*")) for name in _LIBRARIES]
    return [paths[0] for paths in found] if all(found) else None


def find() -> list[Path] | None:
    """The libraries of the environment variable's folder, else those of llama-cpp-python."""
    if folder := os.environ.get(VARIABLE):
        return library_paths(Path(folder))
    spec = importlib.util.find_spec("llama_cpp")
    for package in (spec.submodule_search_locations or ()) if spec else ():
        if paths := library_paths(Path(package) / "lib"):
            return paths
    return None


def absent() -> str | None:
    """Why ggml cannot run, or None if it can."""
    if find() is not None:
        return None
    if folder := os.environ.get(VARIABLE):
        return f"{VARIABLE}={folder} does not hold the libraries {' and '.join(_LIBRARIES)}"
    return f"llama-cpp-python not installed, and {VARIABLE} not set"


@functools.cache
def load() -> Any:
    """An object with the functions of ggml that are used here, by their C names.

    Raises:
        OSError: the libraries are not there or cannot be loaded.
        AttributeError: they lack a function.
    """
    paths = find()
    if paths is None:
        raise OSError(absent())
    libraries = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths]
    holder = type("Ggml", (), {})()
    for name, (result, arguments) in _FUNCTIONS.items():
        # On some systems a library gives its dependencies' functions as well, on others not.
        function = next(getattr(lib, name) for lib in reversed(libraries) if hasattr(lib, name))
        function.restype, function.argtypes = result, arguments
        setattr(holder, name, function)
    holder.ggml_log_set(_SILENT, None)
    return holder


def version() -> str:
    """The version of ggml."""
    return f"ggml {load().ggml_version().decode()}"


def quantize(weight: torch.Tensor, kind: int) -> Array:
    """ggml's own rounding of a float32 `[N, K]` weight: uint8, its blocks row by row."""
    ggml = load()
    n, k = weight.shape
    weight = weight.detach().contiguous()
    codes = np.empty(n * ggml.ggml_row_size(kind, k), np.uint8)
    ggml.ggml_quantize_chunk(kind, weight.data_ptr(), codes.ctypes.data, 0, n, k, None)
    return codes


class MatMul:
    """A graph `y = x @ W.T + b` with its own copy of the weights, computed on the CPU backend.

    Input and output are not copied: the graph reads the tensor that it was built for, and every
    call returns the same output tensor. Weights lie where llama.cpp would put them: in a buffer
    that repacks them, where the backend has one for this kind and shape.

    Args:
        codes: what `quantize` returned.
        kind: the `ggml_type` of the weights.
        bias: float32 `[N]` or None.
        x: float32 `[M, K]`, contiguous.
        n: output channels.
        threads: number of threads.

    Raises:
        ValueError: called with another tensor than `x`.
        RuntimeError: ggml could not compute.
    """

    def __init__(
        self,
        codes: Array,
        kind: int,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        n: int,
        threads: int,
    ) -> None:
        ggml = self._ggml = load()
        m, k = x.shape
        self._x, self._y = x, torch.empty(m, n)
        self._bias = None if bias is None else bias.detach().clone()
        self._backend = _backend(threads)
        self._context = _context()
        weight, rows, y = _product(self._context, kind, m, k, n)
        self._buffers = [
            _place(_weight_buffer_type(kind, k, n), weight),
            _wrap(rows, self._x),
            _wrap(y, self._y),
        ]
        ggml.ggml_backend_tensor_set(weight, codes.ctypes.data, 0, codes.nbytes)
        if self._bias is not None:
            addend = ggml.ggml_new_tensor_2d(self._context, FLOAT32, n, 1)
            self._buffers.append(_wrap(addend, self._bias))
            y = ggml.ggml_add_inplace(self._context, y, addend)
            ggml.ggml_backend_view_init(y)
        self._graph = ggml.ggml_new_graph(self._context)
        ggml.ggml_build_forward_expand(self._graph, y)
        weakref.finalize(self, _free, self._context, self._buffers)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() != self._x.data_ptr():
            raise ValueError("the graph reads the tensor that it was built for, not another")
        status = self._ggml.ggml_backend_graph_compute(self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._y


@functools.cache
def _backend(threads: int) -> int:
    """One backend for all graphs, as in llama.cpp: it holds the memory for quantized rows."""
    backend: int = load().ggml_backend_cpu_init()
    load().ggml_backend_cpu_set_n_threads(backend, threads)
    return backend


def _context() -> int:
    """Memory for the descriptions of a few tensors and a graph; their data lies elsewhere."""
    ggml = load()
    size = 8 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
    context: int = ggml.ggml_init(_InitParams(size, None, True))
    return context


def _product(context: int, kind: int, m: int, k: int, n: int) -> tuple[int, int, int]:
    """Weight, rows and their product; ggml names the quickest dimension first."""
    ggml = load()
    weight = ggml.ggml_new_tensor_2d(context, kind, k, n)
    rows = ggml.ggml_new_tensor_2d(context, FLOAT32, k, m)
    return weight, rows, ggml.ggml_mul_mat(context, weight, rows)


def _place(buffer_type: int, weight: int) -> int:
    """Allocates a weight in a buffer of its own."""
    ggml = load()
    size = ggml.ggml_backend_buft_get_alloc_size(buffer_type, weight)
    buffer: int = ggml.ggml_backend_buft_alloc_buffer(buffer_type, size)
    ggml.ggml_backend_buffer_set_usage(buffer, _WEIGHTS)
    ggml.ggml_backend_tensor_alloc(buffer, weight, ggml.ggml_backend_buffer_get_base(buffer))
    return buffer


def _wrap(tensor: int, memory: torch.Tensor) -> int:
    """Makes a tensor's data that of a torch tensor."""
    if memory.data_ptr() % _ALIGNMENT or not memory.is_contiguous():
        raise ValueError(f"ggml takes contiguous tensors at multiples of {_ALIGNMENT} bytes")
    ggml = load()
    buffer: int = ggml.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
    ggml.ggml_backend_tensor_alloc(buffer, tensor, memory.data_ptr())
    return buffer


def _free(context: int, buffers: list[int]) -> None:
    for buffer in buffers:
        load().ggml_backend_buffer_free(buffer)
    load().ggml_free(context)


@functools.cache
def _weight_buffer_type(kind: int, k: int, n: int) -> int:
    """The first of the backend's extra buffer types that multiplies such weights, or the plain one.

    An extra type repacks weights when they are written to it.
    """
    ggml = load()
    backend = _backend(1)
    device = ggml.ggml_backend_get_device(backend)
    for buffer_type in _extra_buffer_types(device):
        context = _context()
        weight, rows, product = _product(context, kind, 1, k, n)
        memory = torch.empty(1, k)
        buffers = [_place(buffer_type, weight), _wrap(rows, memory)]
        supported = ggml.ggml_backend_dev_supports_op(device, product)
        _free(context, buffers)
        if supported:
            return buffer_type
    plain: int = ggml.ggml_backend_get_default_buffer_type(backend)
    return plain


def _extra_buffer_types(device: int) -> list[int]:
    ggml = load()
    registry = ggml.ggml_backend_dev_backend_reg(device)
    name = b"ggml_backend_dev_get_extra_bufts"
    address = ggml.ggml_backend_reg_get_proc_address(registry, name)
    if not address:
        return []
    found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
    types: list[int] = []
    while found and (buffer_type := found[len(types)]):  # a null pointer ends the list
        types.append(buffer_type)
    return types
