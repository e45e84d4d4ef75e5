"""What the quality page is made of: its cases, its data, its tables."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowbit
from lowbit.benchmark import worker
from lowbit.benchmark.quality import clothes, page, photographs, sentences, study
from lowbit.benchmark.quality.study import Method, Network, QualityCase, QualityResult, measure
from lowbit.schemes import Scheme


def test_every_case_is_a_method_of_its_own():
    cases = study.cases()
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        method = case.chosen
        assert method.label == case.method
        assert method.goal in study.NETWORKS[case.quality].targets or not method.goal
        for scheme in (method.scheme, *method.overrides.values()):
            assert scheme is None or Scheme.parse(scheme)


def test_every_target_has_a_method():
    for network in study.NETWORKS.values():
        assert {m.goal for m in network.methods if m.goal} == set(network.targets)


@pytest.fixture
def tiny(monkeypatch):
    """A network of one layer, whose score is the relative error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = [torch.randn(64, 32) @ torch.randn(32, 32) for _ in range(4)]
    data = SimpleNamespace(
        load=lambda: model,
        calibration=lambda: x[:2],
        tests=lambda: x[2:],
        score=lambda wanted, found: float((wanted - found).norm() / wanted.norm()),
    )
    methods = [Method("w2a8", goal="small"), Method("w2a8-gptq", True, goal="small")]
    network = Network("Tiny", data, "error", -1, {"small": 0.5}, methods, lambda output: output, 3)
    monkeypatch.setattr(study, "NETWORKS", {"tiny": network})
    monkeypatch.setattr(page, "NETWORKS", {"tiny": network})
    monkeypatch.setattr(page, "NOTES", {"tiny": "A note."})
    return network


def test_a_measurement(tiny):
    plain, better = (measure(QualityCase("tiny", label)) for label in ("w2a8", "w2a8-gptq"))
    assert 0 < better.score < plain.score < 1
    assert plain.size == better.size
    assert plain.float_size == 4 * (32 * 8 + 8 + 8 * 4 + 4)
    assert better.seconds > 0


def test_float_weights_round_activations_alone(tiny):
    tiny.methods.append(Method("w8a8", text="float32 weights", float_weights=True))
    found = measure(QualityCase("tiny", "w8a8, float32 weights"))
    model = tiny.data.load()

    def rounded(x):
        scale = x.abs().amax(1, keepdim=True) / 127
        return (x / scale).round() * scale

    x = torch.cat(tiny.data.tests())
    with torch.no_grad():
        wanted, y = model(x), model[2](rounded(torch.relu(model[0](rounded(x)))))
    assert found.score == pytest.approx(float((wanted - y).norm() / wanted.norm()), rel=1e-3)
    assert found.size == found.float_size == 4 * (32 * 8 + 8 + 8 * 4 + 4)
    assert not model[0]._forward_pre_hooks


def test_a_model_that_is_distilled(tiny):
    calls = []
    tiny.data.learning = lambda: calls.append(1) or [torch.randn(64, 32) for _ in range(9)]
    tiny.data.deviation = lambda wanted, found: 0.125
    tiny.data.clear = lambda wanted, found: 0.0625
    tiny.methods.append(Method("w2a8", goal="small", text="distilled", distill=60))
    plain, better = (measure(QualityCase("tiny", name)) for name in ("w2a8", "w2a8, distilled"))
    assert calls == [1]
    assert better.score < plain.score
    assert better.size == plain.size
    assert better.deviation == 0.125
    tiny.data.wide_calibration = lambda: calls.append(2) or [torch.randn(64, 32)]
    tiny.data.wide_learning = lambda: calls.append(3) or tiny.data.learning
    wide = Method("w2a8-gptq", True, text="wide", wide=True, distill=60)
    tiny.methods.append(wide)
    assert measure(QualityCase("tiny", "w2a8-gptq, wide")).score < plain.score
    assert calls[:3] == [1, 2, 3]
    text = page.page({("tiny", "w2a8, distilled"): better}, "a command")
    assert "without near ties" in text
    assert f"| {better.score:.3f} ±0.125 |               0.062 |" in text


def test_layers_that_are_converted_late(tiny):
    calls = []
    tiny.data.many_calibration = lambda: calls.append(2) or [torch.randn(64, 32) for _ in range(9)]
    tiny.data.wide_calibration = lambda: calls.append(1) or [torch.randn(64, 32) for _ in range(3)]
    late = Method("w2a8-gptq", True, overrides={"2": None}, late={"2": "w8a8-gptq"}, wide=True)
    tiny.methods[:] = [late]
    found = measure(QualityCase("tiny", "w2a8-gptq"))
    assert calls == [1, 2]
    assert found.score < 1
    part = lowbit.quantize(tiny.data.load(), "w2a8", overrides={"2": "w8a8"})
    assert found.size == lowbit.summary(part).bytes_after


def test_the_worker_runs_it(tiny, monkeypatch, capfd):
    case = QualityCase("tiny", "w2a8")
    kept = {}
    monkeypatch.setattr(worker.os, "dup2", lambda *files: None)
    monkeypatch.setattr(worker, "hold", lambda isa: kept.update(isa=isa))
    worker.main([json.dumps(case.options([case]))])
    assert kept == {"isa": None}
    line = json.loads(capfd.readouterr().out)
    assert line["score"] == measure(case).score


def lines(**scores):
    return [
        {
            "case": {"quality": "tiny", "method": label},
            "result": QualityResult(score, 100, 400, 2.0, 1).to_dict(),
        }
        for label, score in scores.items()
    ]


def test_the_page_says_what_was_reached(tiny):
    found = page.results([*lines(w2a8=0.75), {"case": {"shape": [1, 2]}, "result": {}}])
    text = page.page(found, "a command")
    assert "Written by `a command`." in text
    assert "| w2a8     |        |   0.750 |      0.5 | no    |     100 |         2 |" in text
    assert "small: target 0.5 not reached, 0.750 with w2a8 (1 of its methods not measured)." in text
    tiny.methods.append(Method("w8a8"))
    both = page.results(lines(**{"w2a8": 0.75, "w2a8-gptq": 0.25, "w8a8": 0.1}))
    both["tiny", "w8a8"] = QualityResult(0.1, 200, 400, 2.0, 1)
    assert "small: target 0.5 reached, 0.250 with w2a8-gptq, 50.0 % of w8a8's bytes." in page.page(
        both, "a command"
    )


def test_a_target_without_a_measurement_is_named(tiny):
    tiny.methods.append(Method("w8a8"))
    found = page.results(lines(w8a8=0.1))
    assert "small: not measured." in page.page(found, "a command")


def test_photographs_are_each_of_one_part():
    parts = (photographs.TESTS, photographs.VALIDATION, photographs.CALIBRATION)
    together = [file for part in parts for file in part]
    assert sorted(together) == sorted(set(photographs.PHOTOGRAPHS))
    assert [len(part) for part in parts] == [40, 10, 30]


@pytest.fixture
def at_hand(monkeypatch):
    """Only the photographs of a package that the tests have."""
    pytest.importorskip("skimage")
    files = tuple(file for file in photographs.PHOTOGRAPHS if file[0] == "skimage")
    assert len(files) == 6
    return files


def test_crops_are_the_same_every_time(at_hand):
    one, two = photographs.judging(at_hand), photographs.judging(at_hand)
    assert sum(map(len, one)) == photographs.TEST_CROPS * len(at_hand)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one[0].shape == (8, 3, 224, 224)
    assert one[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(one[0][0], one[0][1])
    assert -1.0 <= float(one[0].min()) < float(one[0].max()) <= 1.01


def test_augmented_crops_differ_in_their_colours(at_hand):
    plain, other, again = (
        photographs.calibration(at_hand[:2], 4, augmented) for augmented in (False, True, True)
    )
    assert len(plain) == len(other) == 1
    assert torch.equal(other[0], again[0])
    assert other[0].shape == plain[0].shape == (8, 3, 224, 224)
    assert not torch.equal(other[0], plain[0])
    assert -1.0 <= float(other[0].min()) < float(other[0].max()) <= 1.0
    wanted = photographs.jittered(torch.zeros(4, 3, 2, 2), torch.Generator())
    # One grey has neither contrast nor saturation to vary.
    assert torch.equal(wanted, wanted[:, :1, :1, :1].expand_as(wanted))


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps scikit-learn"):
        photographs.file_of("sklearn", "datasets/images/china.jpg")


def test_photographs_of_debian_packages_may_lie_anywhere(monkeypatch, tmp_path):
    monkeypatch.setenv(photographs.ROOT, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get download darknet"):
        photographs.file_of("darknet", "/usr/share/dog.jpg")
    (tmp_path / "usr" / "share").mkdir(parents=True)
    (tmp_path / "usr" / "share" / "dog.jpg").touch()
    assert photographs.file_of("darknet", "/usr/share/dog.jpg") == tmp_path / "usr/share/dog.jpg"


def test_the_standard_error_is_that_of_photographs():
    wanted = torch.eye(2)[torch.zeros(3 * photographs.TEST_CROPS, dtype=torch.int64)]
    found = wanted.clone()
    assert photographs.deviation(wanted, found) == 0.0
    found[: photographs.TEST_CROPS] = torch.tensor([0.0, 1.0])  # of one photograph, all
    assert photographs.deviation(wanted, found) == pytest.approx(100 / 3)


def test_near_ties_can_be_left_out():
    wanted = torch.tensor([[3.0, 0], [0.05, 0], [0, 2]])
    found = torch.tensor([[3.0, 0], [0, 0.05], [0, 2]])
    assert photographs.score(wanted, found) == pytest.approx(200 / 3)
    assert photographs.clear(wanted, found) == 100.0
    assert photographs.clear(wanted, -found) == 0.0


def test_agreement():
    wanted = torch.eye(4)
    found = wanted.clone()
    found[0] = torch.tensor([0.0, 1, 0, 0])
    assert photographs.score(wanted, found) == 75.0


def test_sentences_are_of_different_texts():
    calibration, tested = (
        sentences.sentences(sentences.CALIBRATION),
        sentences.sentences(sentences.TESTS),
    )
    assert min(len(calibration), len(tested)) >= sentences.TEST_COUNT
    assert len(set(calibration) & set(tested)) < 0.01 * len(tested)
    assert len(set(calibration)) == len(calibration)
    for text in (*calibration, *tested):
        assert text[0].isupper()
        assert text[-1] in ".!?"
        assert 6 <= len(text.split()) <= 40
    assert sentences.sentences(sentences.CALIBRATION) == calibration


def test_cosine_of_embeddings():
    x = torch.randn(5, 8)
    assert sentences.score(x, 3 * x) == pytest.approx(1.0)
    assert sentences.score(x, -x) == pytest.approx(-1.0)
    hidden = torch.arange(12.0).view(1, 3, 4)
    output = SimpleNamespace(last_hidden_state=hidden)
    assert sentences.embedding(output).tolist() == [[4.0, 5.0, 6.0, 7.0]]


def test_points_lost(monkeypatch):
    labels = torch.tensor([0, 1, 2, 3])
    monkeypatch.setattr(clothes, "load_images", lambda split: SimpleNamespace(labels=labels))
    wanted = torch.eye(4)
    found = wanted.clone()
    found[0] = found[1]
    assert clothes.score(wanted, found) == 25.0
