"""What the oracle says that a layer of `lowbit.nn` returns, from the layer's tensors alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import oracle
import oracle_static
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


def _groups(tensor: torch.Tensor | None, n: int, blocks: int) -> np.ndarray | None:
    """Scales or zeros of a layer's groups, [N, G]."""
    return None if tensor is None else oracle.unpack_groups(tensor.numpy(), n, blocks)


def _weights(layer, codes: np.ndarray, blocks: int = 1) -> tuple:
    n = len(codes)
    return (
        codes,
        layer.scheme.weight,
        layer.weight_scale.numpy(),
        _groups(layer.weight_group_scale, n, blocks),
        _groups(layer.weight_group_zero, n, blocks),
        layer.scheme.group_size,
        _array(layer.bias),
        layer.scheme.activation,
    )


def _fixed(layer) -> tuple[float, int]:
    return float(layer.activation_scale), int(layer.activation_zero)


def linear(layer, x: torch.Tensor) -> torch.Tensor:
    """Output of a `lowbit.nn.Linear` for x [..., K], in x's dtype."""
    n, k = layer.out_features, layer.in_features
    codes = oracle.unpack(layer.weight_packed.numpy(), layer.scheme.weight, n, k)
    rows = np.ascontiguousarray(x.detach().float().numpy().reshape(-1, k))
    if layer.scheme.static:
        y = oracle_static.linear(rows, *_weights(layer, codes), _fixed(layer))
    else:
        y = oracle.linear(rows, *_weights(layer, codes))
    return torch.from_numpy(y).view(*x.shape[:-1], n).to(x.dtype)


def conv2d(layer, x: torch.Tensor) -> torch.Tensor:
    """Output of a `lowbit.nn.Conv2d` for x [N, C, H, W], in x's dtype; contiguous."""
    fmt, groups, n = layer.scheme.weight, layer.groups, layer.out_channels
    channels = layer.in_channels // groups
    kernel = layer.kernel_size
    tap = oracle.tap_channels(fmt, channels)
    k = kernel[0] * kernel[1] * tap
    blocks = oracle.conv_blocks(n, groups)
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
    window = {
        "stride": layer.stride,
        "padding": padding,
        "dilation": layer.dilation,
        "groups": groups,
    }
    nhwc = np.ascontiguousarray(image.numpy().transpose(0, 2, 3, 1))
    if layer.scheme.static:
        y = oracle_static.conv2d(nhwc, *_weights(layer, codes, blocks), _fixed(layer), **window)
    else:
        y = oracle.conv2d(nhwc, *_weights(layer, codes, blocks), **window)
    return torch.from_numpy(np.ascontiguousarray(y.transpose(0, 3, 1, 2))).to(x.dtype)


def conv1d(layer, x: torch.Tensor) -> torch.Tensor:
    """Output of a `lowbit.nn.Conv1d` for x [N, C, L], in x's dtype: an image one row high."""
    image = SimpleNamespace(**vars(layer), **layer._buffers)
    for name, beside in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        value = getattr(layer, name)
        setattr(image, name, value if isinstance(value, str) else (beside, *value))
    return conv2d(image, x.unsqueeze(2)).squeeze(2)


def conv_transpose2d(layer, x: torch.Tensor) -> torch.Tensor:
    """Output of a `lowbit.nn.ConvTranspose2d` for x [N, C, H, W], in x's dtype; contiguous.

    Pixel by pixel, from the definition: which inputs an output reads through which taps.
    """
    batch, _, height, width = x.shape
    n, groups, (sh, sw), (ph, pw) = layer.out_channels, layer.groups, layer.stride, layer.padding
    (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
    size = [
        (x.shape[2 + d] - 1) * layer.stride[d]
        - 2 * layer.padding[d]
        + layer.dilation[d] * (layer.kernel_size[d] - 1)
        + layer.output_padding[d]
        + 1
        for d in (0, 1)
    ]
    image = np.ascontiguousarray(x.detach().float().numpy().transpose(0, 2, 3, 1))
    activation, fixed, zero = layer.scheme.activation, (0.0, 0), 0
    if layer.scheme.static:
        fixed = _fixed(layer)
        zero = fixed[1]
        codes, scale = oracle_static.quantize(image, activation, *fixed)
    else:
        codes, scale = oracle.quantize_activation(image, activation)
    weights = dict(_phases(layer))
    bias = _array(layer.bias)
    y = np.zeros((batch, *size, n), np.float32)
    for row, column in np.ndindex(*size):
        # In the order of the pixels that they read: as in an ordinary convolution.
        rows = [k for k in reversed(range(kh)) if (row + ph - k * dh) % sh == 0]
        columns = [k for k in reversed(range(kw)) if (column + pw - k * dw) % sw == 0]
        if not (rows and columns):
            y[:, row, column] = (0 if bias is None else bias) + 0 * scale[:, None]
            continue
        taps = []
        for i, j in itertools.product(rows, columns):
            at, to = (row + ph - i * dh) // sh, (column + pw - j * dw) // sw
            inside = 0 <= at < height and 0 <= to < width
            taps.append(codes[:, at, to] if inside else np.full_like(codes[:, 0, 0], zero))
        window = np.stack(taps, 1).reshape(batch, len(rows), len(columns), groups, -1)
        matrix, factors = weights[(row + ph) % sh, (column + pw) % sw]
        real = np.ones((1, len(rows), len(columns), window.shape[-1]), int)
        real = oracle.conv_matrix(real, layer.scheme.weight)[0] == 1
        for g, part in enumerate(np.split(np.arange(n), groups)):
            values = oracle.conv_matrix(window[:, :, :, g], layer.scheme.weight)
            own = [None if f is None else f[part] for f in factors]
            rest = (layer.scheme.weight, *own, layer.scheme.group_size)
            offset = None if bias is None else bias[part]
            if layer.scheme.static:
                offset = oracle_static.bias(matrix[part], real, *rest, offset, fixed)
            y[:, row, column, part] = oracle.scaled_sum(values, scale, matrix[part], *rest, offset)
    return torch.from_numpy(np.ascontiguousarray(y.transpose(0, 3, 1, 2))).to(x.dtype)


def _phases(layer) -> Iterator[tuple[tuple[int, int], tuple[np.ndarray, list]]]:
    """For each phase (rows, columns): its weight codes [N, K], and its scales.

    A part holds the phases with kernels of its size, rows before columns, in ascending order.
    """
    (sh, sw), (dh, dw) = layer.stride, layer.dilation
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    sizes = [
        Counter(k * d % s for k in range(kernel))
        for kernel, d, s in zip(layer.kernel_size, (dh, dw), (sh, sw), strict=True)
    ]
    order = []
    for counts in sizes:
        if depthwise:
            order.append([[r] for r in sorted(counts, key=lambda r: (-counts[r], r))])
        else:
            by_size = sorted(set(counts.values()), reverse=True)
            order.append([sorted(r for r in counts if counts[r] == size) for size in by_size])
    pairs = list(itertools.product(*order))
    assert len(pairs) == len(layer.parts)
    for (rows, columns), part in zip(pairs, layer.parts, strict=True):
        blocks = oracle.conv_blocks(part.out_channels, part.groups)
        factors = [_array(part.weight_scale)] + [
            _groups(values, part.out_channels, blocks)
            for values in (part.weight_group_scale, part.weight_group_zero)
        ]
        packed = np.split(part.weight_packed.numpy(), blocks)
        n, depth = part.out_channels // blocks, part._layout()[2]
        codes = [oracle.unpack(block, layer.scheme.weight, n, depth) for block in packed]
        matrix = np.concatenate(codes)
        phases = list(itertools.product(rows, columns))
        channels = np.arange(part.out_channels).reshape(layer.groups, len(phases), -1)
        for index, phase in enumerate(phases):
            chosen = channels[:, index].ravel()
            yield phase, (matrix[chosen], [None if f is None else f[chosen] for f in factors])


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
