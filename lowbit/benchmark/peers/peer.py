"""What a peer is: a name, the packages it needs, and how it builds a linear or a convolution."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import nn

from lowbit.benchmark.candidate import Candidate

BuildLinear = Callable[[nn.Linear, torch.Tensor, int], list[Candidate]]
BuildConv2d = Callable[[nn.Conv2d, torch.Tensor, int], list[Candidate]]


@dataclass(frozen=True)
class Peer:
    """An engine to race against.

    Attributes:
        name: as `--peers` takes it.
        requires: the modules that must be importable.
        linear: `(layer, input, threads) -> candidates`, or None if the peer has no linear.
        conv: `(layer, input, threads) -> candidates`, or None if the peer has no convolution.
        absent: says why the peer cannot run here, or None, where `requires` does not.
        tell_version: its version, where that of the packages in `requires` does not say it.
    """

    name: str
    requires: tuple[str, ...] = ()
    linear: BuildLinear | None = None
    conv: BuildConv2d | None = None
    absent: Callable[[], str | None] | None = None
    tell_version: Callable[[], str] | None = None

    def missing(self) -> str | None:
        """Why this peer cannot run here, or None if it can."""
        absent = [name for name in self.requires if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        return self.absent() if self.absent is not None else None

    def version(self) -> str:
        """What runs: packages and versions. To be called where nothing is missing."""
        if self.tell_version is not None:
            return self.tell_version()
        found = [f"{name} {metadata.version(name)}" for name in self.requires]
        return ", ".join(found) or f"torch {torch.__version__}"
