"""SiamFC, and SiamFC with DASTSiam's template update (SiamFC+ST).

Sources: Bertinetto et al., "Fully-Convolutional Siamese Networks for Object Tracking", 2016, with the sizes and
settings of siamfc-pytorch; DASTSiam, section 3.1 and table 4, for the update. The original crops a pyramid of three
scales from the frame; here the search crop is that of the largest scale, and all three are resampled from it inside the
graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siamtrack.bundle import TrackingSpec, UpdateSpec
from siamtrack.nets.backbones import AlexNetV1
from siamtrack.nets.correlation import pixelwise, summed_cells
from siamtrack.nets.decode import Choice, Grid, Normalisation
from siamtrack.nets.template_update import SpatioTemporal, TransformerConfig, check_preset, three_features

INSTANCE_PX = 255
SCALE_STEP = 1.0375
SCALES = (1 / SCALE_STEP, 1.0, SCALE_STEP)
OFF_SCALE_PENALTY = 0.9745
RESPONSE_SCALE = 0.001


class ResponseMaps(NamedTuple):
    """What SiamFC gives.

    Attributes:
        logits: ``[N, S, 17, 17]`` responses at S scales: three from `search`, the middle one alone from `forward`.
        self_response: ``[N, 1]`` what the first template answers to itself, for SiamFC+ST; its confidence is the
            response as a share of this. Without it the confidence is the sigmoid of the response.
    """

    logits: Tensor
    self_response: Tensor | None = None


@dataclass(frozen=True)
class SiamFCConfig:
    """Switches of `SiamFC`.

    Attributes:
        upsampling: points of the upsampled response a cell and axis; 16 in the paper.
    """

    upsampling: int = 16

    def __post_init__(self) -> None:
        if self.upsampling < 1:
            raise ValueError(f"upsampling must be at least 1, got {self.upsampling}")


@dataclass(frozen=True)
class SiamFCSTConfig(SiamFCConfig):
    """Switches of `SiamFCST`.

    Attributes:
        attention: "paper" or "release", see `siamtrack.nets.template_update.SpatioTemporal` (DASTSiam erratum D2).
        transformer: size of the encoder; its width is that of the features, 256.
    """

    attention: str = "paper"
    transformer: TransformerConfig = TransformerConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preset(self.attention)
        if self.transformer.width != 256:
            raise ValueError(f"transformer.width must be 256, that of the features, got {self.transformer.width}")


class ScaleDecoder(nn.Module):
    """Chooses scale and place of the target (siamfc-pytorch's tracker).

    Responses are upsampled bicubically; the scale of the highest one wins, off-scales being discounted; the place is
    the maximum of the response, normalised to sum 1, blended with a cosine window. The box keeps its shape. The
    discount follows ``tuning``: ``exp(-penalty_k (1.0375 - 1))`` for an off-scale.

    Args:
        grid: of the response at the middle scale.
        factor: points of the upsampled response a cell and axis.
    """

    points: Tensor
    upsample: Tensor
    window: Tensor
    places: Tensor
    scales: Tensor

    def __init__(self, grid: Grid, factor: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("points", grid.points(), persistent=False)  # for labels
        side = grid.size * factor
        axis = (np.arange(side) - (side - 1) / 2) * grid.stride / factor  # crop pixels from the centre
        hann = np.outer(np.hanning(side), np.hanning(side))
        buffers = {
            "upsample": cubic_upsampling(grid.size, factor),  # [272, 17]
            "window": (hann / hann.mean()).ravel(),  # of mean 1, where the original has a sum of 1: FP16 holds it
            "places": np.stack([np.tile(axis, side), np.repeat(axis, side)], axis=1),  # [M, 2] x, y
            "scales": np.array(SCALES),
        }
        for name, values in buffers.items():
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)), persistent=False)
        self.centre = grid.origin + grid.stride * (grid.size - 1) / 2

    def forward(self, raw: ResponseMaps, prev_size: Tensor, tuning: Tensor) -> Choice:
        """Raw maps, previous size ``[N, 2]`` and tuning ``[3]`` to the outputs of a search graph."""
        fine = (self.upsample @ raw.logits @ self.upsample.T).flatten(2)  # [N, 3, M]
        discount = torch.exp((1 - torch.maximum(self.scales, 1 / self.scales)) * tuning[0])  # [3]
        scale = (fine.amax(dim=2) * discount).argmax(dim=1, keepdim=True)  # [N, 1]
        response = fine.gather(1, scale[:, :, None].expand(-1, -1, fine.shape[2]))[:, 0]  # [N, M]
        height = response - response.amin(dim=1, keepdim=True)
        relative = height / (height.mean(dim=1, keepdim=True) + 1e-6)
        best = (relative * (1 - tuning[1]) + self.window * tuning[1]).argmax(dim=1)  # [N]
        factor = self.scales.index_select(0, scale[:, 0])[:, None]  # [N, 1]
        box = torch.cat([self.centre + self.places.index_select(0, best) * factor, prev_size * factor], dim=1)
        score = self.confidence(raw, response.gather(1, best[:, None]))[:, 0]
        chosen = raw.logits.flatten(2).gather(1, scale[:, :, None].expand(-1, -1, self.grid.size**2))[:, 0]
        coarse = self.confidence(raw, chosen).unflatten(1, (self.grid.size, self.grid.size))
        return Choice(box, score, discount.index_select(0, scale[:, 0]), coarse)

    @staticmethod
    def confidence(raw: ResponseMaps, response: Tensor) -> Tensor:
        """Responses ``[N, M]`` as confidences in [0, 1]."""
        if raw.self_response is None:
            return torch.sigmoid(response)
        return (response / raw.self_response).clamp(0, 1)


class SiamFC(nn.Module):
    """AlexNet and a naive correlation, three scales, 17x17 grid of stride 8 a scale.

    The search crop of 265 px is 255 px at the largest scale, in the template's resolution.
    """

    template_size, search_size = 127, round(INSTANCE_PX * SCALE_STEP)
    grid = Grid(size=17, stride=8, origin=68.5)  # of the middle scale
    normalisation = Normalisation(mean=0.0, scale=1.0)
    template_names: tuple[str, ...] = ("kernel",)
    # Scale penalty 0.9745, window 0.176, size smoothing 0.59; no motion model.
    tracking = TrackingSpec(
        penalty_k=-math.log(OFF_SCALE_PENALTY) / (SCALE_STEP - 1),
        window_influence=0.176,
        size_rate=0.59,
        motion_rate=0.0,
    )

    resample: Tensor

    def __init__(self, config: SiamFCConfig | None = None) -> None:
        super().__init__()
        self.config = config or SiamFCConfig()
        self.backbone = AlexNetV1()
        matrices = np.stack([linear_resampling(self.search_size, INSTANCE_PX, scale) for scale in SCALES])
        self.register_buffer("resample", torch.from_numpy(matrices.astype(np.float32)), persistent=False)
        self.decoder = ScaleDecoder(self.grid, self.config.upsampling)

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """``[N, 3, 127, 127]`` to the kernel ``[N, 256, 6, 6]``."""
        return self.backbone(image)

    def search(self, image: Tensor, *template: Tensor) -> ResponseMaps:
        """``[N, 3, 265, 265]`` and the tensors of `template` to the responses at three scales."""
        crops = [self.middle(image) if s == 1 else m @ image @ m.T for s, m in zip(SCALES, self.resample, strict=True)]
        kernel = template[0][:, None].expand(-1, len(SCALES), -1, -1, -1).flatten(0, 1)  # [3 N, 256, 6, 6]
        responses = self.respond(torch.stack(crops, dim=1).flatten(0, 1), kernel)  # [3 N, 1, 17, 17]
        return ResponseMaps(responses[:, 0].unflatten(0, (-1, len(SCALES))), *template[1:])

    def respond(self, image: Tensor, kernel: Tensor) -> Tensor:
        """Crops ``[N, 3, 255, 255]`` and kernels ``[N, 256, 6, 6]`` to responses ``[N, 1, 17, 17]``."""
        cells = kernel.shape[2]
        # The kernel is scaled, not the sum of its 9216 products, which half precision could not hold.
        products = pixelwise(self.backbone(image)[0], (kernel * RESPONSE_SCALE).flatten(2).transpose(1, 2))
        edge = cells // 2
        return summed_cells(products, cells)[:, :, edge:-edge, edge:-edge]

    @staticmethod
    def middle(image: Tensor) -> Tensor:
        """The middle scale of a search crop: its inner 255 px."""
        edge = (image.shape[3] - INSTANCE_PX) // 2
        return image[:, :, edge : edge + INSTANCE_PX, edge : edge + INSTANCE_PX]

    def forward(self, template: Tensor, search: Tensor) -> ResponseMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 265, 265]`` crops to the middle response."""
        return ResponseMaps(self.respond(self.middle(search), self.template(template)[0]))


class SiamFCST(SiamFC):
    """SiamFC whose kernel is renewed by DASTSiam's spatio-temporal fusion of 6x6 cells (DASTSiam table 4).

    The confidence is the response as a share of what the first frame's kernel answers to the first template itself, so
    that the update rule "response at least 0.8 of that" (erratum D14) is a score like any other.
    """

    template_names = ("feature",)
    update_names = ("fused", "self_response")
    update_rule = UpdateSpec(min_score=0.8)
    learns_update = True
    score_meaning = "response as a share of what the first template answers to itself, at most 1"

    def __init__(self, config: SiamFCSTConfig | None = None) -> None:
        config = config or SiamFCSTConfig()
        super().__init__(config)
        self.st = SpatioTemporal(config.transformer, config.attention)

    def update(self, first: Tensor, history: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        """Three features ``[N, 256, 6, 6]`` to the kernel ``[N, 256, 6, 6]`` and the self-response ``[N, 1]``."""
        start = self.st(first, first, first) * RESPONSE_SCALE
        self_response = (start * first).sum(dim=(1, 2, 3))[:, None]
        return self.st(first, history, current), self_response.clamp(min=1e-3)

    def forward(
        self, template: Tensor, search: Tensor, history: Tensor | None = None, current: Tensor | None = None
    ) -> ResponseMaps:
        """As `SiamFC.forward`; history and current are further template crops ``[N, 3, 127, 127]`` of the target.

        Without them the first template stands for both, as when a track starts.
        """
        return ResponseMaps(
            self.respond(self.middle(search), self.st(*three_features(self.template, template, history, current)))
        )


def linear_resampling(inputs: int, outputs: int, step: float) -> NDArray[np.float64]:
    """Matrix ``[outputs, inputs]`` that samples a line of pixels every `step` pixels round its middle, linearly."""
    at = (inputs - 1) / 2 + (np.arange(outputs) - (outputs - 1) / 2) * step
    return np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(inputs)))


def cubic_upsampling(size: int, factor: int) -> NDArray[np.float64]:
    """Matrix ``[size * factor, size]`` of bicubic interpolation (a = -0.75, edges repeated: OpenCV's and PyTorch's)."""
    a = -0.75
    at = (np.arange(size * factor) + 0.5) / factor - 0.5
    matrix = np.zeros((size * factor, size))
    rows = np.arange(size * factor)
    for tap in range(-1, 3):
        cell = np.floor(at).astype(int) + tap
        d = np.abs(at - cell)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(matrix, (rows, cell.clip(0, size - 1)), np.where(d <= 1, near, far))
    return matrix
