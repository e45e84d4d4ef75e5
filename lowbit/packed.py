"""Packed weights as the kernels take them: shapes, and the check before an address is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import _core
from lowbit.formats import FORMATS

Tensors = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]
"""weight_packed, weight_scale, weight_group_scale, weight_group_zero, bias."""

ActivationTensors = tuple["Tensor | None", "Tensor | None"]
"""activation_scale float32 [] and activation_zero int32 [] of static activations, or `DYNAMIC`."""

ACTIVATION_NAMES = ("activation_scale", "activation_zero")
_ACTIVATION_DTYPES = (torch.float32, torch.int32)
DYNAMIC: ActivationTensors = (None, None)

PANEL = 16
"""Output channels of a panel."""

_HUGE_PAGE = 2 << 20

NAMES = ("weight_packed", "weight_scale", "weight_group_scale", "weight_group_zero", "bias")


@dataclass(frozen=True)
class FixedActivation:
    """Static activations as they were checked, and what follows from them.

    Attributes:
        tensors: activation_scale and activation_zero.
        scale, zero: their values: code q means scale * (q - zero).
        bias: float32 [N], what the kernels add in place of the bias; None where that is right
            (there is no zero point).
        versions: of the weight's tensors, which `bias` is made of; see `tensor_version`.
    """

    tensors: tuple[Tensor, Tensor]
    scale: float
    zero: int
    bias: Tensor | None
    versions: tuple[int, ...]


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
        fixed: static activations; None: each row or image has a scale of its own.
        call: what the kernel takes: the operands, with the bias that it adds.
        activation_parameters: what it takes last.
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
    fixed: FixedActivation | None = None
    call: Any = ()
    activation_parameters: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        call, fixed = self.operands, self.fixed
        if fixed is not None:
            object.__setattr__(self, "activation_parameters", (fixed.scale, fixed.zero))
            if fixed.bias is not None:
                call = (*call[:-1], fixed.bias.data_ptr())
        object.__setattr__(self, "call", call)

    @property
    def bias(self) -> Tensor | None:
        """float32 [N] or None."""
        return self.tensors[4]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of the tensors' memory when they were checked, 0 where there is no tensor."""
        found: tuple[int, ...] = self.operands[-len(NAMES) :]
        return found


def move_to_huge_pages(tensors: Iterable[Tensor | None]) -> None:
    """Moves tensors to pages of 2 MB, where Linux grants them: same bytes, same addresses.

    Weights that come from memory are read up to a fifth faster then. Pages that lie in a tensor
    whole are moved, in some two copies' time; where they are already, that is known at once.
    """
    for tensor in tensors:
        if tensor is not None and tensor.nbytes >= _HUGE_PAGE:
            _core.move_to_huge_pages(tensor.data_ptr(), tensor.nbytes)


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
    layout: tuple[int, int, int], weight_format: str, group_size: int, static: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor in `NAMES`, for a layout (blocks, rows, K).

    Args:
        group_size: 0 for one scale per channel; there are no group scales then.
        static: whether there are those in `ACTIVATION_NAMES`, too.
    """
    blocks, rows, depth = layout
    panels, steps, vector = FORMATS[weight_format].packed_shape(rows, depth)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((blocks * panels, steps, vector), torch.uint8),
        "weight_scale": ((blocks * rows,), torch.float32),
        "bias": ((blocks * rows,), torch.float32),
    }
    if group_size:
        group_shape = (blocks * panels, -(-depth // group_size), PANEL)
        shapes["weight_group_scale"] = (group_shape, torch.float16)
        shapes["weight_group_zero"] = (group_shape, torch.float16)
    if static:
        shapes |= {
            name: ((), dtype)
            for name, dtype in zip(ACTIVATION_NAMES, _ACTIVATION_DTYPES, strict=True)
        }
    return shapes


def pack_groups(values: Tensor, blocks: int) -> Tensor:
    """Scales or zeros of groups [N, G] in the order of the panels: [panels, G, 16].

    Args:
        values: float16 [N, G], the rows of `blocks` matrices one after the other.
        blocks: matrices that have panels of their own, see `conv_weight_layout`. What pads the
            last panel of each is 0.
    """
    n, groups = values.shape
    rows = n // max(blocks, 1)
    panels = -(-rows // PANEL)
    padded = values.new_zeros(blocks, panels * PANEL, groups)
    padded[:, :rows] = values.reshape(blocks, rows, groups)
    return padded.view(blocks * panels, PANEL, groups).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, blocks: int, rows: int) -> Tensor:
    """The inverse of `pack_groups`, for blocks of `rows` channels: [N, G]."""
    panels, groups, _ = packed.shape
    values = packed.transpose(1, 2).reshape(blocks, panels // max(blocks, 1) * PANEL, groups)
    return values[:, :rows].reshape(blocks * rows, groups)


def groups_padding_is_zero(packed: Tensor, blocks: int, rows: int) -> bool:
    """Whether all that `packed` holds beyond its blocks of `rows` channels is 0."""
    kept = pack_groups(unpack_groups(packed, blocks, rows), blocks)
    return torch.equal(kept.view(torch.int16), packed.view(torch.int16))


def linear_weight(
    tensors: Tensors,
    formats: tuple[str, str],
    group_size: int,
    sizes: tuple[int, int],
    owner: str,
    epilogue: str = "none",
    activation: ActivationTensors = DYNAMIC,
) -> PackedWeight:
    """Checks the operands of a Linear, so that no wrong one can make a kernel read elsewhere.

    Args:
        tensors: see `Tensors`.
        formats: of the weight and of the activation.
        group_size: 0 for one scale per channel.
        sizes: in_features, out_features.
        owner: name for error messages.
        epilogue: one of `_core.EPILOGUES`.
        activation: see `ActivationTensors`.

    Raises:
        ValueError: an unknown format, epilogue or group size, a tensor of another shape, dtype or
            layout, or activation parameters that no kernel takes.
        RuntimeError: a tensor that is not on the CPU, or an activation scale of 0: it is not
            calibrated.
    """
    channels, out_features = sizes
    indices = _check_formats(formats, group_size, owner)
    layout = (1, out_features, channels)
    addresses = _check_tensors(tensors, layout, formats[0], group_size, owner)
    operands = (*indices, out_features, channels, group_size, *addresses)
    fixed = _check_activation(
        activation,
        formats[1],
        tensors,
        owner,
        lambda out, scale, zero: _core.linear_static_bias(
            out, scale, zero, torch.get_num_threads(), *operands
        ),
    )
    return PackedWeight(
        tensors,
        operands,
        channels,
        out_features,
        channels,
        owner,
        formats[1],
        epilogue=_epilogue_index(epilogue, owner),
        fixed=fixed,
    )


def conv2d_weight(
    tensors: Tensors,
    formats: tuple[str, str],
    group_size: int,
    sizes: tuple[int, int, tuple[int, int], int],
    owner: str,
    epilogue: str = "none",
    activation: ActivationTensors = DYNAMIC,
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
    # Of the geometry nothing but the weight's counts.
    geometry = (0, 0, 0, channels, out_channels, 0, 0, *kernel_size, 1, 1, 0, 0, 1, 1, groups)
    fixed = _check_activation(
        activation,
        formats[1],
        tensors,
        owner,
        lambda out, scale, zero: _core.conv2d_static_bias(
            out, scale, zero, torch.get_num_threads(), geometry, *operands
        ),
    )
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
        fixed,
    )


def activation_problem(scale: float, zero: int, activation: str) -> str | None:
    """Why a kernel takes no such parameters of static activations; None if it does.

    Args:
        scale: as a float32 holds it.
    """
    least = torch.finfo(torch.float32).tiny
    if not least <= scale <= 1 / least:
        return (
            f"activation_scale {scale} must be a positive number that a float32 can divide by "
            f"({least:.3g} to {1 / least:.3g})"
        )
    if activation == "int8" and not -128 <= zero <= 127:
        return f"activation_zero {zero} must be in -128..127"
    if activation != "int8" and zero:
        return f"activation_zero {zero} must be 0: {activation} activations have no zero point"
    return None


def not_calibrated(owner: str) -> RuntimeError:
    """The error of static activations without a scale."""
    return RuntimeError(
        f"{owner}: not calibrated: its activations are static, but their scale is still 0; "
        "calibrate the model (lowbit.quantize(model, scheme, calibration=batches)), load a state "
        "dict of a calibrated one, or set them by layer.set_activation(scale, zero)"
    )


def tensor_version(tensor: Tensor | None) -> int:
    """How often a tensor was written to in place, as torch counts; -1 where it does not.

    torch does not count writes to inference tensors, through `.data`, or through NumPy.
    """
    if tensor is None or tensor.is_inference():
        return -1
    return tensor._version


def _check_activation(
    tensors: ActivationTensors,
    activation: str,
    weights: Tensors,
    owner: str,
    make_bias: Callable[[int, float, int], None],
) -> FixedActivation | None:
    """Checks the parameters of static activations, and makes the bias that goes with them.

    Args:
        make_bias: writes it to an address, for a scale and a zero point.
    """
    scale_tensor, zero_tensor = tensors
    if scale_tensor is None and zero_tensor is None:
        return None
    if scale_tensor is None or zero_tensor is None:
        raise ValueError(f"{owner}: {' and '.join(ACTIVATION_NAMES)} go together")
    for name, tensor, dtype in zip(ACTIVATION_NAMES, tensors, _ACTIVATION_DTYPES, strict=True):
        _check_operand(name, tensor, ((), dtype), owner)
    scale, zero = float(scale_tensor), int(zero_tensor)
    if scale == 0:
        raise not_calibrated(owner)
    problem = activation_problem(scale, zero, activation)
    if problem:
        raise ValueError(f"{owner}: {problem}")
    bias = None
    if zero:
        bias = torch.empty_like(weights[1])
        make_bias(bias.data_ptr(), scale, zero)
    versions = tuple(tensor_version(tensor) for tensor in weights)
    return FixedActivation((scale_tensor, zero_tensor), scale, zero, bias, versions)


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
