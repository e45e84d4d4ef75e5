"""Linear layer with packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import _core, ops
from lowbit.direct import prepare_linear
from lowbit.inputs import check_features
from lowbit.nn.base import QuantizedLayer
from lowbit.packed import DYNAMIC, ActivationTensors, PackedWeight, Tensors, linear_weight
from lowbit.quantizers import quantize_weight
from lowbit.schemes import Scheme


class Linear(QuantizedLayer):
    """Drop-in replacement of `nn.Linear` for inference.

    Takes [..., in_features] in float32, bfloat16, float16 or float64 and returns [...,
    out_features] in the same dtype; the arithmetic is float32 and integer, each row by itself.

    Args:
        in_features, out_features, bias, device: as for `nn.Linear`. The weight is zero.
        scheme: a recipe such as "w4a8-g128", a `Scheme`, or its dict.
        dtype: of the float layer that this one stands for; nothing but `weight` has it.

    Raises:
        ValueError: an invalid scheme or size.
    """

    _float = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | Scheme | Mapping[str, Any] = "w8a8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        if in_features < 0 or out_features < 0:
            raise ValueError(f"{self.label}: sizes must not be negative")
        self._create_buffers(Scheme.parse(scheme), bias, device, dtype)

    @staticmethod
    def _arguments(module: Any) -> dict[str, Any]:
        out_features, in_features = module.weight.shape
        return {"in_features": in_features, "out_features": out_features}

    def quantize_from(self, weight: Tensor, bias: Tensor | None) -> None:
        self.set_quantized_weight(quantize_weight(weight.float(), self.scheme))
        self.bias = bias

    def dequantize(self) -> nn.Module:
        """A float layer whose weights are what the codes mean, its epilogue behind it if any."""
        sizes = (self.in_features, self.out_features)
        return self._dequantized(nn.Linear(*sizes, bias=self.bias is not None, device="meta"))

    def _run(self, x: Tensor, w: PackedWeight) -> Tensor:
        return ops.linear_direct(x, w)

    def _prepare(self, w: PackedWeight) -> _core.Direct | None:
        return prepare_linear(w, {"epilogue": self.epilogue})

    def _dispatch(self, x: Any) -> Tensor:
        x = self._check_input(x)
        if self._sizes_are_known(x):
            check_features(x.shape, self.in_features, self.label)
        sizes = (self.in_features, self.out_features, self.scheme.group_size or 0)
        return self._call_operator(torch.ops.lowbit.linear, x, *sizes, self.epilogue)

    def _layout(self) -> tuple[int, int, int]:
        return 1, self.out_features, self.in_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def _sizes(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _matrix_to_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def _check_operands(
        self, tensors: Tensors, activation: ActivationTensors = DYNAMIC
    ) -> PackedWeight:
        return linear_weight(
            tensors,
            (self.scheme.weight, self.scheme.activation),
            self.scheme.group_size or 0,
            (self.in_features, self.out_features),
            self.label,
            self.epilogue,
            activation,
        )
