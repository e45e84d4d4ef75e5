"""torch's own INT8 of a model: the baseline that a scheme has to beat.

Models of Linear layers get dynamic quantization, models with convolutions FX static quantization,
calibrated on the given batches. Each engine of this torch that works is timed briefly, and the
fastest is taken. These interfaces are deprecated: where one is gone, or fails on a model, the
reason is returned in its place.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit import timing
from lowbit.errors import one_line

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def run(model: nn.Module, batch: Any) -> Any:
    """Calls the model: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@contextlib.contextmanager
def eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode for all; every module's own flag restored (they may differ within a model)."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def no_fused_paths() -> Iterator[None]:
    """Transformer encoders call their layers, instead of handing their weights to one function."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@dataclass(frozen=True)
class Int8Baseline:
    """torch's INT8 of a model, or why there is none.

    Attributes:
        model: the fastest quantized model that worked; None if none did.
        method: "static", "dynamic" or, for a model with convolutions that FX cannot handle,
            "dynamic, Linear only"; None without a model.
        engine: torch's engine that packed the weights; None without a model.
        first_seconds: the first call of `model`, which was made here; None without a model.
        attempts: "method engine" -> median milliseconds of a short race, or why it failed.
        reason: why there is no model, in one line; None if there is one.
    """

    model: nn.Module | None
    method: str | None
    engine: str | None
    first_seconds: float | None
    attempts: dict[str, str]
    reason: str | None

    @property
    def label(self) -> str:
        """For a table: "static, onednn"."""
        return f"{self.method}, {self.engine}" if self.model is not None else "not available"


def engines() -> tuple[str, ...]:
    """The engines worth trying in this build of torch: x86 and onednn, else qnnpack (ARM)."""
    supported: Sequence[str] = torch.backends.quantized.supported_engines
    preferred = tuple(name for name in ("x86", "onednn") if name in supported)
    return preferred or tuple(name for name in ("qnnpack",) if name in supported)


def torch_int8(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    budget_seconds: float = 1.0,
    calibration: Sequence[Any] | None = None,
) -> Int8Baseline:
    """torch's INT8 of a float model with the engine that is fastest here.

    Static quantization is calibrated on `calibration`; the first of `batches` is what the engines
    are timed on. `torch.backends.quantized.engine` is as before afterwards, and `model` is not
    changed.

    Args:
        model: float model, in eval mode.
        batches: at least one batch, each a tensor, a tuple of arguments or a mapping of them.
        budget_seconds: time to race the engines after their first calls.
        calibration: batches like those; None takes `batches`.

    Raises:
        ValueError: no batches.
    """
    if not batches:
        raise ValueError("torch INT8 needs at least one batch")
    has_linear = any(isinstance(m, nn.Linear) for m in model.modules())
    has_convolution = any(isinstance(m, _CONVOLUTIONS) for m in model.modules())
    methods: list[tuple[str, _Convert]] = []
    if has_convolution:
        methods.append(("static", _static))
    if has_linear:
        methods.append(("dynamic, Linear only" if has_convolution else "dynamic", _dynamic))
    attempts: dict[str, str] = {}
    if not methods:
        reason = "the model has no Linear layer and no convolution"
        return Int8Baseline(None, None, None, None, attempts, reason)
    if not engines():
        reason = "this build of torch has no quantized engine (x86, onednn or qnnpack)"
        return Int8Baseline(None, None, None, None, attempts, reason)
    for method, convert in methods:
        learned = batches if calibration is None else calibration
        found = _race(model, batches[0], learned, method, convert, budget_seconds, attempts)
        if found is not None:
            return found
    reason = "; ".join(f"{name}: {why}" for name, why in attempts.items())
    return Int8Baseline(None, None, None, None, attempts, reason)


_Convert = Callable[[nn.Module, Sequence[Any], str], nn.Module]


def _race(
    model: nn.Module,
    timed: Any,
    calibration: Sequence[Any],
    method: str,
    convert: _Convert,
    budget_seconds: float,
    attempts: dict[str, str],
) -> Int8Baseline | None:
    """Converts with every engine and takes the fastest; None if no engine works."""
    models: dict[str, nn.Module] = {}
    first_seconds: dict[str, float] = {}
    for engine in engines():
        worked = _attempt(model, timed, calibration, convert, engine)
        if isinstance(worked, str):
            attempts[f"{method} {engine}"] = worked
        else:
            models[engine], first_seconds[engine] = worked
    if not models:
        return None
    with torch.inference_mode():
        sides = {engine: _call(quantized, timed) for engine, quantized in models.items()}
        raced = timing.alternate(sides, min_rounds=3, budget_seconds=budget_seconds, warmup=1)
    attempts |= {f"{method} {e}": f"{raced[e].p50 * 1e3:.3g} ms" for e in models}
    best = min(models, key=lambda engine: raced[engine].p50)
    return Int8Baseline(models[best], method, best, first_seconds[best], attempts, None)


def _attempt(
    model: nn.Module, batch: Any, calibration: Sequence[Any], convert: _Convert, engine: str
) -> tuple[nn.Module, float] | str:
    """The model quantized for an engine and the seconds of its first call, or why it failed."""
    # torch offers no way to know beforehand what it can convert, and fails in many types.
    try:
        with _engine(engine), _no_warnings(), torch.no_grad():
            quantized = convert(copy.deepcopy(model), calibration, engine)
        only = {engine: _call(quantized, batch)}
        with _no_warnings(), torch.inference_mode():
            timed = timing.alternate(only, min_rounds=1, budget_seconds=0, warmup=0)
    except Exception as error:
        return one_line(error)
    return quantized, timed[engine].first


def _call(model: nn.Module, batch: Any) -> Callable[[], Any]:
    return lambda: run(model, batch)


@contextlib.contextmanager
def _engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """torch announces the deprecation at every step; the caller did not choose these interfaces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dynamic(model: nn.Module, batches: Sequence[Any], engine: str) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    return _checked(quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8))  # type: ignore[no-untyped-call]


def _static(model: nn.Module, batches: Sequence[Any], engine: str) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    first = batches[0]
    if isinstance(first, Mapping):
        examples = tuple(first.values())
    else:
        examples = tuple(first) if isinstance(first, (tuple, list)) else (first,)
    prepared = prepare_fx(_as_modules(model), get_default_qconfig_mapping(engine), examples)
    for batch in batches:
        run(prepared, batch)
    return _checked(convert_fx(prepared))


def _checked(model: nn.Module) -> nn.Module:
    """torch passes over what it cannot convert without a word: refuse a model left float."""
    for module in model.modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.q")):
            return model
    if isinstance(model, torch.fx.GraphModule) and any(
        str(node.target).startswith("quantized.") for node in model.graph.nodes
    ):
        return model
    raise RuntimeError("torch converted none of the layers")


def _as_modules(model: nn.Module) -> nn.Module:
    """Functional conv2d calls as `nn.Conv2d`, so that FX folds batch norm and padding into them.

    Subclasses of Conv2d with a `forward` of their own (TensorFlow's SAME padding) are traced to a
    functional call, which FX neither fuses nor pads; torch is 1.5 times slower then than it can
    be (EfficientNet-Lite0). A model that cannot be traced is returned as it is.
    """
    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception:  # prepare_fx, whose tracer knows more leaves, then says what is wrong
        return model
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    for index, node in enumerate(list(traced.graph.nodes)):
        if node.op != "call_function" or node.target is not torch.conv2d:
            continue
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        weight, bias = (_parameter(traced, given.get(key)) for key in ("weight", "bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            continue  # computed weights
        groups = given.get("groups", 1)
        source, padding = _merged_padding(traced, given["input"], given.get("padding", 0))
        convolution = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            given.get("stride", 1),
            padding,
            given.get("dilation", 1),
            groups,
            bias=bias is not None,
            device="meta",
        )
        convolution.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            convolution.bias = nn.Parameter(bias.detach(), requires_grad=False)
        name = f"convolution_{index}"
        traced.add_submodule(name, convolution)
        with traced.graph.inserting_before(node):
            replacement = traced.graph.call_module(name, (source,))
        node.replace_all_uses_with(replacement)
        traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


def _parameter(traced: torch.fx.GraphModule, node: Any) -> torch.Tensor | None:
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(traced.get_submodule(owner), name)
    return found if isinstance(found, torch.Tensor) else None


def _merged_padding(
    traced: torch.fx.GraphModule, source: torch.fx.Node, padding: Any
) -> tuple[torch.fx.Node, Any]:
    """The convolution's input and padding, a symmetric ZeroPad2d before it merged into them."""
    if source.op != "call_module" or isinstance(padding, str):
        return source, padding
    pad = traced.get_submodule(str(source.target))
    if not isinstance(pad, nn.ZeroPad2d):
        return source, padding
    left, right, top, bottom = pad.padding
    before = source.args[0]
    if left != right or top != bottom or not isinstance(before, torch.fx.Node):
        return source, padding
    height, width = (padding, padding) if isinstance(padding, int) else padding
    return before, (height + top, width + left)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once, torch's packed weights included."""
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # an unpacked weight that is freed gives its address away
    total = 0
    for tensor in _stored_tensors([model.state_dict(), list(model.buffers())]):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.is_quantized and tensor.qscheme() == torch.per_channel_affine:
            total += 16 * tensor.q_per_channel_scales().numel()  # float64 scales, int64 zero points
    return total + sum(storages.values())


def _stored_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _stored_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _stored_tensors(item)
    elif isinstance(value, torch.ScriptObject) and hasattr(value, "unpack"):
        yield from _stored_tensors(value.unpack())
