"""The file that a run goes on from."""

import math

import pytest
import torch
from torch import nn

from lowbit.mixed.journal import Journal, data_fingerprint, fingerprint


def test_results_are_measured_once_and_kept(tmp_path):
    path, calls = tmp_path / "run.jsonl", []

    def measure():
        calls.append(1)
        return {"x": math.nan, "y": 2}

    first = Journal(path, {"a": 1})
    assert first.get("k", measure) is first.get("k", measure)
    second = Journal(path, {"a": 1})
    assert second.restored == 1
    assert "k" in second
    assert second.get("k", measure)["y"] == 2
    assert len(calls) == 1


def test_half_a_line_is_measured_again(tmp_path):
    path = tmp_path / "run.jsonl"
    journal = Journal(path, {})
    journal.get("one", lambda: 1)
    whole = path.read_text()
    journal.get("two", lambda: 2)
    path.write_text(path.read_text()[:-4])
    again = Journal(path, {})
    assert again.restored == 1
    assert path.read_text() == whole
    assert again.get("two", lambda: 3) == 3
    assert Journal(path, {}).restored == 2


def test_another_run_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    Journal(path, {"model": "x", "data": "y"})
    with pytest.raises(ValueError, match="belongs to another run: data differ; delete it"):
        Journal(path, {"model": "x", "data": "z"})


@pytest.mark.parametrize("text", ["words\n", '{"a": 1}\n', "[1]\n", '{"format": "x"}\n{}\n'])
def test_other_files_are_refused_and_kept(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a file of measurements"):
        Journal(path, {})
    assert path.read_text() == text


def test_without_a_file_it_remembers():
    journal = Journal(None, {})
    assert journal.get("k", lambda: 1) == journal.get("k", lambda: 2) == 1


def test_fingerprints_tell_models_and_data_apart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert fingerprint(model) != before
    batches = [torch.zeros(2), {"a": torch.ones(1), "b": [3]}]
    assert data_fingerprint(batches) == data_fingerprint(batches)
    assert data_fingerprint(batches) != data_fingerprint(batches[:1])
    assert data_fingerprint([torch.zeros(2)]) != data_fingerprint([torch.zeros(2).bfloat16()])
    assert data_fingerprint([torch.zeros(0)])
