"""A node of a captured network: one operation on values, in integers or in float.

The name of a node is that of its value. What an operation does to sizes and codes is in
`lowering.py`, how torch's calls become nodes in `capture.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Where codes lie is always [N, height, width, channels]; a layout says which dimensions of the
# float tensor these are. "flat" are features in torch's order of a flattened [C, H, W].
LAYOUTS = {"nchw": 4, "nhwc": 4, "nct": 3, "ntc": 3, "nc": 2, "flat": 2}
CHANNELS_LAST = ("nhwc", "ntc", "nc")


@dataclass(frozen=True)
class Ref:
    """The value of a node, in the arguments of a float operation."""

    name: str


@dataclass
class Node:
    """One operation.

    Attributes:
        name: of the operation and of its value, unique.
        kind: "input", "float", or one of `lowering.OPERATIONS`, which run in integers.
        inputs: names of the nodes whose values it takes, in order.
        settings: what else it takes, by kind; plain values.
        layout: of its value if that is codes, see `LAYOUTS`; "" where nothing asked for codes.
        shape: of its value for the example inputs.
        dtype: of its value in the float model, for what leaves the integers.
        fused: names of the float model's calls that it computes, with its own.
        reason: why it is not in integers.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    layout: str = ""
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fused: tuple[str, ...] = ()
    reason: str = ""

    @property
    def in_integers(self) -> bool:
        """Whether it runs on codes."""
        return self.kind not in ("input", "float")

    @property
    def keeps_codes(self) -> bool:
        """Whether its codes mean what its input's do."""
        return self.kind in ("max_pool", "pad", "resize", "view")


def check_size(argument: str, x: Tensor, node: Node) -> None:
    """Refuses what torch.export has not seen.

    Raises:
        ValueError: an input of another size than the example's, the batch left out.
    """
    if x.shape[1:] != node.shape[1:] or x.dim() != len(node.shape):
        sizes = ", ".join(["N" if node.shape else "", *map(str, node.shape[1:])])
        raise ValueError(
            f"argument '{argument}' is {list(x.shape)}: the model was captured by torch.export, "
            f"for [{sizes}] alone"
        )


def references(value: Any) -> Iterator[str]:
    """Names of all values in an argument."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, slice):
        yield from references((value.start, value.stop, value.step))


def replace(value: Any, fn: Callable[[str], Any]) -> Any:
    """An argument with each value's reference replaced by `fn(name)`."""
    if isinstance(value, Ref):
        return fn(value.name)
    if isinstance(value, (tuple, list)):
        return type(value)(replace(item, fn) for item in value)
    if isinstance(value, dict):
        return {key: replace(item, fn) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(replace(part, fn) for part in (value.start, value.stop, value.step)))
    return value
