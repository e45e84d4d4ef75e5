"""Language models against loops over tokens."""

import math

import pytest
import torch

from lowbit.quality import QualityMeter, measure

VOCABULARY = 11


def _pair(rows=3, length=7, noise=0.7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    reference = 2 * torch.randn(rows, length, VOCABULARY, generator=generator)
    output = reference + noise * torch.randn(reference.shape, generator=generator)
    return reference, output, torch.randint(VOCABULARY, (rows, length), generator=generator)


def _probabilities(scores):
    exps = [math.exp(value) for value in scores]
    return [value / sum(exps) for value in exps]


def _expected(reference, output, tokens, mask):
    surprise, before, kl, same = [], [], [], []
    for row in range(len(reference)):
        for at in range(reference.shape[1]):
            if not mask[row][at]:
                continue
            p, q = (_probabilities(side[row, at].tolist()) for side in (reference, output))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(p.index(max(p)) == q.index(max(q)))
            if at + 1 < reference.shape[1] and mask[row][at + 1] and tokens[row][at + 1] >= 0:
                before.append(-math.log(p[tokens[row][at + 1]]))
                surprise.append(-math.log(q[tokens[row][at + 1]]))
    return {
        "perplexity": pytest.approx(math.exp(sum(surprise) / len(surprise)), rel=1e-6),
        "perplexity_reference": pytest.approx(math.exp(sum(before) / len(before)), rel=1e-6),
        "kl_per_token": pytest.approx(sum(kl) / len(kl), rel=1e-5),
        "token_agreement": pytest.approx(sum(same) / len(same)),
    }


def test_against_loops():
    reference, output, tokens = _pair()
    meter = QualityMeter("language")
    for at in (slice(0, 1), slice(1, 3)):
        meter.update(reference[at], output[at], {"input_ids": tokens[at]})
    mask = [[True] * 7] * 3
    assert meter.result().metrics == _expected(reference, output, tokens.tolist(), mask)


def test_padding_and_ignored_labels_do_not_count():
    reference, output, tokens = _pair()
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    labels = tokens.clone()
    labels[0, :3] = -100
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    found = measure({"logits": reference}, {"logits": output}, "language", batch).metrics
    assert found == _expected(reference, output, labels.tolist(), mask.bool().tolist())


def test_tokens_may_be_the_input_itself():
    reference, output, tokens = _pair()
    keyword = measure(reference, output, "language", {"input_ids": tokens})
    assert measure(reference, output, "language", tokens) == keyword
    assert measure(reference, output, "language", (torch.rand(2), tokens)) == keyword


def test_without_tokens_there_is_no_perplexity():
    reference, output, _ = _pair()
    found = measure(reference, output, "language").metrics
    assert math.isnan(found["perplexity"])
    assert found["kl_per_token"] > 0


def test_a_hopeless_model_has_an_infinite_perplexity():
    reference, _, tokens = _pair()
    output = torch.zeros_like(reference)
    output.scatter_(2, (tokens.roll(-1, 1)[:, :, None] + 1) % VOCABULARY, 5000.0)
    assert measure(reference, output, "language", tokens).metrics["perplexity"] == math.inf


def test_nan_agrees_with_nothing():
    reference, output, tokens = _pair()
    output[:] = math.nan
    found = measure(reference, output, "language", tokens).metrics
    assert found["token_agreement"] == 0.0
    assert math.isnan(found["kl_per_token"])


@pytest.mark.parametrize(
    ("shape", "batch", "match"),
    [
        ((4, 5), None, r"\[N, T, V\], not \[4, 5\]"),
        ((2, 5, 6), torch.zeros(2, 4, dtype=torch.int64), r"\[2, 5\] positions, the tokens"),
        ((2, 5, 6), {"attention_mask": torch.ones(2, 4)}, "the attention_mask"),
    ],
)
def test_what_does_not_fit_is_refused(shape, batch, match):
    with pytest.raises(ValueError, match=match):
        measure(torch.rand(shape), torch.rand(shape), "language", batch)
