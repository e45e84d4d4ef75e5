"""Rounds layer after layer, each for the inputs that the layers rounded before it make.

One layer's inputs are computed at a time, batch by batch, by running the model up to that layer: of
the data and of the model's activations nothing is kept but the layer's second moments.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit import quantizers
from lowbit.baselines import eval_mode, no_fused_paths, run
from lowbit.nn.linear import Linear
from lowbit.plan import Job
from lowbit.quality import floating_tensors
from lowbit.quantizers import dequantize_weight, quantize_weight
from lowbit.rounding.blocks import Call, Sample, find_blocks, learn
from lowbit.rounding.moments import Moments, float_matrix, rows_of, takes_moments

Convert = Callable[[Job], nn.Module]
Forward = Callable[[nn.Module, Any], Any]


class _Reached(BaseException):  # no model's `except Exception` may stop it
    """The layer whose input was wanted has been called."""


@dataclass
class _Calls:
    """What one run over all data showed of a layer.

    Attributes:
        order: how many layers were called before it.
        counts: calls by batch.
        source: batch and tensor of its first call; layers that took the same one share a run.
    """

    order: int
    counts: dict[int, int] = field(default_factory=dict)
    source: tuple[int, int] | None = None


def round_layers(
    model: nn.Module,
    jobs: Sequence[Job],
    data: Callable[[], Iterable[Any]],
    convert: Convert,
    forward: Forward = run,
    correct_bias: bool = False,
    block_steps: int = 0,
) -> dict[int, nn.Module]:
    """The lowbit layers of a plan's jobs, by the ids of the float layers.

    Args:
        model: the float model; while this runs, its converted layers compute what their lowbit
            layers do.
        jobs: the layers to convert. Notes are added to those that get a data-free quantizer instead
            of theirs.
        data: gives the batches, the same ones each time that it is called.
        convert: makes the lowbit layer of a job whose quantizer needs no data.
        forward: runs a model on a batch.
        correct_bias: whether biases make up for what rounding does to the means of the outputs:
            Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction",
            2019, section 4.2, by the calibration data (appendix D).
        block_steps: how many steps each block of layers learns, see `lowbit.rounding.blocks`.

    Raises:
        ValueError: there are no data, or a layer gets NaN or Inf from them.
    """
    layers: dict[int, nn.Module] = {}
    with eval_mode([model]), torch.no_grad(), no_fused_paths(), _Overlay() as overlay:
        runner = _Runner(model, data, forward, overlay)
        calls = runner.watch(jobs)
        never = _Calls(-1)
        blocks = _Blocks(model, jobs, calls, runner, block_steps)
        left = sorted(jobs, key=lambda job: calls.get(id(job.module), never).order)
        with tqdm(total=len(left), desc="round", unit="layer", disable=None, leave=False) as bar:
            while left:
                first = calls.get(id(left[0].module), never)
                count = 1
                while (
                    count < len(left)
                    and first.source is not None
                    and calls[id(left[count].module)].source == first.source
                ):
                    count += 1
                group, left = left[:count], left[count:]
                for job, layer in zip(
                    group, _round(group, calls, runner, convert, correct_bias), strict=True
                ):
                    layers[id(job.module)] = layer
                    overlay.add(job, layer)
                    blocks.add(job, layer)
                bar.update(count)
    return layers


def _round(
    group: list[Job],
    calls: dict[int, _Calls],
    runner: _Runner,
    convert: Convert,
    correct_bias: bool,
) -> list[nn.Module]:
    """The lowbit layers of jobs that take the same input."""
    made: list[nn.Module] = []
    wanted: list[tuple[Job, Any, Any]] = []
    for job in group:
        assert job.scheme.quantizer is not None  # resolved by Scheme
        needs = quantizers.needs_data(job.scheme.quantizer)
        default = quantizers.DEFAULTS[job.scheme.weight]
        free = dataclasses.replace(job.scheme, quantizer=default) if needs else job.scheme
        layer = convert(dataclasses.replace(job, scheme=free))
        made.append(layer)
        if layer is job.module or not (needs or correct_bias):
            continue
        if not takes_moments(layer):
            reason = f"{type(layer).__name__} is not rounded for its inputs"
        elif id(job.module) not in calls:
            reason = "the calibration data never reach it"
        else:
            wanted.append((job, layer, free))
            continue
        job.scheme = free
        job.notes.append(reason + (f": {default} instead" if needs else ": its bias is kept"))
    if wanted:
        moments = _gather([(job, layer) for job, layer, _ in wanted], calls, runner)
        for job, layer, _ in wanted:
            _finish(job, layer, moments[_key(layer)], correct_bias)
    return made


def _gather(
    wanted: list[tuple[Job, Any]], calls: dict[int, _Calls], runner: _Runner
) -> dict[Any, Moments]:
    """The moments of all data for the layers of one input, by `_key`."""
    moments: dict[Any, Moments] = {}
    job = wanted[0][0]
    layers = {_key(layer): layer for _, layer in wanted}
    for index, batch in runner.batches():
        count = calls[id(job.module)].counts.get(index, 0)
        if count == 0:
            continue
        before = runner.inputs(job, batch, count, quantized=False)
        after = runner.inputs(job, batch, count, quantized=True)
        for call, (x, z) in enumerate(zip(before, after, strict=True)):
            if not (x.isfinite().all() and z.isfinite().all()):
                raise ValueError(
                    f"layer '{job.name}': batch {index} of the calibration data gives it NaN or Inf"
                )
            for key, layer in layers.items():
                seed = 1000 * index + call
                rows = rows_of(layer, x, seed)
                if key not in moments:
                    moments[key] = Moments.like(rows)
                moments[key].add(rows, rows_of(layer, z, seed, rounded=True))
    for key in layers:
        if moments[key].count == 0:
            raise ValueError(f"layer '{job.name}': the calibration data give it empty inputs")
    return moments


def _finish(job: Job, layer: Any, moments: Moments, correct_bias: bool) -> None:
    """Gives a layer its codes and its bias."""
    source = job.source()
    weight = source._parameters["weight"]
    assert weight is not None
    w, valid = float_matrix(layer, weight.detach())
    assert job.scheme.quantizer is not None
    if quantizers.needs_data(job.scheme.quantizer):
        target = moments.target(w, correct_bias)
        q = quantize_weight(target, job.scheme, valid, moments.hessian(correct_bias))
        layer.scheme = job.scheme
        layer.set_quantized_weight(q)
    if correct_bias:
        shift = moments.shift(w, dequantize_weight(layer.quantized_weight()))
        layer.bias = shift if layer.bias is None else layer.bias + shift
        job.notes.append("bias corrected")


def _key(layer: Any) -> Any:
    """Layers of the same key and input have the same moments."""
    return layer.scheme.activation if isinstance(layer, Linear) else id(layer)


class _Blocks:
    """Has each block learn when the last of its layers has been rounded."""

    def __init__(
        self,
        model: nn.Module,
        jobs: Sequence[Job],
        calls: dict[int, _Calls],
        runner: _Runner,
        steps: int,
    ) -> None:
        self._runner, self._steps = runner, steps
        self._block_of: dict[int, nn.Module] = {}
        self._left: dict[int, set[int]] = {}
        self._layers: dict[int, dict[int, Any]] = {}
        self._jobs: dict[int, list[Job]] = {}
        for block in find_blocks(model) if steps else []:
            inside = {id(module) for module in block.modules()} - {id(block)}
            own = {id(job.module) for job in jobs} & inside & calls.keys()
            self._left[id(block)] = own
            self._block_of |= dict.fromkeys(own, block)

    def add(self, job: Job, layer: nn.Module) -> None:
        """A layer has been rounded."""
        block = self._block_of.get(id(job.module))
        if block is None:
            return
        if takes_moments(layer):
            self._layers.setdefault(id(block), {})[id(job.module)] = layer
            self._jobs.setdefault(id(block), []).append(job)
        left = self._left[id(block)]
        left.discard(id(job.module))
        layers = self._layers.get(id(block), {})
        if left or not layers:
            return
        samples = self._runner.samples(block)
        if not samples:
            return
        before, after = learn(block, layers, samples, self._runner.replaced, self._steps)
        note = f"learned with its block: error {100 * before:.3g} % to {100 * after:.3g} %"
        for other in self._jobs[id(block)]:
            other.notes.append(note)


class _Overlay:
    """Makes float layers compute what their lowbit layers do, while it is on."""

    def __init__(self) -> None:
        self._forwards: dict[int, tuple[nn.Module, Callable[..., Any]]] = {}

    def __enter__(self) -> _Overlay:
        return self

    def __exit__(self, *error: object) -> None:
        self.off()

    def add(self, job: Job, layer: nn.Module) -> None:
        """From now on `on` replaces this job's layer, and its batch norm by nothing."""
        if layer is job.module:
            return
        self._forwards[id(job.module)] = job.module, layer.forward
        if job.fold is not None:
            self._forwards[id(job.fold.norm)] = job.fold.norm, _same

    def on(self) -> None:
        for module, forward in self._forwards.values():
            vars(module)["forward"] = forward

    @contextlib.contextmanager
    def replaced(self, functions: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
        """On, with other functions for some of the layers."""
        self.on()
        try:
            for key, function in functions.items():
                vars(self._forwards[key][0])["forward"] = function
            yield
        finally:
            self.off()

    def off(self) -> None:
        for module, _ in self._forwards.values():
            vars(module).pop("forward", None)


def _same(x: Tensor) -> Tensor:
    return x


class _Runner:
    """Runs the float model, or the quantized one as far as it is, up to a layer."""

    def __init__(
        self,
        model: nn.Module,
        data: Callable[[], Iterable[Any]],
        forward: Forward,
        overlay: _Overlay,
    ) -> None:
        self._model, self._data, self._forward, self._overlay = model, data, forward, overlay
        self.replaced = overlay.replaced

    def batches(self) -> Iterator[tuple[int, Any]]:
        """The number of each batch, and the batch."""
        yield from enumerate(self._data())

    def watch(self, jobs: Sequence[Job]) -> dict[int, _Calls]:
        """Runs the float model on all data: which layers are called, in which order."""
        calls: dict[int, _Calls] = {}
        at = 0
        held: list[Any] = []  # tensors whose ids are compared have to live

        def watcher(key: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = _input(args, kwargs)
                if key not in calls:
                    held.append(x)
                    calls[key] = _Calls(len(calls), source=(at, id(x)))
                counts = calls[key].counts
                counts[at] = counts.get(at, 0) + 1

            return hook

        handles = [
            job.module.register_forward_pre_hook(watcher(id(job.module)), with_kwargs=True)
            for job in jobs
        ]
        batches = 0
        try:
            for at, batch in self.batches():  # noqa: B007
                self._forward(self._model, batch)
                held.clear()
                batches += 1
        finally:
            for handle in handles:
                handle.remove()
        if batches == 0:
            raise ValueError("the calibration data are empty: there is no batch to look at")
        return calls

    def inputs(self, job: Job, batch: Any, count: int, quantized: bool) -> list[Tensor]:
        """The inputs of the first `count` calls of a layer; what comes behind is not run."""
        found: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_input(args, kwargs).detach().float())
            if len(found) == count:
                raise _Reached

        if quantized:
            self._overlay.on()
        handle = job.module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with contextlib.suppress(_Reached):
                self._forward(self._model, batch)
        finally:
            handle.remove()
            self._overlay.off()
        if len(found) != count:
            raise ValueError(
                f"layer '{job.name}' was called {count} times on a batch of the calibration data, "
                f"and then {len(found)} times on the same one: a model to be calibrated takes the "
                "same path each time"
            )
        return found

    def samples(self, block: nn.Module) -> list[Sample]:
        """What a block gets in the quantized model and returns in the float one, batch by batch.

        None for a block that is not called exactly once.
        """
        found = []
        for _, batch in self.batches():
            calls: list[Call] = []
            outputs: list[Tensor] = []

            def before(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                calls: list[Call] = calls,
            ) -> None:
                calls.append((tuple(map(_kept, args)), dict(kwargs)))

            def behind(
                module: nn.Module, args: Any, output: Any, outputs: list[Tensor] = outputs
            ) -> None:
                outputs.append(floating_tensors(output)[0].detach().clone())

            with self._hooked(block.register_forward_hook(behind)):
                self._forward(self._model, batch)
            handle = block.register_forward_pre_hook(before, with_kwargs=True)
            with self._hooked(handle), self._overlay.replaced({}):
                self._forward(self._model, batch)
            if len(calls) != 1 or len(outputs) != 1:
                return []
            found.append(Sample(calls[0], outputs[0]))
        return found

    @contextlib.contextmanager
    def _hooked(self, handle: Any) -> Iterator[None]:
        try:
            yield
        finally:
            handle.remove()


def _kept(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
