"""Calibration: what static activations and data-dependent weights learn from example data."""

from lowbit.calibration.data import batches

__all__ = ["batches"]
