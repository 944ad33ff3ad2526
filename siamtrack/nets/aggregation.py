"""SiamLA's feature aggregation: how good a predicted box is, read from the features at its centre and corners."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siamtrack.nets.decode import Grid

POINTS = ((0.0, 0.0), (-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
"""Centre and the four corners of a box, in half widths and half heights from its centre (SiamLA Fig. 5)."""


def sampling_weights(ltrb: Tensor, grid: Grid, points: Tensor) -> Tensor:
    """Bilinear weights of every cell at points of every predicted box.

    Separable hat functions, ``max(0, 1 - |x - j|) max(0, 1 - |y - i|)``; points outside the map are moved to its edge
    (as `torch.nn.functional.grid_sample` does with ``align_corners=True, padding_mode="border"``). The sample is then
    one matrix product, which every exporter takes.

    Args:
        ltrb: ``[N, 4, H, W]`` distances of each cell to its box's sides, in crop pixels.
        grid: geometry of the map.
        points: ``[P, 2]``, as `POINTS`.

    Returns:
        ``[N, H * W, P * H * W]``: row m holds the weights of box m, point after point; each point's add up to 1.
    """
    size = grid.size
    cells = torch.arange(size, dtype=ltrb.dtype, device=ltrb.device)
    left, top, right, bottom = (ltrb / grid.stride).unbind(1)  # [N, H, W], in cells
    kx, ky = points.T  # [P]

    def hats(own: Tensor, before: Tensor, after: Tensor, k: Tensor) -> Tensor:
        centre, half = own + (after - before) / 2, (after + before) / 2
        at = (centre[..., None] + half[..., None] * k).clamp(0, size - 1)  # [N, H, W, P]
        return (1 - (at[..., None] - cells).abs()).clamp(min=0)  # [N, H, W, P, size]

    across = hats(cells, left, right, kx)
    down = hats(cells[:, None], top, bottom, ky)
    return (down[..., :, None] * across[..., None, :]).flatten(3).flatten(1, 2)


class FeatureAggregation(nn.Module):
    """Quality of each predicted box from the features at its centre and corners (SiamLA section III-D, Fig. 5).

    The five samples are concatenated and fused by a 1x1 convolution. Fusing is linear and so is sampling: the map is
    projected once for each of the five points, and the samples of the five projections are added.

    The centre is that of the box, not the grid point, and samples are bilinear (erratum L12).

    Args:
        grid: geometry of the map.
        channels: of the map.
        width: of the fused features.
        norm: normalisation of the fused features.
    """

    points: Tensor

    def __init__(self, grid: Grid, channels: int, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("points", torch.tensor(POINTS), persistent=False)
        self.project = nn.Conv2d(channels, len(POINTS) * width, 1, bias=False)  # output: point by point
        self.norm = norm

    def forward(self, y: Tensor, ltrb: Tensor) -> Tensor:
        """``y`` [N, C, H, W] and ``ltrb`` [N, 4, H, W] (crop pixels; not learnt from) to ``[N, width, H, W]``."""
        projected = self.project(y).unflatten(1, (len(POINTS), -1))  # [N, 5, width, H, W]
        sources = projected.transpose(1, 2).flatten(2)  # [N, width, 5 H W]
        weights = sampling_weights(ltrb.detach(), self.grid, self.points).to(sources.dtype)
        fused = (weights @ sources.transpose(1, 2)).transpose(1, 2)  # [N, width, H W]
        return torch.relu(self.norm(fused.unflatten(2, y.shape[2:])))
