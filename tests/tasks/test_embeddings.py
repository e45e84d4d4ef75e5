"""Embeddings against NumPy and scipy's Spearman correlation."""

import math

import numpy as np
import pytest
import torch

from lowbit.quality import QualityMeter, measure
from lowbit.tasks import Embeddings
from lowbit.tasks.embeddings import spearman

stats = pytest.importorskip("scipy.stats")


def _pair(rows=40, noise=0.5, seed=2):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, 16, generator=generator)
    return reference, reference + noise * torch.randn(rows, 16, generator=generator)


def _cosines(vectors):
    v = vectors.double().numpy()
    return [
        np.dot(v[i], v[j]) / math.sqrt(np.dot(v[i], v[i]) * np.dot(v[j], v[j]))
        for i in range(len(v))
        for j in range(i + 1, len(v))
    ]


def test_against_numpy_and_scipy():
    reference, output = _pair()
    meter = QualityMeter("embeddings")
    for r, o in zip(reference.split(15), output.split(15), strict=True):
        meter.update(r, o)
    found = meter.result().metrics
    rows = zip(reference.double().numpy(), output.double().numpy(), strict=True)
    means = [np.dot(r, o) / (np.linalg.norm(r) * np.linalg.norm(o)) for r, o in rows]
    assert found["mean_cosine"] == pytest.approx(np.mean(means), rel=1e-12)
    expected = stats.spearmanr(_cosines(reference), _cosines(output)).statistic
    assert 0.3 < expected < 0.95
    assert found["rank_correlation"] == pytest.approx(expected, rel=1e-12)


def test_ties_get_their_mean_rank():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 60).astype(float), rng.integers(0, 7, 60).astype(float)
    expected = stats.spearmanr(a, b).statistic
    assert spearman(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-12)


def test_only_the_first_vectors_are_kept():
    reference, output = _pair()
    found = measure(reference, output, Embeddings(most=10)).metrics
    assert found["rank_correlation"] == pytest.approx(
        measure(reference[:10], output[:10], "embeddings").metrics["rank_correlation"]
    )
    assert found["mean_cosine"] == measure(reference, output, "embeddings").metrics["mean_cosine"]


def test_too_few_vectors_and_nan():
    reference, output = _pair(rows=2)
    assert math.isnan(measure(reference, output, "embeddings").metrics["rank_correlation"])
    reference, output = _pair()
    output[3, 3] = math.nan
    found = measure(reference, output, "embeddings").metrics
    assert math.isnan(found["mean_cosine"])
    assert math.isnan(found["rank_correlation"])
    assert math.isnan(spearman(torch.ones(4), torch.arange(4.0)))


def test_the_vector_is_found_by_its_name():
    reference, output = _pair()
    states = torch.zeros(40, 5, 16)
    sides = ({"last_hidden_state": states, "pooler_output": v} for v in (reference, output))
    assert measure(*sides, "embeddings").metrics == measure(reference, output, "embeddings").metrics


@pytest.mark.parametrize(
    ("reference", "output", "match"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), r"\[N, D\], not \[2, 3, 4\]"),
        ([torch.zeros(2, 3), torch.zeros(2, 3)],) * 2 + ("2 floating tensors, and none is named",),
    ],
)
def test_what_is_no_embedding_is_refused(reference, output, match):
    with pytest.raises(ValueError, match=match):
        measure(reference, output, "embeddings")


def test_shapes_have_to_fit():
    meter = Embeddings().meter()
    with pytest.raises(ValueError, match=r"differ in shape: \[2, 3\] and \[2, 4\]"):
        meter.update(torch.zeros(2, 3), torch.zeros(2, 4), None)
    with pytest.raises(ValueError, match="at least 3 vectors"):
        Embeddings(most=2)
