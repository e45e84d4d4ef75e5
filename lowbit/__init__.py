"""Low-bit inference for PyTorch models on CPUs: INT8, INT4, INT2, ternary and binary weights.

Examples:
    qmodel = lowbit.quantize(model, "w4a8")      # a quantized copy
    report = lowbit.quantize_(model, "w8a8")     # in place; the account of every layer
    lowbit.quantize(model, "w8a8-static", calibration=batches)
    prepared = lowbit.prepare_qat(model, "w2a8") # train this, then lowbit.convert(prepared)
    lowbit.compare(model, ["w8a8", "w4a8"], x)   # speed, size and quality, side by side
"""

import sys
from pathlib import Path

from lowbit.openmp import share_openmp

try:
    share_openmp()
    from lowbit import _core
except ImportError as error:
    # The command cannot begin, and says so as it says other errors: in a line.
    as_module = sys.argv[0] == "-m" and {"lowbit", "lowbit.cli"} & set(sys.orig_argv)
    if as_module or Path(sys.argv[0]).stem == "lowbit":
        raise SystemExit(f"lowbit: error: {error}") from None
    raise
from lowbit import nn, observers, qat
from lowbit.calibration.deploy import convert
from lowbit.calibration.prepare import prepare
from lowbit.calibration.run import calibrate
from lowbit.compare import compare
from lowbit.convert import quantize, quantize_, register_converter
from lowbit.fuse import fuse
from lowbit.info import cpu_info
from lowbit.mixed.search import search
from lowbit.mixed.sensitivity import sensitivity
from lowbit.qat import prepare_qat
from lowbit.report import Report, summary
from lowbit.rounding.distill import distill_
from lowbit.rounding.equalize import equalize
from lowbit.rounding.smooth import smooth
from lowbit.schemes import RECIPES, Scheme
from lowbit.serialize import FileFormatError, load_file, save_file

__version__: str = _core.build_info()["version"]

__all__ = [
    "RECIPES",
    "FileFormatError",
    "Report",
    "Scheme",
    "__version__",
    "calibrate",
    "compare",
    "convert",
    "cpu_info",
    "distill_",
    "equalize",
    "fuse",
    "load_file",
    "nn",
    "observers",
    "prepare",
    "prepare_qat",
    "qat",
    "quantize",
    "quantize_",
    "register_converter",
    "save_file",
    "search",
    "sensitivity",
    "smooth",
    "summary",
]
