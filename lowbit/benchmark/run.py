"""Runs the benchmark of `lowbit bench`: every shape, M and number of threads in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

import lowbit._core as _core
from lowbit.benchmark import case as cases
from lowbit.benchmark.candidate import Candidate
from lowbit.benchmark.case import Case
from lowbit.benchmark.ceilings import Ceilings, probe
from lowbit.benchmark.measure import measure, reason
from lowbit.benchmark.peers import PEERS, Peer
from lowbit.benchmark.result import Group, Result
from lowbit.benchmark.shapes import parse
from lowbit.info import cpu_info
from lowbit.schemes import Scheme

STREAM_M = 8
"""Up to this many rows, a layer's time is that of reading its weights: they come from memory."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        op: "linear" or "conv".
        shapes: see `lowbit.benchmark.shapes.parse` for the grammar.
        m: rows of a linear's input, images of a convolution's.
        formats: recipes of lowbit's layers.
        threads: numbers of threads.
        peers: names in `lowbit.benchmark.peers.PEERS`.
        isa: forces an ISA; None keeps the one in use.
        rotate_bytes: bytes of weight copies for M up to `STREAM_M` (linears); 0 times them warm.
        budget_seconds: per shape, M and number of threads, for all engines together.
        min_rounds: rounds at least.
        probe_seconds: for each ceiling.
        padded: times lowbit's layers of ragged linears also in whole vectors and panels.
    """

    op: str = "linear"
    shapes: tuple[str, ...] = cases.LINEAR_SHAPES
    m: tuple[int, ...] = (1, 8, 32, 128, 512)
    formats: tuple[str, ...] = cases.FORMATS
    threads: tuple[int, ...] = (1,)
    peers: tuple[str, ...] = tuple(PEERS)
    isa: str | None = None
    rotate_bytes: int = 256 << 20
    budget_seconds: float = 3.0
    min_rounds: int = 10
    probe_seconds: float = 0.3
    padded: bool = False

    def check(self) -> None:
        """Raises ValueError for anything that would fail later."""
        if self.op not in ("linear", "conv"):
            raise ValueError(f"unknown operation {self.op!r}: use linear or conv")
        for shape in self.shapes:
            parse(self.op, shape)
        for name in self.formats:
            Scheme.parse(name)
        for name in self.peers:
            if name not in PEERS:
                raise ValueError(f"unknown peer {name!r}: use any of {', '.join(PEERS)}")
        if not self.shapes or not self.m or not self.threads:
            raise ValueError("nothing to run: shapes, m and threads each need a value")
        if min(self.m) < 1 or min(self.threads) < 1:
            raise ValueError("m and threads must be at least 1")
        usable = [row["name"] for row in _core.isas() if row["usable"]]
        if self.isa is not None and self.isa not in usable:
            raise ValueError(f"ISA {self.isa!r} is not usable here: use {', '.join(usable)}")


def run(
    options: Options,
    progress: Callable[[str], None] | None = None,
    save: Callable[[Result], None] | None = None,
) -> Result:
    """Runs all cases.

    Leaves torch's number of threads, the ISA and torch's quantized engine as it found them.

    Args:
        options: what to run.
        progress: told in words what is running.
        save: given every case's result, of that one group, as soon as it is there.

    Raises:
        ValueError: an option is not valid.
    """
    options.check()
    say = progress or (lambda _: None)
    save = save or (lambda _: None)
    offering = [name for name in options.peers if getattr(PEERS[name], options.op) is not None]
    missing = {name: reason for name in offering if (reason := PEERS[name].missing())}
    peers = [PEERS[name] for name in offering if name not in missing]
    threads_before, isa_before = torch.get_num_threads(), _core.isa()
    engine_before = torch.backends.quantized.engine
    groups: list[Group] = []
    try:
        if options.isa is not None:
            _core.set_isa(options.isa)
        environment = cpu_info()
        versions = {peer.name: peer.version() for peer in peers}
        for threads in options.threads:
            torch.set_num_threads(threads)
            say(f"probing the ceilings, {threads} threads")
            ceilings = probe(threads, options.probe_seconds)
            for shape in options.shapes:
                say(f"{options.op} {shape}: converting")
                layer = cases.make(options.op, shape, 1).layer
                layers = cases.convert(layer, options.formats)
                for m in options.m:
                    say(f"{options.op} {shape}, M={m}, {threads} threads")
                    case = cases.make(options.op, shape, m, layer)
                    candidates = cases.lowbit_candidates(case, layers)
                    if options.padded:
                        candidates += cases.padded_candidates(case, options.formats)
                    groups.append(_run_case(options, case, candidates, ceilings, peers))
                    save(Result(groups[-1:], missing, versions, environment))
                    del case, candidates
                    gc.collect()
    finally:
        _core.set_isa(isa_before)
        torch.set_num_threads(threads_before)
        torch.backends.quantized.engine = engine_before
    return Result(groups, missing, versions, environment)


def _run_case(
    options: Options,
    case: Case,
    candidates: list[Candidate],
    ceilings: Ceilings,
    peers: list[Peer],
) -> Group:
    failed: dict[str, str] = {}
    for peer in peers:
        found = _peer_candidates(peer, case, ceilings.threads)
        if isinstance(found, str):
            failed[peer.name] = found
        else:
            candidates += found
    streams = options.op == "linear" and case.m <= STREAM_M
    group = measure(
        case,
        candidates,
        ceilings,
        rotate_bytes=options.rotate_bytes if streams else 0,
        budget_seconds=options.budget_seconds,
        min_rounds=options.min_rounds,
    )
    group.failed.update(failed)
    return group


def _peer_candidates(peer: Peer, case: Case, threads: int) -> list[Candidate] | str:
    """The peer's candidates (none if it lacks the operation), or why it failed."""
    try:
        if isinstance(case.layer, torch.nn.Linear):
            return peer.linear(case.layer, case.x, threads) if peer.linear else []
        return peer.conv(case.layer, case.x, threads) if peer.conv else []
    except Exception as error:  # an engine may refuse in any way
        return reason(error)
