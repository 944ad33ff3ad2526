"""SiamLA: localisation-aware Siamese network, in the paper's size and as an edge model.

Source: "Learning Localization-aware Target Confidence for Siamese Visual Tracking", section III. The paper builds on
SiamCAR and replaces its centre-ness by a branch of its own that says how well the predicted box fits. The errata named
below are in `docs/papers.md`. Its dynamic and smoothed labels (LADL, LALS) belong to training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siamtrack.bundle import TrackingSpec
from siamtrack.nets.aggregation import FeatureAggregation
from siamtrack.nets.attention import LocalisationNonLocal
from siamtrack.nets.correlation import pixelwise, summed_cells
from siamtrack.nets.decode import AnchorFree, RawMaps
from siamtrack.nets.edge import EdgeFeatures, cell_kernel
from siamtrack.nets.layers import (
    check_correlation,
    conv_norm_act,
    group_norm_tower,
    positive_distances,
    separable_tower,
    small_weights,
)
from siamtrack.nets.siamcar import ConcatenatedLevels

LOCALISATIONS = ("separate", "centreness", "none")


@dataclass(frozen=True)
class LocalisationConfig:
    """Switches of the localisation branch: the rows of tables III and VI.

    Attributes:
        localisation: "separate" is the paper's branch; "centreness" SiamCAR's, one convolution on the classification
            tower (rows without Lafa); "none" leaves the score to classification.
        non_local: the localisation-aware non-local block.
        aggregation: features at five points of the predicted box; without it those of the cell alone.
        average: how many of the best cells around the best one give the box (erratum L14); 1 takes its own.
    """

    localisation: str = "separate"
    non_local: bool = True
    aggregation: bool = True
    average: int = 3

    def __post_init__(self) -> None:
        if self.localisation not in LOCALISATIONS:
            raise ValueError(f"localisation must be one of {', '.join(LOCALISATIONS)}, got {self.localisation!r}")


@dataclass(frozen=True)
class SiamLAConfig(LocalisationConfig):
    """Size and switches of `SiamLA`.

    Attributes:
        channels: neck and tower width; 256 in SiamCAR.
        inner: width of the non-local block's queries, keys and values.
        correlation: key of `siamtrack.nets.correlation.DEPTHWISE_FORMS`.
    """

    channels: int = 256
    inner: int = 128
    correlation: str = "grouped"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_correlation(self.correlation)


class LocalisationBranch(nn.Module):
    """The separate localisation branch (section III-D): tower, non-local block, aggregation, one logit a cell.

    Args:
        tower: of the branch, on the same map as the other two.
        non_local: the localisation-aware block, or None.
        aggregate: gathers features for every predicted box, or those of every cell.
        width: channels that `aggregate` gives.
    """

    def __init__(
        self, tower: nn.Module, non_local: LocalisationNonLocal | None, aggregate: nn.Module, width: int
    ) -> None:
        super().__init__()
        self.tower, self.non_local, self.aggregate = tower, non_local, aggregate
        self.score = nn.Conv2d(width, 1, 1)

    def forward(self, fused: Tensor, h: Tensor, ltrb: Tensor) -> Tensor:
        """Reduced correlation map, naive correlation ``h`` and predicted distances to logits ``[N, 1, H, W]``."""
        x = self.tower(fused)
        y = x if self.non_local is None else self.non_local(x, h)
        at_boxes = self.aggregate(y, ltrb) if isinstance(self.aggregate, FeatureAggregation) else self.aggregate(y)
        return self.score(at_boxes)


class SiamLA(ConcatenatedLevels):
    """The paper's network: SiamCAR's trunk and towers, one sigmoid logit, a separate localisation branch.

    The confidence of a cell is classification times localisation (section IV-A). Weights of SiamCAR fit: of its two
    logits the difference is ours.
    """

    def __init__(self, config: SiamLAConfig | None = None) -> None:
        config = config or SiamLAConfig()
        width = config.channels
        super().__init__(width, config.correlation)
        self.config = config
        self.cls_tower = group_norm_tower(width)
        self.bbox_tower = group_norm_tower(width)
        self.cls_logits = nn.Conv2d(width, 1, 3, padding=1)
        self.bbox_pred = nn.Conv2d(width, 4, 3, padding=1)
        small_weights(self.cls_tower, self.bbox_tower, self.cls_logits, self.bbox_pred)
        if config.localisation == "separate":
            non_local = LocalisationNonLocal(width, config.inner, len(self.levels)) if config.non_local else None
            self.localise = LocalisationBranch(group_norm_tower(width), non_local, self._aggregate(), width)
            small_weights(self.localise)
        elif config.localisation == "centreness":
            self.centerness = nn.Conv2d(width, 1, 3, padding=1)
            small_weights(self.centerness)
        self.decoder = AnchorFree(self.grid, average=config.average)

    def _aggregate(self) -> nn.Module:
        width, norm = self.config.channels, nn.GroupNorm(32, self.config.channels)
        if self.config.aggregation:
            return FeatureAggregation(self.grid, width, width, norm)
        return nn.Sequential(nn.Conv2d(width, width, 1, bias=False), norm, nn.ReLU(inplace=True))

    def search(self, image: Tensor, *template: Tensor) -> RawMaps:
        """``[N, 3, 255, 255]`` and the kernels of `template` to raw maps on the 25x25 grid."""
        levels = self.correlations(image, template)  # 3 x [N, C, 25, 25]
        fused = self.down(torch.cat(levels, dim=1))
        cls = self.cls_tower(fused)
        ltrb = positive_distances(self.bbox_pred(self.bbox_tower(fused)))
        return RawMaps(self.cls_logits(cls), ltrb, self._quality(cls, fused, levels, template, ltrb))

    def _quality(
        self, cls: Tensor, fused: Tensor, levels: list[Tensor], template: tuple[Tensor, ...], ltrb: Tensor
    ) -> Tensor | None:
        if self.config.localisation == "none":
            return None
        if self.config.localisation == "centreness":
            return self.centerness(cls)
        # h of Eq. 8, the naive correlation of a level, is the sum over channels of its depthwise correlation. Taken as
        # the mean product: a sum of C K^2 = 12544 of them overflows half precision.
        area = template[0].shape[2] * template[0].shape[3]
        h = torch.stack([(level / area).mean(dim=1) for level in levels], dim=1)  # [N, 3, 25, 25]
        return self.localise(fused, h, ltrb)

    def forward(self, template: Tensor, search: Tensor) -> RawMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 255, 255]`` crops to raw maps."""
        return self.search(search, *self.template(template))


@dataclass(frozen=True)
class SiamLAEdgeConfig(LocalisationConfig):
    """Size and switches of `SiamLAEdge`.

    Attributes:
        channels: neck and tower width.
        blocks: depthwise-separable blocks of the classification and the regression tower.
        localisation_blocks: of the localisation tower.
        inner: width of the non-local block and of the aggregated features.
    """

    channels: int = 96
    blocks: int = 3
    localisation_blocks: int = 2
    inner: int = 48


class SiamLAEdge(EdgeFeatures):
    """SiamLA for CPUs and small GPUs: MobileNetV2, 209 px search crop, 14x14 grid of stride 16.

    Kept from the paper: the separate localisation branch with its non-local block, position embedding and five-point
    aggregation, confidence as classification times localisation, the mean of the best three. What deviates, and why:

    * Features, search crop, pixelwise correlation and separable towers of `siamtrack.nets.siamcan.SiamCANEdge`, for
      the reasons given there. The naive correlation h is then one map: each search cell's products with the template
      cells, summed along their places.
    * Towers with BatchNorm, which folds into the convolutions, in place of GroupNorm; a localisation tower of two
      blocks; inner width 48 in the non-local block and after the aggregation.
    * Distances of ``32 exp(raw)``: a step of the coarser grid is 16 px.
    """

    tracking = TrackingSpec(uncertain_rate=0.5, second_look=1.2)
    template_names = ("kernel",)

    def __init__(self, config: SiamLAEdgeConfig | None = None) -> None:
        config = config or SiamLAEdgeConfig()
        width = config.channels
        super().__init__(width)
        self.config = config
        self.mix = conv_norm_act(self.cells**2, width, 1)
        self.cls_tower = separable_tower(width, config.blocks)
        self.bbox_tower = separable_tower(width, config.blocks)
        self.cls_logits = nn.Conv2d(width, 1, 1)
        self.bbox_pred = nn.Conv2d(width, 4, 1)
        if config.localisation == "separate":
            non_local = LocalisationNonLocal(width, config.inner, responses=1) if config.non_local else None
            tower = separable_tower(width, config.localisation_blocks)
            self.localise = LocalisationBranch(tower, non_local, self._aggregate(), config.inner)
            if non_local is not None:
                small_weights(non_local)  # starts as the identity, nearly
        elif config.localisation == "centreness":
            self.centerness = nn.Conv2d(width, 1, 1)
        self.decoder = AnchorFree(self.grid, average=config.average)

    def _aggregate(self) -> nn.Module:
        width, inner = self.config.channels, self.config.inner
        if self.config.aggregation:
            return FeatureAggregation(self.grid, width, inner, nn.BatchNorm2d(inner))
        return conv_norm_act(width, inner, 1)

    def template(self, image: Tensor) -> tuple[Tensor]:
        """``[N, 3, 127, 127]`` to the correlation kernel ``[N, 49, C]``."""
        return (cell_kernel(self.template_features(image)),)

    def search(self, image: Tensor, kernel: Tensor) -> RawMaps:
        """``[N, 3, 209, 209]`` and the kernel to raw maps on the 14x14 grid."""
        products = pixelwise(self.features(image), kernel)  # [N, 49, 14, 14]
        fused = self.mix(products)
        cls = self.cls_tower(fused)
        ltrb = 32 * torch.exp(self.bbox_pred(self.bbox_tower(fused)).clamp(-6.0, 2.7))  # 0.08 to 476 px
        quality = None
        if self.config.localisation == "separate":
            quality = self.localise(fused, summed_cells(products / self.cells**2, self.cells), ltrb)
        elif self.config.localisation == "centreness":
            quality = self.centerness(cls)
        return RawMaps(self.cls_logits(cls), ltrb, quality)

    def forward(self, template: Tensor, search: Tensor) -> RawMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 209, 209]`` crops to raw maps."""
        return self.search(search, *self.template(template))
