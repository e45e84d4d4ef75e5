"""Pictures of inputs and outputs, decoded again."""

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lowbit.html import pictures
from lowbit.html.pictures import samples
from lowbit.html.samples import split


def decoded(picture):
    kind, _, data = picture.uri.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{image.format.lower()};base64"
    assert image.size == (picture.width, picture.height)
    return np.asarray(image).astype(float)


class Scores(nn.Module):
    def __init__(self, best):
        super().__init__()
        self.best = best

    def forward(self, x):
        scores = torch.zeros(x.shape[0], 10)
        scores[:, self.best] = math.log(91)  # 91 of 100: softmax .91
        scores[:, 3] = math.log(1.0001)
        return scores


def test_guesses_with_labels_and_probabilities():
    x = torch.rand(3, 3, 16, 24)
    found = samples({"float32": Scores(2), "w": Scores(9)}, [x], ["zero", "one", "two", "three"])
    assert len(found) == 3
    first, second, _ = found[0].guesses["float32"]
    assert (first.label, second.label) == ("two", "three")
    assert first.probability == pytest.approx(0.91, abs=1e-4)
    assert found[0].guesses["w"][0].label == "class 9"  # beyond the labels
    assert decoded(found[0].input).shape == (16, 24, 3)


@pytest.mark.parametrize(
    ("factor", "shift", "black", "white"),
    [(1.0, 0.0, 0.0, 1.0), (255.0, 0.0, 0.0, 255.0), (4.0, -2.0, -2.0, 2.0)],
    ids=["0 to 1", "0 to 255", "normalised"],
)
def test_the_range_of_the_input(restorer, factor, shift, black, white):
    x = torch.linspace(0, 1, 16).repeat(16, 1)[None, None] * factor + shift
    (sample,) = samples({"float32": restorer}, [x])
    expected = (x[0, 0].numpy() - black) / (white - black) * 255
    assert np.abs(decoded(sample.input) - expected).mean() < 4  # JPEG


def test_outputs_side_by_side_with_psnr(restorer):
    class Off(nn.Module):
        def forward(self, x):
            return restorer(x) + 0.01

    x = torch.rand(2, 1, 20, 12)
    with torch.no_grad():
        found = samples({"float32": restorer, "off": Off(), "same": restorer}, [x])
        y = restorer(x[:1])
    low, high = float(y.min()), float(y.max())
    expected = ((y[0, 0] - low) / (high - low) * 255).round().numpy()
    assert found[0].outputs["float32"].lossless
    assert np.array_equal(decoded(found[0].outputs["float32"]), expected)
    assert found[0].psnr["off"] == pytest.approx(20 * math.log10((high - low) / 0.01), abs=0.01)
    assert found[0].psnr["same"] == math.inf
    assert not found[0].guesses


def test_large_pictures_are_bounded(monkeypatch):
    monkeypatch.setattr(pictures, "_LOSSLESS_BYTES", 10_000)
    torch.manual_seed(0)
    x = torch.rand(1, 3, 400, 300)
    (sample,) = samples({"float32": nn.Identity()}, [x])
    output = sample.outputs["float32"]
    assert output.cut
    assert not output.lossless
    assert decoded(output).shape == (256, 256, 3)
    assert decoded(sample.input).shape == (192, 144, 3)
    centre = x[0, :, 72:328, 22:278].permute(1, 2, 0).numpy() * 255
    assert abs(decoded(output).mean() - centre.mean()) < 2


def test_six_samples_spread_over_the_batches(restorer):
    x = torch.rand(9, 1, 8, 8)
    assert len(samples({"float32": restorer}, [x])) == 6
    assert len(samples({"float32": restorer}, [x, x])) == 6
    assert len(samples({"float32": restorer}, [x[:1], x])) == 4
    assert len(samples({"float32": restorer}, [x] * 20)) == 6


@pytest.mark.parametrize(
    "x",
    [torch.rand(2, 64), torch.rand(2, 5, 16, 16), torch.rand(2, 3, 4, 4), torch.zeros(0, 3, 9, 9)],
    ids=["features", "channels", "too small", "empty"],
)
def test_what_is_no_picture_is_not_shown(x):
    assert samples({"float32": nn.Identity()}, [x]) == ()


def test_outputs_that_are_neither_classes_nor_pictures():
    class Boxes(nn.Module):
        def forward(self, x):
            return torch.zeros(x.shape[0], 5, 4), torch.zeros(x.shape[0], 5)

    assert samples({"float32": Boxes()}, [torch.rand(1, 3, 16, 16)]) == ()


def test_a_candidate_that_fails_is_left_out_and_the_float_model_is_not(restorer):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    x = torch.rand(1, 1, 8, 8)
    (sample,) = samples({"float32": restorer, "torch int8": Fails()}, [x])
    assert list(sample.outputs) == ["float32"]
    with pytest.raises(RuntimeError, match="no"):
        samples({"float32": Fails()}, [x])


def test_nan_is_drawn():
    x = torch.rand(1, 1, 8, 8)
    x[0, 0, 2, 2] = math.nan
    (sample,) = samples({"float32": nn.Identity()}, [x])
    assert decoded(sample.outputs["float32"])[2, 2] == 0


def test_split_keeps_the_kind_of_batch():
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    (one, two) = split((x, y), 2)
    assert isinstance(one, tuple)
    assert two[0].tolist() == [[2, 3]]
    assert two[1].tolist() == [1]
    assert [list(part) for part in split({"a": x, "b": y}, 1)] == [["a", "b"]]
    assert len(split(x, 9)) == 3
    unequal = (x, torch.zeros(5))
    assert split(unequal, 2)[0] is unequal
    with_flag = {"x": x, "flag": True}
    assert split(with_flag, 2)[0] is with_flag
