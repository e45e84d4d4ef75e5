"""The figures of quality by name: how tables show them, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: as in `Quality` or its `metrics`.
        header: of a table's column; may have two lines.
        spec: how the number is formatted.
        factor: what it is multiplied by for the table (100 for a share in %).
        higher_is_better: whether a larger figure means that less is lost.
    """

    name: str
    header: str
    spec: str
    factor: float = 1.0
    higher_is_better: bool = True

    @property
    def title(self) -> str:
        """The header in one line."""
        return self.header.replace("\n", " ")

    def text(self, value: float | None) -> str:
        """A table's cell."""
        return "-" if value is None else format(value * self.factor, self.spec)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("sqnr_db", "SQNR\ndB", ".1f"),
        Metric("cosine", "cosine", ".5f"),
        Metric("max_abs_error", "max abs\nerror", ".3g", higher_is_better=False),
        Metric("top1_agreement", "top-1\n%", ".1f", 100),
        Metric("top5_agreement", "top-5\n%", ".1f", 100),
        Metric("kl_divergence", "KL\nnats", ".2g", higher_is_better=False),
        Metric("probability_shift", "prob.\nshift", ".2g", higher_is_better=False),
        Metric("matched_boxes", "boxes\nfound, %", ".1f", 100),
        Metric("box_precision", "boxes\nright, %", ".1f", 100),
        Metric("mean_iou", "mean\nIoU", ".3f"),
        Metric("score_shift", "score\nshift", ".2g", higher_is_better=False),
        Metric("psnr_db", "PSNR\ndB", ".1f"),
        Metric("ssim", "SSIM", ".4f"),
        Metric("distinct_levels", "distinct\nlevels", ".1f"),
        Metric("levels_kept", "levels\nkept, %", ".1f", 100),
        Metric("mean_cosine", "mean\ncosine", ".4f"),
        Metric("rank_correlation", "rank\ncorrel.", ".4f"),
        Metric("perplexity", "per-\nplexity", ".2f", higher_is_better=False),
        Metric("perplexity_reference", "of\nfloat", ".2f", higher_is_better=False),
        Metric("kl_per_token", "KL/token\nnats", ".2g", higher_is_better=False),
        Metric("token_agreement", "tokens\nagree, %", ".1f", 100),
    )
}


def metric_of(name: str) -> Metric:
    """The metric of that name; for a function's own figure, one that is better when higher."""
    return METRICS.get(name) or Metric(name, name, ".4g")
