"""A small convolution network for 28 x 28 images, made so that every width can follow."""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.qat.fashion.data import CLASSES

FIRST, LAST = "stem.conv", "head"
"""The layers that see pixels and give answers: they stay at 8 bits."""


class Block(nn.Module):
    """Convolution, batch norm, PReLU, and the input added where it has the output's channels.

    PReLU, not ReLU: a binary activation is a sign, and behind ReLU every sign would be the same.
    The sum carries past a layer what its signs lose (Liu et al., "Bi-Real Net", 2018).
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.PReLU(out_channels)
        self.adds = channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, H, W], float32."""
        y: Tensor = self.act(self.norm(self.conv(x)))
        return x + y if self.adds else y


class Network(nn.Module):
    """Fashion-MNIST images float32 [N, 1, 28, 28] to logits [N, 10].

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = Block(1, width)
        self.body = nn.Sequential(
            nn.MaxPool2d(2),
            Block(width, 2 * width),
            nn.MaxPool2d(2),
            Block(2 * width, 4 * width),
            Block(4 * width, 4 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width * 3 * 3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, 1, 28, 28] -> [N, 10]."""
        y: Tensor = self.head(self.body(self.stem(x)))
        return y
