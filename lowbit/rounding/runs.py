"""Runs a model up to a layer: in float, or quantized as far as it is.

What lies before the last finished block is not run again, see `lowbit.rounding.shortcut`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lowbit.plan import Job
from lowbit.quality import floating_tensors
from lowbit.rounding.blocks import Call, Sample
from lowbit.rounding.shortcut import Shortcut, copied, has_no_nan, same

Forward = Callable[[nn.Module, Any], Any]


class _Reached(BaseException):  # no model's `except Exception` may stop it
    """The layer whose input was wanted has been called."""


@dataclass
class Calls:
    """What one run over all data showed of a layer.

    Attributes:
        order: how many layers were called before it.
        counts: calls by batch.
        source: batch and tensor of its first call; layers that took the same one share a run.
    """

    order: int
    counts: dict[int, int] = field(default_factory=dict)
    source: tuple[int, int] | None = None


class Overlay:
    """Makes float layers compute what their lowbit layers do, while it is on."""

    def __init__(self) -> None:
        self._forwards: dict[int, tuple[nn.Module, Callable[..., Any]]] = {}

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, *error: object) -> None:
        self.off()

    def add(self, job: Job, layer: nn.Module) -> None:
        """From now on `on` replaces this job's layer, and its batch norm by nothing."""
        if layer is job.module:
            return
        self._forwards[id(job.module)] = job.module, layer.forward
        if job.fold is not None:
            self._forwards[id(job.fold.norm)] = job.fold.norm, _same

    def on(self) -> None:
        for module, forward in self._forwards.values():
            vars(module)["forward"] = forward

    @contextlib.contextmanager
    def replaced(self, functions: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
        """On, with other functions for some of the layers."""
        self.on()
        try:
            for key, function in functions.items():
                vars(self._forwards[key][0])["forward"] = function
            yield
        finally:
            self.off()

    def off(self) -> None:
        for module, _ in self._forwards.values():
            vars(module).pop("forward", None)


def _same(x: Tensor) -> Tensor:
    return x


class Runner:
    """Runs the float model, or the quantized one as far as it is, up to a layer.

    Args:
        model: the float model.
        data: gives the batches, the same ones each time.
        forward: runs a model on a batch.
        overlay: what makes the model the quantized one.
        blocks: modules behind which runs may begin.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Callable[[], Iterable[Any]],
        forward: Forward,
        overlay: Overlay,
        blocks: Sequence[nn.Module],
    ) -> None:
        self._model, self._data, self._forward, self._overlay = model, data, forward, overlay
        self._shortcut = Shortcut(blocks)
        self._checked: set[tuple[int, bool]] = set()
        self.replaced = overlay.replaced

    def batches(self) -> Iterator[tuple[int, Any]]:
        """The number of each batch, and the batch."""
        yield from enumerate(self._data())

    def watch(self, jobs: Sequence[Job]) -> dict[int, Calls]:
        """Runs the float model on all data: which layers are called, in which order."""
        calls: dict[int, Calls] = {}
        at = 0
        held: list[Any] = []  # tensors whose ids are compared have to live

        def watcher(key: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = _input(args, kwargs)
                if key not in calls:
                    held.append(x)
                    calls[key] = Calls(len(calls), source=(at, id(x)))
                counts = calls[key].counts
                counts[at] = counts.get(at, 0) + 1

            return hook

        layers = [job.module for job in jobs]
        with contextlib.ExitStack() as stack:
            for layer in layers:
                handle = layer.register_forward_pre_hook(watcher(id(layer)), with_kwargs=True)
                stack.enter_context(_hooked(handle))
            begin = stack.enter_context(self._shortcut.watched(layers))
            batches = 0
            for at, batch in self.batches():
                begin(at)
                self._forward(self._model, batch)
                held.clear()
                batches += 1
        if batches == 0:
            raise ValueError("the calibration data are empty: there is no batch to look at")
        return calls

    def advance(self, done: Set[int], sides: Sequence[bool] = (False, True)) -> None:
        """Keeps what the last finished block returns.

        Args:
            done: ids of the float layers that are as they will be.
            sides: which models' inputs will be asked for, as `inputs` names them.
        """
        block = self._shortcut.next_cut(done)
        if block is None:
            return
        outputs: dict[tuple[int, bool], Any] = {}
        for index, batch in self.batches():
            for quantized in sides:
                run = partial(self._outputs, block, index, batch, quantized, copied)
                found = self._short(run, 1)
                if found is None:
                    return
                (outputs[index, quantized],) = found
        self._shortcut.keep(block, outputs)

    def inputs(self, job: Job, index: int, batch: Any, count: int, quantized: bool) -> list[Tensor]:
        """The inputs of the first `count` calls of a layer; what comes behind is not run.

        Args:
            job: the layer's.
            index: the number of the batch.
            batch: the batch.
            count: how often the layer was called on it.
            quantized: which of the models.
        """
        run = partial(self._inputs, job, index, batch, count, quantized)
        if self._shortcut.cut is not None:
            found = self._short(run, count)
            first = (id(job.module), quantized) not in self._checked
            self._checked.add((id(job.module), quantized))
            if found is not None and (not first or same(run(whole=True), found)):
                return found
            self._shortcut.give_up()
        found = run()
        if len(found) != count:
            raise ValueError(
                f"layer '{job.name}' was called {count} times on a batch of the calibration data, "
                f"and then {len(found)} times on the same one: a model to be calibrated takes the "
                "same path each time"
            )
        return found

    def _short(self, run: Callable[[], list[Any]], count: int) -> list[Any] | None:
        """What a run finds that may be shortened; None, and none are any more, if that fails."""
        try:
            found = run()
        except Exception:  # NaN may upset a model; a whole run says what is wrong with it
            found = []
        if len(found) == count and all(map(has_no_nan, found)):
            return found
        self._shortcut.give_up()
        return None

    def _inputs(
        self, job: Job, index: int, batch: Any, count: int, quantized: bool, whole: bool = False
    ) -> list[Tensor]:
        found: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_input(args, kwargs).detach().float())
            if len(found) == count:
                raise _Reached

        handle = job.module.register_forward_pre_hook(hook, with_kwargs=True)
        self._run(handle, index, batch, quantized, whole)
        return found

    def _run(
        self, handle: Any, index: int, batch: Any, quantized: bool, whole: bool = False
    ) -> None:
        """Runs a model until a hook has what it wants, and removes the hook."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_hooked(handle))
            if quantized:
                stack.enter_context(self._overlay.replaced({}))
            if not whole:
                stack.enter_context(self._shortcut.on(index, quantized))
            with contextlib.suppress(_Reached):
                self._forward(self._model, batch)

    def _outputs(
        self,
        block: nn.Module,
        index: int,
        batch: Any,
        quantized: bool,
        take: Callable[[Any], Any],
    ) -> list[Any]:
        """What a function takes of the first output of a block; nothing if it is not called."""
        found: list[Any] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append(take(output))
            raise _Reached

        self._run(block.register_forward_hook(hook), index, batch, quantized)
        return found

    def samples(self, block: nn.Module) -> list[Sample]:
        """What a block gets in the quantized model and returns in the float one, batch by batch.

        None for a block that is not called exactly once.
        """
        if not self._shortcut.calls_once(block):
            return []
        if self._shortcut.cut is not None:
            found = self._short(partial(self._samples, block), sum(1 for _ in self.batches()))
            if found is not None:
                return found
        return self._samples(block)

    def _samples(self, block: nn.Module) -> list[Sample]:
        found = []
        for index, batch in self.batches():
            calls: list[Call] = []

            def before(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                calls: list[Call] = calls,
            ) -> None:
                calls.append((tuple(map(_kept, args)), dict(kwargs)))
                raise _Reached

            targets = self._outputs(block, index, batch, False, _first)
            handle = block.register_forward_pre_hook(before, with_kwargs=True)
            self._run(handle, index, batch, True)
            if not (targets and calls):
                return []
            found.append(Sample(calls[0], targets[0]))
        return found


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    return floating_tensors(output)[0].detach().clone()


def _kept(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
