"""lowbit.benchmark.runner: saving, resuming, failures. Processes are made up, but for two."""

import json
import sys

import pytest

from lowbit.benchmark.matrix import MatrixCase, cases
from lowbit.benchmark.runner import command, load, run
from lowbit.benchmark.summary import summarize


def options(words):
    """The options that a command line hands to its worker."""
    assert words[:3] == [sys.executable, "-m", "lowbit.benchmark.worker"]
    return json.loads(words[3])


class Processes:
    """Stands in for the processes: prints a result for every M, or ends early at some."""

    def __init__(self, *breaking):
        self.breaking = breaking
        self.ran = []

    def __call__(self, words):
        given = options(words)
        for m in given["m"]:
            if m in self.breaking:
                return
            self.ran.append((given["shapes"][0], m, given["threads"][0]))
            yield json.dumps({"groups": [], "m": m})


SMALL = {"shapes": ("64x64", "64x32"), "ms": (1, 8), "threads": (1,)}


def test_every_case_is_saved_and_not_run_again(tmp_path):
    path, processes = tmp_path / "m.jsonl", Processes()
    few, all_cases = cases(**SMALL)[:1], cases(**SMALL)
    assert run(few, path, stream=processes) == 0
    assert run(all_cases, path, stream=processes) == 0
    assert processes.ran == [("64x64", 1, 1), ("64x64", 8, 1), ("64x32", 1, 1), ("64x32", 8, 1)]
    assert [line["result"]["m"] for line in load(path)] == [1, 8, 1, 8]
    assert load(path)[0]["case"]["shape"] == "64x64"
    assert run(all_cases, path, stream=processes) == 0
    assert len(processes.ran) == 4


def test_other_formats_are_another_measurement(tmp_path):
    path, processes = tmp_path / "m.jsonl", Processes()
    run(cases(**SMALL), path, stream=processes)
    run(cases(**SMALL, formats=("w8a8-g128",)), path, stream=processes)
    assert len(processes.ran) == 8


def test_a_process_that_ends_early_costs_one_case(tmp_path, capsys):
    path, processes = tmp_path / "m.jsonl", Processes(4)
    found = cases(("64x64",), (1, 4, 8), (1,), ("cache",))
    assert run(found, path, stream=processes) == 1
    assert [m for _, m, _ in processes.ran] == [1, 8]
    assert "64x64 M=4 T=1 cache: failed" in capsys.readouterr().err
    assert run(found, path, stream=Processes()) == 0  # tried again


def test_time_runs_out(tmp_path):
    path, processes = tmp_path / "m.jsonl", Processes()
    assert run(cases(**SMALL), path, minutes=0, stream=processes) == 3
    assert len(processes.ran) == 1
    assert run(cases(**SMALL), path, stream=processes) == 0


def test_files_that_are_not_results(tmp_path):
    path = tmp_path / "m.jsonl"
    with pytest.raises(ValueError, match="holds no results"):
        load(path)
    path.write_text('{"case": {}}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2: not a result"):
        run([], path)


def test_a_real_process(tmp_path):
    """One small case, without peers, through the worker, and into a summary."""
    case = MatrixCase("64x32", 2, 1, "cache", ("w8a8", "w4a8-g32"), ("torch-float32",), None, 0.01)
    path = tmp_path / "m.jsonl"
    assert run([case], path) == 0
    summary = summarize(load(path))
    assert [cell.name for cell in summary.cells] == ["w8a8", "w4a8-g32", "torch float32"]
    assert summary.own[0].macs == 2 * 64 * 32


def test_lines_from_before_there_were_convolutions_are_found(tmp_path):
    """They do not name their operation: linear."""
    path, processes = tmp_path / "m.jsonl", Processes()
    (case, *_) = cases(**SMALL)
    run([case], path, stream=processes)
    line = json.loads(path.read_text())
    del line["case"]["op"]
    path.write_text(json.dumps(line) + "\n")
    assert run([case], path, stream=processes) == 0
    assert len(processes.ran) == 1


def test_a_command_runs_the_worker():
    case = MatrixCase("64x64", 2, 1, "cache")
    assert options(command([case])) == json.loads(json.dumps(case.options([case])))
