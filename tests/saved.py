"""Converted models as files, written on one CPU and read on another: every layer's bits must agree.

python tests/saved.py --write FOLDER      models, and what each of their layers makes of its input
python tests/saved.py --check FOLDER      load them, and compare the layers' outputs bit for bit
"""

from __future__ import annotations

import platform
import sys
from functools import partial
from pathlib import Path

import models
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.nn.base import QuantizedLayer

RECIPES = ("w8a8", "w8a16", "w4a8-g32", "w4a16", "w2a8-g32", "wta8", "w1a8", "w1a16", "w1a1")


def layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The converted layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def record(calls: dict[str, torch.Tensor], name: str, _, inputs, output) -> None:
    """A forward hook that keeps copies: one layer's output is the next one's input."""
    calls[f"{name}.x"] = inputs[0].clone().contiguous()
    calls[f"{name}.y"] = output.clone().contiguous()


def write(folder: Path) -> None:
    """For each recipe a model, and the inputs and outputs of its layers in `RECIPE.calls`."""
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        torch.manual_seed(0)
        model = lowbit.quantize(models.trained(models.RaggedNet()), recipe)
        calls: dict[str, torch.Tensor] = {}
        for name, layer in layers(model).items():
            layer.register_forward_hook(partial(record, calls, name))
        with torch.no_grad():
            model(torch.randn(2, 3, 16, 16))
        save_file(calls, folder / f"{recipe}.calls")
        lowbit.save_file(model, folder / f"{recipe}.safetensors")
    print(f"{len(RECIPES)} models written on {platform.machine()}")


def check(folder: Path) -> int:
    """The number of layers whose output differs from the one in the file."""
    right, wrong = 0, []
    for recipe in RECIPES:
        model = lowbit.load_file(models.RaggedNet().eval(), folder / f"{recipe}.safetensors")
        calls = load_file(folder / f"{recipe}.calls")
        found = layers(model)
        assert found.keys() == {name.rpartition(".")[0] for name in calls}
        for name, layer in found.items():
            with torch.no_grad():
                y = layer(calls[f"{name}.x"])
            if torch.equal(y.contiguous().view(torch.int32), calls[f"{name}.y"].view(torch.int32)):
                right += 1
            else:
                wrong.append(f"{recipe} {name}")
    where = f"{platform.machine()}, {lowbit.cpu_info()['isa']['chosen']}"
    print(f"{where}: {right} layers of {len(RECIPES)} files right, wrong: {wrong}")
    return len(wrong)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--write":
        write(Path(sys.argv[2]))
    elif len(sys.argv) == 3 and sys.argv[1] == "--check":
        sys.exit(check(Path(sys.argv[2])) != 0)
    else:
        sys.exit(__doc__)
