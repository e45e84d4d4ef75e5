"""The command `lowbit`: output, JSON, exit codes, and an error message for everything wrong."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_safetensors

import lowbit
from lowbit import _core, cli, quality
from lowbit.report import size_text

MODELS = """
import torch
from torch import nn


def mlp():
    torch.manual_seed(0)
    print("building")
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


mlp.example_inputs = torch.ones(4, 64)


def lazy():
    return mlp()


lazy.example_inputs = lambda: torch.ones(3, 64)


def keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(64, 8), nn.Linear(32, 8)

        def forward(self, a, b):
            return self.left(a) + self.right(b)

    return Two()


def pictures():
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


pictures.example_inputs = torch.ones(2, 3, 12, 12)


def fails():
    raise RuntimeError("no weights\\nhere")


def nothing():
    return 3


class zoo:
    small = nn.Sequential(nn.Linear(64, 10))


instance = nn.Sequential(nn.Linear(64, 10))
activation = nn.Sequential(nn.Tanh())
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, use_threads):
    """An own current directory with a module of models, and nothing left behind."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    others = {name: sys.modules.pop(name, None) for name in ("models", "broken", "wrong")}
    engine = torch.backends.quantized.engine
    use_threads(1)
    yield tmp_path
    torch.backends.quantized.engine = engine
    for name, module in others.items():
        sys.modules.pop(name, None)
        if module is not None:  # tests/models.py
            sys.modules[name] = module


@pytest.fixture
def small_probe(monkeypatch):
    """Ceilings are not what is tested here: do not fill half a gigabyte for each."""
    monkeypatch.setattr("lowbit.benchmark.ceilings.READ_BYTES", 1 << 20)


@pytest.fixture
def run(capsys):
    """Runs a command line: (exit code, standard output, standard error)."""

    def call(*arguments):
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    """Runs a command with --json: what it printed, which has to be strict JSON and all of it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=refuse)

    return call


COMPARE = ("compare", "--seconds", "0.05", "--no-torch-int8")


def test_without_a_command_prints_help(run):
    code, out, _ = run()
    assert code == 2
    assert all(name in out for name in ("demo", "info", "compare", "convert", "bench"))


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out == f"lowbit {lowbit.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "info", "compare", "report", "convert", "bench"])
def test_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out
    assert "--threads" in out


def test_info(run, run_json):
    code, out, _ = run("info", "--threads", "1")
    assert code == 0
    assert _core.isa() in out
    assert run_json("info", "--threads", "1")["threads"]["torch"] == 1


def test_compare_text(run):
    code, out, err = run(*COMPARE, "models:mlp")
    assert code == 0, err
    assert "building" not in out  # what the model prints is no result
    assert "inputs: the model's example_inputs" in out
    for name in ("float32", "w8a8", "w4a8"):
        assert name in out


def test_compare_json(run_json):
    data = run_json(*COMPARE, "models:mlp", "--schemes", "w8a8,w1a1", "--input-shape", "5,64")
    assert data["inputs"] == "random normal, 5x64, seed 0"
    assert data["batch_size"] == 5
    assert [row["name"] for row in data["rows"]] == ["float32", "w8a8", "w1a1"]
    assert data["rows"][1]["quality"]["sqnr_db"] > 25


def test_compare_includes_torch_int8(run_json):
    data = run_json("compare", "--seconds", "0.05", "models:mlp")
    assert [row["name"] for row in data["rows"]] == ["float32", "torch int8", "w8a8", "w4a8"]


def test_compare_takes_a_callable_for_inputs(run_json):
    assert run_json(*COMPARE, "models:lazy")["batch_size"] == 3


@pytest.mark.parametrize("name", ["models:instance", "models:zoo.small"])
def test_compare_takes_a_module(run_json, name):
    assert run_json(*COMPARE, name, "--input-shape", "2,64")["batch_size"] == 2


def test_compare_random_inputs_depend_on_the_seed_only(run_json):
    command = (*COMPARE, "models:mlp", "--input-shape", "5,64", "--schemes", "w8a8")
    quality = [run_json(*command, "--seed", seed)["rows"][1]["quality"] for seed in (1, 1, 2)]
    assert quality[0] == quality[1] != quality[2]


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
def test_compare_reads_inputs(run_json, folder, suffix):
    x, path = torch.randn(6, 64), folder / f"x{suffix}"
    if suffix == ".pt":
        torch.save(x, path)
    elif suffix == ".npy":
        np.save(path, x.numpy())
    else:
        save_safetensors({"x": x}, path)
    data = run_json(*COMPARE, "models:mlp", "--inputs", path)
    assert data["batch_size"] == 6
    assert data["inputs"] == str(path)


def test_compare_reads_named_inputs(run_json, folder):
    tensors = {"a": torch.randn(2, 64), "b": torch.randn(2, 32)}
    save_safetensors(tensors, folder / "x.safetensors")
    data = run_json(*COMPARE, "models:keywords", "--inputs", "x.safetensors")
    assert data["rows"][1]["quality"]["elements"] == 16


@pytest.fixture
def sample(folder):
    """A file of calibration data for `models:mlp`, and the batches in it."""
    x = [torch.randn(16, 64), torch.randn(16, 64)]
    torch.save(x, folder / "sample.pt")
    return x


def test_compare_calibrates_static_schemes(run, run_json, sample):
    command = (*COMPARE, "models:mlp", "--schemes", "w8a8,w8a8-static", "--input-shape", "5,64")
    data = run_json(*command, "--calibration", "sample.pt")
    assert data["calibration"] == "sample.pt"
    on_inputs = run_json(*command, "--calibration", "inputs")
    assert "calibrated on these" in run(*command, "--calibration", "inputs")[1]
    import models

    model = models.mlp()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    quantized = lowbit.quantize(model, "w8a8-static", calibration=sample)
    expected = quality.measure(model(x), quantized(x))
    assert data["rows"][2]["quality"]["sqnr_db"] == pytest.approx(expected.sqnr_db)
    quantized = lowbit.quantize(model, "w8a8-static", calibration=x)
    expected = quality.measure(model(x), quantized(x))
    assert on_inputs["rows"][2]["quality"]["sqnr_db"] == pytest.approx(expected.sqnr_db)


def test_convert_calibrates(run, sample):
    command = ("convert", "models:mlp", "-o", "m.safetensors", "--scheme", "w8a8-static")
    code, out, err = run(*command, "--calibration", "sample.pt")
    assert code == 0, err
    assert "w8a8-static" in out
    import models

    expected = lowbit.quantize(models.mlp(), "w8a8-static", calibration=sample)
    loaded = lowbit.load_file(models.mlp(), "m.safetensors")
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), expected(x))


def test_compare_plots(run, folder):
    pytest.importorskip("matplotlib")
    code, _, err = run(*COMPARE, "models:mlp", "--plot", "plot.png")
    assert code == 0, err
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command", [("compare", "--html", "page.html"), ("report", "-o", "page.html"), ("report",)]
)
def test_pages(run, run_json, folder, command):
    name, *options = command
    path = folder / (options[-1] if options else "report.html")
    arguments = (name, *COMPARE[1:], "models:mlp", "--schemes", "w8a8", *options)
    code, out, err = run(*arguments)
    assert code == 0, err
    assert out.rstrip().endswith(f"wrote {path.name} ({size_text(path.stat().st_size)})")
    text = path.read_text(encoding="utf-8")
    assert " ".join(["lowbit", *map(str, arguments)]) in text
    assert "inputs: the model&#39;s example_inputs" in text
    data = run_json(*arguments)
    assert (data["html"], data["html_bytes"]) == (path.name, path.stat().st_size)
    assert data["details"]["layers"]["w8a8"][0]["weight_db"] > 30


def test_labels_name_the_classes(run, folder):
    (folder / "labels.txt").write_text("\n".join(f"label {i}" for i in range(7)), encoding="utf-8")
    arguments = ("report", *COMPARE[1:], "models:pictures", "--labels", "labels.txt")
    code, _, err = run(*arguments)
    assert code == 0, err
    assert "<strong>label " in (folder / "report.html").read_text(encoding="utf-8")
    (folder / "labels.txt").write_bytes(b"\xff\xfe\xfa")
    code, _, err = run(*arguments)
    assert code == 1
    assert "labels.txt cannot be read" in err


@pytest.mark.parametrize("command", [("demo", "--html"), ("compare", "models:mlp", "--html")])
def test_pages_need_packages_and_a_place_before_the_work(run, folder, monkeypatch, command):
    code, _, err = run(*command, folder / "none" / "x.html")
    assert code == 2
    assert "there is no directory" in err
    code, _, err = run(*command, folder)
    assert code == 2
    assert "is a directory" in err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = run(*command, folder / "x.html")
    assert code == 1
    assert "pip install 'lowbit[report]'" in err


def test_convert_writes_what_quantize_makes(run, folder):
    code, out, err = run("convert", "models:mlp", "-o", "m.safetensors", "--scheme", "w4a8")
    assert code == 0, err
    assert "2 converted, 0 kept float" in out
    assert "lowbit.load_file(float_model, 'm.safetensors')" in out
    import models

    expected = lowbit.quantize(models.mlp(), "w4a8")
    loaded = lowbit.load_file(models.mlp(), folder / "m.safetensors")
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), expected(x))


def test_convert_json_and_overrides(run_json, folder):
    data = run_json(
        "convert", "models:mlp", "-o", "m.safetensors", "--scheme", "w4a8-g32",
        "--override", "2=float",
    )  # fmt: skip
    assert data["file_bytes"] == (folder / "m.safetensors").stat().st_size
    assert [layer["scheme"] for layer in data["layers"]] == ["w4a8-g32", "float32"]
    data = run_json(
        "convert", "models:mlp", "-o", "m.safetensors",
        "--override", "re:(?=2)2=w1a1", "--override", "re:.*=w2a8",
    )  # fmt: skip
    assert [layer["scheme"] for layer in data["layers"]] == ["w2a8", "w1a1"]


BENCH = (
    "bench", "--quick", "--shapes", "64x48", "--m", "1", "--seconds", "0.01",
    "--peers", "torch-float32",
)  # fmt: skip


@pytest.mark.usefixtures("small_probe")
def test_bench(run, run_json):
    code, out, err = run(*BENCH, "--formats", "w8a8")
    assert code == 0, err
    assert "linear 64x48, M=1, 1 thread" in out
    data = run_json(*BENCH, "--formats", "w4a8", "--isa", "scalar")
    assert data["environment"]["isa"]["chosen"] == "scalar"
    assert [row["name"] for row in data["groups"][0]["rows"]] == ["w4a8", "torch float32"]


@pytest.mark.usefixtures("small_probe")
def test_bench_plots(run, folder):
    pytest.importorskip("matplotlib")
    code, _, err = run(*BENCH, "--plot", "bars.svg")
    assert code == 0, err
    assert "<svg" in (folder / "bars.svg").read_text()


CONVERT = ("convert", "-o", "m.safetensors")
SHAPE = ("--input-shape", "2,64")


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ((*COMPARE, "models"), 2, "MODEL is package.module:factory"),
        ((*COMPARE, ":mlp"), 2, "MODEL is package.module:factory"),
        ((*COMPARE, "modles:mlp"), 1, "no module 'modles'"),
        ((*COMPARE, "models.sub:mlp"), 1, "no module 'models.sub'"),
        ((*COMPARE, "broken:mlp"), 1, "'no_such_package'; install it"),
        ((*COMPARE, "wrong:mlp"), 1, "ZeroDivisionError"),
        ((*COMPARE, "models:mpl"), 1, "did you mean mlp"),
        ((*COMPARE, "models:fails"), 1, "RuntimeError: no weights"),
        ((*COMPARE, "models:nothing"), 1, "returned no nn.Module, but type int"),
        ((*COMPARE, "models:number"), 1, "neither an nn.Module nor callable"),
        ((*COMPARE, "models:instance"), 2, "--input-shape"),
        ((*COMPARE, "models:instance", "--input-shape", "2,3"), 1, "float32"),
        ((*COMPARE, "models:instance", "--input-shape", "2,x"), 2, "--input-shape"),
        ((*COMPARE, "models:instance", "--input-shape", "0,64"), 2, "not at least 1"),
        ((*COMPARE, "models:mlp", "--inputs", "no.npy"), 1, "no such file"),
        ((*COMPARE, "models:mlp", "--inputs", "models.py"), 2, ".pt, .npy or .safetensors"),
        ((*COMPARE, "models:mlp", "--inputs", "x.npy", *SHAPE), 2, "not allowed with"),
        ((*COMPARE, "models:mlp", "--schemes", "w3a8"), 2, "w8a8, w4a8"),
        ((*COMPARE, "models:mlp", "--schemes", ","), 2, "no scheme"),
        ((*COMPARE, "models:mlp", "--threads", "0"), 2, "not at least 1"),
        ((*COMPARE, "models:mlp", "--plot", "no/x.png"), 2, "no directory no"),
        ((*COMPARE, "models:mlp", "--plot", "."), 2, "is a directory"),
        ((*CONVERT, "models:mlp", "--schemes", "no.json"), 1, "no.json: no such file"),
        ((*CONVERT, "models:mlp", "--scheme", "w4"), 2, "unknown scheme 'w4'"),
        ((*CONVERT, "models:mlp", "--scheme", "w8a8,w4a8"), 2, "one scheme"),
        ((*CONVERT, "models:mlp", "--override", "2"), 2, "NAME=RECIPE"),
        ((*CONVERT, "models:mlp", "--override", "2=w9"), 2, "unknown scheme 'w9'"),
        ((*CONVERT, "models:mlp", "--override", "9=w8a8"), 1, "'9'"),
        ((*CONVERT, "models:activation"), 1, "no layer was converted"),
        ((*COMPARE, "models:mlp", "--schemes", "w8a8-static"), 2, "give --calibration FILE"),
        ((*CONVERT, "models:mlp", "--scheme", "w8a8-static"), 2, "give --calibration FILE"),
        ((*CONVERT, "models:mlp", "--override", "2=w8a8-static"), 2, "give --calibration FILE"),
        ((*CONVERT, "models:mlp", "--calibration", "no.pt"), 1, "no such file"),
        ((*CONVERT, "models:mlp", "--calibration", "models.py"), 2, "--calibration takes .pt"),
        (("convert", "models:mlp"), 2, "-o"),
        (("bench", "--shapes", "64"), 2, "INxOUT"),
        (("bench", "--shapes", "0x64"), 2, "holds a zero"),
        (("bench", "--op", "conv", "--shapes", "8x8k3g3@8"), 2, "do not divide"),
        (("bench", "--formats", "w9a9"), 2, "unknown scheme"),
        (("bench", "--peers", "nobody"), 2, "torch-float32"),
        (("bench", "--isa", "abacus"), 2, "not usable here"),
        (("bench", "--m", "0"), 2, "not at least 1"),
        (("bench", "--seconds", "0"), 2, "more than 0"),
        (("compare", "models:mlp", "--seconds", "-1"), 2, "more than 0"),
        (("fly",), 2, "invalid choice"),
    ],
)
def test_errors(run, command, code, words):
    actual, out, err = run(*command)
    assert actual == code
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    # argparse prints its usage first; the message itself is one line.
    assert len([line for line in err.splitlines() if "error:" in line]) == 1


def test_a_plot_of_no_format_is_refused_before_the_work(run):
    pytest.importorskip("matplotlib")
    code, _, err = run(*COMPARE, "models:fails", "--plot", "x.xyz")
    assert (code, err[:45]) == (2, "lowbit: error: --plot: x.xyz has no suffix of")


def test_unreadable_inputs(run, folder):
    (folder / "x.npy").write_bytes(b"no array")
    code, _, err = run(*COMPARE, "models:mlp", "--inputs", "x.npy")
    assert code == 1
    assert "x.npy cannot be read" in err


def test_a_failed_convert_writes_nothing(run, folder):
    run("convert", "models:activation", "-o", "m.safetensors")
    assert not (folder / "m.safetensors").exists()


def test_debug_prints_the_traceback(run):
    code, _, err = run(*COMPARE, "models:fails", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("lowbit: error: models:fails() failed")


def test_an_unexpected_error_is_one_line(run, monkeypatch):
    def surprise():
        raise KeyError("gone")

    monkeypatch.setattr("lowbit.info.cpu_info", surprise)
    code, out, err = run("info")
    assert (code, out) == (1, "")
    assert err == "lowbit: error: KeyError: 'gone' (--debug shows the traceback)\n"


def test_interrupted(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.info.cpu_info", interrupt)
    code, out, err = run("info")
    assert (code, out, err) == (130, "", "lowbit: interrupted\n")


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_only_on_a_terminal(run, monkeypatch):
    _, _, err = run("convert", "models:mlp", "-o", "m.safetensors")
    assert "converting" not in err
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["convert", "models:mlp", "-o", "m.safetensors"]) == 0
    assert "converting" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_missing_packages_of_the_demo(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run("demo")
    assert (code, out) == (1, "")
    assert "pip install 'lowbit[demo]'" in err


def test_a_reader_that_stops_reading():
    command = [sys.executable, "-m", "lowbit", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
