"""What a budget may look like."""

import pytest

from lowbit.mixed.budget import Budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.4MB", Budget("bytes", 2.4e6)),
        ("300 kB", Budget("bytes", 3e5)),
        ("1.5MiB", Budget("bytes", 1.5 * 2**20)),
        (2000, Budget("bytes", 2000.0)),
        ("30%", Budget("bytes", 0.3, "float")),
        ("50% of w8a8", Budget("bytes", 0.5, "w8a8")),
        ("3ms", Budget("seconds", 0.003)),
        ("250us", Budget("seconds", 250e-6)),
        ("20dB", Budget("quality", 20.0, metric="sqnr_db")),
        ("top1_agreement>=93%", Budget("quality", 0.93, metric="top1_agreement")),
        ("kl_divergence <= 1e-2", Budget("quality", 0.01, metric="kl_divergence")),
        ("right>=0.5", Budget("quality", 0.5, metric="right")),
    ],
)
def test_forms(text, expected):
    parsed = Budget.parse(text)
    assert parsed.kind == expected.kind
    assert parsed.value == pytest.approx(expected.value)
    assert (parsed.of, parsed.metric) == (expected.of, expected.metric)
    assert Budget.parse(parsed) is parsed


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("fast", "a budget is a size.*not 'fast'"),
        ("3 parsecs", "a budget is a size"),
        ("0MB", "more than 0"),
        (-5, "more than 0"),
        (True, "not True"),
        (None, "not None"),
        ("50% of w9a9", "unknown scheme 'w9a9'"),
        ("top1_agreement<=0.9", "better when higher: >="),
        ("kl_divergence>=0.9", "better when lower: <="),
        ("sqnr_db>=--", "a budget is a size"),
    ],
)
def test_what_is_no_budget_is_refused(text, match):
    with pytest.raises(ValueError, match=match):
        Budget.parse(text)


def test_floors():
    floor = Budget.parse("top1_agreement>=0.9")
    assert floor.meets({"top1_agreement": 0.9})
    assert not floor.meets({"top1_agreement": 0.89})
    assert not floor.meets({"top1_agreement": float("nan")})
    assert Budget.parse("kl_divergence<=0.1").meets({"kl_divergence": 0.05})
    with pytest.raises(ValueError, match=r"no figure 'ssim'.*sqnr_db"):
        Budget.parse("ssim>=0.9").meets({"sqnr_db": 3.0})


def test_text():
    assert str(Budget.parse("2.4MB")) == "2.400 MB"
    assert str(Budget.parse("50% of w8a8")) == "50 % of the bytes of w8a8"
    assert str(Budget.parse("3ms")) == "3 ms"
    assert str(Budget.parse("20dB")) == "sqnr_db >= 20"
