"""Weight formats: what an unsigned code means, and how many of them one packed vector holds.

The list itself is the extension's (`csrc/formats.h`); nothing is repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from lowbit import _core

PANEL = 16  # output channels that one packed vector serves
VECTOR_BYTES = 64  # four bytes of codes for each of them


@dataclass(frozen=True)
class Format:
    """A weight format: code `c` of `bits` bits has the value `mul * c + add`, before the scale.

    Attributes:
        name: "int8", "int4", "int2", "ternary" or "binary".
        index: position in `FORMATS`, by which the extension knows the format.
        bits: bits of a code.
        mul: step between two levels.
        add: value of code 0.
        produced: smallest and largest code that a quantizer produces. int8 leaves out code 0
            (-128) to stay symmetric and ternary code 3 (2); both are legal in a file.
    """

    name: str
    index: int
    bits: int
    mul: int
    add: int
    produced: tuple[int, int]

    @property
    def planes(self) -> int:
        """Codes in one byte."""
        return 8 // self.bits

    @property
    def depth(self) -> int:
        """Consecutive k that one 64-byte vector holds for each of its 16 channels."""
        return 4 * self.planes

    @property
    def min_value(self) -> int:
        """Smallest value that a quantizer produces."""
        return self.mul * self.produced[0] + self.add

    @property
    def max_value(self) -> int:
        """Largest value that a quantizer produces."""
        return self.mul * self.produced[1] + self.add

    def value(self, codes: torch.Tensor) -> torch.Tensor:
        """Values of `codes` (any shape, uint8) as float32, exactly."""
        return codes.float() * self.mul + self.add

    def packed_shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the packed codes of an [n, k] matrix: panels, steps, 64 bytes."""
        return -(-n // PANEL), -(-k // self.depth), VECTOR_BYTES


def _produced(name: str, bits: int) -> tuple[int, int]:
    lowest = 1 if name == "int8" else 0
    highest = 2 if name == "ternary" else 2**bits - 1
    return lowest, highest


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        name: Format(name, index, bits, mul, add, _produced(name, bits))
        for index, (name, (bits, mul, add)) in enumerate(_core.FORMATS.items())
    }
)
