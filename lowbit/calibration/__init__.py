"""Calibration: what static activations and data-dependent weights learn from example data."""

from lowbit.calibration.data import batches
from lowbit.calibration.deploy import convert
from lowbit.calibration.prepare import NotCaptured, prepare
from lowbit.calibration.prepared import ObserverModule
from lowbit.calibration.run import calibrate

__all__ = ["NotCaptured", "ObserverModule", "batches", "calibrate", "convert", "prepare"]
