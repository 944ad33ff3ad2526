"""What the edge models share: MobileNetV2 features of stride 16, their template cells, the pixelwise kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from siamtrack.nets.backbones import MobileNetV2
from siamtrack.nets.decode import Grid, Normalisation


class EdgeFeatures(nn.Module):
    """MobileNetV2 to stride 16 with its stride-8 features added, for CPUs and small GPUs; 209 px search crop.

    209 = 13 * 16 + 1: the 14x14 grid then has its middle, where the cosine window peaks, in the middle of the crop.

    Args:
        channels: width of the features.
    """

    template_size, search_size = 127, 209
    grid = Grid(size=14, stride=16, origin=0.5)
    normalisation = Normalisation(mean=127.5, scale=1 / 127.5)
    cells = 7  # template cells a side: 1..7 of 8, cell 4 is the centre

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = MobileNetV2()
        # 1x1 over stride-16 features and stride-8 features folded 2x2 into depth, written as the 2x2 convolution it is.
        self.neck8 = nn.Conv2d(32, channels, 2, stride=2, bias=False)
        self.neck16 = nn.Conv2d(96, channels, 1, bias=False)
        self.neck_norm = nn.BatchNorm2d(channels)

    def features(self, image: Tensor) -> Tensor:
        """``[N, 3, S, S]`` to ``[N, C, S/16, S/16]`` (rounded up): 8x8 for 127 px, 14x14 for 209."""
        stride8, stride16 = self.backbone(image)
        odd = stride8.shape[-1] % 2  # 27 cells of 209 px: an empty 28th makes pairs of them
        stride8 = functional.pad(stride8, (0, odd, 0, odd))
        return self.neck_norm(self.neck8(stride8) + self.neck16(stride16))

    def template_features(self, image: Tensor) -> Tensor:
        """``[N, 3, 127, 127]`` to the cells of the target and its surroundings ``[N, C, 7, 7]``."""
        return self.features(image)[:, :, 1:8, 1:8]


def covered_cells(size: Tensor, cells: int) -> Tensor:
    """How much of each template cell a target covers.

    Args:
        size: ``[N, 2]`` its width and height in template-crop pixels; it is centred in the crop.
        cells: K, template cells a side, each a square of the stride about its pixel.

    Returns:
        ``[N, K * K]`` shares in [0, 1], row by row.
    """
    stride = EdgeFeatures.grid.stride
    first = EdgeFeatures.grid.origin + stride - EdgeFeatures.template_size / 2  # cell 1 from the crop's centre
    centres = first + stride * torch.arange(cells, dtype=size.dtype, device=size.device)
    half = size[:, :, None] / 2  # [N, 2, 1]
    ends = torch.minimum(centres + stride / 2, half) - torch.maximum(centres - stride / 2, -half)
    across, down = (ends / stride).clamp(0, 1).unbind(dim=1)  # [N, K] each
    return (down[:, :, None] * across[:, None]).flatten(1)


def cell_kernel(z: Tensor) -> Tensor:
    """Template cells ``[N, C, K, K]`` as the kernel ``[N, K * K, C]`` of `siamtrack.nets.correlation.pixelwise`.

    Divided by the root of C, so that a product of unit features is of unit size whatever the width.
    """
    return z.flatten(2).transpose(1, 2) / math.sqrt(z.shape[1])
