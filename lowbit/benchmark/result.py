"""The results of `lowbit bench`: rows, groups of rows timed together, and how they print."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from lowbit.benchmark.ceilings import Ceilings
from lowbit.timing import Ratio, Timing

LEGEND = """\
Median times; ratios are medians of the rounds' ratios (10th-90th percentile), above 1 is quicker.
"of peak" and "of read" are fractions of the ceilings above; "error" is the output's relative error
against float32 for random weights and inputs."""


@dataclass(frozen=True)
class Row:
    """One engine's layer.

    Attributes:
        name: engine and format.
        timing: seconds per forward call, all rounds.
        versus_float32: how many times quicker than torch float32 (its best memory format).
        versus_torch_int8: how many times quicker than torch INT8 (its best backend).
        macs_per_second: multiply-accumulates of the float layer per second of the median call.
        fraction_of_peak: of the probed arithmetic ceiling; int16 activations count both passes.
            None if no probe times its instructions.
        bytes_per_second: bytes of weights and scales per second of the median call.
        fraction_of_read: of the probed memory read; None if the weights came from a cache.
        weight_bytes: bytes of weights and scales.
        relative_error: of the output against float32, Euclidean norms; random weights.
        own: whether it is a layer of lowbit.
        layout: memory format of a convolution's input and output, "nchw" or "channels_last".
        rival: whether it is the layer as a user calls it; else it is shown and not raced.
        widths: the widths of weights, in bits, that it offers.
        activation_bits: of the activations that it multiplies.
        bound: what bounds it: "dot8" to "dot1", "fma", "xnor", or where the weights (and the images
            of a convolution) are read from: "read" (memory), "l3", "l2".
        fraction_of_bound: the time that this ceiling demands over the median time.
        peer: the fastest peer of the width, for lowbit's own layers.
        peer_rivals: whether that peer offers the width; otherwise it is an 8-bit one.
        versus_peer: how many times quicker than that peer.
    """

    name: str
    timing: Timing
    versus_float32: Ratio | None
    versus_torch_int8: Ratio | None
    macs_per_second: float
    fraction_of_peak: float | None
    bytes_per_second: float
    fraction_of_read: float | None
    weight_bytes: int
    relative_error: float
    own: bool
    layout: str | None
    rival: bool
    widths: tuple[int, ...]
    activation_bits: int
    bound: str
    fraction_of_bound: float
    peer: str | None
    peer_rivals: bool
    versus_peer: Ratio | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, the timing and the ratios as their own dicts."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("timing", "versus_float32", "versus_torch_int8", "versus_peer"):
            row[name] = row[name] and row[name].to_dict()
        return row


@dataclass(frozen=True)
class Group:
    """The rows of one shape, one M and one number of threads: timed together, alternately.

    Attributes:
        op: "linear" or "conv".
        shape: as given.
        m: rows or images.
        ceilings: probed for this number of threads.
        rotated_bytes: bytes of copies that every engine's weights were rotated through; 0 if the
            same weights were used again and again, from the cache where they fit.
        macs: multiply-accumulates of one forward call.
        activation_bytes: float32 input and output of one forward call.
        rows: the engines.
        failed: engine -> reason, for those that could not run this case.
    """

    op: str
    shape: str
    m: int
    ceilings: Ceilings
    rotated_bytes: int
    macs: int
    activation_bytes: int
    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Shape, M, threads and where the weights came from, in words."""
        what = "M" if self.op == "linear" else "batch"
        threads = self.ceilings.threads
        source = (
            f"weights from memory ({self.rotated_bytes / 2**20:.0f} MiB of copies)"
            if self.rotated_bytes
            else "same weights each call"
        )
        plural = "s" if threads > 1 else ""
        return f"{self.op} {self.shape}, {what}={self.m}, {threads} thread{plural}, {source}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return {
            "op": self.op,
            "shape": self.shape,
            "m": self.m,
            "threads": self.ceilings.threads,
            "ceilings": self.ceilings.to_dict(),
            "rotated_bytes": self.rotated_bytes,
            "macs": self.macs,
            "activation_bytes": self.activation_bytes,
            "rows": [row.to_dict() for row in self.rows],
            "failed": self.failed,
        }

    def __str__(self) -> str:
        from_memory = self.rotated_bytes > 0
        throughput = ["GB/s", "of read"] if from_memory else ["GMAC/s", "of peak"]
        headers = ["", "microseconds", "x float32", "x torch int8", *throughput, "error"]
        body = [_cells(row, from_memory) for row in self.rows]
        table = tabulate(
            body, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1))
        )
        notes = [f"  {name}: failed: {reason}" for name, reason in self.failed.items()]
        return "\n".join([self.title, table, *notes])


def _cells(row: Row, from_memory: bool) -> list[str]:
    if from_memory:
        throughput = [f"{row.bytes_per_second / 1e9:.1f}", _percent(row.fraction_of_read)]
    else:
        throughput = [f"{row.macs_per_second / 1e9:.0f}", _percent(row.fraction_of_peak)]
    return [
        row.name,
        f"{row.timing.p50 * 1e6:.0f}",
        _ratio(row.versus_float32),
        _ratio(row.versus_torch_int8),
        *throughput,
        f"{row.relative_error:.3f}",
    ]


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def _ratio(value: Ratio | None) -> str:
    if value is None:
        return ""
    # The reference itself, round by round.
    return "1.00" if value.p10 == value.p90 == 1.0 else str(value)


@dataclass(frozen=True)
class Result:
    """Everything that one run of `lowbit bench` found.

    Attributes:
        groups: in the order of running.
        missing: peer -> why it could not take part.
        peers: peer -> the version that took part.
        environment: what `lowbit.info.cpu_info` said.
    """

    groups: list[Group]
    missing: dict[str, str]
    peers: dict[str, str]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All groups, the peers and the environment, as JSON takes them."""
        return {
            "groups": [group.to_dict() for group in self.groups],
            "missing": self.missing,
            "peers": self.peers,
            "environment": self.environment,
        }

    def __str__(self) -> str:
        cpu, versions = self.environment["cpu"], self.environment["versions"]
        head = [
            f"{cpu['model']}, ISA {self.environment['isa']['chosen']}, "
            f"lowbit {versions['lowbit']}, torch {versions['torch']}"
        ]
        threads: dict[int, Ceilings] = {g.ceilings.threads: g.ceilings for g in self.groups}
        head += [f"ceilings, {n} thread{'s' if n > 1 else ''}: {c}" for n, c in threads.items()]
        head += [f"missing: {name} ({reason})" for name, reason in self.missing.items()]
        return "\n\n".join(["\n".join(head), *map(str, self.groups), LEGEND])
