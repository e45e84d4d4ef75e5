"""Static networks that stay in integers against torch's float32 and INT8, and OpenVINO's INT8.

All sides of a case take float32 and give float32, and are timed alternately in one process, on the
same calibration data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import _core, baselines
from lowbit.benchmark import openvino_network
from lowbit.benchmark.runner import SavedCase
from lowbit.calibration.deploy import convert
from lowbit.calibration.prepare import prepare
from lowbit.calibration.run import calibrate
from lowbit.convert import quantize
from lowbit.info import cpu_info
from lowbit.quality import QualityMeter
from lowbit.static.network import Network
from lowbit.static.prepared import PreparedNetwork
from lowbit.timing import Timing, alternate, ratio

STATIC, DYNAMIC = "lowbit w8a8-static", "lowbit w8a8"
FLOAT32, INT8, OPENVINO = "torch float32 channels_last", "torch int8", "openvino int8"
PROFILE_ROUNDS = 50


class _Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != width:
            projection = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al., "Deep Residual Learning", 2015, with 18 layers.

    Args:
        widths: of the four stages, two blocks each.
        classes: of the output.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512), classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        before = (widths[0], *widths)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_Block(c, w, 1 if i == 0 else 2), _Block(w, w, 1))
                for i, (c, w) in enumerate(zip(before, widths, strict=False))
            )
        )
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        y: Tensor = self.fc(F.adaptive_avg_pool2d(self.stages(x), 1).flatten(1))
        return y


def _resnet() -> nn.Module:
    """Random weights, statistics of the norms as after a few batches, norms folded."""
    from lowbit.fuse import fuse

    torch.manual_seed(0)
    model = ResNet().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    return fuse(model.eval())


def _efficientnet() -> nn.Module:
    from lowbit.demo.network import load_model

    return load_model()


def _noise() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, 224, 224, generator=generator) for _ in range(4)]
    return batches[:2], batches[2:]


def _photographs() -> tuple[list[Tensor], list[Tensor]]:
    """Crops to calibrate on; the demo's views and other crops to test on."""
    from lowbit.demo.photographs import PHOTOS, load_views, random_crops

    learned = torch.stack([random_crops(photo, 10, seed=0) for photo in PHOTOS], dim=1)
    tested = [torch.cat([load_views(p), random_crops(p, 20, seed=1)]) for p in PHOTOS]
    return list(torch.split(learned.flatten(0, 1), 6)), tested


@dataclass(frozen=True)
class Model:
    """A network and its data.

    Attributes:
        load: the float model in eval mode, norms folded.
        images: batches to calibrate on, and batches to test on.
        over_int8: how many times torch's INT8 it is to be.
    """

    load: Callable[[], nn.Module]
    images: Callable[[], tuple[list[Tensor], list[Tensor]]]
    over_int8: float


MODELS = {
    "efficientnet-lite0": Model(_efficientnet, _photographs, 2.0),
    "resnet18": Model(_resnet, _noise, 1.0),
}
OVER_FLOAT32 = 3.0


@dataclass(frozen=True)
class StaticCase(SavedCase):
    """One network with one size of batch and number of threads.

    Attributes:
        static: a name in `MODELS`.
        batch: images.
        threads: number of threads.
        seconds: for the rounds.
    """

    static: str
    batch: int
    threads: int
    seconds: float = 6.0

    def __str__(self) -> str:
        return f"{self.static}, batch {self.batch}, T={self.threads}"

    @property
    def cost(self) -> float:
        """Roughly how many seconds it takes."""
        return 40.0 + self.seconds


def cases(
    names: Sequence[str] = tuple(MODELS),
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1, 2),
    **common: Any,
) -> list[StaticCase]:
    """All of them; `common` holds the other fields of `StaticCase`."""
    return [
        StaticCase(name, batch, count, **common)
        for name in names
        for count in threads
        for batch in batches
    ]


@dataclass(frozen=True)
class StaticResult:
    """What one case found.

    Attributes:
        case: the case.
        timings: side -> seconds of a call, all rounds.
        qualities: side -> of its outputs for the test images against float32's; of batch 1, one
            thread only.
        int8: method and engine of torch's INT8, or why there is none.
        steps: of the network's programs, (call, step, seconds); of batch 1 only.
        layers: OpenVINO's (name, kind, seconds), likewise.
        environment: what `lowbit.info.cpu_info` said.
    """

    case: StaticCase
    timings: dict[str, Timing]
    qualities: dict[str, dict[str, Any]]
    int8: str
    steps: list[tuple[str, str, float]]
    layers: list[tuple[str, str, float]]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For each side its timing, and how many times quicker it is than the others."""
        rows = [
            {
                "name": name,
                "timing": timing.to_dict(),
                "quality": self.qualities.get(name),
                "versus": {
                    other: ratio(theirs, timing).to_dict()
                    for other, theirs in self.timings.items()
                    if other != name
                },
            }
            for name, timing in self.timings.items()
        ]
        return {
            "rows": rows,
            "int8": self.int8,
            "steps": self.steps,
            "layers": self.layers,
            "environment": self.environment,
        }


def race(case: StaticCase) -> StaticResult:
    """Runs one case. Leaves torch's number of threads as it found it.

    Raises:
        ModuleNotFoundError: a package of the network is not installed.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        return _race(case)
    finally:
        torch.set_num_threads(threads)


def _race(case: StaticCase) -> StaticResult:
    network = MODELS[case.static]
    model = network.load()
    learned, tested = network.images()
    learned = [_last(batch) for batch in learned]
    x = torch.cat(tested)[: case.batch].contiguous()
    last = _last(x)
    prepared = calibrate(prepare(model, "w8a8-static", learned[0]), learned)
    static = convert(prepared)
    assert isinstance(prepared, PreparedNetwork)
    assert isinstance(static, Network)
    baseline = baselines.torch_int8(model, [last[:1], *learned])
    dynamic = quantize(model, "w8a8")
    float32: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    models: dict[str, Callable[[Tensor], Tensor]] = {
        FLOAT32: float32,
        DYNAMIC: dynamic,
        STATIC: static,
    }
    if baseline.model is not None:
        models[INT8] = baseline.model
    sides: dict[str, Callable[[], Any]] = {name: _call(m, last) for name, m in models.items()}
    peer = None
    if openvino_network.available():
        peer = openvino_network.compile_network(prepared, tuple(x.shape), case.threads)
        sides[OPENVINO] = _call(peer.run, x)
    with torch.inference_mode():
        timings = alternate(sides, min_rounds=10, budget_seconds=case.seconds)
        qualities, steps, layers = {}, [], []
        if case.batch == 1:
            steps = profile(static, last)
            layers = peer.profile(x, PROFILE_ROUNDS) if peer is not None else []
            if peer is not None:
                models[OPENVINO] = peer.each
            if case.threads == 1:
                qualities = _qualities(model, models, tested)
    label = baseline.reason or baseline.label
    return StaticResult(case, timings, qualities, label, steps, layers, cpu_info())


def _last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def _call(model: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: model(x)


def _qualities(
    model: nn.Module, sides: dict[str, Callable[[Tensor], Tensor]], tested: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    found = {}
    for name, side in sides.items():
        meter = QualityMeter("classification")
        for batch in tested:
            meter.update(model(batch), side(_last(batch)))
        found[name] = meter.result().to_dict()
    return found


def profile(network: Network, x: Tensor) -> list[tuple[str, str, float]]:
    """Seconds of each step of a network's programs, the best of some rounds.

    Args:
        x: float32, one batch.

    Returns:
        (the call of the float model, the operation, seconds) in order.
    """

    class Profiling:
        """A program that times its steps."""

        def __init__(self, *arguments: Any) -> None:
            self.core = _core.Program(*arguments)
            self.times: list[list[float]] = []
            self.operations: list[str] = []

        def run(self, *arguments: Any) -> None:
            found = self.core.profile(*arguments)
            self.operations = [operation for operation, _ in found]
            self.times.append([seconds for _, seconds in found])

    twin = copy.deepcopy(network)
    twin.make_program = Profiling
    for _ in range(PROFILE_ROUNDS):
        twin(x)
    parts = [part for plan in twin._plans.values() for part in plan.parts if part.core is not None]
    names = [name for part in parts for name in part.lowered.program.names]
    shown = {node.name: (node.fused or (node.name,))[0] for node in network.nodes}
    steps = [
        (operation, min(times))
        for core in [cast(Profiling, part.core) for part in parts]
        for operation, times in zip(core.operations, zip(*core.times, strict=True), strict=True)
    ]
    return [
        (shown[name], operation, seconds)
        for name, (operation, seconds) in zip(names, steps, strict=True)
    ]
