"""MODEL on the command line and its inputs: what is found, built and read."""

import sys

import pytest
import torch
from torch import nn

from lowbit.model_argument import (
    CommandError,
    UsageError,
    build,
    example_inputs,
    find,
    random_input,
    read_inputs,
)


class Unsafe:
    """An object that only unpickling could bring back."""


def test_finds_what_is_installed():
    assert find("torch.nn:Linear") is nn.Linear
    assert find("torch:nn.functional.relu") is torch.nn.functional.relu


def test_finds_modules_of_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found_here.py").write_text("def factory():\n    import also_here\n    return 3\n")
    (tmp_path / "also_here.py").write_text("")
    try:
        assert find("found_here:factory")() == 3  # imports more when it is called
    finally:
        sys.modules.pop("found_here", None)
        sys.modules.pop("also_here", None)


@pytest.mark.parametrize("name", ["", ":", "torch", "torch:", ":nn"])
def test_refuses_what_is_not_of_the_form(name):
    with pytest.raises(UsageError, match=r"package\.module:factory"):
        find(name)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("nets.py:net", "nets:net"),
        ("./nets.py:net", "nets:net"),
        ("zoo/nets.py:zoo.net", "zoo.nets:zoo.net"),
        ("zoo/nets:net", "zoo.nets:net"),
        ("../nets.py:net", "nets:net, in the directory .."),
        ("/tmp/zoo/nets.py:net", "nets:net, in the directory /tmp/zoo"),
    ],
)
def test_a_file_is_no_module(name, instead):
    with pytest.raises(UsageError, match=f"not a file: write {instead}$"):
        find(name)


def test_builds_in_eval_mode():
    model = nn.Sequential(nn.Dropout())
    assert build(model, "m:model") is model
    assert not model.training
    assert isinstance(build(lambda: nn.Linear(2, 3), "m:f"), nn.Linear)
    assert isinstance(build(nn.Identity, "m:f"), nn.Identity)  # a class is a factory


def test_names_a_factory_that_needs_arguments():
    with pytest.raises(CommandError, match=r"m:Linear\(\) failed: TypeError: .*in_features"):
        build(nn.Linear, "m:Linear")


def test_random_input_is_reproducible_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    x, described = random_input([2, 3], seed=7)
    assert described == "random normal, 2x3, seed 7"
    assert torch.equal(x, random_input([2, 3], seed=7)[0])
    assert not torch.equal(x, random_input([2, 3], seed=8)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_example_inputs_of_the_factory_come_before_those_of_the_model():
    class Owner:
        example_inputs = 1

    class Other:
        example_inputs = staticmethod(lambda: 2)

    assert example_inputs(Owner(), Other())[0] == 1
    assert example_inputs(object(), Other())[0] == 2
    with pytest.raises(UsageError, match="--input-shape"):
        example_inputs(object())


def test_reads_batches(tmp_path):
    batches = [(torch.ones(1), torch.zeros(2)), (torch.zeros(1), torch.ones(2))]
    torch.save(batches, tmp_path / "x.pt")
    read, described = read_inputs(tmp_path / "x.pt")
    assert described == str(tmp_path / "x.pt")
    assert [[t.tolist() for t in batch] for batch in read] == [
        [[1.0], [0.0, 0.0]],
        [[0.0], [1.0, 1.0]],
    ]


def test_runs_no_code_of_a_file(tmp_path):
    torch.save(Unsafe(), tmp_path / "x.pt")
    with pytest.raises(CommandError, match=r"x.pt cannot be read"):
        read_inputs(tmp_path / "x.pt")
