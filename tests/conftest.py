"""Fixtures shared by the tests.

`isa` runs a test once for every instruction set that this extension was built with; one that this
machine cannot execute is a visible skip. `kernel` does so for every weight format and activation
type as well, with ids such as `w4a8-avx2`.
"""

from __future__ import annotations

import builtins
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

# The oracle's products are small: threads of BLAS would only fight the kernels' for the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported, below

import hypothesis
import numpy as np
import pytest
import torch

if not any((Path(__file__).parents[1] / "lowbit").glob("_core.*.so")):
    # `python -m pytest` puts the source tree first; it must not shadow the installed package.
    sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).parents[1]]
sys.path.insert(0, str(Path(__file__).parent))  # `import oracle`, from any working directory

import models
import oracle

import lowbit
from lowbit import _core

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Processes share the cores: teams that wait for each other take six times as long.
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

# The same examples in every run: a failure must be reproducible by anyone.
hypothesis.settings.register_profile(
    "lowbit",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=int(os.environ.get("LOWBIT_TEST_EXAMPLES", "50")),
    suppress_health_check=list(hypothesis.HealthCheck),  # some depend on the machine's speed
)
hypothesis.settings.load_profile("lowbit")

WEIGHT_ID = {"int8": "w8", "int4": "w4", "int2": "w2", "ternary": "wt", "binary": "w1"}
ACTIVATION_ID = {"int8": "a8", "int16": "a16", "binary": "a1"}


@dataclass(frozen=True)
class Kernel:
    """What selects a kernel: weight format, activation type, instruction set."""

    fmt: str
    activation: str
    isa: str


@pytest.fixture(scope="session", autouse=True)
def working_directory(tmp_path_factory):
    """A folder away from the source tree, which must not shadow the installed package.

    `python -c` and `python -m`, which some tests start, import from the working directory first.
    """
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("working_directory"))
    yield
    os.chdir(before)


@pytest.fixture
def use_threads():
    """A function that sets torch's number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _isa_params() -> list:
    return [
        pytest.param(
            isa["name"],
            id=isa["name"],
            marks=[] if isa["usable"] else pytest.mark.skip(reason=f"no {isa['name']} here"),
        )
        for isa in _core.isas()
    ]


def _kernel_params() -> list:
    return [
        pytest.param(
            Kernel(fmt, activation, isa.values[0]),
            id=f"{WEIGHT_ID[fmt]}{ACTIVATION_ID[activation]}-{isa.id}",
            marks=isa.marks,
        )
        for fmt in oracle.FORMATS
        for activation in oracle.ACTIVATIONS
        for isa in _isa_params()
    ]


@pytest.fixture
def use_isa():
    """A function that chooses an instruction set by name, until the test ends."""
    before = _core.isa()
    yield _core.set_isa
    _core.set_isa(before)


@pytest.fixture(params=_isa_params())
def isa(request, use_isa) -> str:
    """Name of the instruction set in use during the test, one test for each."""
    use_isa(request.param)
    return request.param


@pytest.fixture(params=_kernel_params())
def kernel(request, use_isa) -> Kernel:
    """Format, activation type and the instruction set in use during the test, one test for each."""
    use_isa(request.param.isa)
    return request.param


@pytest.fixture(params=[pytest.param(f, id=WEIGHT_ID[f]) for f in oracle.FORMATS])
def fmt(request) -> str:
    """Name of a weight format, one test for each."""
    return request.param


@pytest.fixture(params=[pytest.param(a, id=ACTIVATION_ID[a]) for a in oracle.ACTIVATIONS])
def activation(request) -> str:
    """Name of an activation type, one test for each."""
    return request.param


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  for code under test that uses the global generator
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def saved(tmp_path):
    """A converted model and its file."""
    model = lowbit.quantize(models.trained(models.RaggedNet()), "w4a8", overrides={"head": None})
    path = tmp_path / "model.safetensors"
    lowbit.save_file(model, path)
    return model, path


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, caught when they are saved."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    caught = []
    save = figure.savefig
    monkeypatch.setattr(
        figure,
        "savefig",
        lambda self, *args, **kwargs: (caught.append(self), save(self, *args, **kwargs))[1],
    )
    return caught


@pytest.fixture
def no_matplotlib(monkeypatch):
    """An interpreter that has none."""
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
