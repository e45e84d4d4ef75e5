"""Language models: how surprised they are by a text, and how far their guesses moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.tasks.outputs import pair
from lowbit.tasks.task import Meter, Task


@dataclass(frozen=True)
class Language(Task):
    """Perplexity, KL divergence per token, and agreement on the next token.

    The output named `logits`, or else the only floating tensor, is [N, T, V]. The tokens are the
    batch's `labels` or `input_ids` [N, T] (a mapping), or its first integer tensor of that shape;
    position t guesses token t + 1. Tokens of -100, and those that `attention_mask` hides, do not
    count.

    The figures: `perplexity`, the exponential of the mean negative log likelihood of the tokens
    (nats), of the candidate; `perplexity_reference`, the float model's; `kl_per_token`, mean over
    the positions, nats; `token_agreement`, share of the positions, 0..1, with the float model's
    most probable token. Without tokens the perplexities are NaN and every position counts.
    """

    name: ClassVar[str] = "language"
    objective: ClassVar[str] = "kl_per_token"

    def meter(self) -> Meter:
        """A new meter."""
        return _Meter()


class _Meter:
    def __init__(self) -> None:
        self._positions = self._tokens = self._agree = 0
        self._kl = self._surprise = self._reference = 0.0

    def update(self, reference: Any, output: Any, batch: Any) -> None:
        ref, out = pair(reference, output, ("logits",), "language")
        if ref.ndim != 3:
            raise ValueError(f"a language model's scores are [N, T, V], not {list(ref.shape)}")
        tokens, mask = _tokens(batch, tuple(ref.shape[:2]))
        log_p, log_q = ref.log_softmax(dim=2), out.log_softmax(dim=2)
        p = log_p.exp()
        kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=2)
        same = out.argmax(dim=2) == ref.argmax(dim=2)
        same &= ~(ref.isnan().any(dim=2) | out.isnan().any(dim=2))
        self._positions += int(mask.sum())
        self._kl += float(kl[mask].sum())
        self._agree += int(same[mask].sum())
        if tokens is not None:
            following = tokens[:, 1:]
            valid = mask[:, 1:] & mask[:, :-1] & (following >= 0)
            index = following.clamp(min=0)[:, :, None]
            self._tokens += int(valid.sum())
            self._surprise -= float(log_q[:, :-1].gather(2, index)[:, :, 0][valid].sum())
            self._reference -= float(log_p[:, :-1].gather(2, index)[:, :, 0][valid].sum())

    def result(self) -> dict[str, float]:
        return {
            "perplexity": _exp(self._surprise, self._tokens),
            "perplexity_reference": _exp(self._reference, self._tokens),
            "kl_per_token": self._kl / self._positions if self._positions else math.nan,
            "token_agreement": self._agree / self._positions if self._positions else math.nan,
        }


def _exp(total: float, count: int) -> float:
    if not count or math.isnan(total):
        return math.nan
    mean = total / count
    return math.exp(mean) if mean < 700.0 else math.inf


def _tokens(batch: Any, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
    """The tokens [N, T] or None, and which positions count."""
    mask = torch.ones(shape, dtype=torch.bool)
    found: Any = None
    if isinstance(batch, Mapping):
        if isinstance(batch.get("attention_mask"), Tensor):
            mask = batch["attention_mask"].bool()
        found = batch.get("labels", batch.get("input_ids"))
    else:
        for item in batch if isinstance(batch, (tuple, list)) else [batch]:
            if isinstance(item, Tensor) and not item.is_floating_point():
                found = item
                break
    if not isinstance(found, Tensor) or found.is_floating_point():
        found = None
    for name, tensor in (("tokens", found), ("attention_mask", mask)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"the scores are of {list(shape)} positions, the {name} {list(tensor.shape)}"
            )
    return (None if found is None else found.long()), mask
