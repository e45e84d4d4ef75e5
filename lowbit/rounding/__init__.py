"""Weight quantizers that see more than one unit of weights at a time, by name in a `Scheme`.

Without data: `hqq`. With calibration data, which `lowbit.quantize(..., calibration=)` takes:
`gptq`, `adaround` and `descent`. `equalize` and `smooth` prepare a float model.
"""

from lowbit.rounding import adaround, descent, gptq, hqq

__all__ = ["adaround", "descent", "gptq", "hqq"]
