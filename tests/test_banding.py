"""lowbit.banding: scenes, measures, crops; and the network with weights of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.banding import images, network
from lowbit.banding.images import centre, mosaic, photo, ramp, sky, with_patch
from lowbit.banding.measure import Measures, largest_step, levels, measure
from lowbit.banding.network import BORDER, Demosaick, load_network
from lowbit.banding.run import FLOAT, Result, run, scenes

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "banding.py"


def test_levels_of_a_ramp():
    line = torch.linspace(0, 1, 1000)
    assert levels(line, 8) == 256
    assert levels(line, 4) == 16
    assert levels((line * 10).round() / 10) == 11
    assert levels(torch.full((7,), 0.3)) == 1


def test_levels_count_what_differs_by_a_code_alone():
    line = torch.tensor([0.5, 0.5 + 0.1 / 4095, 0.5 + 1.2 / 4095])
    assert levels(line, 12) == 2


def test_largest_step():
    line = torch.tensor([0.0, 0.5, 0.1, 0.5, 0.1, 0.9])  # alternates; then a step of 0.4
    assert largest_step(line) == pytest.approx(0.4 * 255)
    assert largest_step(torch.tensor([0.0, 1.0])) == 0.0
    assert largest_step(torch.linspace(0, 1, 256)) == pytest.approx(2.0, abs=1e-3)


def test_centre():
    image = torch.arange(5 * 7).reshape(1, 5, 7)
    assert centre(image, 3).tolist() == [[[9, 10, 11], [16, 17, 18], [23, 24, 25]]]
    assert torch.equal(centre(image, 5), image[..., 1:6])
    for side in (6, 0):
        with pytest.raises(ValueError, match=f"no square of {side} pixels in an image of 5 x 7"):
            centre(image, side)


def test_mosaic_keeps_one_channel_of_each_pixel():
    image = torch.rand(3, 4, 6) + 0.1
    seen = mosaic(image)
    which = [[1, 0, 1, 0, 1, 0], [2, 1, 2, 1, 2, 1]] * 2
    for y in range(4):
        for x in range(6):
            for channel in range(3):
                kept = image[channel, y, x] if channel == which[y][x] else 0
                assert seen[channel, y, x] == kept


def test_smooth_scenes():
    line = ramp(16, 0.2, 0.5)
    assert line.shape == (3, 16, 16)
    assert (line == line[:1, :1]).all()
    assert (line[0, 0].diff() > 0).all()
    assert line[0, 0, 0] == 0.2
    assert line[0, 0, -1] == 0.5
    glow = sky(16, 0.1, 0.4)
    assert glow[2, 0, 0] == pytest.approx(0.4)
    assert glow[2, -1, -1] == pytest.approx(0.1)
    assert torch.allclose(glow[0], 0.8 * glow[2])
    patched = with_patch(line, 3, 2)
    assert (patched[:, 3:5, 3:5] == 1).all()
    assert int((patched != line).sum()) == 3 * 4


def test_photographs():
    pytest.importorskip("skimage")
    for name in images.PHOTOS:
        image = photo(name, 64)
        assert image.shape == (3, 64, 64)
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1


def test_without_the_packages_the_errors_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowbit\[demo\]'"):
        photo("cat", 64)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps demosaicnet"):
        load_network()


def test_scenes_refuse_a_side_that_leaves_nothing():
    for side in (321, 64):
        with pytest.raises(ValueError, match=f"not {side}"):
            scenes(side)


def test_measure_of_equal_images_and_of_noise():
    pytest.importorskip("skimage")
    reference = torch.rand(3, 20, 20)
    same = measure(reference, reference, smooth=False)
    assert same == Measures(float("inf"), pytest.approx(1.0), None, None)
    other = measure(reference, reference + 0.01, smooth=True)
    assert other.psnr == pytest.approx(40, abs=1e-3)
    assert other.levels == levels(reference[1, 10] + 0.01)
    assert other.step == pytest.approx(largest_step(reference[1, 10]), abs=1e-3)


@pytest.fixture
def untrained(monkeypatch):
    """The network without the package of its weights."""
    torch.manual_seed(0)
    model = Demosaick().eval()
    monkeypatch.setattr("lowbit.banding.run.load_network", lambda: model)
    return model


def test_the_network_takes_its_border_off(untrained):
    with torch.inference_mode():
        y = untrained(torch.rand(2, 3, 70, 66))
    assert y.shape == (2, 3, 70 - 2 * BORDER, 66 - 2 * BORDER)


def test_run_draw_and_page(untrained, tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    from lowbit.banding.picture import draw

    result = run(("w8a8", "w8a16"), 190)
    assert list(result.sizes) == [FLOAT, "w8a8", "w8a16"]
    assert result.sizes["w8a8"] < result.sizes[FLOAT] / 3
    for by_scheme in result.measures.values():
        assert by_scheme[FLOAT].psnr == float("inf")
        assert by_scheme["w8a16"].psnr > by_scheme["w8a8"].psnr > 20
    draw(result, tmp_path / "crops.png")
    assert (tmp_path / "crops.png").read_bytes().startswith(b"\x89PNG")
    page = result.page("python bench/banding.py", "crops.png")
    assert "](crops.png)" in page
    assert page.count("| w8a16 ") == len(result.measures)
    assert page.count("\n- `w8a") == 2


@pytest.mark.parametrize(("step", "said"), [(0.99, "has no bands"), (1.0, "has bands")])
def test_findings_go_by_the_largest_step(step, said):
    exact = Measures(float("inf"), 1.0, 9, 0.1)
    found = {FLOAT: exact, "w8a8": Measures(40.0, 0.9, 5, step)}
    names = ["ramp", "sky", *images.PHOTOS]
    result = Result({}, dict.fromkeys(names, found), {FLOAT: 4, "w8a8": 1})
    (line,) = result.findings()
    assert line.startswith(f"`w8a8` {said}: steps of up to {step:.2f}/255")


def test_crops_with_raised_contrast():
    pytest.importorskip("matplotlib")
    from lowbit.banding.picture import difference, stretched

    reference = ramp(64, 0.30, 0.36)
    same = stretched(reference, reference)
    assert torch.allclose(stretched(reference + 0.1, reference), same, atol=1e-4)
    assert same.min() == 0
    assert same.max() == 1
    assert (difference(reference, reference) == 0.5).all()
    assert torch.allclose(difference(reference + 0.01, reference, 10), torch.tensor(0.6), atol=1e-4)
    assert (difference(reference - 0.5, reference) == 0).all()


def test_script_without_the_weights():
    if not SCRIPT.exists():
        pytest.skip("the source tree is not beside the tests")
    if importlib.util.find_spec(network.PACKAGE):
        pytest.skip("the weights are installed")
    pytest.importorskip("skimage")
    environment = {**os.environ, "PYTHONPATH": str(Path(network.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert "banding.py: error: the network's weights" in done.stderr
