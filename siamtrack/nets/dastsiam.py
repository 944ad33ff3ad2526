"""DASTSiam: a SiamRPN whose template is renewed while tracking and whose search features are augmented by it.

Source: "DASTSiam: Spatio-Temporal Fusion and Discriminative Augmentation for Improved Siamese Tracking", section 2, and
the released network definition where the paper is silent. The errata D1 to D18 named below say which reading is taken
(`docs/papers.md`). Its two transformer modules are in `siamtrack.nets.template_update`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from siamtrack.bundle import TrackingSpec, UpdateSpec
from siamtrack.nets.backbones import ResNet50Layer3, TwoBackbones
from siamtrack.nets.correlation import DEPTHWISE_FORMS, pixelwise
from siamtrack.nets.decode import AnchorBased, AnchorMaps, Grid, Normalisation
from siamtrack.nets.edge import EdgeFeatures, cell_kernel
from siamtrack.nets.layers import check_correlation, conv_norm_act, separable_tower
from siamtrack.nets.template_update import (
    Discriminative,
    SpatioTemporal,
    TransformerConfig,
    check_preset,
    three_features,
)

ANCHOR_PX = ((64, 64),)  # erratum D11: four regression channels leave room for one anchor, ratio 1 and scale 8
UPDATE_RULE = UpdateSpec(min_score=0.59)  # 1.18 on the sum of two scores (section 3.1), our mean halves it (D13)

NO_FUSION = "this configuration has no fusion (st=False): its template is not renewed"


@dataclass(frozen=True)
class DASTSiamConfig:
    """Size and switches of `DASTSiam`; tables 3 to 5 are made of `st`, `da`, `second` and `anchors_px`.

    Attributes:
        st: spatio-temporal fusion; without it the template stays that of the first frame.
        da: discriminative augmentation of the search features.
        second: the second classification branch, which learns the same mask (erratum D12).
        anchors_px: width and height of the anchors of a cell.
        attention: "paper" or "release", see `siamtrack.nets.template_update.SpatioTemporal` (erratum D2).
        gated: the release's gated branch in the fusion, which is not in the paper (erratum D7).
        untied: a backbone of their own for templates, as released, in place of a shared one (erratum D9).
        st_grid: cells a side that are fused: 16 as released, or the 8 that the text has (erratum D5).
        cached_memory: let the update graph, not every search, project the template for the cross-attention. Saves half
            a percent of a search and costs 2 MB of template tensors.
        transformer: size of encoder and decoder.
        correlation: key of `siamtrack.nets.correlation.DEPTHWISE_FORMS`.
    """

    st: bool = True
    da: bool = True
    second: bool = True
    anchors_px: tuple[tuple[int, int], ...] = ANCHOR_PX
    attention: str = "paper"
    gated: bool = False
    untied: bool = False
    st_grid: int = 16
    cached_memory: bool = False
    transformer: TransformerConfig = TransformerConfig()
    correlation: str = "grouped"

    def __post_init__(self) -> None:
        check_correlation(self.correlation)
        check_preset(self.attention)
        check_anchors(self.anchors_px)
        if self.st_grid not in (8, 16):
            raise ValueError(f"st_grid must be 8 or 16, got {self.st_grid}")
        if self.cached_memory and not (self.st and self.da):
            raise ValueError(
                "cached_memory moves a part of the augmentation to the update: it needs st=True and da=True"
            )


class DASTSiam(nn.Module):
    """The released network: ResNet-50 to layer3, one level, 287 px search crop, 25x25 grid of stride 8.

    The template crop is 127 px and the search crop 287 (erratum D1: the text has them swapped). One level, no pyramid
    (D8). Sizes follow from the features, and nothing is kept between calls, so that the parts can be exported (D18).

    Attributes:
        names: of the tensors that `search` takes, and `update` gives; without `st`, `template` gives them.
    """

    template_size, search_size = 127, 287
    # Template cells 4..11 of 16 have their middle on pixel 60, the target has its own on 63; search cell k is on pixel
    # 8 k, and two unpadded convolutions take two cells off. So cell 0 is the target at 8 (0 + 2) + 28 + 3 = 47.
    grid = Grid(size=25, stride=8, origin=47.5)
    normalisation = Normalisation(mean=114.5, scale=1 / 57.6)  # of ImageNet, mean of the channels; not published
    update_rule = UPDATE_RULE
    learns_update = True
    tracking = TrackingSpec(penalty_k=0.16, window_influence=0.4, size_rate=0.3, motion_rate=0.0)  # SiamRPN's

    def __init__(self, config: DASTSiamConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DASTSiamConfig()
        width = config.transformer.width
        self.backbone: ResNet50Layer3 | TwoBackbones = ResNet50Layer3()
        if config.untied:
            self.backbone = TwoBackbones(ResNet50Layer3(), self.backbone)
        self.reduce = nn.Sequential(nn.Conv2d(1024, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.st = SpatioTemporal(config.transformer, config.attention, config.gated) if config.st else None
        self.da = Discriminative(config.transformer) if config.da else None
        anchors = len(config.anchors_px)
        self.adjust = nn.ModuleDict({f"{side}_{branch}": _adapter(width) for side in "zx" for branch in ("cls", "loc")})
        self.correlate = DEPTHWISE_FORMS[config.correlation]
        self.cls_trunk = nn.Sequential(*_conv(width, width, 1), *_conv(width, width, 3), *_conv(width, 64, 3))
        self.loc_trunk = nn.Sequential(*_conv(width, width, 1), *_conv(width, width, 3), *_conv(width, 64, 3))
        self.cls = _prediction(2 * anchors)
        self.second = _prediction(anchors) if config.second else None
        self.loc = _prediction(4 * anchors)
        self.decoder = AnchorBased(self.grid, config.anchors_px)

        cached = [f"{kind}{i}" for i in range(config.transformer.layers) for kind in ("key", "value")]
        fused = ("fused",) if config.st or config.da else ()
        self.names = (*fused, *(cached if config.cached_memory else ()), "cls_kernel", "loc_kernel")
        self.template_names = ("feature",) if config.st else self.names
        self.update_names = self.names if config.st else ()

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """``[N, 3, 127, 127]`` to the feature ``[N, 256, 16, 16]``; without `st` to the tensors of `update`."""
        backbone = self.backbone.template if isinstance(self.backbone, TwoBackbones) else self.backbone
        feature = _centre(self.reduce(backbone(image)[0]), self.config.st_grid)
        return (feature,) if self.config.st else self._prepare(feature)

    def update(self, first: Tensor, history: Tensor, current: Tensor) -> tuple[Tensor, ...]:
        """Three features ``[N, 256, 16, 16]`` to the fused one, and what `search` needs of it.

        The fused feature is the next history: "f_a is the result of ST's output" (section 2.3).

        Raises:
            ValueError: the configuration has no fusion.
        """
        if self.st is None:
            raise ValueError(NO_FUSION)
        return self._prepare(self.st(first, history, current))

    def _prepare(self, fused: Tensor) -> tuple[Tensor, ...]:
        """The fused template, keys and values where they are cached, and two kernels ``[N, 256, 8, 8]``."""
        z = _centre(fused, 8)
        prepared = {"fused": fused, "cls_kernel": self.adjust["z_cls"](z), "loc_kernel": self.adjust["z_loc"](z)}
        if self.config.cached_memory and self.da is not None:
            prepared |= zip(self.names[1:-2], self.da.memory(fused), strict=True)
        return tuple(prepared[name] for name in self.names)

    def search(self, image: Tensor, *template: Tensor) -> AnchorMaps:
        """``[N, 3, 287, 287]`` and the tensors of `update` to raw maps on the 25x25 grid."""
        *prepared, cls_kernel, loc_kernel = template
        backbone = self.backbone.search if isinstance(self.backbone, TwoBackbones) else self.backbone
        x = self.reduce(backbone(image)[0])  # [N, 256, 36, 36]
        if self.da is not None:
            fused, *memory = prepared
            x = self.da(x, tuple(memory) or self.da.memory(fused))
        cls = self.cls_trunk(self.correlate(self.adjust["x_cls"](x), cls_kernel))  # [N, 64, 29, 29]
        loc = self.loc_trunk(self.correlate(self.adjust["x_loc"](x), loc_kernel))
        return AnchorMaps(self.cls(cls), self.loc(loc), None if self.second is None else self.second(cls))

    def forward(
        self, template: Tensor, search: Tensor, history: Tensor | None = None, current: Tensor | None = None
    ) -> AnchorMaps:
        """Normalised crops to raw maps with one fusion, as in training (section 2.3).

        Args:
            template: T_i, ``[N, 3, 127, 127]``.
            search: T_s, ``[N, 3, 287, 287]``.
            history: T_a, like `template`; when None the first template, as when a track starts.
            current: T_c, likewise.
        """
        if self.st is None:
            return self.search(search, *self.template(template))
        return self.search(search, *self.update(*three_features(self.template, template, history, current)))


@dataclass(frozen=True)
class DASTSiamEdgeConfig:
    """Size and switches of `DASTSiamEdge`; `st`, `da`, `second`, `anchors_px` and `attention` as in `DASTSiamConfig`.

    Attributes:
        transformer: size of encoder and decoder; its width is that of all features.
        blocks: depthwise-separable blocks a branch.
    """

    st: bool = True
    da: bool = True
    second: bool = True
    anchors_px: tuple[tuple[int, int], ...] = ANCHOR_PX
    attention: str = "paper"
    transformer: TransformerConfig = TransformerConfig(width=96, layers=2, heads=4, hidden=192)
    blocks: int = 2

    def __post_init__(self) -> None:
        check_preset(self.attention)
        check_anchors(self.anchors_px)
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")


class DASTSiamEdge(EdgeFeatures):
    """DASTSiam for CPUs and small GPUs: MobileNetV2, 209 px search crop, 14x14 grid of stride 16.

    Kept from the paper: the fusion of three templates with its adaptive filter, the augmentation of the search features
    with its own, centre-distance labels, two classification branches, one anchor, the update rule. What deviates, and
    why:

    * MobileNetV2 to stride 16 and a search crop of 209, as for every edge model here (`siamtrack.nets.edge`): 196
      search tokens in place of 1296, 49 template tokens in place of 256.
    * Two layers of 96 channels with a feed-forward part of 192, in place of four of 256 with 1024; the adaptive filter
      of the search features, which runs every frame, is depthwise-separable.
    * The fusion sees the 7x7 cells of the target and its surroundings, not the whole crop: the text's grid is no larger
      (erratum D5), and kernel and memory are the same cells then.
    * Pixelwise correlation, shared by the branches, and depthwise-separable towers, as in the edge form of SiamCAN. No
      adapters before the correlation: both modules have just filtered their output.
    """

    template_names = ("feature",)
    names = ("fused",)
    update_rule = UPDATE_RULE
    learns_update = True
    tracking = TrackingSpec(second_look=1.2)

    def __init__(self, config: DASTSiamEdgeConfig | None = None) -> None:
        config = config or DASTSiamEdgeConfig()
        width = config.transformer.width
        super().__init__(width)
        self.config = config
        self.template_names = ("feature",) if config.st else self.names
        self.update_names = self.names if config.st else ()
        self.st = SpatioTemporal(config.transformer, config.attention) if config.st else None
        self.da = Discriminative(config.transformer, separable=True) if config.da else None
        self.mix = conv_norm_act(self.cells**2, width, 1)
        self.cls_tower, self.loc_tower = (separable_tower(width, config.blocks) for _ in range(2))
        anchors = len(config.anchors_px)
        self.cls = nn.Conv2d(width, 2 * anchors, 1)
        self.second = nn.Conv2d(width, anchors, 1) if config.second else None
        self.loc = nn.Conv2d(width, 4 * anchors, 1)
        self.decoder = AnchorBased(self.grid, config.anchors_px)

    def template(self, image: Tensor) -> tuple[Tensor]:
        """``[N, 3, 127, 127]`` to the feature ``[N, C, 7, 7]``."""
        return (self.template_features(image),)

    def update(self, first: Tensor, history: Tensor, current: Tensor) -> tuple[Tensor]:
        """Three features ``[N, C, 7, 7]`` to the fused one, the next history.

        Raises:
            ValueError: the configuration has no fusion.
        """
        if self.st is None:
            raise ValueError(NO_FUSION)
        return (self.st(first, history, current),)

    def search(self, image: Tensor, fused: Tensor) -> AnchorMaps:
        """``[N, 3, 209, 209]`` and the fused template to raw maps on the 14x14 grid."""
        x = self.features(image)  # [N, C, 14, 14]
        if self.da is not None:
            x = self.da(x, self.da.memory(fused))
        x = self.mix(pixelwise(x, cell_kernel(fused)))
        cls, loc = self.cls_tower(x), self.loc_tower(x)
        return AnchorMaps(self.cls(cls), self.loc(loc), None if self.second is None else self.second(cls))

    def forward(
        self, template: Tensor, search: Tensor, history: Tensor | None = None, current: Tensor | None = None
    ) -> AnchorMaps:
        """As `DASTSiam.forward`; the search crop is ``[N, 3, 209, 209]``."""
        features = three_features(self.template, template, history, current)
        return self.search(search, *(self.update(*features) if self.config.st else features[:1]))


def check_anchors(anchors_px: tuple[tuple[int, int], ...]) -> None:
    """Raise ValueError when there are no anchors, or one is not a width and a height."""
    if not anchors_px or any(len(size) != 2 or min(size) < 1 for size in anchors_px):
        raise ValueError(f"anchors_px must be pairs of width and height, at least 1 px, got {anchors_px}")


def _centre(features: Tensor, cells: int) -> Tensor:
    """The middle ``cells`` x ``cells`` of a map."""
    edge = (features.shape[2] - cells) // 2
    return features[:, :, edge : edge + cells, edge : edge + cells]


def _conv(inputs: int, outputs: int, kernel: int, padding: int | None = None) -> list[nn.Module]:
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _adapter(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))


def _prediction(outputs: int) -> nn.Sequential:
    return nn.Sequential(*_conv(64, 64, 3, padding=0), nn.Conv2d(64, outputs, 3))
