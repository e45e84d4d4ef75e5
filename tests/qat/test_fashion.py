"""The training on Fashion-MNIST, on a handful of made-up images."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.qat.fashion import data, training
from lowbit.qat.fashion.network import Network
from lowbit.qat.fashion.run import Options, run

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
FILES += ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
QUICK = Options(
    schemes=("w4a8", "w1a1"), float_epochs=2, epochs=1, width=4, seconds=0.01, float_rate=1e-2
)
SCRIPT = Path(__file__).parents[2] / "bench" / "qat.py"


def idx(array):
    sizes = np.array(array.shape, dtype=">u4").tobytes()
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path, rng):
    """384 images to train and 100 to test: the class is where the bright stripe is."""
    for images, labels, count in ((*FILES[:2], 384), (*FILES[2:], 100)):
        classes = rng.integers(0, 10, count)
        pixels = rng.integers(0, 60, (count, 28, 28))
        for image, label in zip(pixels, classes, strict=True):
            image[2 * label + 3 : 2 * label + 7] += 180
        (tmp_path / f"{images}.gz").write_bytes(gzip.compress(idx(pixels)))
        (tmp_path / labels).write_bytes(idx(classes))
    return tmp_path


def test_images_are_normalized_and_keep_their_order(folder):
    images = data.load("test", folder)
    raw = data._read(folder / f"{FILES[2]}.gz")
    assert images.pixels.shape == (100, 1, 28, 28)
    assert images.pixels.dtype == torch.float32
    torch.testing.assert_close(
        images.pixels[7, 0, 3, 4].item(), (raw[7, 3, 4] / 255 - 0.286) / 0.353
    )
    assert images.labels.tolist() == data._read(folder / FILES[3]).tolist()
    assert len(images.first(3)) == 3


def test_what_is_missing_or_damaged_is_named(folder):
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        data.load("train", folder / "nowhere")
    (folder / FILES[1]).write_bytes(b"none")
    with pytest.raises(ValueError, match="no IDX file"):
        data.load("train", folder)
    (folder / FILES[1]).write_bytes(idx(np.zeros(3)))
    with pytest.raises(ValueError, match="do not belong together"):
        data.load("train", folder)
    (folder / FILES[1]).write_bytes(idx(np.zeros(384))[:-1])
    with pytest.raises(ValueError, match="damaged"):
        data.load("train", folder)
    (folder / f"{FILES[0]}.gz").write_bytes(gzip.compress(b"0" * 1000)[:-9])
    with pytest.raises(ValueError, match="damaged"):
        data.load("train", folder)


def test_training_learns_and_is_the_same_with_the_same_seed(folder):
    images, tests = data.load("train", folder), data.load("test", folder)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Network(4)
        before = training.accuracy(training.predictions(model, tests), tests)
        training.train(model, images, 5, 1e-2, seed=3)
        assert training.accuracy(training.predictions(model, tests), tests) > before + 20
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_the_whole_run(folder, tmp_path):
    result = run(QUICK, folder, tmp_path / "kept")
    assert [row.scheme for row in result.rows] == ["float32", "w4a8", "w1a1"]
    for row in result.rows:
        assert row.same == 100
        assert row.deployed == row.trained
        assert result.lost(row) == result.rows[0].deployed - row.deployed
    assert result.rows[0].size > result.rows[1].size > result.rows[2].size
    assert {size: set(speeds) for size, speeds in result.speed.items()} == {
        size: {"float32", "w4a8", "w1a1"} for size in (1, 100)
    }
    assert json.loads(json.dumps(result.to_dict()))["rows"][2]["scheme"] == "w1a1"
    assert "| w1a1" in result.page("command")
    assert "384 images to train" in str(result)
    # What is kept is not trained again, and training again gives the same.
    assert run(QUICK, folder, tmp_path / "kept").rows == result.rows
    assert run(QUICK, folder).rows == result.rows
    other = Options(**{**vars(QUICK), "epochs": 2})
    with pytest.raises(ValueError, match=r"w4a8\.pt was trained with"):
        run(other, folder, tmp_path / "kept")


def test_an_unknown_scheme_is_an_error_before_the_training(folder):
    with pytest.raises(ValueError, match="unknown scheme 'w5a5'"):
        run(Options(schemes=("w5a5",), float_epochs=1e9), folder)


@pytest.mark.skipif(not SCRIPT.exists(), reason="the source tree is not beside the tests")
def test_the_command(folder, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    arguments = ["--schemes", "w2a8", "--float-epochs", "0.3", "--epochs", "0.3"]
    arguments += ["--train-images", "256", "--test-images", "50", "--seconds", "0.01", "--json"]

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return stopped.value.code

    assert command("--data", str(folder), *arguments, "--page", str(page)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["train_images"] == 256
    assert [row["scheme"] for row in found["rows"]] == ["float32", "w2a8"]
    assert page.read_text().startswith("# Quantization-aware training")
    assert command("--data", str(tmp_path / "nowhere")) == 1
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err
