"""Which kernel runs: the instruction sets built in, `set_isa` and LOWBIT_MAX_ISA.

Under qemu, where it is installed, the extension is also run on a CPU that lacks what it was built
for: it must import, choose what works, say what does not, and compute the same bits.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import oracle
import pytest
from operands import assert_same_bits, core_linear, random_weights

from lowbit import _core

USABLE = [isa["name"] for isa in _core.isas() if isa["usable"]]


def run_python(code: str, *arguments: str, prefix=(), **environment: str):
    """Run `code` in a fresh interpreter with only the given LOWBIT_ variables."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LOWBIT_")}
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# Loads the extension by its path, without torch: quick, and possible under qemu. Lazily, since
# there is no OpenMP runtime, which one thread does not need.
LOAD = """
import importlib.util, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
spec = importlib.util.spec_from_file_location("lowbit._core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
"""


def load(code: str = "", *, prefix=(), **environment: str):
    return run_python(LOAD + code, _core.__file__, prefix=prefix, **environment)


def test_the_extension_is_one_file():
    assert Path(_core.__file__).name.endswith(tuple(EXTENSION_SUFFIXES))


def test_isas_are_described_best_first():
    names = [isa["name"] for isa in _core.isas()]
    assert names
    assert len(names) == len(set(names))
    assert names[-1] == "scalar"
    assert "scalar" in USABLE
    assert _core.isa() in USABLE
    for isa in _core.isas():
        assert isinstance(isa["usable"], bool)
        assert isa["kernels"]
        assert all(isa["name"] in kernel for kernel in isa["kernels"].values())


def test_cpu_features_explain_what_is_usable():
    features = _core.cpu_features()
    assert all(isinstance(value, bool) for value in features.values())
    for name, needs in {
        "avx2": ["avx2", "fma", "f16c"],
        "avxvnni": ["avx2", "avxvnni"],
        "avx512vnni": ["avx512vnni"],
    }.items():
        if name in USABLE:
            assert all(features[feature] for feature in needs)


def test_cpu_features_are_the_kernels_own_view():
    if not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64":
        pytest.skip("reads /proc/cpuinfo of x86-64")
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
    )
    flags = {flag.replace("_", "") for flag in flags.split()}
    features = _core.cpu_features()
    for name in ("avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512vnni"):
        assert features[name] == (name in flags), name


def test_set_isa(use_isa):
    for name in USABLE:
        use_isa(name)
        assert _core.isa() == name


def test_set_isa_unknown_names_the_usable_ones():
    before = _core.isa()
    for name in ("sse9", "", "AVX2", "avx2 "):
        with pytest.raises(ValueError, match="scalar") as error:
            _core.set_isa(name)
        assert f"'{name}'" in str(error.value)
        assert all(usable in str(error.value) for usable in USABLE)
    assert _core.isa() == before


def test_kernel_names_tell_format_activation_and_isa(use_isa):
    seen = {}
    for isa in USABLE:
        use_isa(isa)
        for fmt, (bits, _, _) in _core.FORMATS.items():
            for activation in _core.ACTIVATIONS:
                name = _core.kernel_name(fmt, activation)
                assert name.endswith(isa)
                assert f"w{bits}" in name
                seen[bits, activation, isa] = name
    assert all("a16" in name for (_, act, _), name in seen.items() if act == "int16")
    by_isa = {isa: {n for (_, _, i), n in seen.items() if i == isa} for isa in USABLE}
    assert len(set.union(*by_isa.values())) == sum(map(len, by_isa.values()))


def test_kernel_name_unknown_arguments():
    with pytest.raises(ValueError, match=r"float8.*int16"):
        _core.kernel_name("int8", "float8")


def test_build_info():
    info = _core.build_info()
    assert info["compiler"]
    assert info["version"]
    json.dumps(info)
    assert _core.openmp_threads() >= 1


# --- LOWBIT_MAX_ISA ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USABLE)
def test_max_isa_is_obeyed(name):
    result = load("print(core.isa())", LOWBIT_MAX_ISA=name)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == name


@pytest.mark.parametrize("environment", [{}, {"LOWBIT_MAX_ISA": ""}], ids=["unset", "empty"])
def test_the_best_usable_is_the_default(environment):
    result = load("print(core.isa())", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == USABLE[0]


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx512"])
def test_max_isa_unknown_is_an_import_error(name):
    result = load(LOWBIT_MAX_ISA=name)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError")
    assert "LOWBIT_MAX_ISA" in message
    assert f"'{name}'" in message
    assert all(usable in message for usable in USABLE)


def test_max_isa_of_another_architecture_is_an_import_error():
    name = "neondot" if platform.machine() == "x86_64" else "avx2"
    result = load(LOWBIT_MAX_ISA=name)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError")
    assert name in message
    assert "scalar" in message


def test_max_isa_error_reaches_the_user_through_the_package():
    result = run_python("import lowbit", LOWBIT_MAX_ISA="sse9")
    assert result.returncode != 0
    assert "LOWBIT_MAX_ISA 'sse9'" in result.stderr


@pytest.mark.parametrize(
    ("launch", "arguments"),
    [
        ("-m", ("lowbit", "info")),
        ("-m", ("lowbit.cli", "info")),
        (
            "-c",
            ("import sys; sys.argv[0] = '/usr/bin/lowbit'; from lowbit.cli import main; main()",),
        ),
    ],
    ids=["package", "module", "script"],
)
def test_max_isa_error_is_one_line_of_the_command(launch, arguments):
    result = subprocess.run(
        [sys.executable, launch, *arguments],
        env={**os.environ, "LOWBIT_MAX_ISA": "sse9"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"lowbit: error: LOWBIT_MAX_ISA 'sse9' is unknown.*\n", result.stderr)


# --- other CPUs ----------------------------------------------------------------------------------

QEMU = shutil.which("qemu-x86_64")
needs_qemu = pytest.mark.skipif(
    QEMU is None or platform.machine() != "x86_64", reason="needs qemu-x86_64 on x86-64"
)
# A model of each CPU, and what must be chosen on it of what is built in.
CPUS = [("Nehalem", "scalar"), ("Haswell", "avx2")]


@needs_qemu
@pytest.mark.parametrize(("cpu", "expected"), CPUS)
def test_older_cpu_gets_what_it_can_run(cpu, expected, tmp_path):
    built = [isa["name"] for isa in _core.isas()]
    if expected not in built:
        pytest.skip(f"{expected} is not built in")
    rng = np.random.default_rng(0)
    weights = random_weights(rng, "int4", (20, 100), 32, zeros=True)
    x = rng.normal(size=(3, 100)).astype(np.float32)
    arrays = {
        "x": x,
        "packed": oracle.pack(weights.codes, "int4"),
        "scale": weights.scale,
        "group_scale": oracle.pack_groups(weights.group_scale),
        "group_zero": oracle.pack_groups(weights.group_zero),
        "bias": weights.bias,
    }
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(array.tobytes())
    # Without NumPy, whose own kernels need more than the oldest of these CPUs has.
    code = """
import ctypes, pathlib
folder = pathlib.Path(sys.argv[2])
def operand(name):
    return ctypes.create_string_buffer((folder / name).read_bytes())
buffers = [operand(name) for name in "x packed scale group_scale group_zero bias".split()]
x, packed, *rest = map(ctypes.addressof, buffers)
y = ctypes.create_string_buffer(4 * 3 * 20)
core.linear(x, 3, ctypes.addressof(y), 1, 0, 20, 100, 32, packed, *rest, 2)
(folder / "y").write_bytes(y.raw)
print(core.isa(), [isa["name"] for isa in core.isas() if isa["usable"]])
"""
    prefix = (QEMU, "-cpu", cpu)
    result = run_python(LOAD + code, _core.__file__, str(tmp_path), prefix=prefix)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == expected
    assert "avx512" not in result.stdout
    y = np.frombuffer((tmp_path / "y").read_bytes()[: 4 * 3 * 20], np.float32).reshape(3, 20)
    assert_same_bits(y, core_linear(x, weights, "int8"))


@needs_qemu
def test_max_isa_beyond_the_cpu_is_an_import_error():
    best = _core.isas()[0]["name"]
    if best == "scalar":
        pytest.skip("every CPU runs what is built in")
    result = load(prefix=(QEMU, "-cpu", "Nehalem"), LOWBIT_MAX_ISA=best)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError")
    assert f"'{best}' is not supported by this CPU" in message
    assert "scalar" in message


@needs_qemu
def test_set_isa_beyond_the_cpu_is_an_error():
    best = _core.isas()[0]["name"]
    if best == "scalar":
        pytest.skip("every CPU runs what is built in")
    result = load(f"core.set_isa({best!r})", prefix=(QEMU, "-cpu", "Nehalem"))
    assert result.returncode != 0
    assert "ValueError" in result.stderr.splitlines()[-1]
    assert "not supported by this CPU" in result.stderr


# --- probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["dot", "dot8", "dot4", "dot2", "dot1", "fma", "xnor"])
def test_probes_measure_something(isa, what):
    assert _core.probe(what, 0.001) > 0


def test_read_bandwidth_measures_something(isa):
    assert _core.read_bandwidth(1 << 16, 1, 0.001) > 0
    assert _core.read_bandwidth(1 << 20, 2, 0.001) > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: _core.probe("sqrt", 0.001),
        lambda: _core.probe("dot", -1.0),
        lambda: _core.probe("dot", float("nan")),
        lambda: _core.read_bandwidth(1 << 16, 1, -1.0),
        lambda: _core.read_bandwidth(-1, 1, 0.001),
        lambda: _core.read_bandwidth(1 << 16, 0, 0.001),
    ],
    ids=["unknown", "negative", "nan", "no-time", "bytes", "threads"],
)
def test_probes_refuse_what_they_cannot_measure(call):
    with pytest.raises(ValueError, match=r"\w"):
        call()
