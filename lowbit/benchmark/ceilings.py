"""What this machine can do at most, probed in the same run as the layers.

One core's multiply-accumulates per second with the instructions of the ISA in use, for each width
of weights, and the bytes per second that all threads together read from memory and from the caches.
A layer's figure is a fraction of these: GMAC/s alone say nothing about how much is left.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import lowbit._core as _core
from lowbit.info import cache_bytes

Arithmetic = Literal["dot8", "dot4", "dot2", "dot1", "fma", "xnor"]
ARITHMETIC: tuple[Arithmetic, ...] = get_args(Arithmetic)

READ_BYTES = 512 << 20  # far above the last-level cache of a desktop or a server's share of one


@dataclass(frozen=True)
class Ceilings:
    """Ceilings for a number of threads.

    Attributes:
        threads: number of threads; the arithmetic probes run on one core and are multiplied by it,
            so a core that shares its execution units with another makes them too high.
        dot8, dot4, dot2, dot1: multiply-accumulates per second of int8 activations and weights of
            so many bits: the instructions that unpack the weights are counted, and differ.
        fma: float32 multiply-accumulates per second.
        xnor: binary multiply-accumulates per second.
        read: bytes per second read from memory.
        l3: bytes per second read from the L3 cache; None where its size is not known, or where the
            threads' L2 caches hold most of what it holds.
        l2: bytes per second read from the threads' L2 caches; None where the size is not known.
        l3_bytes: size of the L3 cache, 0 if unknown.
        l2_bytes: size of the L2 caches of all threads together, 0 if unknown.
    """

    threads: int
    dot8: float
    dot4: float
    dot2: float
    dot1: float
    fma: float
    xnor: float
    read: float
    l3: float | None = None
    l2: float | None = None
    l3_bytes: int = 0
    l2_bytes: int = 0

    def macs_per_second(self, what: str) -> float:
        """The arithmetic ceiling called "dot8", "dot4", "dot2", "dot1", "fma" or "xnor"."""
        found: dict[str, float] = {name: getattr(self, name) for name in ARITHMETIC}
        return found[what]

    def bytes_per_second(self, size: int, from_memory: bool) -> tuple[str, float]:
        """Where `size` bytes that are read again and again come from, and the bytes per second.

        Args:
            size: bytes that one call reads.
            from_memory: other data passes through the caches between two calls.

        Returns:
            "read" (memory), "l3" or "l2", and that ceiling.
        """
        if not from_memory:
            for name, rate, room in (
                ("l2", self.l2, self.l2_bytes),
                ("l3", self.l3, self.l3_bytes),
            ):
                if rate is not None and size <= room:
                    return name, rate
        return "read", self.read

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        reads = {"memory": self.read, "L3": self.l3, "L2": self.l2}
        known = [f"{name} {rate / 1e9:.1f}" for name, rate in reads.items() if rate is not None]
        dots = "/".join(f"{r / 1e9:.0f}" for r in (self.dot8, self.dot4, self.dot2, self.dot1))
        return (
            f"dot W8/4/2/1 {dots}, float32 FMA {self.fma / 1e9:.0f}, "
            f"xnor {self.xnor / 1e9:.0f} GMAC/s;\n  read {', '.join(known)} GB/s"
        )


def probe(threads: int, seconds: float = 0.2) -> Ceilings:
    """Probes all ceilings; takes about nine times `seconds`.

    Each is the best of three probes: what else runs on the machine only ever takes away.
    """

    def cores(what: Arithmetic) -> float:
        return threads * max(_core.probe(what, seconds / 3) for _ in range(3))

    def read(size: int) -> float:
        return max(_core.read_bandwidth(size, threads, seconds / 3) for _ in range(3))

    caches = cache_bytes()
    l2_bytes, l3_bytes = threads * caches.get("l2", 0), caches.get("l3", 0)
    # A buffer of half a cache lies in it wholly; half of the L3 must not lie in the L2s as well.
    return Ceilings(
        threads,
        cores("dot8"),
        cores("dot4"),
        cores("dot2"),
        cores("dot1"),
        cores("fma"),
        cores("xnor"),
        read(READ_BYTES),
        l3=read(l3_bytes // 2) if l3_bytes >= 4 * l2_bytes > 0 else None,
        l2=read(l2_bytes // 2) if l2_bytes else None,
        l3_bytes=l3_bytes,
        l2_bytes=l2_bytes,
    )
