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
import math
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
from lowbit.report import entry_of, set_entry
from lowbit.rounding.blocks import Learner, SoftLayer
from lowbit.rounding.moments import takes_moments
from lowbit.rounding.objectives import LOSSES, Loss, Side, blocks_of_both, feature_error, judge
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
    loss: Loss = "mse",
    features: float = 0.0,
    code_rate: float = 1.0,
) -> tuple[float, float]:
    """Brings the outputs of a quantized model nearer to the float model's, in place.

    Its layers learn codes, scales and biases together, by steps of Adam on the first floating-point
    output. Bytes and speed stay what they are. Deterministic on one machine with one number of
    threads. Memory: the activations of a batch, five float32 numbers for each weight, and the
    batches kept back with their outputs.

    Args:
        quantized: of `lowbit.quantize` or `lowbit.search`; changed. Layers with static activations
            keep their scales; networks that run in integers (`lowbit.static`) are refused.
        model: the float model that it was made of; untouched.
        data: batches, see `lowbit.calibration.batches`; at least two. Labels are not needed, but
            many different inputs: hundreds, better with augmentation, which a function that gives
            others at each call can do anew for each pass. Every eighth batch is kept back, see
            Returns; those of the first pass judge.
        steps: one batch each; the data are read again as often as it takes.
        forward_fn: as for `lowbit.quantize`.
        rate: factor of the learning rates, which fall to zero as a cosine.
        loss: "mse", the mean squared error; "kl", the Kullback-Leibler divergence of the softmax
            over the last dimension, which counts what is probable (Hinton et al., "Distilling the
            Knowledge in a Neural Network", 2015, at temperature 1).
        features: weight, beside the loss, of the mean over blocks of the squared error of what they
            return, as a share of its power (Romero et al., "FitNets", 2015): many more targets for
            each input. Blocks are the modules that containers (`nn.ModuleList`, `nn.Sequential`)
            list, the outermost ones.
        code_rate: factor of the rate of codes beside that of scales and biases.

    Returns:
        The error on the batches kept back, before and after: mean squares, as shares of the float
        outputs' mean square; with "kl" the mean divergence in nats. It is looked at several times
        on the way, and the best state stays.

    Raises:
        ValueError: no layer can learn, steps is not positive, an argument is none of those above,
            or there are fewer than two batches.
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
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it is one of {', '.join(map(repr, LOSSES))}")
    for name, value in {"rate": rate, "features": features, "code_rate": code_rate}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it is a finite number, at least 0")
    batches, forward = repeatable(data), forward_fn or run
    blocks = blocks_of_both(model, quantized) if features else ([], [])
    if features and not blocks[0]:
        raise ValueError(
            "features: the model has no blocks, the modules that nn.ModuleList and nn.Sequential "
            "list, whose outputs could be compared"
        )
    teacher, student = Side(model, forward, blocks[0]), Side(quantized, forward, blocks[1])

    with eval_mode([quantized, model]), no_fused_paths(), torch.enable_grad():
        with torch.no_grad():
            held = [(batch, teacher(batch)[0]) for _, batch in _part(batches(), True)]
        if not held:
            raise ValueError("distill_ needs at least two batches: one learns, one judges")

        def error() -> float:
            with torch.no_grad():
                return judge(loss, [(student(batch)[0], wanted) for batch, wanted in held])

        learner = Learner({id(layer): layer for layer in layers}, steps, rate, code_rate)
        forwards = {key: _with_epilogue(soft) for key, soft in learner.soft.items()}
        before = best = error()
        every = max(1, steps // _CHECKS)
        stream = _endless(batches)
        for step in tqdm(range(1, steps + 1), desc="distill", disable=None, leave=False):
            batch = next(stream)
            with torch.no_grad():
                wanted, inner = teacher(batch)
            with _replaced(layers, forwards):
                found, own = student(batch)
                total = LOSSES[loss](found, wanted)
                if features:
                    total = total + features * feature_error(own, inner)
                if not total.isfinite():
                    break
                learner.step(total)
            if step % every == 0 or step == steps:
                learner.store()
                now = error()
                if now < best:
                    best = now
                    learner.keep()
        learner.restore()
    for layer in layers:
        entry = entry_of(layer)
        if entry is not None:
            note = f"distilled: the model's {_change(loss, before, best)}"
            note = f"{entry.note}; {note}" if entry.note else note
            set_entry(layer, dataclasses.replace(entry, note=note))
    return before, best


def _change(loss: Loss, before: float, after: float) -> str:
    if loss == "kl":
        return f"divergence {before:.3g} to {after:.3g} nats"
    return f"error {100 * before:.3g} % to {100 * after:.3g} %"


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
