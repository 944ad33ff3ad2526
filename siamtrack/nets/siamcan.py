"""SiamCAN: cross-attention guided Siamese network, in the paper's size and as an edge model.

Source: "SiamCAN: Simple yet Effective Method to Enhance Siamese Short-Term Tracking", sections 3.1 to 3.3. The paper
starts from SiamBAN and prints several equations that cannot be meant; the errata S1 to S13 named below say which
reading is taken and why (`docs/papers.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from siamtrack.nets.attention import ChannelAttention, SpatialAttention
from siamtrack.nets.backbones import MobileNetV2, ResNet50Dilated
from siamtrack.nets.correlation import DEPTHWISE_FORMS, pixelwise
from siamtrack.nets.decode import Grid, Normalisation, RawMaps


@dataclass(frozen=True)
class SiamCANConfig:
    """Size and switches of `SiamCAN`.

    Attributes:
        channels: neck width; 256 in the paper.
        channel_attention: the cross-attention of Eq. 1 to 3 (ablation row "+ cross-attention").
        spatial_attention: the self-spatial attention of Eq. 6 and 7 (ablation row "+ spatial-attention").
        adjust_convs: SiamBAN's 3x3 convolutions before correlation, one pair a branch. Without them Eq. 4 and 5 are
            one and the same map for both branches (erratum S2).
        correlation: key of `siamtrack.nets.correlation.DEPTHWISE_FORMS`.
    """

    channels: int = 256
    channel_attention: bool = True
    spatial_attention: bool = True
    adjust_convs: bool = True
    correlation: str = "grouped"

    def __post_init__(self) -> None:
        if self.correlation not in DEPTHWISE_FORMS:
            raise ValueError(f"correlation must be one of {sorted(DEPTHWISE_FORMS)}, got {self.correlation!r}")


class Neck(nn.Module):
    """1x1 convolution and BatchNorm to the common width, no activation (SiamRPN++)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x)


class CorrelationBranch(nn.Module):
    """One branch (classification or regression) of one level: correlate, attend, predict."""

    def __init__(self, config: SiamCANConfig, outputs: int) -> None:
        super().__init__()
        width = config.channels
        self.conv_kernel = self._adjust(width) if config.adjust_convs else nn.Identity()
        self.conv_search = self._adjust(width) if config.adjust_convs else nn.Identity()
        self.correlate = DEPTHWISE_FORMS[config.correlation]
        self.spatial = SpatialAttention() if config.spatial_attention else nn.Identity()
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1),
        )

    @staticmethod
    def _adjust(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))

    def forward(self, kernel: Tensor, search: Tensor) -> Tensor:
        """``kernel`` already through `conv_kernel` [N, C, 5, 5]; ``search`` [N, C, 31, 31] -> [N, outputs, 25, 25]."""
        correlated = self.correlate(self.conv_search(search), kernel)
        return self.head(self.spatial(correlated))


class SiamCAN(nn.Module):
    """The paper's network: modified ResNet-50, three levels, 25x25 grid of stride 8.

    Classification has two channels, channel 1 the target (erratum S8: SiamBAN's order, so that its weights import).
    """

    template_size, search_size = 127, 255
    grid = Grid(size=25, stride=8, origin=31.5)
    normalisation = Normalisation(mean=0.0, scale=1.0)  # raw BGR, as every pysot descendant
    levels = (512, 1024, 2048)

    def __init__(self, config: SiamCANConfig | None = None) -> None:
        super().__init__()
        self.config = config or SiamCANConfig()
        count = len(self.levels)
        self.template_names = tuple(
            f"{kind}{level}" for kind in ("cls_kernel", "loc_kernel", "attention") for level in range(count)
        )
        self.backbone = ResNet50Dilated()
        self.necks = nn.ModuleList(Neck(channels, self.config.channels) for channels in self.levels)
        self.attentions = nn.ModuleList(ChannelAttention() for _ in self.levels if self.config.channel_attention)
        self.cls = nn.ModuleList(CorrelationBranch(self.config, outputs=2) for _ in self.levels)
        self.loc = nn.ModuleList(CorrelationBranch(self.config, outputs=4) for _ in self.levels)
        # Erratum S6: separate softmax-weighted sums, not a concatenation with one shared alpha.
        self.cls_weight = nn.Parameter(torch.ones(count))
        self.loc_weight = nn.Parameter(torch.ones(count))
        self.loc_scale = nn.Parameter(torch.ones(count))

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """``[N, 3, 127, 127]`` to 3 + 3 kernels ``[N, C, 5, 5]`` and 3 channel weights ``[N, C, 1, 1]``."""
        features = [
            neck(level)[:, :, 4:11, 4:11]  # centre 7x7 of 15x15 (section 3.1)
            for neck, level in zip(self.necks, self.backbone(image), strict=True)
        ]
        if self.config.channel_attention:
            weights = [attend(z) for attend, z in zip(self.attentions, features, strict=True)]
        else:
            weights = [torch.ones_like(z[:, :, :1, :1]) for z in features]
        cls_kernels = self._kernels(self.cls, features)
        loc_kernels = self._kernels(self.loc, features)
        return (*cls_kernels, *loc_kernels, *weights)

    @staticmethod
    def _kernels(branches: nn.ModuleList, features: list[Tensor]) -> list[Tensor]:
        return [cast(CorrelationBranch, b).conv_kernel(z) for b, z in zip(branches, features, strict=True)]

    def search(self, image: Tensor, *template: Tensor) -> RawMaps:
        """``[N, 3, 255, 255]`` and the tensors of `template` to raw maps on the 25x25 grid."""
        count = len(self.levels)
        cls_kernels, loc_kernels, weights = (template[i : i + count] for i in (0, count, 2 * count))
        logits, ltrb = [], []
        for i, level in enumerate(self.backbone(image)):
            x = self.necks[i](level) * weights[i]  # Eq. 3: channel-wise product, no residual (S4); [N, C, 31, 31]
            logits.append(self.cls[i](cls_kernels[i], x))
            raw = self.loc[i](loc_kernels[i], x) * self.loc_scale[i]
            # Positive distances (S9); e^-6 px is nothing and e^6.2 = 493 px exceeds any crop.
            ltrb.append(torch.exp(raw.clamp(-6.0, 6.2)))
        cls_share, loc_share = self.cls_weight.softmax(0), self.loc_weight.softmax(0)
        return RawMaps(
            logits=torch.stack([m * a for m, a in zip(logits, cls_share, strict=True)]).sum(0),
            ltrb=torch.stack([m * a for m, a in zip(ltrb, loc_share, strict=True)]).sum(0),
        )

    def forward(self, template: Tensor, search: Tensor) -> RawMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 255, 255]`` crops to raw maps."""
        return self.search(search, *self.template(template))


@dataclass(frozen=True)
class SiamCANEdgeConfig:
    """Size and switches of `SiamCANEdge`.

    Attributes:
        channels: neck and head width.
        blocks: depthwise-separable blocks a branch.
        channel_attention: as in `SiamCANConfig`.
        spatial_attention: as in `SiamCANConfig`.
    """

    channels: int = 96
    blocks: int = 3
    channel_attention: bool = True
    spatial_attention: bool = True


def _conv_norm(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class EdgeBranch(nn.Module):
    """Spatial attention, depthwise-separable blocks, 1x1 prediction."""

    def __init__(self, config: SiamCANEdgeConfig, outputs: int) -> None:
        super().__init__()
        width = config.channels
        self.spatial = SpatialAttention() if config.spatial_attention else nn.Identity()
        layers: list[nn.Module] = []
        for _ in range(config.blocks):
            layers += [_conv_norm(width, width, 3, groups=width), _conv_norm(width, width, 1)]
        self.tower = nn.Sequential(*layers)
        self.predict = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(self.tower(self.spatial(x)))


class SiamCANEdge(nn.Module):
    """SiamCAN for CPUs and small GPUs: MobileNetV2, 223 px search crop, 14x14 grid of stride 16.

    Kept from the paper: cross-channel attention of the template on the search features, self-spatial attention a
    branch, circle and ellipse labels, DIoU regression. What deviates, and why:

    * MobileNetV2 to stride 16 in place of ResNet-50; its stride-8 features, taken in by a 2x2 convolution, stand for
      the second level, so small targets keep detail. The two are added before correlation, not fused after it.
    * A search crop of 223 in place of 255 pixels on the same scale: a quarter less to compute, and the target may still
      move by 1.2 times its size between frames.
    * Pixelwise in place of depthwise correlation, shared by the branches: every search cell against each of the 49
      template cells. It learns less of what training targets look like. The channel weights v then fold into the
      kernel, ``z (v x) = (v z) x``, and the search graph never sees them.
    * Depthwise-separable towers, because the correlation map carries position, not appearance, and must be read
      spatially; one sigmoid logit in place of two softmax ones, distances of ``32 exp(raw)`` without a learnt scale.
    * Training (`training/recipes/siamcan-mobilenetv2.yaml`): focal loss over all cells in place of sampled, balanced
      cross-entropy, and the cell nearest to the centre always positive, or a small target would have none.
    """

    template_size, search_size = 127, 223
    grid = Grid(size=14, stride=16, origin=0.5)
    normalisation = Normalisation(mean=127.5, scale=1 / 127.5)
    template_names = ("kernel",)
    cells = 7  # template cells a side: 1..7 of 8, cell 4 is the centre

    def __init__(self, config: SiamCANEdgeConfig | None = None) -> None:
        super().__init__()
        self.config = config or SiamCANEdgeConfig()
        width = self.config.channels
        self.backbone = MobileNetV2()
        # 1x1 over stride-16 features and stride-8 features folded 2x2 into depth, written as the 2x2 convolution it is.
        self.neck8 = nn.Conv2d(32, width, 2, stride=2, bias=False)
        self.neck16 = nn.Conv2d(96, width, 1, bias=False)
        self.neck_norm = nn.BatchNorm2d(width)
        self.attention = ChannelAttention() if self.config.channel_attention else None
        self.mix = _conv_norm(self.cells**2, width, 1)
        self.cls = EdgeBranch(self.config, outputs=1)
        self.loc = EdgeBranch(self.config, outputs=4)
        nn.init.constant_(self.cls.predict.bias, -math.log(99.0))  # type: ignore[arg-type]  # focal loss: prior 0.01

    def features(self, image: Tensor) -> Tensor:
        """``[N, 3, S, S]`` to ``[N, C, S/16, S/16]``."""
        stride8, stride16 = self.backbone(image)
        return self.neck_norm(self.neck8(stride8) + self.neck16(stride16))

    def template(self, image: Tensor) -> tuple[Tensor]:
        """``[N, 3, 127, 127]`` to the correlation kernel ``[N, 49, C]``, channel attention folded in."""
        z = self.features(image)[:, :, 1:8, 1:8]  # [N, C, 7, 7]
        if self.attention is not None:
            z = z * self.attention(z)
        return (z.flatten(2).transpose(1, 2) / math.sqrt(self.config.channels),)

    def search(self, image: Tensor, kernel: Tensor) -> RawMaps:
        """``[N, 3, 223, 223]`` and the kernel to raw maps on the 14x14 grid."""
        x = self.mix(pixelwise(self.features(image), kernel))  # [N, C, 14, 14]
        ltrb = 32 * torch.exp(self.loc(x).clamp(-6.0, 2.7))  # 0.08 to 476 px: never nothing, never more than a crop
        return RawMaps(logits=self.cls(x), ltrb=ltrb)

    def forward(self, template: Tensor, search: Tensor) -> RawMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 223, 223]`` crops to raw maps."""
        return self.search(search, *self.template(template))
