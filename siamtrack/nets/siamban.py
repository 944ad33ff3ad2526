"""SiamBAN: anchor-free boxes from three levels of depthwise correlation; the network that SiamCAN starts from.

Source: Chen et al., "Siamese Box Adaptive Network for Visual Tracking", CVPR 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from siamtrack.bundle import TrackingSpec
from siamtrack.nets.decode import AnchorFree, RawMaps
from siamtrack.nets.layers import CorrelationBranch, PyramidFeatures, check_correlation, positive_distances


@dataclass(frozen=True)
class SiamBANConfig:
    """Size and switches of `SiamBAN`.

    Attributes:
        channels: neck width; 256 in the paper.
        adjust_convs: 3x3 convolutions before correlation, one pair a branch. Without them both branches read one and
            the same correlation map.
        centreness: one more channel of the classification branch, how central a cell is on the target (`quality` of the
            raw maps). SiamBAN has none; SiamCAN's table 3 tries it.
        correlation: key of `siamtrack.nets.correlation.DEPTHWISE_FORMS`.
    """

    channels: int = 256
    adjust_convs: bool = True
    centreness: bool = False
    correlation: str = "grouped"

    def __post_init__(self) -> None:
        check_correlation(self.correlation)


class SiamBAN(PyramidFeatures):
    """Modified ResNet-50, three levels, 25x25 grid of stride 8.

    Classification has two channels, channel 1 the target; distances are in crop pixels.
    """

    template_names = tuple(f"{kind}{level}" for kind in ("cls_kernel", "loc_kernel") for level in range(3))
    tracking = TrackingSpec(penalty_k=0.0851, window_influence=0.4633, size_rate=0.4442, motion_rate=0.0)  # VOT2018

    def __init__(self, config: SiamBANConfig | None = None) -> None:
        config = config or SiamBANConfig()
        super().__init__(config.channels)
        self.config = config
        self.cls = nn.ModuleList(self.branch(outputs=3 if config.centreness else 2) for _ in self.levels)
        self.loc = nn.ModuleList(self.branch(outputs=4) for _ in self.levels)
        self.cls_weight = nn.Parameter(torch.ones(len(self.levels)))
        self.loc_weight = nn.Parameter(torch.ones(len(self.levels)))
        self.loc_scale = nn.Parameter(torch.ones(len(self.levels)))
        self.decoder = AnchorFree(self.grid)

    def branch(self, outputs: int) -> CorrelationBranch:
        """One branch of one level; what descendants change."""
        return CorrelationBranch(self.config.channels, outputs, self.config.correlation, self.config.adjust_convs)

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """``[N, 3, 127, 127]`` to 3 + 3 kernels ``[N, C, 5, 5]``, without `adjust_convs` ``[N, C, 7, 7]``."""
        return self.kernels(self.template_features(image))

    def kernels(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Template features ``[N, C, 7, 7]`` of the levels to the kernels of both branches."""
        return tuple(
            cast(CorrelationBranch, branch).conv_kernel(z)
            for branches in (self.cls, self.loc)
            for branch, z in zip(branches, features, strict=True)
        )

    def search(self, image: Tensor, *template: Tensor) -> RawMaps:
        """``[N, 3, 255, 255]`` and the tensors of `template` to raw maps on the 25x25 grid."""
        return self.predict(self.features(image), template)

    def predict(self, features: Sequence[Tensor], kernels: Sequence[Tensor]) -> RawMaps:
        """Search features ``[N, C, 31, 31]`` and kernels of the levels to raw maps: weighted sums over the levels."""
        count = len(self.levels)
        scores = torch.stack([self.cls[i](kernels[i], x) for i, x in enumerate(features)])
        raw = torch.stack([self.loc[i](kernels[count + i], x) for i, x in enumerate(features)])
        ltrb = positive_distances(raw * self.loc_scale[:, None, None, None, None])  # [levels, N, 4, 25, 25]
        cls_share, loc_share = (w.softmax(0)[:, None, None, None, None] for w in (self.cls_weight, self.loc_weight))
        score = (scores * cls_share).sum(0)  # [N, 2 or 3, 25, 25]
        quality = score[:, 2:] if self.config.centreness else None
        return RawMaps(logits=score[:, :2], ltrb=(ltrb * loc_share).sum(0), quality=quality)

    def forward(self, template: Tensor, search: Tensor) -> RawMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 255, 255]`` crops to raw maps."""
        return self.search(search, *self.template(template))
