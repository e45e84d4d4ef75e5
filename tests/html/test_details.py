"""The details: what they hold, and what happens where something cannot be taken."""

import sys

import pytest
import torch
from torch import nn

import lowbit
from lowbit.html import details as details_module
from lowbit.html.details import gather
from lowbit.html.packages import check_packages


def test_accounts_errors_and_environment(comparison):
    details = comparison.details
    assert list(details.reports) == list(details.layers) == ["w8a8", "w4a8 & <b>"]
    assert [row.name for row in details.reports["w8a8"].kept] == ["depthwise"]
    assert details.layer_samples == 4
    assert details.environment["isa"]["chosen"] == lowbit.cpu_info()["isa"]["chosen"]
    assert details.settings["candidates"] == ["w8a8", "w4a8 & <b>"]
    assert details.settings["budget_seconds"] == 0.05
    assert details.missing == ()
    assert not any("/" in name for name in details.environment["threads"]["openmp_runtimes"])


def test_variables_that_bear_on_speed_alone(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    model = nn.Sequential(nn.Linear(32, 4))
    found = gather({"float32": model, "q": lowbit.quantize(model, "w8a8")}, [torch.ones(1, 32)])
    assert found.variables["OMP_NUM_THREADS"] == "1"
    assert "SECRET_TOKEN" not in found.variables


def test_a_model_that_fails_on_single_samples_is_told():
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 4)

        def forward(self, x):
            if x.shape[0] != 8:
                raise ValueError("takes batches of 8")
            return self.fc(x)

    model = Batched().eval()
    quantized = lowbit.quantize(model, "w8a8")
    found = gather({"float32": model, "q": quantized}, [torch.ones(8, 32)])
    assert found.missing == ("errors of the layers: ValueError: takes batches of 8",)
    assert found.layers == {}
    assert list(found.reports) == ["q"]


def test_a_candidate_without_layers_of_lowbit_has_no_account():
    model = nn.Sequential(nn.Linear(32, 4))
    found = gather(
        {"float32": model, "other": nn.Sequential(nn.Linear(32, 4))}, [torch.ones(1, 32)]
    )
    assert found.reports == found.layers == {}


def test_at_most_eight_samples(monkeypatch):
    seen = []
    monkeypatch.setattr(
        details_module,
        "layer_errors",
        lambda model, sides, batches, say: seen.extend(batches) or {},
    )
    model = nn.Sequential(nn.Linear(32, 4))
    gather({"float32": model}, [torch.ones(20, 32), torch.ones(20, 32)])
    assert [x.shape[0] for x in seen] == [1] * 8


@pytest.mark.parametrize(("module", "package"), [("jinja2", "jinja2"), ("PIL", "pillow")])
def test_missing_packages_name_the_extra(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}: pip install 'lowbit\[report\]'"):
        check_packages()
    model = nn.Sequential(nn.Linear(32, 4))
    with pytest.raises(ModuleNotFoundError, match=package):
        lowbit.compare(model, ["w8a8"], torch.ones(1, 32), details=True)
