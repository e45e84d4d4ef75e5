"""Which methods are measured on which network, and one measurement."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.baselines import run, weight_bytes
from lowbit.benchmark.quality import clothes, photographs, sentences
from lowbit.benchmark.runner import SavedCase
from lowbit.convert import quantize, quantize_
from lowbit.qat.fake import fake_activation
from lowbit.quality import floating_tensors
from lowbit.report import summary
from lowbit.rounding.distill import distill_
from lowbit.rounding.equalize import equalize
from lowbit.schemes import Scheme


@dataclass(frozen=True)
class Method:
    """One way to quantize a network.

    Attributes:
        scheme: of the layers that no override names; its name says the quantizer.
        overrides: by name or pattern, as `lowbit.quantize` takes them.
        options: other arguments of `lowbit.quantize`, `calibration` excepted.
        data: whether the calibration data are given.
        goal: the issue's target that this method stands for: its row's key in `Network.targets`.
        text: what the row says beside the scheme.
        equalized: whether channels are equalized first, what is ReLU6 becoming ReLU.
        float_weights: whether only the activations are rounded, as the scheme does it: what no
            choice of weights gets past.
        wide: whether data are those of `wide_calibration` and `wide_learning`.
        late: layers that a second call converts, by name or pattern: for the data of
            `many_calibration`, behind the others.
        distill: for how many steps the converted model learns from the float one, on the data of
            `learning`.
    """

    scheme: str
    data: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, str | None] = field(default_factory=dict)
    goal: str = ""
    text: str = ""
    equalized: bool = False
    float_weights: bool = False
    wide: bool = False
    late: Mapping[str, str | None] = field(default_factory=dict)
    distill: int = 0

    @property
    def label(self) -> str:
        """How rows and cases name it."""
        return f"{self.scheme}{', ' if self.text else ''}{self.text}"


@dataclass(frozen=True)
class Network:
    """A network, its data, and what is asked of it.

    Attributes:
        title: of its table.
        data: a module with `load`, `calibration`, `tests` and `score`; with `deviation`, the
            standard error of the score, `clear`, `wide_calibration`, `many_calibration`,
            `learning` and `wide_learning`, if a method needs these.
        unit: of the score.
        better: 1 where a higher score is better, -1 where a lower one is.
        targets: goal -> score to reach.
        methods: in the order of the table.
        output: the tensor that is scored, of what the model returns.
        digits: of the score that mean something.
    """

    title: str
    data: ModuleType
    unit: str
    better: int
    targets: Mapping[str, float]
    methods: Sequence[Method]
    output: Callable[[Any], Tensor]
    digits: int = 1

    def meets(self, goal: str, score: float) -> bool:
        """Whether a score reaches a target."""
        return self.better * score >= self.better * self.targets[goal]


def _first(output: Any) -> Tensor:
    return floating_tensors(output)[0]


# 8 bits where `lowbit.sensitivity` finds most damage at 4, on crops to calibrate with: the first
# blocks, which weigh little. The last layer, a quarter of all weights, pays for them.
_MIXED = {
    r"re:_conv_stem|_blocks\.[0-5]\..*": "w8a16",
    "re:.*_depthwise_conv": "w8a8",
    "_fc": "w2a8-g64-descent",
}
# int16 activations cost no bytes.
_MIXED_A16 = {
    r"_blocks.0._depthwise_conv": "w8a16-descent",
    r"re:_conv_stem|_blocks\.[0-5]\..*|.*_depthwise_conv": "w8a16",
    "_fc": "w2a16-g64-descent",
}
_FIRST_DEPTHWISE = {"_blocks.0._depthwise_conv": "w8a16"}
# The network's worst layer at 8 bits (19 dB alone, all others above 31): channels whose weights of
# up to 17 cancel on a nearly constant input.
_FIRST_LEARNED = {"_blocks.0._depthwise_conv": "w8a8-static-descent"}


def _curve(
    scheme: str, goal: str, methods: str, overrides: Mapping[str, str | None] | None = None
) -> list[Method]:
    """Rows of one scheme: "minmax mse hqq", and those of `methods` that see data."""
    rows = []
    for word in methods.split():
        name, _, extra = word.partition("+")
        quantizer = "" if name == "default" else f"-{name}"
        data = name in ("gptq", "adaround", "descent")
        options: dict[str, Any] = {}
        texts = []
        if "bias" in extra:
            options, data = {**options, "correct_bias": True}, True
            texts.append("bias correction")
        if "blocks" in extra:
            options, data = {**options, "block_steps": BLOCK_STEPS}, True
            texts.append("blocks")
        rows.append(
            Method(
                f"{scheme}{quantizer}", data, options, overrides or {}, goal, " and ".join(texts)
            )
        )
    return rows


def _more(
    scheme: str,
    goal: str,
    text: str = "",
    options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Method:
    """A row of a scheme that is calibrated with more photographs; `rest`: fields of Method."""
    texts = (text, "more photographs", "distilled" if rest.get("distill") else "")
    label = ", ".join(filter(None, texts))
    return Method(scheme, True, options or {}, goal=goal, text=label, wide=True, **rest)


BLOCK_STEPS = 100
DISTILL_STEPS = 150

NETWORKS: Mapping[str, Network] = {
    "efficientnet": Network(
        "EfficientNet-Lite0, ImageNet weights",
        photographs,
        "top-1 agreement with float32, %",
        1,
        {"w8a8": 98.0, "w4a8": 85.0, "mixed": 93.0},
        [
            Method("w8a8", goal="w8a8"),
            *_curve("w8a8", "w8a8", "mse gptq gptq+bias"),
            Method("w8a8", overrides=_FIRST_DEPTHWISE, text="w8a16 in the first depthwise layer"),
            Method("w8a8-static", True, goal="w8a8"),
            Method(
                "w8a8-static",
                True,
                overrides=_FIRST_LEARNED,
                goal="w8a8",
                text="descent in the first depthwise layer",
            ),
            Method("w8a8-static", True, goal="w8a8", text="distilled", distill=DISTILL_STEPS),
            _more(
                "w8a8-static",
                "w8a8",
                "descent in the first depthwise layer",
                overrides=_FIRST_LEARNED,
                distill=DISTILL_STEPS,
            ),
            Method("w8a16"),
            Method("w8a8", text="float32 weights", float_weights=True),
            *_curve("w4a8", "w4a8", "minmax default hqq default+bias gptq adaround descent"),
            *_curve("w4a8", "w4a8", "descent+bias descent+blocks"),
            *_curve("w4a8-g32", "w4a8", "default descent"),
            Method("w4a8", goal="w4a8", text="equalized", equalized=True),
            _more("w4a8-gptq", "w4a8"),
            _more("w4a8-descent", "w4a8"),
            _more("w4a8-descent", "w4a8", "blocks", {"block_steps": BLOCK_STEPS}),
            _more("w4a8-g32-descent", "w4a8"),
            *(
                Method("w4a8-descent", True, options, _MIXED, "mixed", text)
                for options, text in (
                    ({}, "mixed"),
                    ({"correct_bias": True}, "mixed, bias correction"),
                    ({"block_steps": BLOCK_STEPS}, "mixed, blocks"),
                )
            ),
            Method("w4a16-descent", True, {}, _MIXED_A16, "mixed", "mixed"),
            _more("w4a16-descent", "mixed", "mixed", overrides=_MIXED_A16),
            Method(
                "w4a16-descent",
                True,
                overrides={**_MIXED_A16, "_fc": None},
                goal="mixed",
                text="mixed, more photographs, 2304 crops for the classifier",
                wide=True,
                late={"_fc": _MIXED_A16["_fc"]},
            ),
        ],
        _first,
    ),
    "minilm": Network(
        "MiniLM-L6 (all-MiniLM-L6-v2)",
        sentences,
        "mean cosine to float32",
        1,
        {"w4a8-g64": 0.985, "w2a8-g32": 0.90},
        [
            Method("w8a8"),
            Method("w4a8"),
            *_curve("w4a8-g64", "w4a8-g64", "minmax default hqq gptq descent"),
            *_curve("w2a8-g32", "w2a8-g32", "minmax default hqq gptq descent"),
            *_curve("w2a8-g32", "w2a8-g32", "descent+blocks"),
        ],
        sentences.embedding,
        4,
    ),
    "fashion": Network(
        "Fashion-MNIST, a convolution network of 66,000 weights",
        clothes,
        "points of accuracy lost",
        -1,
        {"w4a8": 0.3, "w2a8": 2.0},
        [
            Method("w8a8"),
            *_curve("w4a8", "w4a8", "minmax default gptq descent", clothes.OVERRIDES),
            *_curve(
                "w2a8",
                "w2a8",
                "minmax default hqq gptq adaround descent descent+bias descent+blocks",
                clothes.OVERRIDES,
            ),
        ],
        _first,
        2,
    ),
}


@dataclass(frozen=True)
class QualityCase(SavedCase):
    """One method on one network.

    Attributes:
        quality: a name in `NETWORKS`.
        method: the label of one of its methods.
    """

    quality: str
    method: str

    def __str__(self) -> str:
        return f"{self.quality} {self.method}"

    @property
    def chosen(self) -> Method:
        """The method of that label."""
        return next(m for m in NETWORKS[self.quality].methods if m.label == self.method)

    @property
    def cost(self) -> float:
        """Roughly how many seconds it takes."""
        method = self.chosen
        learned = 120.0 * bool(method.options.get("block_steps"))
        learned += method.distill
        calibrated = 60.0 * method.data + 120.0 * method.wide + 160.0 * bool(method.late)
        return 15.0 + calibrated + learned


def cases(names: Sequence[str] = tuple(NETWORKS)) -> list[QualityCase]:
    """Every method on the networks named."""
    return [QualityCase(name, m.label) for name in names for m in NETWORKS[name].methods]


@dataclass(frozen=True)
class QualityResult:
    """What one case found.

    Attributes:
        score: in the network's unit.
        size: bytes of all parameters and buffers.
        float_size: the same of the float model.
        seconds: what `lowbit.quantize` took.
        threads: torch's.
        deviation: standard error of the score; 0 where it is not known.
        clear: the score of those inputs alone of which the float model is sure; None where the
            data do not tell them.
    """

    score: float
    size: int
    float_size: int
    seconds: float
    threads: int
    deviation: float = 0.0
    clear: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return dict(vars(self))


def measure(case: QualityCase) -> QualityResult:
    """Converts and scores.

    Raises:
        ModuleNotFoundError: a package of the network is not installed.
        FileNotFoundError: Fashion-MNIST is not there; the message says how to get it.
    """
    network, method = NETWORKS[case.quality], case.chosen
    model: nn.Module = network.data.load()
    options: dict[str, Any] = dict(method.options)
    source = equalize(model, relu6="relu") if method.equalized else model
    if method.data:
        data = network.data
        options["calibration"] = data.wide_calibration() if method.wide else data.calibration()
    learning = None
    if method.distill:
        learning = network.data.wide_learning() if method.wide else network.data.learning()
    begin = time.perf_counter()
    if method.float_weights:
        quantized = rounded_inputs(model, Scheme.parse(method.scheme))
    elif learning is not None or method.late:
        # Layer by layer, also where activations are static.
        quantized = copy.deepcopy(source)
        quantize_(quantized, method.scheme, overrides=dict(method.overrides), **options)
        if method.late:
            options["calibration"] = network.data.many_calibration()
            quantize_(quantized, None, overrides=dict(method.late), **options)
        if learning is not None:
            distill_(quantized, model, learning, steps=method.distill)
    else:
        quantized = quantize(source, method.scheme, overrides=dict(method.overrides), **options)
    seconds = time.perf_counter() - begin
    tests = network.data.tests()
    with torch.inference_mode():
        wanted, found = (
            torch.cat([network.output(run(side, batch)) for batch in tests])
            for side in (model, quantized)
        )
    score = float(network.data.score(wanted, found))
    size = float_size = weight_bytes(model)
    if not method.float_weights:
        report = summary(quantized)
        size, float_size = report.bytes_after, report.bytes_before
    deviation, clear = (getattr(network.data, name, None) for name in ("deviation", "clear"))
    spread = 0.0 if deviation is None else float(deviation(wanted, found))
    sure = None if clear is None else float(clear(wanted, found))
    return QualityResult(score, size, float_size, seconds, torch.get_num_threads(), spread, sure)


def rounded_inputs(model: nn.Module, scheme: Scheme) -> nn.Module:
    """A copy with float32 weights whose layers round their inputs as those of a scheme do."""
    result = copy.deepcopy(model)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dims = (-1,) if isinstance(module, nn.Linear) else (1, 2, 3)
        return (fake_activation(args[0], scheme.activation, dims), *args[1:])

    for module in result.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(hook)
    return result
