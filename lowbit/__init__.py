"""Low-bit inference for PyTorch models on CPUs."""

import torch  # noqa: F401  first: it loads the OpenMP runtime that the extension then shares

from lowbit import _core  # noqa: F401
