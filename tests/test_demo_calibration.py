"""The comparison of observers on the demo's network: what calibrates, what tests, the page."""

import pytest
import torch

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("skimage")

from lowbit import baselines
from lowbit.demo import calibration
from lowbit.demo.calibration import Calibrations, Options, run
from lowbit.demo.photographs import PHOTOS, load_views, random_crops


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two photographs, and a small network that tells more than one class."""

    def network():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 8, 7, stride=8), torch.nn.ReLU(), torch.nn.Flatten()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(8 * 28 * 28, 10)).eval()

    monkeypatch.setattr(calibration, "load_model", network)
    monkeypatch.setattr(calibration, "PHOTOS", PHOTOS[:2])


def test_sides_are_calibrated_and_tested_on_other_images(monkeypatch):
    seen = []

    def torch_int8(model, batches, **_):
        seen.append(torch.cat(batches))
        return baselines.Int8Baseline(None, None, None, None, {}, "left out")

    monkeypatch.setattr(baselines, "torch_int8", torch_int8)
    options = Options(
        crops=3, test_crops=2, observers=("minmax", "mse"), symmetric=False, graph=False
    )
    found = run(options)
    for images, photos in zip(seen, ([0], [1], [0, 1]), strict=True):
        crops = torch.stack([random_crops(PHOTOS[i], 3) for i in photos], dim=1).flatten(0, 1)
        assert torch.equal(images, crops)
    assert found.calibration_images == {"photographs": 3, "crops": 6}
    names = ["w8a8-static, minmax", "w8a8-static, mse", "w8a8, dynamic"]
    for sides in found.qualities.values():
        assert list(sides) == names
        assert {quality.rows for quality in sides.values()} == {2 * (6 + 2)}
        assert all(quality.sqnr_db > 20 for quality in sides.values())


def test_figures_are_those_of_the_tested_images(monkeypatch):
    import lowbit
    from lowbit.quality import measure

    options = Options(crops=3, test_crops=2, observers=("minmax",), symmetric=False, graph=True)
    found = run(options).qualities["crops"]
    model = calibration.load_model()
    learned = [random_crops(photo, 3) for photo in PHOTOS[:2]]
    x = torch.cat(
        [part for p in PHOTOS[:2] for part in (load_views(p), random_crops(p, 2, seed=1))]
    )
    prepared = lowbit.prepare(model, "w8a8-static", observer="minmax", graph=False)
    quantized = lowbit.convert(lowbit.calibrate(prepared, learned))
    expected = measure(model(x), quantized(x))
    assert found["w8a8-static, minmax"].sqnr_db == pytest.approx(expected.sqnr_db)
    assert found["w8a8-static, minmax"].top1_agreement == expected.top1_agreement
    assert "torch INT8 (static)" in found
    captured = lowbit.prepare(model, "w8a8-static", learned[0], observer="minmax")
    network = lowbit.convert(lowbit.calibrate(captured, learned))
    assert type(network) is not type(quantized)
    expected = measure(model(x), network(x))
    assert found["w8a8-static, minmax, graph"].sqnr_db == pytest.approx(expected.sqnr_db)


def test_the_page():
    result = run(
        Options(crops=2, test_crops=1, observers=("minmax", "mse"), symmetric=True, graph=False)
    )
    assert isinstance(result, Calibrations)
    page = result.page("python bench/calibration.py")
    assert "Written by `python bench/calibration.py`." in page
    for split, sides in result.qualities.items():
        best = max((q.sqnr_db, name) for name, q in sides.items() if "static, m" in name)
        assert f"{best[1]} ({best[0]:.1f} dB) on other {split}" in page
        for name, quality in sides.items():
            (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} ")]
            assert f"{quality.sqnr_db:.2f}" in line, split
    assert result.to_dict()["qualities"]["crops"]["w8a8, dynamic"]["rows"] == 14


def test_a_dynamic_scheme_is_refused():
    with pytest.raises(ValueError, match="nothing to calibrate"):
        run(Options(scheme="w8a8", crops=1, test_crops=1))
