"""Rounds layer after layer, each for the inputs that the layers rounded before it make.

One layer's inputs are computed at a time, batch by batch, by running the model up to that layer. Of
the data and of the model's activations nothing is kept but the layer's second moments, and what the
last finished block returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowbit import quantizers
from lowbit.baselines import eval_mode, no_fused_paths, run
from lowbit.nn.linear import Linear
from lowbit.plan import Job
from lowbit.quantizers import dequantize_weight, quantize_weight
from lowbit.rounding.blocks import find_blocks, learn
from lowbit.rounding.moments import Moments, float_matrix, rows_of, takes_moments
from lowbit.rounding.runs import Calls, Forward, Overlay, Runner

Convert = Callable[[Job], nn.Module]


def round_layers(
    model: nn.Module,
    jobs: Sequence[Job],
    data: Callable[[], Iterable[Any]],
    convert: Convert,
    forward: Forward = run,
    correct_bias: bool = False,
    block_steps: int = 0,
    alone: bool = False,
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
        alone: whether layers are rounded for the inputs that they have in the float model, as if
            no other one were: for layers that are put into it one by one.

    Raises:
        ValueError: there are no data, or a layer gets NaN or Inf from them.
    """
    layers: dict[int, nn.Module] = {}
    with eval_mode([model]), torch.no_grad(), no_fused_paths(), Overlay() as overlay:
        runner = Runner(model, data, forward, overlay, find_blocks(model))
        calls = runner.watch(jobs)
        never = Calls(-1)
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
                made = _round(group, calls, runner, convert, correct_bias, layers.keys(), alone)
                for job, layer in zip(group, made, strict=True):
                    layers[id(job.module)] = layer
                    overlay.add(job, layer)
                    blocks.add(job, layer)
                bar.update(count)
    return layers


def _round(
    group: list[Job],
    calls: dict[int, Calls],
    runner: Runner,
    convert: Convert,
    correct_bias: bool,
    done: Set[int],
    alone: bool,
) -> list[nn.Module]:
    """The lowbit layers of jobs that take the same input; `done`: ids of the layers before."""
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
        runner.advance(done, (False,) if alone else (False, True))
        moments = _gather([(job, layer) for job, layer, _ in wanted], calls, runner, alone)
        for job, layer, _ in wanted:
            _finish(job, layer, moments[_key(layer)], correct_bias)
    return made


def _gather(
    wanted: list[tuple[Job, Any]], calls: dict[int, Calls], runner: Runner, alone: bool
) -> dict[Any, Moments]:
    """The moments of all data for the layers of one input, by `_key`."""
    moments: dict[Any, Moments] = {}
    job = wanted[0][0]
    layers = {_key(layer): layer for _, layer in wanted}
    for index, batch in runner.batches():
        count = calls[id(job.module)].counts.get(index, 0)
        if count == 0:
            continue
        before = runner.inputs(job, index, batch, count, quantized=False)
        after = before
        if not alone:
            after = runner.inputs(job, index, batch, count, quantized=True)
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
        calls: dict[int, Calls],
        runner: Runner,
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
