"""`lowbit sensitivity`, `search` and `convert --schemes`, and --task, on the command line."""

import json
import sys

import pytest
import torch

import lowbit
from lowbit import cli, timing

MODELS = """
import mixed_nets

make = mixed_nets.net
make.example_inputs = lambda: mixed_nets.batches(1)


def close(reference, output):
    return {"close": 0.75}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "zoo.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    real = timing.alternate
    monkeypatch.setattr(timing, "alternate", lambda sides, **_: real(sides, max_rounds=10))
    yield tmp_path
    sys.modules.pop("zoo", None)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SENSITIVITY = ("sensitivity", "zoo:make", "--no-latency", "--schemes", "w8a8,w2a8")
SEARCH = ("search", "zoo:make", "--allow-slower", "--rounds", "0", "--front", "2")


def test_sensitivity(run):
    code, out, err = run(*SENSITIVITY)
    assert code == 0, err
    assert "loses most alone" in out
    assert out.startswith("inputs: the model's example_inputs")
    code, out, _ = run(*SENSITIVITY, "--no-accumulated", "--task", "zoo:close", "--json")
    data = json.loads(out)
    effect = data["layers"][0]["schemes"]["w2a8"]
    assert effect["alone"]["metrics"] == {"close": 0.75}
    assert effect["accumulated"] is None


def test_sensitivity_with_other_inputs_goes_on(run, folder):
    torch.save([torch.ones(2, 3, 10, 10)], folder / "x.pt")
    arguments = (*SENSITIVITY, "--inputs", "x.pt", "--resume", "run.jsonl", "--json")
    first = run(*arguments)
    lines = (folder / "run.jsonl").read_text().splitlines()
    assert run(*arguments) == first
    assert (folder / "run.jsonl").read_text().splitlines() == lines
    code, _, err = run(*SENSITIVITY, "--input-shape", "1,3,10,10", "--resume", "run.jsonl")
    assert code == 1
    assert "belongs to another run: data differ" in err


def test_search_and_convert(run, folder):
    code, out, err = run(*SEARCH, "--budget", "35%", "-o", "schemes.json")
    assert code == 0, err
    assert "lowbit convert zoo:make --schemes schemes.json -o FILE.safetensors" in out
    code, out, err = run("convert", "zoo:make", "--schemes", "schemes.json", "-o", "m.safetensors")
    assert code == 0, err
    import zoo

    model = lowbit.load_file(zoo.make(), "m.safetensors")
    found = json.loads((folder / "schemes.json").read_text())
    expected = lowbit.quantize(zoo.make(), None, overrides=found["schemes"])
    x = zoo.make.example_inputs()[0]
    assert torch.equal(model(x), expected(x))


def test_an_override_comes_before_the_file(run, folder):
    run(*SEARCH, "--budget", "35%", "-o", "schemes.json")
    arguments = ("convert", "zoo:make", "--schemes", "schemes.json", "-o", "m.safetensors")
    code, out, err = run(*arguments, "--override", "head=float", "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["layers"]}
    assert not rows["head"]["converted"]


def test_search_json(run):
    code, out, _ = run(*SEARCH, "--budget", "20dB", "--json")
    assert code == 0
    data = json.loads(out)
    assert set(data["schemes"]) == {"stem", "body", "fc", "head"}
    assert float(data["quality"]["sqnr_db"]) >= 20


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (("search", "zoo:make"), 2, "--budget"),
        (("search", "zoo:make", "--budget", "little"), 2, "a budget is a size"),
        (("search", "zoo:make", "--budget", "1B", "--allow-slower"), 1, "cannot be met"),
        (("search", "zoo:make", "--budget", "1MB", "--schemes", "w9"), 2, "unknown scheme"),
        (("search", "zoo:make", "--budget", "1MB", "--rounds", "-1"), 2, "at least 0"),
        (("search", "zoo:make", "--budget", "1MB", "-o", "no/x.json"), 2, "no directory no"),
        (("sensitivity", "zoo:make", "--task", "chess"), 2, "unknown task 'chess'"),
        (("sensitivity", "zoo:make", "--schemes", ","), 2, "`schemes` is empty"),
        (("compare", "zoo:make", "--task", "chess"), 2, "unknown task 'chess'"),
        (("convert", "zoo:make", "-o", "m", "--schemes", "zoo.py"), 1, "not a file of schemes"),
        (("convert", "zoo:make", "-o", "m", "--schemes", "none.json"), 1, "none.json"),
    ],
)
def test_what_is_wrong_is_said(run, arguments, code, match):
    found, _, err = run(*arguments)
    assert found == code
    assert match in err


def test_compare_takes_a_task(run):
    code, out, err = run(
        *("compare", "zoo:make", "--seconds", "0.05", "--no-torch-int8", "--task", "zoo:close")
    )
    assert code == 0, err
    assert "close" in out
