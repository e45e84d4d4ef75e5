"""Every ISA, and the oracle, produce the bits of golden.txt; so does C++ on AArch64."""

from __future__ import annotations

import golden
import pytest
from golden import Case

from lowbit import _core

CASES = [
    pytest.param(case, digest, id=str(case).replace(" ", "-")) for case, digest in golden.cases()
]


@pytest.mark.parametrize(("case", "digest"), CASES)
def test_oracle(case: Case, digest: str) -> None:
    assert golden.digest(golden.oracle_output(case)) == digest


def test_kernels(isa: str) -> None:
    wrong = [
        str(case)
        for case, digest in golden.cases()
        for threads in (1, 3)
        if golden.digest(golden.kernel_output(_core, case, threads)) != digest
    ]
    assert wrong == []


def test_file_covers_every_kernel() -> None:
    cases = [case for case, _ in golden.cases()]
    assert {(c.op, c.fmt, c.activation) for c in cases} == {
        (op, fmt, activation)
        for op in ("linear", "conv2d")
        for fmt in _core.FORMATS
        for activation in _core.ACTIVATIONS
    }
