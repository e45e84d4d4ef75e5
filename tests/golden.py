"""Golden outputs: the bits that every platform must produce, as hashes in golden.txt.

The operands come from an integer generator that C++ (tests/cpp/test_golden.cpp) and NumPy follow
step for step, and every float in them is exact. So x86, AArch64 and Python can be held against the
same file.

    python tests/golden.py --write             golden.txt anew, from the oracle
    python tests/golden.py _CORE.so ISA        check an extension that is not installed, without
                                               torch (on an emulated CPU); ISA must be its choice
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

GOLDEN = Path(__file__).with_name("golden.txt")


class Lcg:
    """Numerical Recipes' 32-bit generator; the upper 16 bits of its state are used."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, bound: int, shape: tuple[int, ...]) -> np.ndarray:
        """int64 of `shape`, in C order, each (state >> 16) % bound of the next state."""
        out = np.empty(int(np.prod(shape)), np.int64)
        for i in range(out.size):
            self.state = (self.state * 1664525 + 1013904223) & 0xFFFFFFFF
            out[i] = (self.state >> 16) % bound
        return out.reshape(shape)


@dataclass(frozen=True)
class Case:
    """One line of golden.txt, without its hash.

    Attributes:
        dims: m, n, k of a linear layer; batch, height, width, channels, out_channels, and of both
            dimensions kernel, stride, padding, dilation, then groups of a convolution.
        group_size: 0 without groups.
        zeros: 1 with group zeros.
    """

    op: str
    fmt: str
    activation: str
    group_size: int
    zeros: int
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join(map(str, (*astuple(self)[:5], *self.dims)))


@dataclass
class Operands:
    """x float32, codes uint8 [N, ...], scale and bias float32 [N], group_* float16 or None."""

    x: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    group_scale: np.ndarray | None
    group_zero: np.ndarray | None
    bias: np.ndarray


def cases() -> Iterator[tuple[Case, str]]:
    """The cases of golden.txt and their hashes."""
    for line in GOLDEN.read_text().splitlines():
        op, fmt, activation, group_size, zeros, *dims, digest = line.split()
        case = Case(op, fmt, activation, int(group_size), int(zeros), tuple(map(int, dims)))
        yield case, digest


def operands(case: Case) -> Operands:
    """The operands of a case, drawn in the order of the fields of `Operands`."""
    import oracle  # NumPy only

    draw = Lcg(1)
    if case.op == "linear":
        m, n, k = case.dims
        x_shape, code_shape = (m, k), (n, k)
    else:
        batch, height, width, channels, n, kernel, *_, groups = case.dims
        x_shape = (batch, height, width, channels)
        code_shape = (n, kernel, kernel, channels // groups)
        k = kernel * kernel * oracle.tap_channels(case.fmt, channels // groups)
    x = ((draw.below(4001, x_shape) - 2000) / 256).astype(np.float32)
    codes = draw.below(oracle.FORMATS[case.fmt].max_code + 1, code_shape).astype(np.uint8)
    scale = ((draw.below(255, (n,)) + 1) / 4096).astype(np.float32)
    group_scale = group_zero = None
    if case.group_size:
        shape = (n, -(-k // case.group_size))
        group_scale = (draw.below(2048, shape) + 0x3400).astype(np.uint16).view(np.float16)
        if case.zeros:
            group_zero = (draw.below(2048, shape) + 0xBC00).astype(np.uint16).view(np.float16)
    bias = ((draw.below(513, (n,)) - 256) / 128).astype(np.float32)
    return Operands(x, codes, scale, group_scale, group_zero, bias)


def digest(y: np.ndarray) -> str:
    """FNV-1a, 64 bits, of float32 values as little-endian bytes, in hexadecimal."""
    h = 0xCBF29CE484222325
    for byte in y.astype("<f4").tobytes():
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def oracle_output(case: Case) -> np.ndarray:
    """y float32 of a case, computed by the oracle."""
    import oracle

    o = operands(case)
    args = (o.x, o.codes, case.fmt, o.scale, o.group_scale, o.group_zero)
    args += (case.group_size or None, o.bias, case.activation)
    if case.op == "linear":
        return oracle.linear(*args)
    *_, stride, padding, dilation, groups = case.dims
    return oracle.conv2d(
        *args, stride=(stride,) * 2, padding=(padding,) * 4, dilation=(dilation,) * 2, groups=groups
    )


def kernel_output(core: ModuleType, case: Case, threads: int = 1) -> np.ndarray:
    """y float32 of a case, computed by the extension `core` on the ISA in use."""
    import oracle

    o = operands(case)
    n = len(o.codes)
    names = (list(core.FORMATS).index(case.fmt), list(core.ACTIVATIONS).index(case.activation))
    if case.op == "linear":
        m, _, k = case.dims
        packed, y = oracle.pack(o.codes, case.fmt), np.empty((m, n), np.float32)
        geometry: tuple[int, ...] = ()
    else:
        batch, height, width, channels, _, kernel, stride, padding, dilation, groups = case.dims
        packed = oracle.pack_conv(o.codes, case.fmt, groups)
        out_h, out_w = (
            oracle.output_size(size, kernel, stride, 2 * padding, dilation)
            for size in (height, width)
        )
        y = np.empty((batch, out_h, out_w, n), np.float32)
        geometry = (batch, height, width, channels, n, out_h, out_w, kernel, kernel, stride, stride)
        geometry += (padding, padding, dilation, dilation, groups)
    blocks = oracle.conv_blocks(n, case.dims[-1]) if case.op == "conv2d" else 1
    group_scale, group_zero = (
        None if values is None else oracle.pack_groups(values, blocks)
        for values in (o.group_scale, o.group_zero)
    )
    tensors = (packed, o.scale, group_scale, group_zero, o.bias)
    weights = tuple(0 if t is None else t.ctypes.data for t in tensors)
    x, out = o.x.ctypes.data, y.ctypes.data
    if case.op == "linear":
        core.linear(x, m, out, *names, n, k, case.group_size, *weights, threads)
    else:
        core.conv2d(x, out, geometry, *names, case.group_size, *weights, threads)
    return y


def _cases_to_write() -> Iterator[Case]:
    for fmt, activation in itertools.product(
        ("int8", "int4", "int2", "ternary", "binary"), ("int8", "int16", "binary")
    ):
        for group_size, zeros in ((0, 0), (32, 0), (64, 1)):
            yield Case("linear", fmt, activation, group_size, zeros, (3, 37, 203))
        #      batch, h, w, cin, cout, kernel, stride, padding, dilation, groups
        yield Case("conv2d", fmt, activation, 0, 0, (2, 5, 6, 3, 18, 3, 2, 1, 1, 1))
        yield Case("conv2d", fmt, activation, 64, 1, (1, 5, 4, 36, 17, 3, 1, 2, 2, 1))
        yield Case("conv2d", fmt, activation, 0, 0, (1, 4, 5, 40, 6, 2, 1, 0, 1, 2))
        yield Case("conv2d", fmt, activation, 0, 0, (2, 5, 6, 18, 18, 3, 1, 1, 1, 18))


def _write() -> None:
    lines = [f"{case} {digest(oracle_output(case))}\n" for case in _cases_to_write()]
    GOLDEN.write_text("".join(lines))
    print(f"{len(lines)} cases written to {GOLDEN.name}")


def _check(extension: str, isa: str) -> int:
    sys.setdlopenflags(os.RTLD_LAZY)  # one thread needs no OpenMP runtime
    spec = importlib.util.spec_from_file_location("_core", extension)
    assert spec
    assert spec.loader
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    if core.isa() != isa:
        print(f"chose {core.isa()} instead of {isa}")
        return 1
    wrong = [str(c) for c, expected in cases() if digest(kernel_output(core, c)) != expected]
    print(f"{isa}: {sum(1 for _ in cases()) - len(wrong)} golden outputs right, {len(wrong)} wrong")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        _write()
    elif len(sys.argv) == 3:
        sys.exit(_check(*sys.argv[1:]))
    else:
        sys.exit(__doc__)
