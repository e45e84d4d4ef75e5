"""What every layer of `lowbit.nn` has: made from a float layer, named in errors, its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowbit import _core
from lowbit.inputs import check_tensor, differentiates
from lowbit.nn.floats import check_float_layer, float_bias
from lowbit.packed import ActivationTensors, not_calibrated
from lowbit.schemes import Scheme

_Layer = TypeVar("_Layer", bound="LowbitLayer")

# torch.compile takes it for True.
is_compiling = torch.compiler.is_dynamo_compiling


class DequantizedWeight(Tensor):
    """The values of a packed weight, computed on demand: a tensor of a class of its own.

    torch's fused transformer path takes the `weight` of linear layers without calling them; it
    declines tensors of other classes, so such a layer is called and runs its kernel.
    """


class LowbitLayer(nn.Module):
    """What every layer of `lowbit.nn` has: its name, and the inputs that it refuses.

    Attributes:
        scheme: the `Scheme` of the layer.
    """

    scheme: Scheme

    # The class of the float layer that it stands for.
    _float: ClassVar[type[nn.Module]]

    # Set by the conversion: the layer's name in its model, for error messages.
    _fqn: str | None = None

    @classmethod
    def like(
        cls: type[_Layer],
        module: Any,
        scheme: str | Scheme | Mapping[str, Any] = "w8a8",
        device: torch.device | str = "cpu",
    ) -> _Layer:
        """A layer with the sizes of a float one, whose weights are not read: its own are zero."""
        make: Any = cls
        layer: _Layer = make(
            **cls._arguments(module),
            bias=module.bias is not None,
            scheme=scheme,
            device=device,
            dtype=module.weight.dtype,
        )
        return layer

    @classmethod
    def from_float(
        cls: type[_Layer],
        module: nn.Module,
        scheme: str | Scheme | Mapping[str, Any] = "w8a8",
    ) -> _Layer:
        """A quantized layer with the weights of a float one, which stays as it is.

        Raises:
            TypeError: the module is no float layer of this kind.
            ValueError: an invalid scheme; weights with NaN or Inf, or not on the CPU.
        """
        weight = check_float_layer(module, cls._float, f"lowbit.nn.{cls._float.__name__}")
        layer = cls.like(module, scheme)
        layer.quantize_from(weight, float_bias(module))
        return layer.train(module.training)

    @staticmethod
    def _arguments(module: Any) -> dict[str, Any]:
        """The sizes of a float or a quantized layer, as arguments of either's class."""
        raise NotImplementedError

    def quantize_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes over a float layer's weight, quantized, and a bias float32 [N]."""
        raise NotImplementedError

    def _sizes(self) -> str:
        """The sizes by which a user knows the layer."""
        raise NotImplementedError

    def _device(self) -> torch.device:
        """Where its weights are."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float layer's weight."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """How error messages name this layer."""
        name = f" '{self._fqn}'" if self._fqn else f"({self._sizes()})"
        return f"lowbit.nn.{type(self).__name__}{name}"

    def _refuse_training(self, x: Tensor) -> None:
        if x.requires_grad and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.label}: quantized layers are for inference only and compute no gradients; "
                "call model.eval(), or run under torch.no_grad()"
            )

    def _check_input(self, x: Any) -> Any:
        """Checks x where the call goes through the dispatcher; returns it without gradient."""
        if isinstance(x, torch.fx.Proxy):
            return x
        check_tensor(x, self.label)
        own = self._device()
        if x.device.type != own.type:
            raise RuntimeError(
                f"{self.label}: the input is on {x.device}, the weights on {own}; move both to the "
                "CPU, and load a state dict if the weights are on the meta device"
            )
        self._refuse_training(x)
        if not is_compiling() and differentiates(x):
            raise RuntimeError(
                f"{self.label}: quantized layers compute no gradients, and torch.func would take "
                "them for 0; differentiate the float model, or one of lowbit.prepare_qat"
            )
        return x.detach() if x.requires_grad else x

    @staticmethod
    def _sizes_are_known(x: Any) -> bool:
        """Whether an input's sizes can be checked: a tracer's are tensors, of a graph of its own.

        The operator checks those that come later.
        """
        return isinstance(x, Tensor) and (is_compiling() or not torch._C._is_tracing())

    def _activation_tensors(self) -> ActivationTensors:
        """activation_scale and activation_zero, where the scheme is static."""
        raise NotImplementedError

    def set_activation(self, scale: float, zero: int = 0) -> None:
        """Set the parameters of static activations: code q means scale * (q - zero).

        Args:
            scale: positive, rounded to float32.
            zero: the code that means 0, in -128..127 for int8 activations, else 0.

        Raises:
            ValueError: parameters that no kernel takes, or a layer whose scheme is not static.
        """
        raise NotImplementedError

    def _refuse_uncalibrated(self) -> None:
        """Where values can be seen; a program that is traced asks its operator when it runs."""
        if not self.scheme.static or is_compiling() or torch._C._is_tracing():
            return
        scale, _ = self._activation_tensors()
        if type(scale) is Tensor and not scale.is_meta and float(scale) == 0:
            raise not_calibrated(self.label)

    def _describe_activation(self) -> str:
        scale, zero = self._activation_tensors()
        if scale is None or zero is None:
            return self.scheme.activation
        described = f"{self.scheme.activation} static"
        if scale.is_meta or type(scale) is not Tensor:
            return described
        if float(scale) == 0:
            return f"{described} (not calibrated)"
        return f"{described} (scale={float(scale):.6g}, zero={int(zero)})"

    def extra_repr(self) -> str:
        scheme = self.scheme
        group = "" if scheme.group_size is None else f" g{scheme.group_size}"
        return (
            f"{self._sizes()}, bias={self.bias is not None}, "
            f"w={scheme.weight}{group} {scheme.quantizer}, a={self._describe_activation()}, "
            f"kernel={_core.kernel_name(scheme.weight, scheme.activation)}"
        )
