"""The two attentions of SiamCAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """Channel weights of the template (SiamCAN Eq. 1 and 2; ECA-Net's layer).

    ``v = sigmoid(Conv1d_k(GAP(template)))``. The paper leaves k and the place of the pooling open (erratum S3):
    k = 5 is ECA-Net's rule for 256 channels, and the pooling is over the cropped 7x7 template.
    """

    def __init__(self, kernel: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, template: Tensor) -> Tensor:
        """``[N, C, K, K]`` template features to weights ``[N, C, 1, 1]`` in (0, 1)."""
        pooled = template.mean(dim=(2, 3))[:, None]  # [N, 1, C]
        return torch.sigmoid(self.conv(pooled))[:, 0, :, None, None]


class SpatialAttention(nn.Module):
    """Reweighs a map by where it responds (SiamCAN Eq. 6 and 7; CBAM's layer).

    The equations print the one-channel weight map as the result; multiplying the input by it is what the text and CBAM
    mean (erratum S5).
    """

    def __init__(self, kernel: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(pooled))
