"""Residual networks for small images, as in section 4.2 of arXiv:1512.03385: resnet20 has 0.27 million parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
"""Names of the networks, and their layers with weights: 6 n + 2, for n blocks a stage."""
_WIDTHS = (16, 32, 64)


class _Block(nn.Module):
    """Two convolutions and a way around them, which has no parameters: channels that are new are zero there."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // channels_in
        self.new_channels = channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, channels, height / stride, width / stride)`."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return torch.relu(x + y)


class SmallResNet(nn.Module):
    """A residual network of three stages for images of about 32x32.

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: classes to tell apart.
        zero_init_residual: whether each block begins as the identity: its last gain is zero (arXiv:1706.02677, section
            5.1).
    """

    def __init__(self, depth: int, num_classes: int, zero_init_residual: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        widths = [width for width in _WIDTHS for _ in range((depth - 2) // 6)]
        before = [_WIDTHS[0], *widths[:-1]]
        self.blocks = nn.Sequential(*(_Block(old, new) for old, new in zip(before, widths, strict=True)))
        self.fc = nn.Linear(_WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, num_classes)` of images `(n, 3, height, width)`."""
        features: Tensor = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits
