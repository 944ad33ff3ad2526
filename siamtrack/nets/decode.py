"""From camera bytes to network input, and from raw maps to one box: the two ends of every exported graph.

Normalisation, size penalty, cosine window, cell choice and box decode stand here once; training-time validation, ONNX
and TensorRT all run this code. Inputs and outputs are the bundle contract (see `siamtrack.bundle`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """Where the cells of a response map lie in the search crop.

    Attributes:
        size: cells a side.
        stride: crop pixels between neighbouring cells.
        origin: continuous crop coordinate of cell 0 (a cell centred on pixel p lies at p + 0.5).
    """

    size: int
    stride: int
    origin: float

    def points(self) -> Tensor:
        """Cell positions ``[size * size, 2]`` (x, y) in crop pixels, row by row."""
        axis = self.origin + self.stride * torch.arange(self.size, dtype=torch.float32)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack([x.flatten(), y.flatten()], dim=1)


@dataclass(frozen=True)
class Normalisation:
    """``(pixel - mean) * scale`` on BGR values 0..255."""

    mean: float
    scale: float


class RawMaps(NamedTuple):
    """What a network's head gives.

    Attributes:
        logits: ``[N, 1, H, W]`` (sigmoid) or ``[N, 2, H, W]`` (softmax, channel 1 = target: erratum S8).
        ltrb: ``[N, 4, H, W]`` positive distances from the cell to the box's left, top, right, bottom in crop pixels.
    """

    logits: Tensor
    ltrb: Tensor


class SiameseNet(Protocol):
    """What every model of `siamtrack.nets.MODELS` offers; images are normalised BGR ``[N, 3, side, side]``."""

    template_size: int
    search_size: int
    grid: Grid
    normalisation: Normalisation
    template_names: tuple[str, ...]

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """Template tensors, named by `template_names`."""
        ...

    def search(self, image: Tensor, *template: Tensor) -> RawMaps:
        """Raw maps of a search crop for the template tensors."""
        ...


def normalise(image: Tensor, normalisation: Normalisation) -> Tensor:
    """uint8 ``[N, H, W, 3]`` BGR to the network's float ``[N, 3, H, W]``.

    The cast comes first: TensorRT takes uint8 nowhere else.
    """
    values = image.to(torch.float32).permute(0, 3, 1, 2)
    return (values - normalisation.mean) * normalisation.scale


def target_probability(logits: Tensor) -> Tensor:
    """Raw confidence ``[N, H, W]`` in (0, 1) of every cell."""
    if logits.shape[1] == 1:
        return torch.sigmoid(logits[:, 0])
    return torch.softmax(logits, dim=1)[:, 1]


def decode_boxes(ltrb: Tensor, points: Tensor) -> Tensor:
    """Boxes ``[N, H * W, 4]`` (cx, cy, w, h; crop pixels) from distances ``[N, 4, H, W]`` and cells ``[H * W, 2]``."""
    # cx = x + (r - l) / 2, cy = y + (b - t) / 2, w = l + r, h = t + b, as one product: fewer and larger operations.
    mix = ltrb.new_tensor([[-0.5, 0, 1, 0], [0, -0.5, 0, 1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]])
    centres = torch.cat([points, torch.zeros_like(points)], dim=1)
    return ltrb.flatten(2).transpose(1, 2) @ mix + centres


def size_penalty(sizes: Tensor, prev_size: Tensor, penalty_k: Tensor) -> Tensor:
    """How plausible a change of size and aspect is, in (0, 1] (SiamRPN's penalty; SiamLA Eq. 13, erratum L9).

    ``exp(-k (max(r/r', r'/r) max(s/s', s'/s) - 1))`` with aspect r = w / h and padded size
    s = sqrt((w + m)(h + m)), m = (w + h) / 2.

    Args:
        sizes: ``[N, M, 2]`` candidate widths and heights.
        prev_size: ``[N, 2]`` the previous width and height in the same crop's pixels.
        penalty_k: scalar k.
    """

    def log_aspect_and_scale(wh: Tensor) -> tuple[Tensor, Tensor]:
        w, h = wh[..., 0], wh[..., 1]
        margin = (w + h) / 2
        return torch.log(w / h), 0.5 * torch.log((w + margin) * (h + margin))

    aspect, scale = log_aspect_and_scale(sizes)
    prev_aspect, prev_scale = log_aspect_and_scale(prev_size[:, None])
    # max(q, 1/q) is exp|log q|.
    change = torch.exp((aspect - prev_aspect).abs() + (scale - prev_scale).abs())
    return torch.exp((1 - change) * penalty_k)


class TemplateGraph(nn.Module):
    """``image`` uint8 ``[1, T, T, 3]`` BGR to the model's template tensors."""

    def __init__(self, net: SiameseNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.net.template(normalise(image, self.net.normalisation))


class SearchGraph(nn.Module):
    """Search crop and template tensors to one box a sample.

    Inputs: ``image`` uint8 ``[N, S, S, 3]`` BGR; the template tensors; ``prev_size`` f32 ``[N, 2]`` (w, h in crop
    pixels); ``tuning`` f32 ``[3]`` (penalty_k, window_influence, spare).

    Outputs: ``box`` f32 ``[N, 4]`` cx, cy, w, h in crop pixels; ``score`` f32 ``[N]`` raw confidence of the chosen
    cell, before penalty and window; ``penalty`` f32 ``[N]`` of that cell; ``response`` f32 ``[N, H, W]`` raw map.
    """

    points: Tensor
    window: Tensor

    def __init__(self, net: SiameseNet) -> None:
        super().__init__()
        self.net = net
        hann = np.hanning(net.grid.size)
        self.register_buffer("points", net.grid.points())
        self.register_buffer("window", torch.from_numpy(np.outer(hann, hann).astype(np.float32)).flatten())

    def forward(self, image: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *template, prev_size, tuning = rest
        raw = self.net.search(normalise(image, self.net.normalisation), *template)
        response = target_probability(raw.logits)  # [N, H, W]
        scores = response.flatten(1)  # [N, H*W]
        boxes = decode_boxes(raw.ltrb, self.points)  # [N, H*W, 4]
        penalty = size_penalty(boxes[..., 2:], prev_size, tuning[0])  # [N, H*W]
        ranked = penalty * scores * (1 - tuning[1]) + self.window * tuning[1]
        best = ranked.argmax(dim=1, keepdim=True)  # [N, 1]
        cells = torch.cat([boxes, scores[..., None], penalty[..., None]], dim=2)  # [N, H*W, 6]
        chosen = cells.gather(1, best[:, :, None].expand(-1, -1, 6))[:, 0]  # [N, 6]
        return chosen[:, :4], chosen[:, 4], chosen[:, 5], response
