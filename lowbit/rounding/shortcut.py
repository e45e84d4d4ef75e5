"""Begins runs of a model behind its last finished block, whose output is kept.

Blocks before it return NaN at no cost. Whether what lies behind the block hangs on them, too, is
not reasoned about but watched: NaN that comes through says so, and so does an input of the first
batch that is not, bit for bit, what a run of the whole model gives. Then runs are whole again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.rounding.blocks import Sample

KEPT_BYTES = 1 << 28
"""Outputs of a block, of all batches and of both models, that are kept at most."""

_MISSING = object()


@dataclass
class _Block:
    """What a run over all data showed of a block.

    Attributes:
        module: the block.
        calls: by batch.
        exits: by batch, when it returned: a number that grows during the run.
        before: ids of the layers that were called before it returned, in any batch.
        stubs: by batch, its output with NaN for all numbers.
        bytes: of its outputs.
    """

    module: nn.Module
    calls: dict[int, int] = field(default_factory=dict)
    exits: dict[int, int] = field(default_factory=dict)
    before: set[int] = field(default_factory=set)
    stubs: dict[int, Any] = field(default_factory=dict)
    bytes: int = 0


class Shortcut:
    """The blocks of a model that need not be run again.

    Args:
        blocks: modules, as `lowbit.rounding.blocks.find_blocks` finds them.

    Attributes:
        cut: the block whose outputs are kept; None while there is none.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = {id(block): _Block(block) for block in blocks}
        self._outputs: dict[tuple[int, bool], Any] = {}
        self._once: set[int] = set()
        self._clock = self._batches = 0
        self.cut: nn.Module | None = None

    @contextlib.contextmanager
    def watched(self, layers: Sequence[nn.Module]) -> Iterator[Callable[[int], None]]:
        """Notes what blocks return, and after which layers, while batches are run.

        Yields:
            To be called with the number of each batch before that is run.
        """
        at = 0
        called: set[int] = set()

        def begin(index: int) -> None:
            nonlocal at
            at = index
            called.clear()
            self._batches += 1

        def layer_hook(module: nn.Module, args: Any) -> None:
            called.add(id(module))

        def block_hook(module: nn.Module, args: Any, output: Any) -> None:
            block = self._blocks[id(module)]
            self._clock += 1
            block.calls[at] = block.calls.get(at, 0) + 1
            block.exits[at] = self._clock
            block.before |= called
            block.stubs[at] = _stub(output)
            block.bytes += _bytes(output)

        handles = [layer.register_forward_pre_hook(layer_hook) for layer in layers]
        handles += [b.module.register_forward_hook(block_hook) for b in self._blocks.values()]
        try:
            yield begin
        finally:
            for handle in handles:
                handle.remove()
        once = [1] * self._batches
        self._once = {key for key, b in self._blocks.items() if list(b.calls.values()) == once}
        self._blocks = {
            key: block
            for key, block in self._blocks.items()
            if key in self._once and all(stub is not None for stub in block.stubs.values())
        }

    def next_cut(self, done: Set[int]) -> nn.Module | None:
        """The last block that is finished, if it is another one than `cut`.

        Args:
            done: ids of the layers that are as they will be.
        """
        finished = [
            block
            for block in self._blocks.values()
            if done >= block.before and 2 * block.bytes <= KEPT_BYTES
        ]
        last = max(finished, key=lambda block: max(block.exits.values()), default=None)
        return None if last is None or last.module is self.cut else last.module

    def calls_once(self, module: nn.Module) -> bool:
        """Whether this is a block that every batch calls once."""
        return id(module) in self._once

    def keep(self, module: nn.Module, outputs: dict[tuple[int, bool], Any]) -> None:
        """From now on runs begin behind this block.

        Args:
            module: the block.
            outputs: by the number of the batch, and whether the model is the quantized one.
        """
        self.cut, self._outputs = module, outputs

    def give_up(self) -> None:
        """From now on all runs are whole."""
        self.cut, self._blocks, self._outputs = None, {}, {}

    @contextlib.contextmanager
    def on(self, index: int, quantized: bool) -> Iterator[None]:
        """While this is on, finished blocks return what is known of a batch."""
        if self.cut is None:
            yield
            return
        last = self._blocks[id(self.cut)]
        saved: list[tuple[nn.Module, Any]] = []

        def replace(module: nn.Module, make: Callable[[], Any]) -> None:
            saved.append((module, vars(module).get("forward", _MISSING)))
            vars(module)["forward"] = lambda *args, **kwargs: make()

        try:
            for block in self._blocks.values():
                if block.exits[index] < last.exits[index]:
                    replace(block.module, partial(_filled, block.stubs[index]))
            # A copy: what comes behind may work in place.
            replace(last.module, partial(copied, self._outputs[index, quantized]))
            yield
        finally:
            for module, forward in reversed(saved):
                if forward is _MISSING:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward


def copied(output: Any) -> Any:
    """An output with copies of its tensors."""
    return _mapped(output, lambda tensor: tensor.detach().clone())


def same(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether tensors are equal, bit for bit."""
    return len(wanted) == len(found) and all(map(torch.equal, wanted, found))


def has_no_nan(found: Any) -> bool:
    """Whether no tensor in nested tuples, lists, mappings and samples of blocks holds NaN."""
    if isinstance(found, Tensor):
        return not bool(found.isnan().any())
    if isinstance(found, Mapping):
        found = list(found.values())
    if isinstance(found, Sample):
        found = [found.call, found.target]
    return not isinstance(found, (tuple, list)) or all(map(has_no_nan, found))


def _stub(output: Any) -> Any:
    """An output whose tensors are one number each, stretched to their shapes; None if it can't."""
    try:
        return _mapped(output, lambda tensor: tensor.new_full((), math.nan).expand(tensor.shape))
    except TypeError:
        return None


def _filled(stub: Any) -> Any:
    return _mapped(stub, lambda tensor: tensor.contiguous())


def _bytes(output: Any) -> int:
    found = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal found
        found += tensor.numel() * tensor.element_size()
        return tensor

    with contextlib.suppress(TypeError):
        _mapped(output, add)
    return found


def _mapped(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """An output with a function of each of its tensors.

    Raises:
        TypeError: it is neither a floating tensor nor a tuple or list of these and of None.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        return function(output)
    if type(output) in (tuple, list):
        return type(output)(None if item is None else _mapped(item, function) for item in output)
    raise TypeError(f"an output of {type(output).__name__}")
