"""Photographs in files of resources, and the endless stream of their crops."""

import io

import numpy as np
import pytest
import torch

from lowbit.benchmark.quality import photographs, stream

Image = pytest.importorskip("PIL.Image")


def picture(size, mode="RGB", seed=0):
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], channels))
    return Image.fromarray(pixels.astype(np.uint8), mode)


def webp(size, mode="RGB"):
    file = io.BytesIO()
    picture(size, mode).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_photographs_are_found_in_a_file_of_resources():
    kept = webp((200, 181)), webp((300, 180))
    left = webp((400, 179)), webp((200, 200), "RGBA"), b"RIFF\x10\0\0\0WEBPnone at all"
    data = b"qres" + kept[0] + b"\0\1" + b"".join(left) + kept[1] + b"end"
    found = stream.webp_photographs(data)
    assert [image.size for image in found] == [(200, 181), (300, 180)]
    assert np.array_equal(np.array(found[0]), np.array(picture((200, 181))))


def test_every_pass_has_other_crops_of_every_photograph():
    # Each of one grey, by which it is known.
    greys = [10 * i + 20 for i in range(11)]
    images = [Image.new("RGB", (256, 224), (grey,) * 3) for grey in greys]
    one, two = stream.Stream(images, 3), stream.Stream(images, 3)
    first, second = list(one()), list(one())
    for wanted, found in zip([*first, *second], [*two(), *two()], strict=True):
        assert torch.equal(wanted, found)
    assert [tuple(x.shape) for x in first] == [(8, 3, 224, 224), (3, 3, 224, 224)]
    assert first[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(first[0], second[0])
    x = torch.cat(first)
    assert torch.equal(x, x[:, :, :1, :1].expand_as(x))
    assert len(x[:, 0, 0, 0].unique()) == len(images)


def test_crops_lie_within_the_photograph():
    # Columns grow from left to right, so that a mirrored crop falls.
    ramp = np.broadcast_to(np.arange(64, 192, dtype=np.uint8)[None, :, None], (128, 128, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    random = stream.Stream([image] * 64, 0)
    crops = [random._crop(image)[112, :, 0].astype(int) for _ in range(64)]
    rises = [int(row[-1] - row[0]) for row in crops]
    assert 16 < sum(rise > 0 for rise in rises) < 48
    assert min(map(abs, rises)) >= 30  # a side of 0.3, less what stretching takes
    assert max(map(abs, rises)) > 100
    assert all(row.min() >= 64 and row.max() <= 191 for row in crops)


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(photographs.ROOT, str(tmp_path))
    monkeypatch.setattr(stream, "CALIBRATION", ())
    with pytest.raises(FileNotFoundError, match="apt-get download gcompris-qt-data"):
        stream.photographs()


def test_large_photographs_are_reduced(monkeypatch, tmp_path):
    monkeypatch.setenv(photographs.ROOT, str(tmp_path))
    monkeypatch.setattr(stream, "CALIBRATION", ())
    monkeypatch.setattr(stream, "GCOMPRIS", (("gcompris-qt-data", "/one.rcc"),))
    (tmp_path / "one.rcc").write_bytes(webp((800, 400)) + webp((200, 190)))
    assert [image.size for image in stream.photographs()] == [(640, 320), (200, 190)]
    batches = photographs.wide_calibration()
    assert [tuple(x.shape) for x in batches] == [(2, 3, 224, 224)]
    assert all(map(torch.equal, batches, photographs.wide_calibration()))
    many = photographs.many_calibration()
    assert [len(x) for x in many()] == [2] * photographs.PASSES
    assert all(map(torch.equal, many(), many()))
    assert not torch.equal(*[x for x, _ in zip(many(), range(2), strict=False)])
    learning = photographs.wide_learning()
    assert not torch.equal(next(learning()), next(learning()))
