"""Learns the rounding of a block of layers together, for the block's output.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021:
errors of layers in one block make up for each other. What is learned is that of Chen et al.,
"EfficientQAT", 2024 (its block-wise training): weights, through their rounding by a
straight-through estimator, with scales, zeros and biases. It begins at codes that a quantizer has
chosen, and what has not become better is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.nn.conv import Convolution
from lowbit.quality import floating_tensors
from lowbit.quantizers import QuantizedWeight, effective_scales, nearest_codes
from lowbit.rounding.moments import kernel_input
from lowbit.rounding.quadratic import make_grid

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_RATES = {"levels": 2e-2, "log_scale": 1e-3, "zero": 2e-3, "bias": 2e-3}

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One call of a block.

    Attributes:
        call: positional and keyword arguments, as the quantized model gives them.
        target: the float model's output.
    """

    call: Call
    target: Tensor


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that containers (`nn.ModuleList`, `nn.Sequential`) list, the outermost ones."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module, listed: bool) -> None:
        container = isinstance(module, _CONTAINERS)
        if listed and not container:
            found.setdefault(id(module), module)
            return
        for child in module.children():
            visit(child, container)

    visit(model, False)
    return list(found.values())


class SoftLayer:
    """A lowbit layer in float32, with gradients; what it learns begins where the layer is.

    Attributes:
        parameters: by name; "levels" are levels before rounding, in units of the scale.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        q: QuantizedWeight = layer.quantized_weight()
        self._q = q
        k = q.codes.shape[1]
        self._unit = torch.arange(k) // (q.group_size or max(k, 1))
        self._scale = effective_scales(q.scale, q.group_scale)
        levels = q.format.value(q.codes)
        self.parameters = {"levels": levels, "log_scale": torch.zeros_like(self._scale)}
        if q.group_zero is not None:
            zero = q.scale[:, None] * q.group_zero.float()
            self.parameters["zero"] = zero / torch.where(self._scale == 0, 1.0, self._scale)
        bias = torch.zeros(len(q.codes)) if layer.bias is None else layer.bias.clone()
        self._bias, self._size = bias, 0.0
        self.parameters["bias"] = torch.zeros_like(bias)  # in units of the outputs' size
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        """What the lowbit layer computes."""
        layer: Any = self.layer
        inputs = kernel_input(layer, x)
        weight = layer._matrix_to_weight(self._weight())
        convolution = isinstance(layer, Convolution)
        if convolution:
            weight = weight if weight.dim() == 4 else weight[:, :, None]
            stride, dilation = layer._two(layer.stride), layer._two(layer.dilation)
            y = F.conv2d(inputs, weight, None, stride, 0, dilation, layer.groups)
        else:
            y = F.linear(inputs, weight)
        if not self._size:
            self._size = float(y.detach().square().mean().sqrt())
        bias = self._bias + self.parameters["bias"] * self._size
        y = y + (bias[:, None, None] if convolution else bias)
        if convolution:
            y = layer._from_images(y, x.dim() <= layer._dims + 1)
        return y.to(x.dtype)

    def _weight(self) -> Tensor:
        fmt = self._q.format
        u = self.parameters["levels"].clamp(fmt.min_value, fmt.max_value)
        rounded = nearest_codes(u.detach(), torch.ones(()), fmt) * fmt.mul + fmt.add
        v = u + (rounded - u).detach()
        zero = self.parameters.get("zero")
        if zero is not None:
            v = v + zero[:, self._unit]
        return v * (self._scale * self.parameters["log_scale"].exp())[:, self._unit]

    @torch.no_grad()
    def store(self) -> None:
        """Gives the lowbit layer what was learned."""
        q, fmt = self._q, self._q.format
        codes = nearest_codes(self.parameters["levels"].detach().clone(), torch.ones(()), fmt)
        # Padding keeps its code, which is no weight's.
        padding = ~_is_weight(self.layer, q)
        codes = torch.where(padding, q.codes, codes.to(torch.uint8))
        scale = self._scale * self.parameters["log_scale"].exp()
        zero = self.parameters.get("zero")
        grid = make_grid(scale, q.group_size, None if zero is None else zero * scale)
        self.layer.set_quantized_weight(
            QuantizedWeight(codes, grid.channel, grid.group, grid.group_zero, fmt, q.group_size)
        )
        self.layer.bias = (self._bias + self.parameters["bias"] * self._size).detach()


def _is_weight(layer: Any, q: QuantizedWeight) -> Tensor:
    """bool [K]: what of K is no padding."""
    k = q.codes.shape[1]
    if not isinstance(layer, Convolution):
        return torch.ones(k, dtype=torch.bool)
    taps = 1
    for size in layer.kernel_size:
        taps *= size
    return torch.arange(k) % (k // taps) < layer.weight_shape[1]


class Learner:
    """Learns what soft layers have to learn, and gives it to the lowbit layers.

    Args:
        layers: lowbit layers, by any keys.
        steps: how many there will be: Adam's rates fall to zero as a cosine.
        rate: factor of the rates.
    """

    def __init__(self, layers: Mapping[int, Any], steps: int, rate: float = 1.0) -> None:
        self.layers = layers
        self.soft = {key: SoftLayer(layer) for key, layer in layers.items()}
        self._learned = [p for soft in self.soft.values() for p in soft.parameters.values()]
        groups = [
            {"params": [p], "lr": rate * _RATES[name]}
            for soft in self.soft.values()
            for name, p in soft.parameters.items()
        ]
        self._optimizer = torch.optim.Adam(groups)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, max(1, steps))
        self.keep()

    def step(self, loss: Tensor) -> None:
        """One step down a loss that the soft layers' outputs went into."""
        # Not backward(): the model's own parameters get no gradients.
        slopes = torch.autograd.grad(loss, self._learned, allow_unused=True)
        for parameter, slope in zip(self._learned, slopes, strict=True):
            parameter.grad = slope
        self._optimizer.step()
        self._schedule.step()

    def store(self) -> None:
        """Gives the lowbit layers what was learned so far."""
        for soft in self.soft.values():
            soft.store()

    def keep(self) -> None:
        """Remembers the lowbit layers as they are."""
        self._kept = {
            key: (layer.quantized_weight(), layer.bias) for key, layer in self.layers.items()
        }

    def restore(self) -> None:
        """Makes the lowbit layers what they were at the last `keep`."""
        for key, (q, bias) in self._kept.items():
            self.layers[key].set_quantized_weight(q)
            self.layers[key].bias = bias


def learn(
    block: nn.Module,
    layers: Mapping[int, Any],
    samples: Sequence[Sample],
    replace: Callable[[Mapping[int, Callable[..., Any]]], Any],
    steps: int,
    seed: int = 0,
) -> tuple[float, float]:
    """Learns the roundings of a block, in place, and returns its error before and after.

    Errors are mean squares of the output's error, as shares of its mean square.

    Args:
        block: the float block; its lowbit layers take its layers' places while `replace` is on.
        layers: the block's lowbit layers, by the ids of the float ones.
        samples: calls of the block.
        replace: context manager in which float layers, by their ids, compute other functions.
        steps: of Adam, each on one sample, at a rate that falls to zero as a cosine.
        seed: of the order of the samples.
    """
    lowbit = {key: layer.forward for key, layer in layers.items()}
    with replace(lowbit):
        before = _error(block, samples)
    learner = Learner(layers, steps)
    soft = {key: layer.forward for key, layer in learner.soft.items()}
    with replace(soft), torch.enable_grad():
        for sample in _shuffled(samples, steps, seed):
            loss = (_output(block, sample.call) - sample.target).square().mean()
            if not loss.isfinite():
                break
            learner.step(loss)
    learner.store()
    with replace(lowbit):
        after = _error(block, samples)
    if not after < before:
        learner.restore()
        after = before
    return before, after


def _output(block: nn.Module, call: Call) -> Tensor:
    args, kwargs = call  # a block may work in place
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    return floating_tensors(block(*args, **kwargs))[0]


def _error(block: nn.Module, samples: Sequence[Sample]) -> float:
    error = power = 0.0
    with torch.no_grad():
        for sample in samples:
            error += float((_output(block, sample.call) - sample.target).square().sum())
            power += float(sample.target.square().sum())
    return error / power if power else error


def _shuffled(samples: Sequence[Sample], steps: int, seed: int) -> Iterator[Sample]:
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(samples), generator=random).tolist()
        yield samples[order.pop()]
