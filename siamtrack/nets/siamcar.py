"""SiamCAR: one correlation map for all levels, fully convolutional towers, centre-ness; the baseline of SiamLA.

Source: Guo et al., "SiamCAR: Siamese Fully Convolutional Classification and Regression for Visual Tracking", CVPR
2020, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from siamtrack.bundle import TrackingSpec
from siamtrack.nets.correlation import DEPTHWISE_FORMS
from siamtrack.nets.decode import AnchorFree, Choice, Grid, RawMaps, size_penalty, target_probability
from siamtrack.nets.layers import (
    PyramidFeatures,
    check_correlation,
    group_norm_tower,
    positive_distances,
    small_weights,
)


@dataclass(frozen=True)
class SiamCARConfig:
    """Size and switches of `SiamCAR`.

    Attributes:
        channels: neck and tower width; 256 in the paper.
        correlation: key of `siamtrack.nets.correlation.DEPTHWISE_FORMS`.
        selection: "neighbours", the paper's mean of the best three cells at the best one, or "peak", the refinement of
            the released code (`PeakRefined`).
        origin_px: search pixel that cell 0 is centred on. It lies on 31; the released code trained as if it were 32,
            so boxes that "neighbours" reads from imported weights want 32 (quirk B1).
    """

    channels: int = 256
    correlation: str = "grouped"
    selection: str = "neighbours"
    origin_px: int = 31

    def __post_init__(self) -> None:
        check_correlation(self.correlation)
        if self.selection not in ("neighbours", "peak"):
            raise ValueError(f"selection must be neighbours or peak, got {self.selection!r}")


class ConcatenatedLevels(PyramidFeatures):
    """What SiamCAR and SiamLA share: depthwise correlation of all levels, concatenated and reduced to one map.

    Args:
        channels: neck width and width of the reduced map.
        correlation: key of `siamtrack.nets.correlation.DEPTHWISE_FORMS`.
    """

    template_names = ("template0", "template1", "template2")
    tracking = TrackingSpec(penalty_k=0.2, window_influence=0.3, size_rate=0.4, motion_rate=0.0)  # SiamCAR's for UAV123

    def __init__(self, channels: int, correlation: str) -> None:
        super().__init__(channels)
        self.correlate = DEPTHWISE_FORMS[correlation]
        # The released code writes this 1x1 convolution as a transposed one: its weights are ours transposed.
        self.down = nn.Conv2d(len(self.levels) * channels, channels, 1)

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """``[N, 3, 127, 127]`` to the three kernels ``[N, C, 7, 7]``."""
        return tuple(self.template_features(image))

    def correlations(self, image: Tensor, template: tuple[Tensor, ...]) -> list[Tensor]:
        """``[N, 3, 255, 255]`` and the kernels to three maps ``[N, C, 25, 25]``."""
        return [self.correlate(x, z) for x, z in zip(self.features(image), template, strict=True)]


class SiamCAR(ConcatenatedLevels):
    """Modified ResNet-50, three levels in one map, towers for classification and regression, 25x25 grid of stride 8.

    Classification has two channels, channel 1 the target. The release starts both with the bias of a rare target,
    which cancels in their softmax; here they start with none.
    """

    def __init__(self, config: SiamCARConfig | None = None) -> None:
        config = config or SiamCARConfig()
        super().__init__(config.channels, config.correlation)
        self.config = config
        self.grid = Grid(size=25, stride=8, origin=config.origin_px + 0.5)
        self.cls_tower = group_norm_tower(config.channels)
        self.bbox_tower = group_norm_tower(config.channels)
        self.cls_logits = nn.Conv2d(config.channels, 2, 3, padding=1)
        self.bbox_pred = nn.Conv2d(config.channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(config.channels, 1, 3, padding=1)
        small_weights(self.cls_tower, self.bbox_tower, self.cls_logits, self.bbox_pred, self.centerness)
        self.decoder = AnchorFree(self.grid, average=3)
        if config.selection == "peak":
            self.decoder = PeakRefined(self.grid, PyramidFeatures.grid.origin)

    def search(self, image: Tensor, *template: Tensor) -> RawMaps:
        """``[N, 3, 255, 255]`` and the kernels of `template` to raw maps on the 25x25 grid."""
        fused = self.down(torch.cat(self.correlations(image, template), dim=1))  # [N, C, 25, 25]
        cls = self.cls_tower(fused)
        return RawMaps(
            logits=self.cls_logits(cls),
            ltrb=positive_distances(self.bbox_pred(self.bbox_tower(fused))),
            quality=self.centerness(cls),
        )

    def forward(self, template: Tensor, search: Tensor) -> RawMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 255, 255]`` crops to raw maps."""
        return self.search(search, *self.template(template))


class PeakRefined(AnchorFree):
    """How SiamCAR's released code finds the target: as the peak of score maps enlarged to one value a crop pixel.

    A first peak, of the windowed map, bounds a region of half the target's size; the peak without window inside it is
    the centre, and width and height are read from the enlarged distances there. Centre-ness is stretched to 0..1 over
    each map in place of a sigmoid. The score is the classification's, enlarged likewise.

    What the release does besides and is left out: it penalises the chosen size once more, in image pixels against crop
    pixels (quirk B2).

    Args:
        grid: of the map, as its distances were learnt.
        origin: continuous crop coordinate on which cell 0 truly lies: peaks of the scores know nothing of quirk B1.
    """

    enlarge: Tensor
    smallest_px, largest_px = 12, 55  # bounds of the distances that make the region, tenth and 0.44 of the template

    def __init__(self, grid: Grid, origin: float) -> None:
        super().__init__(grid)
        self.origin = origin
        self.side = (grid.size - 1) * grid.stride + 1  # 193
        # Bicubic enlargement along one axis, as a matrix. It is OpenCV's, which lets the outer pixels overhang: crop
        # pixel and enlarged pixel agree in the middle and differ by half a stride at the border, as in the release.
        identity = torch.eye(grid.size)[None, None]
        matrix = functional.interpolate(identity, size=(self.side, grid.size), mode="bicubic")[0, 0]
        self.register_buffer("enlarge", matrix, persistent=False)  # [193, 25]

    def forward(self, raw: RawMaps, prev_size: Tensor, tuning: Tensor) -> Choice:
        """As `Decoder.forward`."""
        size, shape = self.grid.size, (-1, self.grid.size, self.grid.size)
        boxes, _ = self.candidates(raw)
        cls = target_probability(raw.logits)  # [N, H, W]
        scores = cls if raw.quality is None else cls * _stretched(raw.quality[:, 0])
        plain = scores * size_penalty(boxes[..., 2:], prev_size, tuning[0]).reshape(shape)
        windowed = plain * (1 - tuning[1]) + self.window.reshape(size, size) * tuning[1]

        first = self._peak(self.enlarge @ windowed @ self.enlarge.T)  # [N, 2] row, column
        cell = (first * size / self.side).round().clamp(max=size - 1).long()
        sides = raw.ltrb.flatten(2).gather(2, (cell[:, :1] * size + cell[:, 1:])[:, None].expand(-1, 4, -1))[..., 0]
        left, top, right, bottom = (sides.clamp(self.smallest_px, self.largest_px) / 2).unbind(1)
        away = torch.arange(self.side, device=first.device) - first[:, :, None]  # [N, 2, 193]
        rows = (away[:, 0] >= -top[:, None]) & (away[:, 0] <= bottom[:, None])
        columns = (away[:, 1] >= -left[:, None]) & (away[:, 1] <= right[:, None])
        inside = rows[:, :, None] & columns[:, None, :]
        peak = self._peak(torch.where(inside, self.enlarge @ plain @ self.enlarge.T, -1.0))

        maps = torch.cat([raw.ltrb[:, :2] + raw.ltrb[:, 2:], cls[:, None]], dim=1)  # width, height, confidence
        row, column = self.enlarge[peak.long()].unbind(1)  # [N, 25] each
        width, height, score = ((maps @ column[:, None, :, None])[..., 0] @ row[:, :, None])[..., 0].unbind(1)
        wh = torch.stack([width, height], dim=1).clamp(min=1.0)  # bicubic weights may undershoot
        box = torch.cat([peak.flip(1) + self.origin, wh], dim=1)
        penalty = size_penalty(wh[:, None], prev_size, tuning[0])[:, 0]
        return Choice(box, score.clamp(0, 1), penalty, scores)

    def _peak(self, enlarged: Tensor) -> Tensor:
        """Row and column ``[N, 2]`` of the largest value of ``[N, 193, 193]``, as floats."""
        best = enlarged.flatten(1).argmax(dim=1)
        return torch.stack([best // self.side, best % self.side], dim=1).to(enlarged.dtype)


def _stretched(maps: Tensor) -> Tensor:
    """``[N, H, W]`` to 0..1, each map on its own."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-6)
