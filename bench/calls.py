"""What does a call cost beside the arithmetic? Layers so small that it is most of their time."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import lowbit
from lowbit import _core
from lowbit.timing import alternate, ratio

CALLS = 200  # in succession, a round: one alone is shorter than the clock can tell


class Empty(nn.Module):
    """A module that does nothing: what `nn.Module` itself costs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def layers() -> list[tuple[str, nn.Module, Tensor]]:
    """Name, float layer and input."""
    sizes = ((64, 64), (64, 48), (256, 256), (768, 3072))
    linears = [(f"linear {k}x{n}, M=1", nn.Linear(k, n), torch.randn(1, k)) for k, n in sizes]
    image = torch.randn(1, 16, 8, 8)
    convs = (nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16))
    names = ("conv 1x1, 16 channels, 8x8", "depthwise 3x3, 16 channels, 8x8")
    last = image.to(memory_format=torch.channels_last)
    return [
        *linears,
        *((name, conv, image) for name, conv in zip(names, convs, strict=True)),
        ("conv 1x1, the same in channels_last", convs[0], last),
    ]


def race(scheme: str, seconds: float) -> str:
    """Each layer against its float twin, alternately."""
    rows = []
    for name, module, x in layers():
        module = module.eval()
        quantized = lowbit.quantize(nn.Sequential(module), scheme)[0]
        sides = {"float": lambda m=module, x=x: m(x), "lowbit": lambda m=quantized, x=x: m(x)}
        found = alternate(sides, budget_seconds=seconds, calls_per_round=CALLS, warmup=CALLS)
        times = [f"{1e6 * found[side].p50:.2f}" for side in sides]
        rows.append([name, *times, str(ratio(found["lowbit"], found["float"]))])
    return tabulate(rows, ["layer", "torch us", "lowbit us", "ratio (p10-p90)"])


def pieces(scheme: str, seconds: float) -> str:
    """The parts of a call of a 64x64 layer, each by itself."""
    x = torch.randn(1, 64)
    layer = lowbit.nn.Linear.from_float(nn.Linear(64, 64).eval(), scheme)
    y = layer(x)
    operands = layer._operands().operands
    empty, direct, attributes = Empty().eval(), layer._direct, layer.__dict__
    sides: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "the whole call": lambda: layer(x),
        "of it nn.Module": lambda: empty(x),
        "of it allocating the output": lambda: x.new_empty(1, 64),
        "the kernel through pybind11, for comparison": lambda: _core.linear(
            x.data_ptr(), 1, y.data_ptr(), *operands, 1
        ),
    }
    if direct is not None:
        sides["of it the prepared call, output and kernel included"] = lambda: direct(x, attributes)
        sides["of it making sure that the layer is unchanged"] = lambda: direct.matches(attributes)
    found = alternate(sides, budget_seconds=seconds, calls_per_round=CALLS, warmup=CALLS)
    nothing = found["nothing"].p50
    rows = [
        [name, f"{1e9 * (timing.p50 - nothing):.0f}"]
        for name, timing in found.items()
        if name != "nothing"
    ]
    return tabulate(rows, ["piece of a call, linear 64x64, M=1", "ns"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="w8a8", help="recipe of the layers")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each layer")
    parser.add_argument("--threads", default="1", help="numbers of threads, e.g. 1,2")
    arguments = parser.parse_args()
    with torch.inference_mode():
        for threads in map(int, arguments.threads.split(",")):
            torch.set_num_threads(threads)
            print(
                f"{threads} threads, {arguments.scheme}, {_core.isa()}, torch {torch.__version__}"
            )
            print(race(arguments.scheme, arguments.seconds), end="\n\n")
            print(pieces(arguments.scheme, arguments.seconds), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
