"""Runs the network at each width on each scene."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tabulate import tabulate

from lowbit.banding.images import PHOTOS, mosaic, photo, ramp, sky, with_patch
from lowbit.banding.measure import BITS, Measures, measure
from lowbit.banding.network import BORDER, load_network
from lowbit.convert import quantize
from lowbit.report import summary

FLOAT = "float32"
SCHEMES = ("w8a8", "w8a16", "w4a16", "w4a8")
SMOOTH = ("ramp", "sky")
SIDE = 320
_PATCH_AT, _PATCH = 40, 24  # pixels; the network's border and a margin around it are cut off

VISIBLE = 1.0
"""A step of so many 1/255 is one that an 8-bit display shows."""

_NOTES = f"""\
Outputs are compared with those of the float32 network: PSNR in dB; SSIM; and for the two smooth
scenes the middle row of the green channel, how many levels it has ({BITS}-bit codes) and the
largest step between pixels two apart (the mosaic's period), in 1/255. These scenes hold a white
patch, cut off here, as a picture holds the sun or a lamp: it decides the scale of the activations,
of whose codes the dark gradient then gets few. A row with many levels may still have bands: what is
rounded in many channels at once is noise around each band. And one without bands may be wrong:
4-bit weights that are only rounded change the tone, and print the mosaic's pattern."""


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        images: scene -> scheme -> float32 `[3, H, W]`; "float32" is the float network.
        measures: scene -> scheme -> figures.
        sizes: scheme -> bytes of parameters and buffers.
    """

    images: dict[str, dict[str, torch.Tensor]]
    measures: dict[str, dict[str, Measures]]
    sizes: dict[str, int]

    def __str__(self) -> str:
        return self.table("simple")

    def table(self, style: str) -> str:
        """One row for a scene and a scheme, in a format of `tabulate`."""
        cells = [
            [
                scene,
                scheme,
                f"{found.psnr:.1f}",
                f"{found.ssim:.4f}",
                "" if found.levels is None else str(found.levels),
                "" if found.step is None else f"{found.step:.2f}",
                f"{self.sizes[scheme]:,}",
            ]
            for scene, by_scheme in self.measures.items()
            for scheme, found in by_scheme.items()
        ]
        headers = ["scene", "scheme", "PSNR", "SSIM", "levels", "largest step", "bytes"]
        align = ("left", "left") + ("right",) * 5
        return tabulate(cells, headers, style, colalign=align, disable_numparse=True)

    def findings(self) -> list[str]:
        """A sentence for each scheme: whether the smooth scenes have steps that can be seen."""
        found = []
        for scheme in self.sizes:
            if scheme == FLOAT:
                continue
            steps = [self.measures[name][scheme].step or 0.0 for name in SMOOTH]
            exact = [self.measures[name][FLOAT].step or 0.0 for name in SMOOTH]
            photos = [self.measures[name][scheme].psnr for name in PHOTOS]
            has = "has bands" if max(steps) >= VISIBLE else "has no bands"
            found.append(
                f"`{scheme}` {has}: steps of up to {max(steps):.2f}/255 in the smooth scenes, "
                f"where float32 has {max(exact):.2f}; photographs are {min(photos):.1f} to "
                f"{max(photos):.1f} dB from float32's."
            )
        return found

    def page(self, command: str, picture: str | None) -> str:
        """A page of Markdown.

        Args:
            command: what made it.
            picture: the picture's path as seen from the page.
        """
        shown = "" if picture is None else f"![crops side by side]({picture})\n\n"
        found = "\n".join(f"- {line}" for line in self.findings())
        return (
            "# INT16 where INT8 shows\n\n"
            f"Written by `{command}`: joint demosaicking (PyPI `demosaicnet`, trained weights, 20 "
            f"convolutions), every layer converted.\n\n{found}\n\n{shown}{_NOTES}\n\n"
            f"{self.table('github')}\n"
        )


def scenes(side: int = SIDE) -> dict[str, torch.Tensor]:
    """What the network sees: smooth scenes with a white patch, then photographs.

    Raises:
        ValueError: `side` is odd, or leaves nothing of the scenes.
    """
    if side % 2 or side < 2 * BORDER + 2 * (_PATCH_AT + _PATCH):
        raise ValueError(f"the side of the scenes has to be even and larger, not {side}")
    found = {"ramp": ramp(side), "sky": sky(side)}
    found = {name: with_patch(image, _PATCH_AT, _PATCH) for name, image in found.items()}
    return found | {name: photo(name, min(side, 300)) for name in PHOTOS}


def run(schemes: tuple[str, ...] = SCHEMES, side: int = SIDE) -> Result:
    """Runs float32 and each scheme.

    Args:
        schemes: recipes, for all layers.
        side: pixels of the smooth scenes across; even.

    Raises:
        ModuleNotFoundError: a package is missing; the message names it.
        ValueError: an unknown scheme, or a side too small.
    """
    given = scenes(side)
    network = load_network()
    models = {FLOAT: network} | {scheme: quantize(network, scheme) for scheme in schemes}
    images: dict[str, dict[str, torch.Tensor]] = {name: {} for name in given}
    measures: dict[str, dict[str, Measures]] = {name: {} for name in given}
    with torch.inference_mode():
        for name, scene in given.items():
            seen = mosaic(scene)[None]
            for scheme, model in models.items():
                image = model(seen)[0]
                if name in SMOOTH:
                    image = image[..., _PATCH_AT + _PATCH :, _PATCH_AT + _PATCH :]
                images[name][scheme] = image
                measures[name][scheme] = measure(images[name][FLOAT], image, name in SMOOTH)
    return Result(images, measures, {name: summary(m).bytes_after for name, m in models.items()})
