"""Weight quantizers that see more than one weight at a time."""

from lowbit.rounding import descent, gptq

__all__ = ["descent", "gptq"]
