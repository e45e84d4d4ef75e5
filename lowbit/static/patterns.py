"""Which of torch's modules, functions and methods are which operations on codes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowbit.static import functions
from lowbit.static.exporting import operator_name
from lowbit.static.node import CHANNELS_LAST, Node, Ref


@dataclass(frozen=True)
class Alias:
    """A call whose value is that of another one."""

    of: str


@dataclass
class Call:
    """One call of a traced model.

    Attributes:
        op: "call_module", "call_function", "call_method" or "get_attr".
        target: the function, or the name of the method or module.
        module: of a call_module.
        args, kwargs: with a `Ref` for each value of the graph.
        shape: of what it returns for the example inputs; () if that is no tensor.
        values: the nodes of the references, each once.
    """

    op: str
    target: Any
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    name: str
    values: list[Node] = field(default_factory=list)

    @property
    def key(self) -> Any:
        """By what the tables know it: the class of a module, the function, the method's name.

        An operator of torch.export is known by its name, in place or not.
        """
        if self.module is not None:
            return type(self.module)
        name = operator_name(self.target)
        return self.target if name is None else name.removesuffix("_")

    @property
    def label(self) -> str:
        if self.module is not None:
            return type(self.module).__name__
        target = self.target
        return target if isinstance(target, str) else getattr(target, "__name__", str(target))

    def named(self, *names: str) -> dict[str, Any]:
        """Arguments behind the first, by name; a module's are its attributes."""
        if self.module is not None:
            return {
                name: getattr(self.module, name) for name in names if hasattr(self.module, name)
            }
        return dict(zip(names, self.args[1:], strict=False)) | {
            key: value for key, value in self.kwargs.items() if key != "input"
        }

    def rest(self, name: str) -> Any:
        """What follows the tensor, in a sequence or not: `x.view(2, 3)`, `x.view((2, 3))`."""
        if name in self.kwargs:
            return self.kwargs[name]
        values = self.args[1:]
        return values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values

    def in_place(self) -> bool:
        """Whether it changes its first argument."""
        if self.op == "call_method":
            return str(self.target).endswith("_") and not str(self.target).endswith("__")
        if self.module is not None:
            return bool(getattr(self.module, "inplace", False))
        name = operator_name(self.target) or str(getattr(self.target, "__name__", ""))
        if self.target in _IN_PLACE or name.endswith("_"):
            return True
        _, names = functions.CALLS.get(self.target, ("", ()))
        return bool(self.named(*names).get("inplace", False))

    def identity(self) -> Alias | None:
        """What it passes on, if it does nothing."""
        first = self.args[0] if self.args else self.kwargs.get("input")
        if not isinstance(first, Ref) or len(self.values) != 1:
            return None
        if self.key in _IDENTITIES and not (self.module is not None and self.module.training):
            return Alias(first.name)
        if self.key in _DROPOUTS and not self.named("p", "training").get("training", True):
            return Alias(first.name)
        return None

    def zero_pad(self) -> tuple[int, int, int, int] | None:
        """(left, right, top, bottom) of zeros, if that is what it puts around an image."""
        padding = _pads(self)
        if padding is None or len(self.values[0].shape) != 4 or self.values[0].layout == "nhwc":
            return None
        return padding[0] if padding[1] == 0 else None


def recognize(call: Call, layout: str) -> Node | Alias | None:
    """The operation in integers that a call is, its inputs of this layout."""
    function = _function(call)
    if function is not None:
        return _node(call, "unary", layout, function=function)
    pattern = _PATTERNS.get(call.key)
    return None if pattern is None else pattern(call, layout)


def _node(call: Call, kind: str, layout: str, **settings: Any) -> Node:
    return Node(call.name, kind, tuple(v.name for v in call.values), settings, layout)


def _function(call: Call) -> functions.Function | None:
    if len(call.values) != 1:
        return None
    if call.module is not None:
        return functions.of_module(call.module)
    args = tuple(None if isinstance(value, Ref) else value for value in call.args)
    return functions.of_call(call.key, args, call.kwargs)


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(rest[0] if rest else first)


def _two(call: Call) -> tuple[Node, Node] | None:
    """The two values of a binary operator without further arguments."""
    if len(call.args) != 2 or call.kwargs or not all(isinstance(a, Ref) for a in call.args):
        return None
    by_name = {v.name: v for v in call.values}
    a, b = (by_name[argument.name] for argument in call.args)
    return a, b


def _add(call: Call, layout: str) -> Node | None:
    two = _two(call)
    if two is None or two[0].shape != two[1].shape:
        return None
    node = _node(call, "add", layout, function=None)
    node.inputs = tuple(value.name for value in two)
    return node


def _mul(call: Call, layout: str) -> Node | None:
    two = _two(call)
    if two is None:
        return None
    a, b = two if len(two[0].shape) and two[0].shape == call.shape else two[::-1]
    gate = (a.shape[0], a.shape[1], 1, 1) if layout == "nchw" else a.shape
    if a.shape != call.shape or b.shape not in (a.shape, gate):
        return None
    node = _node(call, "mul", layout)
    node.inputs = (a.name, b.name)
    return node


def _concat(call: Call, layout: str) -> Node | None:
    tensors = call.args[0] if call.args else call.kwargs.get("tensors", ())
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, Ref) for t in tensors):
        return None
    dim = call.named("dim").get("dim", 0) % len(call.shape)
    wanted = len(call.shape) - 1 if layout in CHANNELS_LAST else 1
    if dim != wanted or layout == "flat":
        return None
    node = _node(call, "concat", layout)
    node.inputs = tuple(t.name for t in tensors)
    return node


def _max_pool(call: Call, layout: str) -> Node | None:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = call.named(*names)
    if layout != "nchw" or given.get("return_indices"):
        return None
    return _node(
        call, "max_pool", layout, **_window(given), dilation=_pair(given.get("dilation", 1))
    )


def _avg_pool(call: Call, layout: str) -> Node | None:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    given = call.named(*names, "divisor_override")
    if layout != "nchw" or given.get("divisor_override") is not None:
        return None
    include = bool(given.get("count_include_pad", True))
    return _node(call, "avg_pool", layout, **_window(given), include_pad=include)


def _window(given: dict[str, Any]) -> dict[str, Any]:
    kernel, stride = given["kernel_size"], given.get("stride")
    stride = kernel if stride is None or stride in ((), []) else stride
    return {
        "kernel": _pair(kernel),
        "stride": _pair(stride),
        "padding": _pair(given.get("padding", 0)),
        "ceil": bool(given.get("ceil_mode", False)),
    }


def _adaptive(call: Call, layout: str) -> Node | None:
    size = call.named("output_size").get("output_size")
    if layout != "nchw" or size is None:
        return None
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _node(call, "adaptive_avg_pool", layout, size=(height, width))


def _adaptive_max(call: Call, layout: str) -> Node | None:
    given = call.named("output_size", "return_indices")
    if layout != "nchw" or given.get("return_indices"):
        return None
    if given.get("output_size") not in (1, (1, 1), [1, 1]):
        return None
    window = {"kernel": None, "stride": (1, 1), "padding": (0, 0), "ceil": False}
    return _node(call, "max_pool", layout, **window, dilation=(1, 1))


def _mean(call: Call, layout: str) -> Node | None:
    given = call.named("dim", "keepdim")
    if "dtype" in given or "dim" not in given or given["dim"] is None:
        return None
    rank = len(call.values[0].shape)
    dims = given["dim"] if isinstance(given["dim"], (tuple, list)) else (given["dim"],)
    found = sorted(dim % rank for dim in dims)
    wanted = {"nchw": [2, 3], "nhwc": [1, 2], "ntc": [1], "nct": [2]}.get(layout)
    if found != wanted:
        return None
    return _node(
        call, "adaptive_avg_pool", layout if given.get("keepdim", False) else "nc", size=(1, 1)
    )


def _reshape(call: Call, layout: str) -> Node | None:
    """Flatten, view, reshape, squeeze: where the codes stay as they lie."""
    old, new = call.values[0].shape, call.shape
    if not new or new[0] != old[0]:
        return None
    if new == old:
        return _node(call, "view", layout, pixels="same")
    if layout == "nchw" and len(new) == 2:
        one = old[2] * old[3] == 1
        return _node(call, "view", "nc" if one else "flat", pixels="same" if one else "none")
    if layout == "nchw" and new[1:] == (old[1], old[2] * old[3]):
        return _node(call, "view", "nct", pixels="row")
    if layout == "nhwc" and new[1:] == (old[1] * old[2], old[3]):
        return _node(call, "view", "ntc", pixels="row")
    if layout in ("nhwc", "ntc") and len(new) == 2:
        return _node(call, "view", "nc", pixels="none")
    if layout == "nct" and old[2] == 1 and new[1:] == (old[1],):
        return _node(call, "view", "nc", pixels="same")
    if layout == "nc" and new[1:] == (old[1], 1, 1):
        return _node(call, "view", "nchw", pixels="same")
    return None


_PERMUTED = {
    ("nchw", (0, 2, 3, 1)): "nhwc",
    ("nhwc", (0, 3, 1, 2)): "nchw",
    ("nct", (0, 2, 1)): "ntc",
    ("ntc", (0, 2, 1)): "nct",
}


def _permute(call: Call, layout: str) -> Node | None:
    dims = call.rest("dims")
    return _reordered(call, layout, [d for d in dims if isinstance(d, int)])


def _transpose(call: Call, layout: str) -> Node | None:
    given = call.named("dim0", "dim1")
    order = list(range(len(call.shape)))
    first, second = given["dim0"], given["dim1"]
    order[first], order[second] = order[second], order[first]
    return _reordered(call, layout, order)


def _reordered(call: Call, layout: str, order: list[int]) -> Node | None:
    rank = len(call.shape)
    found = _PERMUTED.get((layout, tuple(dim % rank for dim in order)))
    return None if found is None else _node(call, "view", found, pixels="same")


def _pads(call: Call) -> tuple[tuple[int, int, int, int], float] | None:
    """((left, right, top, bottom), value) of a call that pads by a constant."""
    if call.key in (nn.ZeroPad2d, nn.ConstantPad2d):
        given = call.named("padding", "value")
        sides, value = given["padding"], given.get("value", 0)
    elif call.key in (F.pad, "pad"):
        given = call.named("pad", "mode", "value")
        sides, value = given.get("pad"), given.get("value")
        if given.get("mode", "constant") != "constant":
            return None
    else:
        return None
    if not isinstance(sides, (tuple, list)) or not all(isinstance(side, int) for side in sides):
        return None
    if len(sides) not in (2, 4) or min(sides) < 0 or len(call.values) != 1:
        return None
    left, right, top, bottom = (*sides, 0, 0)[:4]
    return (left, right, top, bottom), 0.0 if value is None else float(value)


def _pad(call: Call, layout: str) -> Node | None:
    found = _pads(call)
    if found is None or layout != "nchw":
        return None
    return _node(call, "pad", layout, sides=found[0], value=found[1])


def _resize(call: Call, layout: str) -> Node | None:
    given = call.named("size", "scale_factor", "mode", "align_corners")
    scale = given.get("scale_factor")
    if layout != "nchw" or given.get("mode", "nearest") != "nearest" or scale is None:
        return None
    factors = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
    if any(factor != int(factor) or factor < 1 for factor in factors):
        return None
    return _node(call, "resize", layout, factors=tuple(int(factor) for factor in factors))


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)

_IDENTITIES = {
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.AlphaDropout,
    torch.clone,
    "clone",
    "contiguous",
    "detach",
    "alias",
}
_DROPOUTS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout}
_DROPOUTS |= {"dropout", "feature_dropout", "alpha_dropout"}

_PATTERNS: dict[Any, Callable[[Call, str], Node | None]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _mul),
    **dict.fromkeys((torch.cat, torch.concat, "cat"), _concat),
    **dict.fromkeys((nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, "max_pool2d"), _max_pool),
    **dict.fromkeys((nn.AvgPool2d, F.avg_pool2d, "avg_pool2d"), _avg_pool),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, "adaptive_avg_pool2d"), _adaptive
    ),
    **dict.fromkeys((nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d), _adaptive_max),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((nn.Flatten, torch.flatten, torch.reshape, torch.squeeze), _reshape),
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze"), _reshape),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, "transpose"), _transpose),
    **dict.fromkeys((nn.ZeroPad2d, nn.ConstantPad2d, F.pad, "pad"), _pad),
    **dict.fromkeys(
        (nn.Upsample, nn.UpsamplingNearest2d, F.interpolate, "upsample_nearest2d"), _resize
    ),
}
