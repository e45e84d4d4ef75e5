"""Images against scikit-image's PSNR and SSIM, and levels against NumPy."""

import math

import numpy as np
import pytest
import torch

from lowbit.quality import measure
from lowbit.tasks import Generation

metrics = pytest.importorskip("skimage.metrics")


def _images(count=3, channels=3, height=24, width=31, noise=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, width).expand(count, channels, height, width)
    reference = ramp + 0.3 * torch.rand(ramp.shape, generator=generator)
    return reference, reference + noise * torch.randn(ramp.shape, generator=generator)


def _skimage(reference, output, span):
    """Means over the images of scikit-image's PSNR and SSIM, with the window of the paper."""
    psnr, ssim = [], []
    for r, o in zip(reference.double().numpy(), output.double().numpy(), strict=True):
        used = span if span is not None else r.max() - r.min()
        psnr.append(metrics.peak_signal_noise_ratio(r, o, data_range=used))
        ssim.append(
            metrics.structural_similarity(
                r,
                o,
                data_range=used,
                channel_axis=0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
        )
    return np.mean(psnr), np.mean(ssim)


@pytest.mark.parametrize("span", [None, 1.0, 2.0])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_against_scikit_image(span, noise):
    reference, output = _images(noise=noise)
    found = measure(reference, output, Generation(span)).metrics
    psnr, ssim = _skimage(reference, output, span)
    assert found["psnr_db"] == pytest.approx(psnr, rel=1e-9)
    assert found["ssim"] == pytest.approx(ssim, rel=1e-9)


def test_banding_shows_in_the_levels():
    reference = torch.linspace(0, 1, 64).expand(1, 2, 16, 64)
    banded = (reference * 8).round() / 8
    found = measure(reference, banded, "generation").metrics
    assert found["distinct_levels"] == 9
    assert found["levels_kept"] == pytest.approx(9 / 64)


def test_levels_against_numpy():
    reference, output = _images(count=2)
    kept, levels = [], []
    for r, o in zip(reference.double().numpy(), output.double().numpy(), strict=True):
        codes = [
            np.clip(np.rint((side - r.min()) * (255 / (r.max() - r.min()))), 0, 255)
            for side in (r, o)
        ]
        counts = [np.mean([len(np.unique(channel)) for channel in side]) for side in codes]
        levels.append(counts[1])
        kept.append(counts[1] / counts[0])
    found = measure(reference, output, "generation").metrics
    assert found["distinct_levels"] == pytest.approx(np.mean(levels))
    assert found["levels_kept"] == pytest.approx(np.mean(kept))


def test_equal_and_constant_images():
    reference, _ = _images(count=1)
    same = measure(reference, reference, "generation").metrics
    assert (same["psnr_db"], same["levels_kept"]) == (math.inf, 1.0)
    assert same["ssim"] == pytest.approx(1.0)
    flat = torch.full((1, 1, 12, 12), 0.5)
    assert measure(flat, flat, "generation").metrics["ssim"] == 1.0
    assert measure(flat, flat + 1, "generation").metrics["psnr_db"] == -math.inf


def test_the_image_is_found_by_its_name():
    reference, output = _images()
    extra = torch.zeros(2)
    sides = ({"latents": extra, "sample": side} for side in (reference, output))
    assert measure(*sides, "generation").metrics == measure(reference, output, "generation").metrics


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 3, 10, 24), (1, 0, 24, 24)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[N, C, H, W\] with H and W at least 11"):
        Generation().meter().update(torch.rand(shape), torch.rand(shape), None)


def test_a_range_of_nothing_is_refused():
    with pytest.raises(ValueError, match="more than 0, not 0"):
        Generation(data_range=0)
