"""Prepared calls: what a layer's first call found out, kept for the next ones.

A prepared call is an object of the extension that holds a layer's checked operands. It takes the
layer's usual input (contiguous or channels_last) from Python to the kernel without a step in
between, after making sure that neither the operands nor the settings have changed; anything
else it declines, and the layer's own code takes over. It needs torch's DLPack exchange table
(torch 2.10 and later); without it, layers have no prepared calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit import _core
from lowbit.inputs import QUESTIONS
from lowbit.packed import PackedWeight

# torch's own table: other packages give one to an older torch, and what it does is theirs.
_bound = hasattr(torch._C, "_dlpack_exchange_api") and _core.bind_torch(
    Tensor, torch.nn.Parameter, torch.float32, torch.get_num_threads, QUESTIONS
)

_MOST = 1 << 24  # beyond any image: no sum of sizes can overflow


def prepare_linear(w: PackedWeight, settings: Mapping[str, Any]) -> _core.Direct | None:
    """The prepared call of a Linear with these operands, if there is one.

    Args:
        settings: as for `prepare_conv2d`.
    """
    if not _can_prepare(w):
        return None
    return _core.direct_linear(  # type: ignore[call-arg]  # mypy takes the star for all the rest
        _tensors(w), dict(settings), *w.call, w.epilogue, *w.activation_parameters
    )


def prepare_conv2d(
    w: PackedWeight,
    settings: Mapping[str, Any],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> _core.Direct | None:
    """The prepared call of a Conv2d with these operands, if there is one.

    Args:
        settings: the layer's attributes that the other arguments are made of; they must be the
            same objects at every call. A list among them could change: no call is prepared then.
        padding: top, left, bottom, right.
    """
    numbers = (*w.kernel_size, *stride, *padding, *dilation)
    if (
        not _can_prepare(w)
        or not all(isinstance(value, int | str | tuple) for value in settings.values())
        or min(*w.kernel_size, *stride, *dilation) < 1
        or min(padding) < 0
        or max(numbers) > _MOST
    ):
        return None
    top, left, bottom, right = padding
    sizes = (0, 0, 0, w.channels, w.out_features, 0, 0)
    geometry = (*sizes, *w.kernel_size, *stride, top, left, *dilation, w.groups)
    return _core.direct_conv2d(  # type: ignore[call-arg]  # as above
        _tensors(w),
        dict(settings),
        geometry,
        bottom,
        right,
        *w.call,
        w.epilogue,
        *w.activation_parameters,
    )


def _tensors(w: PackedWeight) -> tuple[Tensor | None, ...]:
    """What the prepared call holds: the operands, and the bias that it adds if that is another."""
    fixed = w.fixed
    return w.tensors if fixed is None else (*w.tensors, *fixed.tensors, fixed.bias)


def _can_prepare(w: PackedWeight) -> bool:
    ordinary = (Tensor, torch.nn.Parameter)
    return (
        _bound
        and bool(w.out_features and w.depth)
        and all(
            tensor is None or (type(tensor) in ordinary and address)
            for tensor, address in zip(w.tensors, w.addresses, strict=True)
        )
    )
