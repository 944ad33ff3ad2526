"""From camera bytes to network input, and from raw maps to one box: the two ends of every exported graph.

Normalisation, size penalty, cosine window, cell choice and box decode stand here once; training-time validation, ONNX
and TensorRT all run this code. Inputs and outputs are the bundle contract (see `siamtrack.bundle`).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from siamtrack.bundle import UpdateSpec


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
    """What an anchor-free head gives.

    Attributes:
        logits: ``[N, 1, H, W]`` (sigmoid) or ``[N, 2, H, W]`` (softmax, channel 1 = target: erratum S8).
        ltrb: ``[N, 4, H, W]`` positive distances from the cell to the box's left, top, right, bottom in crop pixels.
        quality: ``[N, 1, H, W]`` logit of how well the cell localises (SiamCAR's centre-ness, SiamLA's localisation
            score), where a head has one; the confidence is the product of both probabilities.
    """

    logits: Tensor
    ltrb: Tensor
    quality: Tensor | None = None


class AnchorMaps(NamedTuple):
    """What an anchor-based head gives for A anchors a cell.

    Attributes:
        logits: ``[N, 2 A, H, W]``, channel ``c A + a`` is class c (1 = target) of anchor a: pysot's layout.
        deltas: ``[N, 4 A, H, W]``, channel ``k A + a`` is entry k of (dx / w, dy / h, ln w, ln h) of anchor a.
        second: ``[N, A, H, W]`` logit of a second classification branch, where a head has one (DASTSiam); the
            confidence is the mean of both probabilities.
    """

    logits: Tensor
    deltas: Tensor
    second: Tensor | None = None


class Candidates(NamedTuple):
    """Every box a network proposes in one crop; M = anchors x H x W, anchor by anchor, each row by row.

    Attributes:
        boxes: ``[N, M, 4]`` cx, cy, w, h in crop pixels.
        scores: ``[N, M]`` raw confidence in [0, 1].
    """

    boxes: Tensor
    scores: Tensor


class Choice(NamedTuple):
    """Outputs of every search graph; see `siamtrack.bundle`."""

    box: Tensor
    score: Tensor
    penalty: Tensor
    response: Tensor


class SiameseNet(Protocol):
    """What every model of `siamtrack.nets.MODELS` offers; images are normalised BGR ``[N, 3, side, side]``.

    Attributes:
        template_names: names of the tensors that `template` gives.
        decoder: turns the raw maps of `search` into a `Choice`: ``decoder(raw, prev_size, tuning)``.
    """

    template_size: int
    search_size: int
    grid: Grid
    normalisation: Normalisation
    template_names: tuple[str, ...]
    decoder: nn.Module

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """Template tensors, named by `template_names`."""
        ...

    def search(self, image: Tensor, *template: Tensor) -> Any:
        """Raw maps of a search crop: what `decoder` takes."""
        ...


class SizedNet(SiameseNet, Protocol):
    """A model whose template is told how large the target is: `size` ``[N, 2]``, w and h in template-crop pixels.

    Attributes:
        takes_size: whether it is; a configuration may leave that out.
    """

    takes_size: bool

    def template(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Template tensors of a target of that size, centred in the crop."""
        ...


class AdaptiveNet(SiameseNet, Protocol):
    """A model whose template is renewed while tracking: `template` gives one tensor, the feature.

    ``kernel = update(first, first, first)`` starts a track; ``update(first, history, current)`` renews it, where
    `history` is the first tensor of the previous update. `search` takes what `update` gave.

    Attributes:
        update_names: names of the tensors that `update` gives and `search` takes; the first is the next history. Empty
            where a configuration leaves the update out: then the model is no adaptive one.
        update_rule: when a frame may renew the template, as published where it is.
        learns_update: whether the update has weights, so that training must show three templates.
    """

    update_names: tuple[str, ...]
    update_rule: UpdateSpec
    learns_update: bool

    def update(self, first: Tensor, history: Tensor, current: Tensor) -> tuple[Tensor, ...]:
        """Fuse the features of the first, the remembered and the current template."""
        ...


def is_adaptive(net: object) -> TypeGuard[AdaptiveNet]:
    """Does this model renew its template while tracking?"""
    return bool(getattr(net, "update_names", ()))


def learns_update(net: object) -> TypeGuard[AdaptiveNet]:
    """Is this a model that renews its template, and learns how from three templates a sample?"""
    return is_adaptive(net) and net.learns_update


def takes_size(net: object) -> TypeGuard[SizedNet]:
    """Is this model's template told how large the target is?"""
    return bool(getattr(net, "takes_size", False))


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


class Decoder(nn.Module, abc.ABC):
    """Chooses one of a network's candidates; subclasses say what the candidates are.

    The choice is SiamRPN's: confidence times size penalty, blended with a cosine window, best cell wins.

    Args:
        grid: the response map's geometry.
        anchors: candidates a cell.
        average: the box is the mean of so many best candidates among the chosen cell and its eight neighbours (SiamLA
            section III-E and SiamCAR's paper take three: SiamLA erratum L14); 1 takes the chosen one's.
    """

    points: Tensor
    window: Tensor

    def __init__(self, grid: Grid, anchors: int = 1, average: int = 1) -> None:
        super().__init__()
        if not 1 <= average <= 4:
            raise ValueError(f"average must be 1 to 4, the cells next to a corner, got {average}")
        self.grid, self.anchors, self.average = grid, anchors, average
        hann = np.hanning(grid.size)
        window = torch.from_numpy(np.outer(hann, hann).astype(np.float32)).flatten()
        self.register_buffer("points", grid.points().repeat(anchors, 1), persistent=False)  # [M, 2]
        self.register_buffer("window", window.repeat(anchors), persistent=False)  # [M]

    @abc.abstractmethod
    def candidates(self, raw: Any) -> Candidates:
        """Boxes and confidences of all cells."""

    def forward(self, raw: Any, prev_size: Tensor, tuning: Tensor) -> Choice:
        """Raw maps, previous size ``[N, 2]`` and tuning ``[3]`` to the outputs of a search graph."""
        boxes, scores = self.candidates(raw)
        penalty = size_penalty(boxes[..., 2:], prev_size, tuning[0])  # [N, M]
        ranked = penalty * scores * (1 - tuning[1]) + self.window * tuning[1]
        best = ranked.argmax(dim=1, keepdim=True)  # [N, 1]
        cells = torch.cat([boxes, scores[..., None], penalty[..., None]], dim=2)  # [N, M, 6]
        chosen = cells.gather(1, best[:, :, None].expand(-1, -1, 6))[:, 0]  # [N, 6]
        box = chosen[:, :4] if self.average == 1 else self._mean_near(boxes, ranked, best)
        maps = scores.reshape(-1, self.anchors, self.grid.size, self.grid.size)
        response = maps[:, 0] if self.anchors == 1 else maps.amax(dim=1)
        return Choice(box, chosen[:, 4], chosen[:, 5], response)

    def _mean_near(self, boxes: Tensor, ranked: Tensor, best: Tensor) -> Tensor:
        away = (self.points - self.points[best]).abs().amax(dim=2)  # [N, M] from the chosen cell
        near = torch.where(away < 1.5 * self.grid.stride, ranked, -1.0)
        top = near.topk(self.average, dim=1).indices  # [N, average]
        return boxes.gather(1, top[:, :, None].expand(-1, -1, 4)).mean(dim=1)


class AnchorFree(Decoder):
    """Decoder of `RawMaps`."""

    mix: Tensor

    def __init__(self, grid: Grid, average: int = 1) -> None:
        super().__init__(grid, average=average)
        mix = torch.tensor([[-0.5, 0, 1, 0], [0, -0.5, 0, 1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]])
        self.register_buffer("mix", mix, persistent=False)

    def boxes(self, ltrb: Tensor) -> Tensor:
        """Boxes ``[N, H * W, 4]`` (cx, cy, w, h; crop pixels) from distances ``[N, 4, H, W]``."""
        # cx = x + (r - l) / 2, cy = y + (b - t) / 2, w = l + r, h = t + b, as one product: fewer and larger operations.
        centres = torch.cat([self.points, torch.zeros_like(self.points)], dim=1)
        return ltrb.flatten(2).transpose(1, 2) @ self.mix + centres

    def candidates(self, raw: RawMaps) -> Candidates:
        scores = target_probability(raw.logits)
        if raw.quality is not None:
            scores = scores * torch.sigmoid(raw.quality[:, 0])
        return Candidates(self.boxes(raw.ltrb), scores.flatten(1))


class AnchorBased(Decoder):
    """Decoder of `AnchorMaps`.

    Args:
        grid: the response map's geometry.
        sizes_px: width and height of every anchor, in crop pixels.
    """

    sizes: Tensor

    def __init__(self, grid: Grid, sizes_px: Sequence[tuple[float, float]]) -> None:
        super().__init__(grid, anchors=len(sizes_px))
        sizes = torch.tensor(sizes_px, dtype=torch.float32).repeat_interleave(grid.size**2, dim=0)
        self.register_buffer("sizes", sizes, persistent=False)  # [M, 2]

    def candidates(self, raw: AnchorMaps) -> Candidates:
        logits = raw.logits.unflatten(1, (2, self.anchors)).flatten(2)  # [N, 2, M]
        scores = torch.softmax(logits, dim=1)[:, 1]
        if raw.second is not None:
            scores = (scores + torch.sigmoid(raw.second.flatten(1))) / 2
        return Candidates(self.boxes(raw.deltas), scores)

    def boxes(self, deltas: Tensor) -> Tensor:
        """``[N, 4 A, H, W]`` to boxes ``[N, M, 4]``; sizes stay under 62.5 anchors, so that no overflow can spread."""
        shifts = deltas.unflatten(1, (4, self.anchors)).flatten(2).transpose(1, 2)  # [N, M, 4]
        centres = shifts[..., :2] * self.sizes + self.points
        return torch.cat([centres, shifts[..., 2:].clamp(-4.135, 4.135).exp() * self.sizes], dim=2)


class TemplateGraph(nn.Module):
    """``image`` uint8 ``[1, T, T, 3]`` BGR, and ``size`` f32 ``[1, 2]`` for a `SizedNet`, to its template tensors."""

    def __init__(self, net: SiameseNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, *size: Tensor) -> tuple[Tensor, ...]:
        return self.net.template(normalise(image, self.net.normalisation), *size)


class UpdateGraph(nn.Module):
    """``first``, ``history`` and ``current`` features to the tensors that the search graph takes."""

    def __init__(self, net: AdaptiveNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, first: Tensor, history: Tensor, current: Tensor) -> tuple[Tensor, ...]:
        return self.net.update(first, history, current)


class SearchGraph(nn.Module):
    """Search crop and template tensors to one box a sample.

    Inputs: ``image`` uint8 ``[N, S, S, 3]`` BGR; the template tensors; ``prev_size`` f32 ``[N, 2]`` (w, h in crop
    pixels); ``tuning`` f32 ``[3]`` (penalty_k, window_influence, spare).

    Outputs: ``box`` f32 ``[N, 4]`` cx, cy, w, h in crop pixels; ``score`` f32 ``[N]`` raw confidence of the chosen
    cell, before penalty and window; ``penalty`` f32 ``[N]`` of that cell; ``response`` f32 ``[N, H, W]`` raw map.
    """

    def __init__(self, net: SiameseNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *template, prev_size, tuning = rest
        return tuple(self.net.decoder(self.raw(image, *template), prev_size, tuning))

    def raw(self, image: Tensor, *template: Tensor) -> Any:
        """The raw maps, for the network's decoder."""
        return self.net.search(normalise(image, self.net.normalisation), *template)
