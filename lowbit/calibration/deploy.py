"""Deployed models of prepared ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lowbit import qat
from lowbit.calibration.prepared import Learned, detach, learned
from lowbit.convert import convert_in_place, converted_copy
from lowbit.errors import check_model
from lowbit.plan import Plan, plan_fusion, plan_layers
from lowbit.report import entry_of
from lowbit.schemes import Scheme
from lowbit.static.prepared import PreparedNetwork

Learn = Callable[[nn.Module, Plan], None]

NEVER_RAN = "never ran during calibration: its activations have no scale"


def convert(prepared: nn.Module) -> nn.Module:
    """The deployed model of a prepared one, in eval mode.

    Of a model of `lowbit.prepare`: a copy, in which layers of `lowbit.nn` with the scales that the
    observers chose stand for the float layers, and compute the activations behind them as those of
    `lowbit.quantize`. Static layers that calibration never reached stay float.

    Of a model of `lowbit.prepare_qat`: see `lowbit.qat.convert`.

    `lowbit.summary` gives the account, `lowbit.save_file` writes the model.

    Args:
        prepared: untouched; can be calibrated or trained further, and converted again.

    Raises:
        TypeError: `prepared` is no `nn.Module`.
        ValueError: the model is not prepared, or no calibration data was seen.
    """
    check_model(prepared)
    if any(isinstance(module, qat.QATLayer) for module in prepared.modules()):
        return qat.convert(prepared)
    return calibrated_copy(prepared).eval()


def calibrated_copy(prepared: nn.Module, learn: Learn | None = None) -> nn.Module:
    """What `convert` makes of a calibrated model, in the modes that this has.

    `learn` is given the folded float model and the plan for it: layers that it makes are taken.
    """
    if isinstance(prepared, PreparedNetwork):
        return prepared.convert(learn)
    layers = _checked(prepared)
    reattach = detach(prepared)
    try:
        return converted_copy(prepared, _plan(prepared, layers, learn))
    finally:
        reattach()


def convert_calibrated(prepared: nn.Module, learn: Learn | None = None) -> None:
    """Converts a calibrated model itself."""
    layers = _checked(prepared)
    detach(prepared)
    convert_in_place(prepared, _plan(prepared, layers, learn))


def _checked(prepared: nn.Module) -> dict[int, Learned]:
    layers = learned(prepared)
    if not layers:
        raise ValueError(
            "no layer of the model is prepared: use a model of lowbit.prepare or "
            "lowbit.prepare_qat, or lowbit.quantize to convert without either"
        )
    if all(layer.observer is None or layer.observer.seen == 0 for layer in layers.values()):
        raise ValueError("the model is not calibrated: run lowbit.calibrate(prepared, data) first")
    return layers


class _Prepared:
    """Gives each layer the scheme that it was prepared for."""

    def __init__(self, layers: dict[int, Learned]) -> None:
        self.layers = layers
        self.lowbit_names: list[str] = []

    def choose(self, name: str, module: nn.Module) -> tuple[Scheme | None, str]:
        layer = self.layers.get(id(module))
        if layer is None:
            entry = entry_of(module)
            return None, entry.note if entry is not None else "it was not prepared"
        if layer.observer is not None and layer.observer.seen == 0:
            return None, NEVER_RAN
        return layer.preparation.scheme, ""

    def check_all_matched(self) -> None:
        """Every layer was prepared under its own name."""


def _plan(model: nn.Module, layers: dict[int, Learned], learn: Learn | None) -> Plan:
    plan = plan_layers(model, _Prepared(layers))
    for job in plan.jobs:
        layer = layers[id(job.module)]
        job.notes += layer.preparation.notes
        if layer.observer is not None:
            job.activation = layer.observer.parameters()
    if any(layer.preparation.fuse for layer in layers.values()):
        plan_fusion(plan, model, folds=False)
    if learn is not None:
        learn(model, plan)
    return plan
