"""Packed weights as the kernels take them: shapes, and the check before an address is used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import _core
from lowbit.formats import FORMATS

Tensors = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]
"""weight_packed, weight_scale, weight_group_scale, weight_group_zero, bias."""

NAMES = ("weight_packed", "weight_scale", "weight_group_scale", "weight_group_zero", "bias")


@dataclass(frozen=True)
class PackedWeight:
    """Checked operands of a kernel. Holds the tensors, so the addresses stay valid.

    Attributes:
        tensors: see `Tensors`.
        operands: tuple of int, what the kernel takes between y and the number of threads.
        channels: in_features, or in_channels of a convolution.
        out_features: outputs, of all groups of a convolution.
        depth: K.
        owner: name of the layer or operator, for error messages.
        activation: format of the activations.
        kernel_size: of a convolution.
        groups: of a convolution.
        epilogue: index in `_core.EPILOGUES`: what is computed from the outputs.
    """

    tensors: Tensors
    operands: Any
    channels: int
    out_features: int
    depth: int
    owner: str
    activation: str
    kernel_size: tuple[int, int] = (1, 1)
    groups: int = 1
    epilogue: int = 0

    @property
    def bias(self) -> Tensor | None:
        """float32 [N] or None."""
        return self.tensors[4]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of the tensors' memory when they were checked, 0 where there is no tensor."""
        found: tuple[int, ...] = self.operands[-len(NAMES) :]
        return found


def conv_weight_layout(
    weight_format: str,
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    groups: int,
    owner: str,
) -> tuple[int, int, int]:
    """Layout of a convolution's weight: (blocks, rows of a block, K).

    K runs over (kernel row, kernel column, channel of the group), the channels of a tap padded to
    whole vectors unless they fill less than one. Groups of 1, 2, 4 or 8 output channels (a
    depthwise convolution's have 1) make one block, whose panels they share; any other has one block
    for each group.

    Raises:
        ValueError: sizes below 1, or channels that the groups do not divide.
    """
    if min(in_channels, out_channels, groups, *kernel_size) < 1:
        raise ValueError(
            f"{owner}: in_channels {in_channels}, out_channels {out_channels}, kernel_size "
            f"{kernel_size} and groups {groups} must be at least 1"
        )
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"{owner}: groups {groups} must divide in_channels {in_channels} and out_channels "
            f"{out_channels}"
        )
    depth = math.prod(kernel_size) * _core.tap_channels(weight_format, in_channels // groups)
    blocks = _core.conv2d_blocks(out_channels, groups)
    return blocks, out_channels // blocks, depth


def tensor_shapes(
    layout: tuple[int, int, int], weight_format: str, group_size: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor in `NAMES`, for a layout (blocks, rows, K).

    Args:
        group_size: 0 for one scale per channel; there are no group scales then.
    """
    blocks, rows, depth = layout
    panels, steps, vector = FORMATS[weight_format].packed_shape(rows, depth)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((blocks * panels, steps, vector), torch.uint8),
        "weight_scale": ((blocks * rows,), torch.float32),
        "bias": ((blocks * rows,), torch.float32),
    }
    if group_size:
        group_shape = (blocks * rows, -(-depth // group_size))
        shapes["weight_group_scale"] = (group_shape, torch.float16)
        shapes["weight_group_zero"] = (group_shape, torch.float16)
    return shapes


def linear_weight(
    tensors: Tensors,
    formats: tuple[str, str],
    group_size: int,
    sizes: tuple[int, int],
    owner: str,
    epilogue: str = "none",
) -> PackedWeight:
    """Checks the operands of a Linear, so that no wrong one can make a kernel read elsewhere.

    Args:
        tensors: see `Tensors`.
        formats: of the weight and of the activation.
        group_size: 0 for one scale per channel.
        sizes: in_features, out_features.
        owner: name for error messages.
        epilogue: one of `_core.EPILOGUES`.

    Raises:
        ValueError: an unknown format, epilogue or group size, or a tensor of another shape, dtype
            or layout.
        RuntimeError: a tensor that is not on the CPU.
    """
    channels, out_features = sizes
    indices = _check_formats(formats, group_size, owner)
    layout = (1, out_features, channels)
    addresses = _check_tensors(tensors, layout, formats[0], group_size, owner)
    operands = (*indices, out_features, channels, group_size, *addresses)
    return PackedWeight(
        tensors,
        operands,
        channels,
        out_features,
        channels,
        owner,
        formats[1],
        epilogue=_epilogue_index(epilogue, owner),
    )


def conv2d_weight(
    tensors: Tensors,
    formats: tuple[str, str],
    group_size: int,
    sizes: tuple[int, int, tuple[int, int], int],
    owner: str,
    epilogue: str = "none",
) -> PackedWeight:
    """Checks the operands of a Conv2d; as `linear_weight`.

    Args:
        sizes: in_channels, out_channels, kernel_size, groups.
    """
    indices = _check_formats(formats, group_size, owner)
    channels, out_channels, kernel_size, groups = sizes
    layout = conv_weight_layout(formats[0], channels, out_channels, kernel_size, groups, owner)
    addresses = _check_tensors(tensors, layout, formats[0], group_size, owner)
    operands = (*indices, group_size, *addresses)
    return PackedWeight(
        tensors,
        operands,
        channels,
        out_channels,
        layout[2],
        owner,
        formats[1],
        kernel_size,
        groups,
        _epilogue_index(epilogue, owner),
    )


def _check_formats(formats: tuple[str, str], group_size: int, owner: str) -> tuple[int, int]:
    weight, activation = formats
    if weight not in FORMATS or activation not in _core.ACTIVATIONS:
        raise ValueError(
            f"{owner}: unknown formats {weight!r}, {activation!r}; weights are "
            f"{', '.join(FORMATS)}, activations {', '.join(_core.ACTIVATIONS)}"
        )
    if group_size < 0 or group_size % 32:
        raise ValueError(f"{owner}: group_size {group_size} must be a multiple of 32, or 0")
    return FORMATS[weight].index, _core.ACTIVATIONS.index(activation)


def _epilogue_index(epilogue: str, owner: str) -> int:
    if epilogue not in _core.EPILOGUES:
        raise ValueError(
            f"{owner}: unknown epilogue {epilogue!r}; use one of: {', '.join(_core.EPILOGUES)}"
        )
    return _core.EPILOGUES.index(epilogue)


def _check_tensors(
    tensors: Tensors,
    layout: tuple[int, int, int],
    weight_format: str,
    group_size: int,
    owner: str,
) -> tuple[int, ...]:
    if min(layout) < 0:
        raise ValueError(f"{owner}: negative sizes {layout}")
    shapes = tensor_shapes(layout, weight_format, group_size)
    for name, tensor in zip(NAMES, tensors, strict=True):
        _check_operand(name, tensor, shapes.get(name), owner)
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _check_operand(
    name: str,
    tensor: Tensor | None,
    expected: tuple[tuple[int, ...], torch.dtype] | None,
    owner: str,
) -> None:
    if tensor is None:
        if expected is not None and name not in ("bias", "weight_group_zero"):
            raise ValueError(f"{owner}: {name} is missing; load it from a state dict")
        return
    if expected is None:
        raise ValueError(f"{owner}: {name} is given, but there are no groups; drop it")
    if tensor.device.type != "cpu":
        remedy = "load a state dict into it" if tensor.is_meta else "move the layer with .cpu()"
        raise RuntimeError(
            f"{owner}: {name} is on {tensor.device}, but this layer runs on the CPU; {remedy}"
        )
    shape, dtype = expected
    if tensor.shape != shape or tensor.dtype != dtype or tensor.layout is not torch.strided:
        raise ValueError(
            f"{owner}: {name} must be a {dtype} tensor {list(shape)}, not {tensor.dtype} "
            f"{list(tensor.shape)} ({tensor.layout})"
        )
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(f"{owner}: {name} must be contiguous; call .contiguous() on it")
