"""README and the other pages: links lead somewhere, commands exist, and the code runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit import cli

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("the source tree is not beside the tests", allow_module_level=True)
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "csrc/README.md", *(ROOT / "bench").glob("*.md")]
CODE = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)

    def forward(self, x):
        return x + torch.relu(self.fc1(x))


class Net(nn.Module):
    """With the names that README gives to layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s#]+)", page.read_text())
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


def test_every_command_is_in_the_table_and_parses():
    parser = cli._parser()
    lines = re.findall(r"^\| `lowbit ([^`]+)` \|", README.read_text(), re.MULTILINE)
    shown = {parser.parse_args(shlex.split(line)).command for line in lines}
    assert shown == set(parser._subparsers._group_actions[0].choices)


@pytest.mark.filterwarnings("ignore:nothing was equalized")
@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_code_runs(code, tmp_path, monkeypatch, use_threads):
    monkeypatch.chdir(tmp_path)
    use_threads(1)
    model, batches = Net().eval(), [torch.randn(4, 64) for _ in range(3)]

    def train(prepared):
        optimizer = torch.optim.SGD(prepared.train().parameters(), 1e-3)
        for x in batches:
            optimizer.zero_grad()
            prepared(x).square().mean().backward()
            optimizer.step()
        prepared.eval()

    names = {
        "lowbit": lowbit,
        "model": model,
        "float_model": Net().eval(),
        "qmodel": lowbit.quantize(model, "w8a8-static", calibration=batches),
        "x": batches[0],
        "batches": batches,
        "example_inputs": batches[0],
        "loader": [(x, 0) for x in batches],
        "train": train,
    }
    # Which layers are quicker than float ones is not the same on every machine.
    code = code.replace('"50% of w8a8"', '"50% of w8a8", allow_slower=True')
    exec(code, names)
