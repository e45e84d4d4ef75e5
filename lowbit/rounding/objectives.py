"""What a model that learns from another one is to imitate, and how far it is from that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.convert import ForwardFn
from lowbit.quality import floating_tensors
from lowbit.rounding.blocks import find_blocks

Loss = Literal["mse", "kl"]


def mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error."""
    return (found - wanted).square().mean()


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean over rows of KL(softmax(wanted) || softmax(found)) along the last dimension."""
    logs = [F.log_softmax(side.reshape(-1, side.shape[-1]), -1) for side in (found, wanted)]
    return F.kl_div(*logs, reduction="batchmean", log_target=True)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mean_square, "kl": divergence}
"""Losses of outputs (found, wanted), by name."""


def judge(loss: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The error of outputs (found, wanted): with "mse" as a share of the power, "kl" in nats."""
    if loss == "kl":
        rows = [wanted.numel() // wanted.shape[-1] for _, wanted in pairs]
        sums = [n * float(divergence(*pair)) for n, pair in zip(rows, pairs, strict=True)]
        return sum(sums) / sum(rows)
    wrong = sum(float((found - wanted).square().sum()) for found, wanted in pairs)
    power = sum(float(wanted.square().sum()) for _, wanted in pairs)
    return wrong / power if power else wrong


def feature_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean of the squared errors of some tensors, each as a share of its power."""
    shares = [
        (a - b).square().mean() / b.square().mean().clamp_min(torch.finfo(b.dtype).tiny)
        for a, b in zip(found, wanted, strict=True)
    ]
    return torch.stack(shares).mean()


def blocks_of_both(model: nn.Module, quantized: nn.Module) -> tuple[list[nn.Module], ...]:
    """The blocks of a float model, see `find_blocks`, and those of the same names in another."""
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(quantized.named_modules())
    pairs = [(b, modules[names[id(b)]]) for b in find_blocks(model) if names[id(b)] in modules]
    return [a for a, _ in pairs], [b for _, b in pairs]


class Side:
    """A model with its forward function.

    Args:
        model: any.
        forward: runs it on a batch.
        blocks: of its modules, those whose outputs are looked at.
    """

    def __init__(self, model: nn.Module, forward: ForwardFn, blocks: Sequence[nn.Module]) -> None:
        self.model, self._forward, self._blocks = model, forward, blocks

    def __call__(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """The first floating-point output, and those of the blocks, in the order of their calls."""
        inner: list[Tensor] = []
        with self._watched(inner):
            output = floating_tensors(self._forward(self.model, batch))[0]
        return output, inner

    @contextlib.contextmanager
    def _watched(self, inner: list[Tensor]) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            inner.extend(floating_tensors(output)[:1])

        handles = [block.register_forward_hook(hook) for block in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
