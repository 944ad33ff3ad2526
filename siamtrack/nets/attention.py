"""Attention over channels, over places and between places: SiamCAN's two and SiamLA's non-local block."""

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


class LocalisationNonLocal(nn.Module):
    """Lets every cell look at all others, knowing where the template responds (SiamLA Eq. 8 and 9).

    ``y = f(softmax(theta(x + p)^T phi(x + p)) g(x)) + x`` with ``p = e(h)``: a non-local block whose queries and keys
    hold a position embedding, made from the naive correlation h of template and search features. The products are not
    divided by the root of their width, as printed.

    Args:
        channels: of x.
        inner: width of queries, keys and values; the paper leaves it open.
        responses: channels of h, one a feature level.
    """

    def __init__(self, channels: int, inner: int, responses: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(responses, channels, 1)  # e of Eq. 8
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.f = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """``x`` [N, C, H, W] and ``h`` [N, responses, H, W] to the shape of x; M = H W."""
        place = x + self.embed(h)
        queries = self.theta(place).flatten(2).transpose(1, 2)  # [N, M, inner]
        similarity = queries @ self.phi(place).flatten(2)  # [N, M, M]
        values = self.g(x).flatten(2).transpose(1, 2)
        # Half precision cannot hold the exponentials' sum over hundreds of cells.
        seen = similarity.float().softmax(dim=2).to(values.dtype) @ values  # [N, M, inner]
        return self.f(seen.transpose(1, 2).unflatten(2, x.shape[2:])) + x
