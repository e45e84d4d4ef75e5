"""Which modules convert, by which function, and the reason why any other stays float."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lowbit.nn import LAYERS, SAFE_GLOBALS, Conv2d
from lowbit.report import FLOAT_CLASSES
from lowbit.schemes import Scheme

Converter = Callable[[nn.Module, Scheme], nn.Module]

# A subclass that replaces one of these does not compute what its parent computes.
_COMPUTES = (
    "forward",
    "_conv_forward",
    "_output_padding",
    "__call__",
    "_call_impl",
    "weight",
    "bias",
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PREPARED = "_lowbit_prepared"
"""The attribute of a layer that was prepared for calibration."""

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_registered: dict[type[nn.Module], Converter] = {}


def register_converter(cls: type[nn.Module], fn: Converter) -> None:
    """Convert modules of class `cls` by `fn(module, scheme)`.

    Its subclasses too, unless they override `forward` again. For subclasses of layers that
    convert with their own `forward`, and for other layers that can be expressed by lowbit's.
    The returned module takes the place of the float one; `fn` must not keep or change the float
    module. A converter that cannot convert a certain module returns it unchanged: it is then
    reported as kept. When `load_file` rebuilds a model, `fn` is called on a copy of the module
    whose parameters are zeros.

    Args:
        cls: the module class. A later registration of the same class replaces the earlier one.
        fn: the converter.

    Raises:
        TypeError: `cls` is no module class, or `fn` cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_converter needs a subclass of torch.nn.Module, got {cls!r}")
    if not callable(fn):
        raise TypeError(f"register_converter needs a function (module, scheme), got {fn!r}")
    _registered[cls] = fn


class PaddedConv2d(Conv2d):
    """A convolution whose four sides are padded by zeros of their own number.

    `nn.Conv2d` pads both sides of a dimension alike; TensorFlow's SAME padding of strided layers
    does not. Like all padding of a convolution, these zeros cost no memory and no time.

    Attributes:
        static_padding: (left, right, top, bottom) in pixels, in the order of `F.pad`; beside the
            usual `padding`.
    """

    static_padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def _pads(self) -> tuple[int, int, int, int]:
        left, right, top, bottom = self.static_padding
        pads = super()._pads()
        return pads[0] + top, pads[1] + left, pads[2] + bottom, pads[3] + right

    def dequantize(self) -> nn.Sequential:
        """The float layers with the weights that the codes mean: padding, then convolution."""
        return nn.Sequential(nn.ZeroPad2d(self.static_padding), super().dequantize())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, static_padding={self.static_padding}"


SAFE_GLOBALS.append(PaddedConv2d)


def is_candidate(module: nn.Module) -> bool:
    """Whether schemes and overrides address this module: of `LAYERS`, or registered."""
    return isinstance(module, FLOAT_CLASSES) or _registered_for(module) is not None


def find_converter(module: nn.Module, parent: nn.Module | None) -> tuple[Converter | None, str]:
    """The function that converts this module, or None and the reason why there is none."""
    reason = _blocked(module, parent)
    if reason:
        return None, reason
    registered = _registered_for(module)
    if registered is not None:
        return registered, ""
    builtin = _builtin_for(module)
    if builtin is None:
        name = type(module).__name__
        return None, (
            f"{name} overrides the forward of its base class: "
            f"lowbit.register_converter({name}, fn) tells how to convert it"
        )
    reason = _unfit(module)
    return (None, reason) if reason else (builtin, "")


def find_empty_converter(
    module: nn.Module, parent: nn.Module | None
) -> tuple[Converter | None, str]:
    """Like `find_converter`, for layers whose tensors come from a file.

    The function reads only the sizes of the float module, not its weights, which may be on the
    meta device, and the layers that it makes hold no codes yet.
    """
    reason = _blocked(module, parent)
    if reason:
        return None, reason
    registered = _registered_for(module)
    if registered is not None:
        convert = registered
        return lambda m, scheme: convert(_zeros_like(m), scheme), ""
    builtin = _builtin_for(module)
    if builtin is None:
        return None, f"{type(module).__name__} has no converter: lowbit.register_converter first"
    return _EMPTY[builtin], ""


def is_builtin(converter: Converter) -> bool:
    """Whether this converter is one of lowbit's own."""
    return converter in _EMPTY


def is_plain(module: nn.Module) -> bool:
    """Whether one of lowbit's own converters takes modules of this kind."""
    return _registered_for(module) is None and _builtin_for(module) is not None


def hook_count(module: nn.Module) -> int:
    """How many hooks a module's call runs."""
    return sum(len(vars(module).get(hooks) or ()) for hooks in HOOKS)


def same_forward(cls: type, base: type) -> bool:
    """Whether a subclass computes what its base does."""
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in _COMPUTES)


def _registered_for(module: nn.Module) -> Converter | None:
    cls = type(module)
    for base in cls.__mro__:
        if base in _registered and same_forward(cls, base):
            return _registered[base]
    return None


def _builtin_for(module: nn.Module) -> Any:
    cls = type(module)
    for base, layer in LAYERS.items():
        if isinstance(module, base) and same_forward(cls, base):
            return layer.from_float
    if isinstance(module, nn.Conv2d) and _static_padding(module) is not None:
        return _convert_padded_conv
    return None


def _blocked(module: nn.Module, parent: nn.Module | None) -> str:
    """Why no converter may replace this module, however it was found."""
    if isinstance(parent, nn.MultiheadAttention) or (
        type(module) is NonDynamicallyQuantizableLinear
    ):
        return "nn.MultiheadAttention passes this layer's raw weight to functional code"
    if isinstance(module, FLOAT_CLASSES) and is_parametrized(module):
        return (
            "parametrized weight: torch.nn.utils.parametrize.remove_parametrizations first, "
            "then convert"
        )
    if hasattr(type(module), "lowbit_class"):
        return "it is prepared for training: lowbit.convert makes the deployed layer of it"
    if PREPARED in vars(module):
        return "it is prepared for calibration: lowbit.convert makes the deployed layer of it"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(is_lazy(p) for p in module._parameters.values() if p is not None):
        return "lazy layer that is not initialized: run the float model once, then convert"
    return ""


def _unfit(module: nn.Module) -> str:
    """Why the built-in converters cannot take this module."""
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            "its weight is computed by a hook (weight_norm, spectral_norm, pruning): make it "
            "permanent first, then convert"
        )
    if type(weight.data) is not Tensor or weight.layout != torch.strided:
        return f"its weight is a {type(weight.data).__name__} ({weight.layout}), not a plain tensor"
    if weight.device.type != "cpu":
        return f"its weight is on device '{weight.device}': move it to the CPU first"
    if weight.dtype not in _FLOAT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOAT_DTYPES)
        return f"its weight is {weight.dtype}; convertible are {names}"
    if weight.numel() == 0:
        return "its weight has no elements"
    if module._state_dict_hooks or module._load_state_dict_pre_hooks:
        return "it has state_dict hooks, which expect its float weight"
    extra = sorted(
        name
        for names in (module._modules, module._parameters, module._buffers)
        for name in names
        if name not in ("weight", "bias", "static_padding")
    )
    if extra:
        return "it has tensors or submodules of its own beside weight and bias: " + ", ".join(extra)
    return ""


def _static_padding(module: nn.Conv2d) -> tuple[int, int, int, int] | None:
    """(left, right, top, bottom) of a convolution that pads in its own forward; None for any other.

    Known by its shape, without an import: EfficientNet ports carry a `Conv2dStaticSamePadding`
    with a `static_padding` module, either an `nn.ZeroPad2d` or an identity.
    """
    if "Conv2dStaticSamePadding" not in [cls.__name__ for cls in type(module).__mro__]:
        return None
    pad = module._modules.get("static_padding")
    if isinstance(pad, nn.ZeroPad2d):
        left, right, top, bottom = pad.padding
        return left, right, top, bottom
    return (0, 0, 0, 0) if type(pad).__name__ == "Identity" else None


def _conv_with_static_padding(module: nn.Conv2d) -> tuple[nn.Conv2d, tuple[int, int, int, int]]:
    """The plain float convolution (its weight not copied), and the padding left to do before it."""
    padding = _static_padding(module)
    if padding is None or isinstance(module.padding, str):
        raise ValueError(f"unexpected padding {module.padding!r} of {type(module).__name__}")
    left, right, top, bottom = padding
    height, width = module.padding[0], module.padding[1]
    if left == right and top == bottom:
        height, width = height + top, width + left
        padding = (0, 0, 0, 0)
    # The port calls F.conv2d itself: padding_mode has no effect there, the padding is zeros.
    plain = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        _pair(module.kernel_size),
        stride=_pair(module.stride),
        padding=(height, width),
        dilation=_pair(module.dilation),
        groups=module.groups,
        bias=module.bias is not None,
        device="meta",
    )
    plain.weight, plain.bias = module.weight, module.bias
    return plain, padding


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def with_static_padding(conv: Conv2d, padding: tuple[int, int, int, int]) -> PaddedConv2d:
    """A lowbit convolution that also pads by (left, right, top, bottom), sharing its tensors."""
    result = PaddedConv2d(
        **conv._arguments(conv),
        bias=conv.bias is not None,
        scheme=conv.scheme,
        device="meta",
        dtype=conv.weight_dtype,
    )
    result._buffers.update(conv._buffers)
    before = vars(conv).get("static_padding", (0, 0, 0, 0))
    total = tuple(a + b for a, b in zip(before, padding, strict=True))
    vars(result).update(static_padding=total, epilogue=conv.epilogue, _fqn=conv._fqn)
    return result.train(conv.training)


def _convert_padded_conv(module: nn.Conv2d, scheme: Scheme) -> Conv2d:
    plain, padding = _conv_with_static_padding(module)
    if not any(padding):
        return Conv2d.from_float(plain, scheme)
    return _padded(PaddedConv2d.from_float(plain, scheme), padding)


def _padded(conv: Conv2d, padding: tuple[int, int, int, int]) -> Conv2d:
    vars(conv)["static_padding"] = padding
    return conv


def _empty_padded_conv(module: nn.Conv2d, scheme: Scheme) -> Conv2d:
    plain, padding = _conv_with_static_padding(module)
    if not any(padding):
        return Conv2d.like(plain, scheme, "meta")
    return _padded(PaddedConv2d.like(plain, scheme, "meta"), padding)


def _empty_like(layer: Any) -> Converter:
    return lambda module, scheme: layer.like(module, scheme, "meta")


# The built-in converters, and what makes the same layer from its sizes alone.
_EMPTY: dict[Any, Any] = {
    **{layer.from_float: _empty_like(layer) for layer in LAYERS.values()},
    _convert_padded_conv: _empty_padded_conv,
}


def _zeros_like(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are zeros on the CPU; the original is not read."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)
