"""What this machine can do at most, probed in the same run as the layers.

One core's multiply-accumulates per second with the instructions of the ISA in use, and the bytes
per second that all threads together read from memory. A layer's figure is a fraction of these:
GMAC/s alone say nothing about how much is left.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import lowbit._core as _core

READ_BYTES = 512 << 20  # far above the last-level cache of a desktop or a server's share of one


@dataclass(frozen=True)
class Ceilings:
    """Ceilings for a number of threads.

    Attributes:
        threads: number of threads; the arithmetic probes run on one core and are multiplied by it,
            so a core that shares its execution units with another makes them too high.
        dot: int8 multiply-accumulates per second.
        fma: float32 multiply-accumulates per second.
        xnor: binary multiply-accumulates per second.
        read: bytes per second read from memory.
    """

    threads: int
    dot: float
    fma: float
    xnor: float
    read: float

    def macs_per_second(self, what: str) -> float:
        """The arithmetic ceiling called "dot", "fma" or "xnor"."""
        return {"dot": self.dot, "fma": self.fma, "xnor": self.xnor}[what]

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"int8 dot {self.dot / 1e9:.0f} GMAC/s, float32 FMA {self.fma / 1e9:.0f} GMAC/s, "
            f"xnor {self.xnor / 1e9:.0f} GMAC/s, memory read {self.read / 1e9:.1f} GB/s"
        )


def probe(threads: int, seconds: float = 0.2) -> Ceilings:
    """Probes all ceilings; takes about four times `seconds`.

    Each is the best of three probes: what else runs on the machine only ever takes away.
    """

    def cores(what: Literal["dot", "fma", "xnor"]) -> float:
        return threads * max(_core.probe(what, seconds / 3) for _ in range(3))

    reads = [_core.read_bandwidth(READ_BYTES, threads, seconds / 3) for _ in range(3)]
    return Ceilings(threads, cores("dot"), cores("fma"), cores("xnor"), max(reads))
