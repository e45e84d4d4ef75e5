"""What the quantized layers take over from float ones: weights, biases, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

FLOAT_EPILOGUES: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish}
)
"""The float module that computes what each epilogue of a layer does."""


def autocast(y: Tensor) -> Tensor:
    """y in the dtype that a float layer would return under `torch.autocast`."""
    if torch.is_autocast_enabled("cpu") and y.dtype != torch.float64:
        return y.to(torch.get_autocast_dtype("cpu"))
    return y


def check_float_layer(module: nn.Module, kind: type[nn.Module], owner: str) -> Tensor:
    """The weight of a float layer that can be quantized, detached.

    Raises:
        TypeError: the module is of another class, or its weight is not floating point.
        ValueError: its weight is not a dense tensor on the CPU.
    """
    if not isinstance(module, kind):
        raise TypeError(
            f"{owner}.from_float takes a torch.nn.{kind.__name__}, not {type(module).__name__}"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise TypeError(f"{owner}.from_float: the weight has dtype {weight.dtype}, not a float one")
    if weight.device.type != "cpu" or weight.layout is not torch.strided:
        raise ValueError(
            f"{owner}.from_float: the weight is on {weight.device} ({weight.layout}), but is "
            "quantized on the CPU as a dense tensor; move it there first"
        )
    return weight.detach()


def float_bias(module: nn.Module) -> Tensor | None:
    """A float32 copy of a float layer's bias."""
    bias = module.bias
    if bias is None:
        return None
    assert isinstance(bias, Tensor)
    return bias.detach().to(torch.float32, copy=True).contiguous()
