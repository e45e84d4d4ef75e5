"""Quality of a quantized model: its outputs against the float model's.

All sums run in float64 and over all batches together: the figures are those of the concatenated
outputs, while the memory used does not grow with their number. With `r` the reference's elements
and `o` the candidate's:

    SQNR   = 10 log10(sum r^2 / sum (r - o)^2)  dB
    cosine = sum r*o / (|r| |o|)
    max absolute error = max |r - o|

and for a classification, per row, with p = softmax(r), q = softmax(o) and c = argmax r:

    top-1 agreement   = mean [argmax o == c]
    top-5 agreement   = mean [c is among the five largest of o]
    KL divergence     = mean sum p (log p - log q)  nats
    probability shift = mean |p[c] - q[c]|

Nothing is left out: one NaN or Inf in either output makes the figures that it enters NaN or
infinite, and its elements are counted. What other tasks measure is in `lowbit.tasks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit import tasks
from lowbit.tasks.outputs import named_tensors
from lowbit.tasks.task import Task


@dataclass(frozen=True)
class Quality:
    """Agreement of a candidate's outputs with the reference's (formulas: see the module).

    Attributes:
        sqnr_db: signal to quantization noise ratio, dB; inf where the outputs are equal. None,
            like the next two, where elements cannot be compared one by one (detections).
        cosine: cosine of the angle between all outputs, -1..1; NaN where either is all zero.
        max_abs_error: largest absolute difference of two elements, in the outputs' unit.
        elements: number of elements compared.
        nonfinite_reference: how many of the reference's elements are NaN or Inf.
        nonfinite_output: how many of the candidate's elements are NaN or Inf.
        rows: number of rows classified; 0 where the output is no classification, and the fields
            below are then None.
        top1_agreement: share of the rows, 0..1. A row with a NaN never agrees.
        top5_agreement: share of the rows, 0..1; None with five classes or fewer, where it would
            always be 1.
        kl_divergence: mean over the rows, nats.
        probability_shift: mean absolute change of the probability of the reference's top-1 class,
            0..1.
        metrics: the figures of another task (`lowbit.tasks`), or of a function, by name.
    """

    sqnr_db: float | None
    cosine: float | None
    max_abs_error: float | None
    elements: int
    nonfinite_reference: int = 0
    nonfinite_output: int = 0
    rows: int = 0
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    kl_divergence: float | None = None
    probability_shift: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {**vars(self), "metrics": dict(self.metrics)}

    def figures(self) -> dict[str, float]:
        """Every figure that is there by its name in `lowbit.tasks.METRICS`, or a function's."""
        own = {name: getattr(self, name) for name in tasks.METRICS if hasattr(self, name)}
        return {name: value for name, value in own.items() if value is not None} | {**self.metrics}


def floating_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors in a model's output, depth first, in a fixed order.

    Args:
        output: a tensor, or any nesting of mappings (Hugging Face's `ModelOutput` is one), lists,
            tuples and dataclasses. Integer tensors and other objects are passed over.
    """
    return [tensor for _, tensor in named_tensors(output)]


class QualityMeter:
    """Accumulates the quality of a candidate over batches.

    Args:
        task: "classification": the output named `logits`, or else the only floating tensor, holds
            scores whose last axis is the classes; all other axes count as rows. "other": no
            classification figures. None: a classification if that tensor is [B, C] with C >= 2.
            Anything else as in `lowbit.tasks`.

    Raises:
        ValueError: unknown task.
        TypeError: neither a name, a function nor a Task.
    """

    def __init__(self, task: object = None) -> None:
        found = tasks.find(task)
        self._meter = found.meter() if isinstance(found, Task) else None
        self._elementwise = found.elementwise if isinstance(found, Task) else True
        self._task = "other" if isinstance(found, Task) else found
        self._batches = 0
        self._signal = self._noise = self._dot = self._power = 0.0
        self._max_error = torch.zeros((), dtype=torch.float64)
        self._elements = self._nonfinite_reference = self._nonfinite_output = 0
        self._rows = self._top1 = self._top5 = 0
        self._kl = self._shift = 0.0
        self._classes = 0

    def update(self, reference: Any, output: Any, batch: Any = None) -> None:
        """Adds one batch.

        Args:
            reference: what the float model returned.
            output: what the candidate returned for the same input: same structure and shapes, any
                floating dtype.
            batch: the input, for tasks that look at it (tokens of a text, a function's labels).

        Raises:
            ValueError: the outputs differ in structure or shape, hold no floating tensor, or are
                not what `task` (or, for a classification, the first batch) says.
        """
        if self._elementwise:
            self._add_output(reference, output)
        if self._meter is not None:
            self._meter.update(reference, output, batch)
        self._batches += 1

    def _add_output(self, reference: Any, output: Any) -> None:
        expected, actual = list(named_tensors(reference)), list(named_tensors(output))
        if not expected:
            kind = type(reference).__name__
            raise ValueError(f"the reference output ({kind}) holds no floating-point tensor")
        ref_shapes, out_shapes = ([list(t.shape) for _, t in side] for side in (expected, actual))
        if ref_shapes != out_shapes:
            raise ValueError(
                f"outputs differ: the reference has shapes {ref_shapes}, the candidate {out_shapes}"
            )
        for (_, ref), (_, out) in zip(expected, actual, strict=True):
            self._add_elements(ref.detach().double(), out.detach().double())
        index = self._scores_index(expected)
        if index is not None:
            ref, out = expected[index][1].detach(), actual[index][1].detach()
            self._add_rows(ref.double().flatten(0, -2), out.double().flatten(0, -2))

    def _scores_index(self, tensors: list[tuple[str, torch.Tensor]]) -> int | None:
        """Which tensor holds class scores, None if none does. The first batch decides for all."""
        if self._task == "other":
            return None
        named = [i for i, (name, _) in enumerate(tensors) if name == "logits"]
        index = named[0] if named else 0 if len(tensors) == 1 else None
        shape = () if index is None else tuple(tensors[index][1].shape)
        if self._task is None:
            self._task = "classification" if len(shape) == 2 and shape[1] >= 2 else "other"
            return index if self._task == "classification" else None
        if len(shape) < 2 or shape[-1] < 2:
            unnamed = f"{len(tensors)} tensors, none named 'logits'"
            found = unnamed if index is None else f"shape {list(shape)}"
            raise ValueError(
                f"a classification needs scores of shape [..., C] with C >= 2, found {found}"
            )
        return index

    def _add_elements(self, ref: torch.Tensor, out: torch.Tensor) -> None:
        if ref.numel() == 0:
            return
        error = ref - out
        self._signal += float((ref * ref).sum())
        self._noise += float((error * error).sum())
        self._power += float((out * out).sum())
        self._dot += float((ref * out).sum())
        # torch's maximum propagates a NaN, Python's max() would drop it.
        self._max_error = torch.maximum(self._max_error, error.abs().max())
        self._elements += ref.numel()
        self._nonfinite_reference += ref.numel() - int(torch.isfinite(ref).sum())
        self._nonfinite_output += out.numel() - int(torch.isfinite(out).sum())

    def _add_rows(self, ref: torch.Tensor, out: torch.Tensor) -> None:
        if ref.shape[0] == 0:
            return
        valid = ~(ref.isnan().any(dim=1) | out.isnan().any(dim=1))
        best = ref.argmax(dim=1, keepdim=True)
        self._rows += ref.shape[0]
        self._classes = max(self._classes, ref.shape[1])
        self._top1 += int(((out.argmax(dim=1, keepdim=True) == best).squeeze(1) & valid).sum())
        among = (out.topk(min(5, out.shape[1]), dim=1).indices == best).any(dim=1)
        self._top5 += int((among & valid).sum())
        log_p, log_q = ref.log_softmax(dim=1), out.log_softmax(dim=1)
        p = log_p.exp()
        # A class that the reference excludes (p = 0, from a score of -inf) adds nothing.
        self._kl += float(torch.where(p == 0, 0.0, p * (log_p - log_q)).sum())
        self._shift += float((p.gather(1, best) - log_q.gather(1, best).exp()).abs().sum())

    def result(self) -> Quality:
        """The figures over all batches so far.

        Raises:
            ValueError: nothing was added.
        """
        if self._batches == 0 or (self._elementwise and self._elements == 0):
            raise ValueError("no outputs were compared")
        rows, seen = self._rows, self._elementwise
        return Quality(
            sqnr_db=_sqnr_db(self._signal, self._noise) if seen else None,
            cosine=_cosine(self._dot, self._signal, self._power) if seen else None,
            max_abs_error=float(self._max_error) if seen else None,
            elements=self._elements,
            nonfinite_reference=self._nonfinite_reference,
            nonfinite_output=self._nonfinite_output,
            rows=rows,
            top1_agreement=self._top1 / rows if rows else None,
            top5_agreement=self._top5 / rows if rows and self._classes > 5 else None,
            kl_divergence=self._kl / rows if rows else None,
            probability_shift=self._shift / rows if rows else None,
            metrics={} if self._meter is None else self._meter.result(),
        )


def measure(reference: Any, output: Any, task: object = None, batch: Any = None) -> Quality:
    """Quality of one batch of outputs: `QualityMeter` for a single update."""
    meter = QualityMeter(task)
    meter.update(reference, output, batch)
    return meter.result()


def _sqnr_db(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    if math.isinf(noise):
        return math.nan if math.isinf(signal) else -math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _cosine(dot: float, a: float, b: float) -> float:
    product = math.sqrt(a) * math.sqrt(b)
    if product == 0.0 or not math.isfinite(product):
        return math.nan
    return max(-1.0, min(1.0, dot / product)) if math.isfinite(dot) else math.nan
