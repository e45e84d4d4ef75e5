"""Second moments of a layer's inputs, from rows (positions of an image) as its kernel sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit.nn as lnn
from lowbit.nn.conv import Convolution, weight_to_matrix
from lowbit.qat.fake import fake_activation
from lowbit.rounding.quadratic import damp

POSITIONS = 128
"""Of an image, at most; neighbours say much the same. A Linear's input has as many rows of 32."""
_ROWS = 4096  # of a Linear's input, at most


@dataclass
class Moments:
    """Sums over the inputs of one layer: x in the float model, z in the quantized one.

    Attributes:
        second: float64 [B, K, K], of z z^T; B blocks of output channels, K as in the packed layout.
        cross: float64 [B, K, K], of x z^T.
        mean_float, mean: float64 [B, K], of x and of z.
        count: rows so far.
    """

    second: Tensor
    cross: Tensor
    mean_float: Tensor
    mean: Tensor
    count: int = 0

    @classmethod
    def like(cls, rows: Tensor) -> Moments:
        """None yet, for rows [B, M, K]."""
        blocks, _, k = rows.shape
        zeros = torch.zeros(blocks, k, k, dtype=torch.float64)
        means = torch.zeros(blocks, k, dtype=torch.float64)
        return cls(zeros, zeros.clone(), means, means.clone())

    def add(self, x: Tensor, z: Tensor) -> None:
        """Adds rows float32 [B, M, K] of both models."""
        self.second += z.transpose(1, 2) @ z
        self.cross += x.transpose(1, 2) @ z
        self.mean_float += x.sum(dim=1, dtype=torch.float64)
        self.mean += z.sum(dim=1, dtype=torch.float64)
        self.count += x.shape[1]

    def hessian(self, centred: bool) -> Tensor:
        """float32 [B, K, K]: the mean of z z^T; `centred`: less that of the means (covariance)."""
        second = self.second / self.count
        if centred:
            mean = self.mean / self.count
            second = second - mean[:, :, None] * mean[:, None]
        return second.float()

    def target(self, w: Tensor, centred: bool) -> Tensor:
        """The weights [N, K] that do best on z what w does on x, near w where z does not tell.

        Ridge regression towards w: the closed form of what Li et al., "GPTAQ", 2025, and Nagel et
        al., "Up or Down?", 2020 (section 3.3, "asymmetric") account for: the inputs of a layer
        carry the error of all layers before it.
        """
        second, cross = self.second / self.count, self.cross / self.count
        if centred:
            mean, before = self.mean / self.count, self.mean_float / self.count
            second = second - mean[:, :, None] * mean[:, None]
            cross = cross - before[:, :, None] * mean[:, None]
        damped = damp(second)
        rows = w.double().view(len(second), -1, w.shape[1])
        right = rows @ (cross + damped - second)
        found = torch.linalg.solve(damped, right.transpose(1, 2)).transpose(1, 2)
        result: Tensor = found.reshape(w.shape).float()
        return result

    def shift(self, w: Tensor, q: Tensor) -> Tensor:
        """What to add to the bias [N] so that the outputs keep their means.

        Args:
            w, q: weights [N, K] of the float and of the quantized layer.
        """
        before, after = (
            (m.double().view(len(mean), -1, m.shape[1]) @ (mean / self.count)[..., None]).flatten()
            for m, mean in ((w, self.mean_float), (q, self.mean))
        )
        return (before - after).float()


def takes_moments(layer: nn.Module) -> bool:
    """Whether `rows_of` knows this lowbit layer."""
    return isinstance(layer, (lnn.Linear, Convolution))


def float_matrix(layer: Any, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """A float weight as the lowbit layer's matrix float32 [N, K], and what of K is no padding."""
    if isinstance(layer, lnn.Linear):
        return weight.float(), None
    return weight_to_matrix(weight.float(), layer.scheme.weight)


def rows_of(layer: Any, x: Tensor, seed: int, rounded: bool = False) -> Tensor:
    """Inputs of a lowbit layer as rows of its matrix product: float32 [B, M, K].

    Args:
        layer: a layer for which `takes_moments`.
        x: its input.
        seed: of what is taken of many rows; the same for both models.
        rounded: whether activations are rounded as the layer rounds them.
    """
    random = torch.Generator().manual_seed(seed)
    x = x.detach()
    if isinstance(layer, lnn.Linear):
        rows = kernel_input(layer, x, rounded)
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows) > _ROWS:
            rows = rows[torch.randperm(len(rows), generator=random)[:_ROWS].sort().values]
        return rows[None]
    return _patches(layer, kernel_input(layer, x, rounded), random)


def kernel_input(layer: Any, x: Tensor, rounded: bool = True) -> Tensor:
    """What a layer's kernel computes with: x, or padded images [N, C, H, W], in float32.

    Args:
        rounded: whether to round to codes times the scale of each row or image.
    """
    x = x.float()
    if isinstance(layer, lnn.Linear):
        return _as_codes(layer, x, (-1,)) if rounded else x
    images: Tensor = layer._to_images(x)
    if layer.padding_mode != "zeros":  # the pixels that it is padded by are rounded with it
        images = layer._pad(images)
    if rounded:
        images = _as_codes(layer, images, (1, 2, 3))
    if layer.padding_mode == "zeros":
        top, left, bottom, right = layer._pads()
        images = F.pad(images, [left, right, top, bottom])
    return images


def _as_codes(layer: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x rounded to what its codes mean, with the gradient of x."""
    activation = layer.scheme.activation
    if not layer.scheme.static or activation == "binary":
        return fake_activation(x, activation, dims)
    scale, zero = float(layer.activation_scale), int(layer.activation_zero)
    low, high = (-128, 127) if activation == "int8" else (-32639, 32639)
    code = (x.detach() / scale).round_().add_(zero).clamp_(low, high)
    return x + (code.sub_(zero).mul_(scale) - x.detach())


def _patches(layer: Convolution, images: Tensor, random: torch.Generator) -> Tensor:
    (kh, kw), (sh, sw), (dh, dw) = map(
        layer._two, (layer.kernel_size, layer.stride, layer.dilation)
    )
    count, channels, height, width = images.shape
    oh, ow = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    taken = torch.arange(oh * ow)
    if len(taken) > POSITIONS:
        taken = torch.randperm(oh * ow, generator=random)[:POSITIONS].sort().values
    i, j = taken // ow * sh, taken % ow * sw
    taps = torch.arange(kh)[:, None, None] * dh, torch.arange(kw)[None, :, None] * dw
    found = images[:, :, i + taps[0], j + taps[1]]  # [images, C, kh, kw, positions]
    per_block = channels // layer.groups
    found = found.view(count, layer.groups, per_block, kh * kw, len(taken))
    found = found.permute(1, 0, 4, 3, 2)  # [groups, images, positions, taps, C / groups]
    tap = layer._layout()[2] // (kh * kw)
    found = F.pad(found, (0, tap - per_block))
    return found.reshape(layer.groups, count * len(taken), kh * kw * tap)
