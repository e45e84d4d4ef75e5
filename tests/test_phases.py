"""The decomposition of transposed convolutions, in whole numbers, against torch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lowbit.phases import parts, window


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("depthwise", [False, True])
def test_parts_compute_the_transposed_convolution(kernel, stride, depthwise):
    checked = 0
    for dilation, padding, more, size in itertools.product(
        range(1, 5), range(6), range(4), (1, 2, 5)
    ):
        output = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + more + 1
        if more >= max(stride, dilation) or output < 1:
            continue
        w, x = torch.randint(-4, 5, (kernel,)).double(), torch.randint(-9, 9, (size,)).double()
        want = F.conv_transpose1d(
            x[None, None], w[None, None], None, stride, padding, more, dilation=dilation
        )[0, 0]
        y = torch.zeros(output).double()
        written = torch.zeros(output)
        for part in parts((kernel, 1), (stride, 1), (dilation, 1), depthwise):
            assert not depthwise or part.count == 1
            found = window(part.rows, size, output, stride, padding)
            if found is None:
                continue
            padded = F.pad(x, found.padding)[None, None]
            for taps, (at, first, count) in zip(part.rows.taps, found.slices, strict=True):
                values = w[list(taps)][None, None]
                z = F.conv1d(padded, values, dilation=part.rows.dilation)[0, 0]
                assert count == 0 or first >= 0
                y[at::stride][:count] = z[first : first + count]
                written[at::stride][:count] += 1
        assert torch.equal(y, want)
        assert written.max() <= 1
        checked += 1
    assert checked > 30


def test_every_tap_is_in_one_phase():
    for kernel, stride, dilation in itertools.product(range(1, 8), range(1, 5), range(1, 5)):
        found = parts((kernel, kernel), (stride, 1), (dilation, 1), False)
        taps = [k for part in found for phase in part.rows.taps for k in phase]
        assert sorted(taps) == list(range(kernel))
    assert len(parts((4, 4), (2, 2), (1, 1), False)) == 1  # the stride divides: one convolution
    assert len(parts((3, 3), (2, 2), (1, 1), False)) == 4
