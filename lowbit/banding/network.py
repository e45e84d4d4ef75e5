"""The network: joint demosaicking, trained weights as PyPI's `demosaicnet` ships them.

The architecture is that of `BayerDemosaick` there (Gharbi et al., Deep Joint Demosaicking and
Denoising, 2016, as released): a module of our own with the same names of parameters, since
importing that package needs others that the network does not.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

PACKAGE = "demosaicnet"
DEPTH, WIDTH = 15, 64


class Demosaick(nn.Module):
    """A Bayer mosaic to an image: float32 `[N, 3, H, W]` in 0..1 to `[N, 3, H - 62, W - 62]`.

    The image lacks 31 pixels of the mosaic on each side, since no convolution pads. H and W are
    even, 64 at least.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(pack_mosaic=nn.Conv2d(3, 4, 2, stride=2))
        for i in range(1, DEPTH + 1):
            before = 4 if i == 1 else WIDTH
            layers[f"conv{i}"] = nn.Conv2d(before, 2 * WIDTH if i == DEPTH else WIDTH, 3)
            layers[f"relu{i}"] = nn.ReLU()
        self.main_processor = nn.Sequential(layers)
        self.residual_predictor = nn.Conv2d(WIDTH, 12, 1)
        self.upsampler = nn.ConvTranspose2d(12, 3, 2, stride=2, groups=3)
        self.fullres_processor = nn.Sequential(
            OrderedDict(
                post_conv=nn.Conv2d(6, WIDTH, 3),
                post_relu=nn.ReLU(),
                output=nn.Conv2d(WIDTH, 3, 1),
            )
        )

    def forward(self, mosaic: torch.Tensor) -> torch.Tensor:
        """The image of a mosaic."""
        filters, masks = self.main_processor(mosaic).split(WIDTH, 1)
        upsampled = self.upsampler(self.residual_predictor(filters * masks))
        crop = 2 * DEPTH
        packed = torch.cat([mosaic[..., crop:-crop, crop:-crop], upsampled], 1)
        image: torch.Tensor = self.fullres_processor(packed)
        return image


BORDER = 2 * DEPTH + 1
"""Pixels of the mosaic that the image lacks on each side."""


def load_network() -> Demosaick:
    """The trained network, in eval mode.

    Raises:
        ModuleNotFoundError: the package that ships the weights is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the network's weights are in a package: pip install --no-deps {PACKAGE}==0.0.14",
            name=PACKAGE,
        )
    network = Demosaick()
    path = Path(spec.origin).parent / "data" / "bayer.pth"
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()
