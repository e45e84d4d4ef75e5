"""Learns codes, scales and biases of a whole quantized model, for the float model's outputs.

Regression on the outputs of a teacher is that of Ba and Caruana, "Do Deep Nets Really Need to be
Deep?", 2014 (of logits, for a classification); with the float model as the teacher of its quantized
self, Mishra and Marr, "Apprentice", 2018. No labels are needed. What is learned, and how, is as in
`lowbit.rounding.blocks`, with the whole model for the block. What does best on data kept back is
what stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.baselines import eval_mode, no_fused_paths, run
from lowbit.calibration.data import Data, repeatable
from lowbit.convert import ForwardFn
from lowbit.nn.base import QuantizedLayer
from lowbit.nn.floats import FLOAT_EPILOGUES
from lowbit.quality import floating_tensors
from lowbit.report import entry_of, set_entry
from lowbit.rounding.blocks import Learner, SoftLayer
from lowbit.rounding.moments import takes_moments
from lowbit.static.network import Network

HELD_OUT = 8
"""Of so many batches one is not learned from: it says when the model is best."""
_CHECKS = 5


def distill_(
    quantized: nn.Module,
    model: nn.Module,
    data: Data,
    *,
    steps: int,
    forward_fn: ForwardFn | None = None,
    rate: float = 1.0,
) -> tuple[float, float]:
    """Brings the outputs of a quantized model nearer to the float model's, in place.

    Its layers learn codes, scales and biases together, by steps of Adam on the mean squared error
    of the first floating-point output. Bytes and speed stay what they are. Deterministic on one
    machine with one number of threads. Memory: the activations of a batch, five float32 numbers for
    each weight, and the batches kept back with their outputs.

    Args:
        quantized: of `lowbit.quantize` or `lowbit.search`; changed. Layers with static activations
            keep their scales; networks that run in integers (`lowbit.static`) are refused.
        model: the float model that it was made of; untouched.
        data: batches, see `lowbit.calibration.batches`; at least two. Labels are not needed, but
            many different inputs: hundreds, better with augmentation, which a function that gives
            others at each call does anew for each pass. Every eighth batch is kept back, see
            Returns; those of the first pass judge.
        steps: one batch each; the data are read again as often as it takes.
        forward_fn: as for `lowbit.quantize`.
        rate: factor of the learning rates, which fall to zero as a cosine.

    Returns:
        The error on the batches kept back, before and after: mean squares, as shares of the float
        outputs' mean square. It is looked at several times on the way, and the best state stays.

    Raises:
        ValueError: no layer can learn, steps is not positive, or there are fewer than two batches.
    """
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLayer) and takes_moments(m)]
    if not layers or steps < 1:
        what = "no layer" if not layers else f"steps={steps}: nothing"
        raise ValueError(
            f"{what} can learn: distill_ takes a model with layers of lowbit.nn, which "
            "lowbit.quantize with a dynamic scheme makes, and a positive number of steps"
        )
    if any(isinstance(module, Network) for module in quantized.modules()):
        raise ValueError(
            "a network whose layers run in integers cannot learn: calibrate with lowbit.quantize_, "
            "which makes single layers"
        )
    batches, forward = repeatable(data), forward_fn or run

    def output(side: nn.Module, batch: Any) -> Tensor:
        return floating_tensors(forward(side, batch))[0]

    with eval_mode([quantized, model]), no_fused_paths(), torch.enable_grad():
        with torch.no_grad():
            held = [(batch, output(model, batch)) for _, batch in _part(batches(), True)]
        if not held:
            raise ValueError("distill_ needs at least two batches: one learns, one judges")
        power = sum(float(wanted.square().sum()) for _, wanted in held)

        def error() -> float:
            wrong = 0.0
            with torch.no_grad():
                for batch, wanted in held:
                    wrong += float((output(quantized, batch) - wanted).square().sum())
            return wrong / power if power else wrong

        learner = Learner({id(layer): layer for layer in layers}, steps, rate)
        forwards = {key: _with_epilogue(soft) for key, soft in learner.soft.items()}
        before = best = error()
        every = max(1, steps // _CHECKS)
        stream = _endless(batches)
        for step in tqdm(range(1, steps + 1), desc="distill", disable=None, leave=False):
            batch = next(stream)
            with torch.no_grad():
                wanted = output(model, batch)
            with _replaced(layers, forwards):
                loss = (output(quantized, batch) - wanted).square().mean()
                if not loss.isfinite():
                    break
                learner.step(loss)
            if step % every == 0 or step == steps:
                learner.store()
                found = error()
                if found < best:
                    best = found
                    learner.keep()
        learner.restore()
    for layer in layers:
        entry = entry_of(layer)
        if entry is not None:
            note = f"distilled: the model's error {100 * before:.3g} % to {100 * best:.3g} %"
            note = f"{entry.note}; {note}" if entry.note else note
            set_entry(layer, dataclasses.replace(entry, note=note))
    return before, best


def _part(batches: Iterator[Any], held_out: bool) -> Iterator[tuple[int, Any]]:
    """The batches that are kept back, the second one among them, or the others."""
    for index, batch in enumerate(batches):
        if (index % HELD_OUT == 1) == held_out:
            yield index, batch


def _endless(batches: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    while True:
        for _, batch in _part(batches(), False):
            yield batch


def _with_epilogue(soft: SoftLayer) -> Callable[[Tensor], Tensor]:
    if soft.layer.epilogue == "none":
        return soft.forward
    activation = FLOAT_EPILOGUES[soft.layer.epilogue]()
    return lambda x: activation(soft.forward(x))


@contextlib.contextmanager
def _replaced(
    layers: Sequence[nn.Module], forwards: Mapping[int, Callable[..., Any]]
) -> Iterator[None]:
    """Layers compute other functions, by their ids."""
    for layer in layers:
        vars(layer)["forward"] = forwards[id(layer)]
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
