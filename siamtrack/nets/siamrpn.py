"""SiamRPN and SiamRPN++: anchor boxes classified and refined by depthwise correlation.

Sources: Li et al., "High Performance Visual Tracking with Siamese Region Proposal Network", CVPR 2018, in the depthwise
form of their reference implementation, and "SiamRPN++", CVPR 2019. Both are baselines of the papers implemented here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from siamtrack.bundle import TrackingSpec
from siamtrack.nets.backbones import AlexNet
from siamtrack.nets.decode import AnchorBased, AnchorMaps, Grid, Normalisation
from siamtrack.nets.layers import CorrelationBranch, PyramidFeatures, check_correlation

RATIOS = (0.33, 0.5, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class SiamRPNConfig:
    """Anchors and switches of `SiamRPN`.

    Attributes:
        ratios: height by width of the anchors of a cell.
        scale: side of the square anchor in strides.
        correlation: key of `siamtrack.nets.correlation.DEPTHWISE_FORMS`.
    """

    ratios: tuple[float, ...] = RATIOS
    scale: int = 8
    correlation: str = "grouped"

    def __post_init__(self) -> None:
        check_correlation(self.correlation)


@dataclass(frozen=True)
class SiamRPNppConfig(SiamRPNConfig):
    """Size, anchors and switches of `SiamRPNpp`.

    Attributes:
        channels: neck width; 256 in the paper.
        weighted_levels: sum the levels with softmax weights, one set a branch (the VOT model), or take their plain mean
            (the OTB model).
    """

    channels: int = 256
    weighted_levels: bool = True


def anchor_sizes(ratios: Sequence[float], scale: int, stride: int) -> tuple[tuple[int, int], ...]:
    """Width and height of every anchor in crop pixels, truncated to whole strides as the reference implementation does.

    Imported weights were trained on these very sizes: 104x32, 88x40, 64x64, 40x80 and 32x96 for its five ratios.
    """
    sizes = []
    for ratio in ratios:
        width = int((stride * stride / ratio) ** 0.5)
        sizes.append((width * scale, int(width * ratio) * scale))
    return tuple(sizes)


class AnchorHead(nn.Module):
    """Classification and regression of one feature level for A anchors a cell."""

    def __init__(self, channels: int, anchors: int, correlation: str) -> None:
        super().__init__()
        self.cls = CorrelationBranch(channels, 2 * anchors, correlation)
        self.loc = CorrelationBranch(channels, 4 * anchors, correlation)

    def kernels(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Template features ``[N, C, K, K]`` to the kernels of both branches ``[N, C, K - 2, K - 2]``."""
        return self.cls.conv_kernel(z), self.loc.conv_kernel(z)

    def forward(self, x: Tensor, cls_kernel: Tensor, loc_kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Search features to logits ``[N, 2 A, H, W]`` and deltas ``[N, 4 A, H, W]``."""
        return self.cls(cls_kernel, x), self.loc(loc_kernel, x)


class SiamRPN(nn.Module):
    """AlexNet, one level, 287 px search crop, 21x21 grid of stride 8, five anchors a cell."""

    template_size, search_size = 127, 287
    grid = Grid(size=21, stride=8, origin=63.5)
    normalisation = Normalisation(mean=0.0, scale=1.0)  # raw BGR, as pysot
    template_names = ("cls_kernel", "loc_kernel")
    tracking = TrackingSpec(penalty_k=0.16, window_influence=0.4, size_rate=0.3, motion_rate=0.0)

    def __init__(self, config: SiamRPNConfig | None = None) -> None:
        super().__init__()
        self.config = config or SiamRPNConfig()
        anchors = anchor_sizes(self.config.ratios, self.config.scale, self.grid.stride)
        self.backbone = AlexNet()
        self.head = AnchorHead(256, len(anchors), self.config.correlation)
        self.decoder = AnchorBased(self.grid, anchors)

    def template(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, 3, 127, 127]`` to two kernels ``[N, 256, 4, 4]``."""
        return self.head.kernels(self.backbone(image)[0])

    def search(self, image: Tensor, *template: Tensor) -> AnchorMaps:
        """``[N, 3, 287, 287]`` and the tensors of `template` to raw maps on the 21x21 grid."""
        return AnchorMaps(*self.head(self.backbone(image)[0], *template))

    def forward(self, template: Tensor, search: Tensor) -> AnchorMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 287, 287]`` crops to raw maps."""
        return self.search(search, *self.template(template))


class SiamRPNpp(PyramidFeatures):
    """SiamRPN++: modified ResNet-50, three levels, 25x25 grid of stride 8, five anchors a cell."""

    template_names = tuple(f"{kind}_kernel{level}" for level in range(3) for kind in ("cls", "loc"))
    tracking = TrackingSpec(penalty_k=0.05, window_influence=0.42, size_rate=0.38, motion_rate=0.0)

    def __init__(self, config: SiamRPNppConfig | None = None) -> None:
        config = config or SiamRPNppConfig()
        super().__init__(config.channels)
        self.config = config
        anchors = anchor_sizes(config.ratios, config.scale, self.grid.stride)
        self.heads = nn.ModuleList(AnchorHead(config.channels, len(anchors), config.correlation) for _ in self.levels)
        if config.weighted_levels:
            self.cls_weight = nn.Parameter(torch.ones(len(self.levels)))
            self.loc_weight = nn.Parameter(torch.ones(len(self.levels)))
        self.decoder = AnchorBased(self.grid, anchors)

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """``[N, 3, 127, 127]`` to two kernels ``[N, C, 5, 5]`` a level."""
        levels = zip(self.heads, self.template_features(image), strict=True)
        return tuple(kernel for head, z in levels for kernel in cast(AnchorHead, head).kernels(z))

    def search(self, image: Tensor, *template: Tensor) -> AnchorMaps:
        """``[N, 3, 255, 255]`` and the tensors of `template` to raw maps on the 25x25 grid."""
        maps = [self.heads[i](x, *template[2 * i : 2 * i + 2]) for i, x in enumerate(self.features(image))]
        logits, deltas = (torch.stack(level_maps) for level_maps in zip(*maps, strict=True))  # [levels, N, .., 25, 25]
        if not self.config.weighted_levels:
            return AnchorMaps(logits.mean(0), deltas.mean(0))
        cls_share, loc_share = (w.softmax(0)[:, None, None, None, None] for w in (self.cls_weight, self.loc_weight))
        return AnchorMaps((logits * cls_share).sum(0), (deltas * loc_share).sum(0))

    def forward(self, template: Tensor, search: Tensor) -> AnchorMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 255, 255]`` crops to raw maps."""
        return self.search(search, *self.template(template))
