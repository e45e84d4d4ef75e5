"""What the models see: pictures of the inputs, with the first guesses, or pictures of the outputs.

A batch whose first floating tensor is [N, 1 or 3, H, W] is one of pictures. Models whose output is
[N, C] name classes; models whose first output is [N, 1 or 3, H, W] too make pictures.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.baselines import run
from lowbit.html.samples import split
from lowbit.quality import floating_tensors

MOST_SAMPLES = 6
_GUESSES = 3
_LEAST_SIDE, _INPUT_SIDE, _OUTPUT_SIDE = 8, 192, 256
_LOSSLESS_BYTES = 900_000  # outputs that take more together are written as JPEG
_QUALITY = 82


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        uri: `data:` URI.
        width, height: pixels.
        lossless: whether its pixels are the rounded values.
        cut: whether it is the centre of a larger picture.
    """

    uri: str
    width: int
    height: int
    lossless: bool = True
    cut: bool = False


@dataclass(frozen=True)
class Guess:
    """A class that a model names, with its softmax, 0..1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Sample:
    """One input and what each model makes of it.

    Attributes:
        input: the picture that the models get.
        guesses: model -> its most probable classes, best first; empty for other tasks.
        outputs: model -> the picture that it makes; empty for other tasks.
        psnr: model -> peak signal to noise ratio of that against the float model's, dB; the peak
            is the range of the float model's picture.
    """

    input: Picture
    guesses: dict[str, tuple[Guess, ...]] = field(default_factory=dict)
    outputs: dict[str, Picture] = field(default_factory=dict)
    psnr: dict[str, float] = field(default_factory=dict)


def samples(
    models: Mapping[str, nn.Module],
    batches: Sequence[Any],
    labels: Sequence[str] | None = None,
) -> tuple[Sample, ...]:
    """Up to six inputs, spread over the batches; none where these are no pictures.

    Args:
        models: name -> model; the float model first. One that fails on an input is left out of it.
        batches: as `lowbit.compare` takes them, already in a sequence.
        labels: names of the classes.

    Raises:
        Exception: whatever the float model raises on an input.
    """
    each = max(1, MOST_SAMPLES // max(1, len(batches)))
    chosen = [one for batch in batches for one in split(batch, each)][:MOST_SAMPLES]
    found = []
    for one in chosen:
        shown = _picture_tensor(_input_tensors(one))
        if shown is not None:
            with torch.inference_mode():
                found.append(_sample(models, one, shown, labels))
    made = [sample for sample in found if sample is not None]
    size = sum(len(p.uri) for sample in made for p in sample.outputs.values())
    if size <= _LOSSLESS_BYTES:
        return tuple(made)
    return tuple(_as_jpeg(sample) for sample in made)


def _input_tensors(batch: Any) -> list[torch.Tensor]:
    return floating_tensors(list(batch) if isinstance(batch, tuple) else batch)


def _picture_tensor(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The first tensor, if it is of pictures."""
    if not tensors or tensors[0].ndim != 4 or tensors[0].shape[0] == 0:
        return None
    _, channels, height, width = tensors[0].shape
    return tensors[0] if channels in (1, 3) and min(height, width) >= _LEAST_SIDE else None


def _sample(
    models: Mapping[str, nn.Module],
    batch: Any,
    shown: torch.Tensor,
    labels: Sequence[str] | None,
) -> Sample | None:
    (first, model), *others = models.items()
    reference = floating_tensors(run(model, batch))
    if not reference:
        return None
    outputs = {first: reference}
    outputs |= {name: made for name, other in others if (made := _output(other, batch))}
    picture = _encode(shown[0], _limits(shown[0]), _INPUT_SIDE, "JPEG")
    if _is_scores(reference):
        guesses = {name: _guesses(found[0][0], labels) for name, found in outputs.items()}
        return Sample(picture, guesses=guesses)
    expected = _picture_tensor(reference)
    if expected is None:
        return None
    limits = _limits(expected[0])
    return Sample(
        picture,
        outputs={
            name: _encode(found[0][0], limits, _OUTPUT_SIDE, "PNG")
            for name, found in outputs.items()
        },
        psnr={
            name: _psnr(expected[0], found[0][0])
            for name, found in outputs.items()
            if found[0] is not expected
        },
    )


def _output(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    """Nothing where the model fails: torch's INT8 may know one shape alone."""
    try:
        return floating_tensors(run(model, batch))
    except Exception:
        return []


def _is_scores(tensors: Sequence[torch.Tensor]) -> bool:
    return len(tensors) == 1 and tensors[0].ndim == 2 and tensors[0].shape[1] >= 2


def _guesses(scores: torch.Tensor, labels: Sequence[str] | None) -> tuple[Guess, ...]:
    best = scores.double().softmax(dim=0).topk(min(_GUESSES, scores.shape[0]))
    return tuple(
        Guess(labels[i] if labels is not None and i < len(labels) else f"class {i}", p)
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def _limits(image: torch.Tensor) -> tuple[float, float]:
    """The values that are shown black and white: 0 and 1, 0 and 255, or the least and the greatest.

    Inputs are usually normalised, by numbers that only their maker knows.
    """
    finite = image[torch.isfinite(image)]
    if finite.numel() == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if low >= 0.0:
        if 0.25 < high <= 1.0:
            return 0.0, 1.0
        if 64.0 < high <= 255.0:
            return 0.0, 255.0
    return (low, high) if high > low else (low, low + 1.0)


def _psnr(reference: torch.Tensor, output: torch.Tensor) -> float:
    """10 log10(range^2 / mean squared error), dB; the range is the reference's."""
    r, o = reference.double(), output.double()
    error, peak = float((r - o).square().mean()), float(r.max() - r.min())
    if error == 0.0:
        return math.inf
    return 10.0 * math.log10(peak * peak / error) if peak > 0.0 else -math.inf


def _encode(image: torch.Tensor, limits: tuple[float, float], side: int, kind: str) -> Picture:
    """An image [C, H, W]: inputs are scaled down to `side`, outputs cut to it."""
    from PIL import Image

    low, high = limits
    cut = False
    if kind == "PNG":
        height, width = image.shape[1:]
        top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
        cut = height > side or width > side
        image = image[:, top : top + side, left : left + side]
    scaled = ((image.float() - low) * (255.0 / (high - low))).nan_to_num(0.0, 255.0, 0.0)
    pixels = scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    made = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    made.thumbnail((side, side))
    return _written(made, kind, cut)


def _written(image: Any, kind: str, cut: bool) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": _QUALITY} if kind == "JPEG" else {"optimize": True}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    uri = f"data:image/{kind.lower()};base64,{data}"
    return Picture(uri, image.width, image.height, kind == "PNG", cut)


def _as_jpeg(sample: Sample) -> Sample:
    from PIL import Image

    outputs = {}
    for name, picture in sample.outputs.items():
        data = base64.b64decode(picture.uri.partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            outputs[name] = _written(image, "JPEG", picture.cut)
    return Sample(sample.input, outputs=outputs, psnr=sample.psnr)
