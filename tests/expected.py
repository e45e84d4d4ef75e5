"""What the oracle says that a layer of `lowbit.nn` returns, from the layer's tensors alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import oracle
import torch
import torch.nn.functional as F

SCHEMES = (
    "w8a8",
    "w4a8",
    "w2a8",
    "wta8",
    "w1a8",
    "w1a1",
    "w8a16",
    "w4a16-g32",
    "w2a8-g64",
    "w1a1-g32",
    "wta16-g32",
)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits (NaN equals NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = (t.detach().contiguous().view(bits) for t in (a, b))
    return torch.equal(a, b)


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def _weights(layer, codes: np.ndarray) -> tuple:
    return (
        codes,
        layer.scheme.weight,
        layer.weight_scale.numpy(),
        _array(layer.weight_group_scale),
        _array(layer.weight_group_zero),
        layer.scheme.group_size,
        _array(layer.bias),
        layer.scheme.activation,
    )


def linear(layer, x: torch.Tensor) -> torch.Tensor:
    """Output of a `lowbit.nn.Linear` for x [..., K], in x's dtype."""
    n, k = layer.out_features, layer.in_features
    codes = oracle.unpack(layer.weight_packed.numpy(), layer.scheme.weight, n, k)
    rows = np.ascontiguousarray(x.detach().float().numpy().reshape(-1, k))
    y = oracle.linear(rows, *_weights(layer, codes))
    return torch.from_numpy(y).view(*x.shape[:-1], n).to(x.dtype)


def conv2d(layer, x: torch.Tensor) -> torch.Tensor:
    """Output of a `lowbit.nn.Conv2d` for x [N, C, H, W], in x's dtype; contiguous."""
    fmt, groups, n = layer.scheme.weight, layer.groups, layer.out_channels
    channels = layer.in_channels // groups
    kernel = layer.kernel_size
    tap = oracle.tap_channels(fmt, channels)
    k = kernel[0] * kernel[1] * tap
    blocks = 1 if oracle.is_depthwise(layer.in_channels, n, groups) else groups
    parts = np.split(layer.weight_packed.numpy(), blocks)
    codes = np.concatenate([oracle.unpack(part, fmt, n // blocks, k) for part in parts])
    codes = np.ascontiguousarray(codes.reshape(n, *kernel, tap)[..., :channels])

    if layer.padding == "same":
        sizes = [d * (size - 1) for d, size in zip(layer.dilation, kernel, strict=True)]
        top, left = (size // 2 for size in sizes)
        padding = (top, sizes[0] - top, left, sizes[1] - left)
    elif layer.padding == "valid":
        padding = (0, 0, 0, 0)
    else:
        height, width = layer.padding
        padding = (height, height, width, width)
    image = x.detach().float()
    if layer.padding_mode != "zeros":
        top, bottom, left, right = padding
        image = F.pad(image, [left, right, top, bottom], mode=layer.padding_mode)
        padding = (0, 0, 0, 0)
    y = oracle.conv2d_nchw(
        image.numpy(),
        *_weights(layer, codes),
        stride=layer.stride,
        padding=padding,
        dilation=layer.dilation,
        groups=groups,
    )
    return torch.from_numpy(np.ascontiguousarray(y)).to(x.dtype)


def images() -> Iterator[tuple[str, torch.Tensor]]:
    """Images [N, C, H, W] in memory formats of every kind, by name."""
    base = torch.randn(4, 6, 8, 10)
    last = base.to(memory_format=torch.channels_last)
    yield "contiguous", base
    yield "channels_last", last
    yield "one image of channels_last", last[1:2]
    yield "sliced", base[:, :, 1:6, ::2]
    yield "sliced channels_last", last[:, :, 1:6, ::2]
    yield "channels sliced", torch.randn(2, 12, 5, 5).to(memory_format=torch.channels_last)[:, ::2]
    yield "transposed", base.transpose(2, 3)
    yield "transposed channels_last", last.transpose(2, 3)
    yield "batch of one pixel", torch.randn(3, 6, 1, 1)
    yield "one pixel, channels_last", torch.randn(3, 6, 1, 1).to(memory_format=torch.channels_last)
    yield "one column", torch.randn(3, 6, 5, 1)
    yield "one column, channels_last", torch.randn(3, 6, 5, 1).to(memory_format=torch.channels_last)
    yield "expanded batch", base[:1].expand(3, -1, -1, -1)
    yield "expanded channels", base[:, :1].expand(-1, 6, -1, -1)
    yield "one channel", torch.randn(2, 1, 5, 5)
    yield (
        "one channel, channels_last",
        torch.randn(2, 1, 5, 5).to(memory_format=torch.channels_last),
    )
    yield "one channel, one pixel", torch.randn(2, 1, 1, 1)
    yield "empty batch", base[:0]
    yield "empty batch, channels_last", last[:0]
