"""SmoothQuant: moves the size of activations into the weights of the Linear layers behind a norm.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2023. A LayerNorm's (or RMSNorm's) channels are divided by factors that its weight and bias
take over, and the columns of the Linears that take its output are multiplied by them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.baselines import eval_mode, no_fused_paths, run
from lowbit.calibration.data import Data, repeatable
from lowbit.quality import floating_tensors

_SMALLEST = 1e-5  # of a magnitude, before it is a divisor
_AGREES = 1e-3  # relative error at which two outputs are the same but for rounding


@dataclass
class _Norm:
    """A norm and who takes its output.

    Attributes:
        largest: float32 [C], magnitudes of the output over all data.
        linears: by id, the layers whose input is its output.
    """

    module: Any
    largest: Tensor | None = None
    linears: dict[int, nn.Linear] = field(default_factory=dict)


def smooth(
    model: nn.Module,
    calibration: Data,
    *,
    alpha: float = 0.5,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    steps: int | None = None,
) -> nn.Module:
    """A copy of a model that computes the same, with smaller outliers in its activations.

    For each channel of a LayerNorm or RMSNorm behind which come Linear layers, and them alone: the
    factor is max|x|^alpha / max|w|^(1 - alpha), of the norm's outputs x on the data and of the
    Linears' weights w. Helps where few channels are far larger than all others, as in large
    language models: int8 activations have one scale for a row.

    Where a norm's output goes elsewhere too (into a sum, as in BERT), scaling would change the
    model. So each norm is tried on the first batch, and left as it was where the outputs do not
    stay the same but for rounding. A warning says if none is left.

    Args:
        model: a float model; untouched.
        calibration, forward_fn, steps: example batches, as for `lowbit.quantize`.
        alpha: how much of the activations' size the weights take over, 0 to 1.

    Returns:
        The copy; quantize it.

    Raises:
        ValueError: alpha is not in 0..1, or the data hold no batch, or NaN or Inf come out.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}; it lies between 0 and 1")
    forward = forward_fn or run
    data = repeatable(calibration, steps)
    result = copy.deepcopy(model)
    smoothed = 0
    with eval_mode([result]), torch.no_grad(), no_fused_paths():
        norms = _watch(result, data, forward)
        first = next(iter(data()))
        wanted = _outputs(result, first, forward)
        for norm in norms:
            weights = [norm.module, *norm.linears.values()]
            kept = [
                {k: p.clone() for k, p in m._parameters.items() if p is not None} for m in weights
            ]
            _scale(norm, alpha)
            if _same(wanted, _outputs(result, first, forward)):
                smoothed += 1
                continue
            for module, parameters in zip(weights, kept, strict=True):
                for key, value in parameters.items():
                    getattr(module, key).copy_(value)
    if not smoothed:
        warnings.warn(
            f"nothing was smoothed: of {len(norms)} norms that Linear layers follow, none feeds "
            "them alone",
            stacklevel=2,
        )
    return result


def _is_norm(module: nn.Module) -> bool:
    """A norm over the last dimension with a weight for each channel."""
    weight = module._parameters.get("weight")
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    return named and weight is not None and weight.dim() == 1


def _watch(
    model: nn.Module, data: Callable[[], Any], forward: Callable[[nn.Module, Any], Any]
) -> list[_Norm]:
    """The norms with Linears behind them, from one run over all data."""
    norms = {id(m): _Norm(m) for m in model.modules() if _is_norm(m)}
    made: dict[int, tuple[Tensor, _Norm]] = {}  # outputs of this batch; alive, so that ids differ

    def behind(module: nn.Module, args: Any, output: Tensor) -> None:
        norm = norms[id(module)]
        if not output.isfinite().all():
            raise ValueError(
                f"a {type(module).__name__} returns NaN or Inf on the calibration data"
            )
        largest = output.abs().flatten(0, -2).amax(dim=0).float()
        norm.largest = largest if norm.largest is None else torch.maximum(norm.largest, largest)
        made[id(output)] = output, norm

    def before(module: Any, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in made:
            made[id(args[0])][1].linears[id(module)] = module

    handles = [norm.module.register_forward_hook(behind) for norm in norms.values()]
    handles += [
        module.register_forward_pre_hook(before)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        for batch in data():
            forward(model, batch)
            made.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [norm for norm in norms.values() if norm.linears and norm.largest is not None]


def _scale(norm: _Norm, alpha: float) -> None:
    assert norm.largest is not None
    linears = list(norm.linears.values())
    columns = torch.stack([linear.weight.abs().amax(dim=0).float() for linear in linears])
    size, weight = norm.largest.clamp_min(_SMALLEST), columns.amax(dim=0).clamp_min(_SMALLEST)
    factor = (size**alpha / weight ** (1 - alpha)).clamp_min(_SMALLEST)
    norm.module.weight.div_(factor.to(norm.module.weight.dtype))
    if getattr(norm.module, "bias", None) is not None:
        norm.module.bias.div_(factor.to(norm.module.bias.dtype))
    for linear in linears:
        linear.weight.mul_(factor.to(linear.weight.dtype))


def _outputs(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]
) -> list[Tensor]:
    return [tensor.clone() for tensor in floating_tensors(forward(model, batch))]


def _same(wanted: list[Tensor], found: list[Tensor]) -> bool:
    for want, got in zip(wanted, found, strict=True):
        error, size = float((want.double() - got.double()).norm()), float(want.double().norm())
        if not error <= _AGREES * max(size, 1e-30):
            return False
    return True
