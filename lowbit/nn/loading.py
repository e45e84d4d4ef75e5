"""Whether the tensors of a state dict are those of a layer, told in words where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit import _core
from lowbit.formats import FORMATS
from lowbit.packed import (
    ACTIVATION_NAMES,
    NAMES,
    activation_problem,
    groups_padding_is_zero,
    tensor_shapes,
)
from lowbit.schemes import Scheme

VERSION_NAME = "format_version"
FLOAT_WEIGHT = "the state dict holds a float weight; load it into the float model and quantize that"
_OPTIONAL = ("weight_group_zero", "bias")


def format_version(scheme: Scheme) -> list[int]:
    """What `format_version` holds: layout version, bits, mul, add, group size (0 without)."""
    fmt = FORMATS[scheme.weight]
    return [_core.LAYOUT_VERSION, fmt.bits, fmt.mul, fmt.add, scheme.group_size or 0]


def state_problems(
    state_dict: Mapping[str, Any], prefix: str, layout: tuple[int, int, int], scheme: Scheme
) -> list[str]:
    """Why a layer cannot load its keys of a state dict; empty if it can, or if it has none.

    Args:
        layout: (blocks, rows, K), see `lowbit.packed.conv_weight_layout`.
    """
    found = {
        name: state_dict[prefix + name]
        for name in (*NAMES, *ACTIVATION_NAMES, VERSION_NAME)
        if prefix + name in state_dict
    }
    if not set(found) - {"bias"}:
        if prefix + "weight" in state_dict:
            return [FLOAT_WEIGHT]
        return []
    not_tensors = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if not_tensors:
        return [f"{', '.join(not_tensors)} must be tensors"]
    problem = _version_problem(found.get(VERSION_NAME), scheme)
    if problem:
        return [problem]
    static = [name for name in ACTIVATION_NAMES if name in found]
    if static and not scheme.static:
        return [f"{', '.join(static)} is there: build the layer with a static scheme"]
    shapes = tensor_shapes(layout, scheme.weight, scheme.group_size or 0, scheme.static)
    missing = [name for name in shapes if name not in found and name not in _OPTIONAL]
    if missing:
        return [f"{', '.join(missing)} missing; the state dict is incomplete"]
    problems = []
    for name, tensor in found.items():
        if name == VERSION_NAME:
            continue
        if name not in shapes:
            problems.append(f"{name} is there, but the layer has no groups")
            continue
        shape, dtype = shapes[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            problems.append(
                f"{name} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}; "
                "the state dict is of a layer with other sizes, or was changed"
            )
        elif tensor.layout is not torch.strided or not tensor.is_contiguous():
            problems.append(f"{name} must be contiguous; call .contiguous() on it before loading")
    if not problems and static:
        scale, zero = (found[name] for name in static)
        problems += _activation_problems(scale, zero, scheme)
    if not problems and not _padding_is_zero(found["weight_packed"], scheme.weight, layout):
        problems.append("weight_packed is damaged: codes in its padding are not 0")
    for name in ("weight_group_scale", "weight_group_zero"):
        values = found.get(name)
        if problems or values is None or not _is_readable(values):
            continue
        if not groups_padding_is_zero(values, *layout[:2]):
            problems.append(f"{name} is damaged: its padding is not 0")
    return problems


def _activation_problems(scale: Tensor, zero: Tensor, scheme: Scheme) -> list[str]:
    if not (_is_readable(scale) and _is_readable(zero)):
        return []
    values = float(scale), int(zero)
    if values == (0, 0):  # not calibrated yet
        return []
    problem = activation_problem(*values, scheme.activation)
    return [problem] if problem else []


def _version_problem(tensor: Tensor | None, scheme: Scheme) -> str | None:
    if tensor is None:
        return f"{VERSION_NAME} is missing; the state dict is incomplete"
    wanted = format_version(scheme)
    if tensor.dtype != torch.int32 or tensor.shape != (len(wanted),):
        return f"{VERSION_NAME} must be int32 [{len(wanted)}], not {tensor.dtype} {tensor.shape}"
    if not _is_readable(tensor):
        return None
    found = tensor.tolist()
    if found[0] != wanted[0]:
        return (
            f"the state dict has layout version {found[0]}, this lowbit reads {wanted[0]}; convert "
            "the float model again, or use the lowbit that wrote it"
        )
    if found != wanted:
        return (
            f"the state dict holds {_format_name(found)} weights, the layer takes "
            f"{_format_name(wanted)}; build the layer with the scheme of the state dict"
        )
    return None


def _format_name(version: list[int]) -> str:
    names = [f.name for f in FORMATS.values() if [f.bits, f.mul, f.add] == version[1:4]]
    name = names[0] if names else f"unknown (bits, mul, add = {version[1:4]})"
    return f"{name} (group_size {version[4] or None})"


def _padding_is_zero(packed: Tensor, weight_format: str, layout: tuple[int, int, int]) -> bool:
    blocks, rows, depth = layout
    if not _is_readable(packed) or packed.numel() == 0:
        return True
    parts = packed.detach().cpu().chunk(blocks)
    return all(_core.padding_is_zero(part.numpy(), weight_format, rows, depth) for part in parts)


def _is_readable(tensor: Tensor) -> bool:
    """Whether the tensor has values: not on the meta device, not a FakeTensor."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
