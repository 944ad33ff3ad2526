"""Which cells of the response map are target, background, or neither. Pure NumPy, one function a paper.

Labels: 1 target, 2 target at the boundary (SiamLA), 0 background, -1 ignored. SiamCAN prints -1 for background and 0
for ignored; erratum S11. There is one label for each of a decoder's M candidates, in their order: anchor by anchor,
each row by row (`siamtrack.nets.decode.Candidates`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int8]
Floats = NDArray[np.float32]
Box = NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """Where a network's candidates stand in the search crop.

    Attributes:
        points: ``[M, 2]`` cell positions (x, y) in crop pixels.
        stride: crop pixels between neighbouring cells.
        sizes: ``[M, 2]`` widths and heights of the anchors in crop pixels; None for a network without anchors.
    """

    points: Floats
    stride: float
    sizes: Floats | None = None


def offsets(cells: Cells, box_cxcywh: Box) -> tuple[Floats, Floats]:
    """Crop pixels ``[M]`` from the box's centre to each cell, to the right and down."""
    cx, cy = float(box_cxcywh[0]), float(box_cxcywh[1])
    return cells.points[:, 0] - cx, cells.points[:, 1] - cy


def siamfc_labels(cells: Cells, box_cxcywh: Box, radius_px: float = 16.0) -> Labels:
    """Target within a block distance ``|dx| + |dy| <= radius_px`` of the centre, whatever the target's size (SiamFC).

    Args:
        cells: of the response map.
        box_cxcywh: ground truth in crop pixels, as for every function here.
        radius_px: 16 px in SiamFC, two cells.

    Returns:
        int8 ``[M]``, as every function here.
    """
    dx, dy = offsets(cells, box_cxcywh)
    return (np.abs(dx) + np.abs(dy) <= radius_px).astype(np.int8)


def siamrpn_labels(cells: Cells, box_cxcywh: Box, positive: float = 0.6, negative: float = 0.3) -> Labels:
    """Target where an anchor's IoU with the box is above `positive`, background below `negative` (SiamRPN)."""
    iou = anchor_iou(cells, box_cxcywh)
    return np.where(iou > positive, 1, np.where(iou < negative, 0, -1)).astype(np.int8)


def anchor_iou(cells: Cells, box_cxcywh: Box) -> Floats:
    """IoU ``[M]`` of each anchor with the box.

    Raises:
        ValueError: the network has no anchors.
    """
    if cells.sizes is None:
        raise ValueError("labels by anchor IoU need a network with anchors")
    dx, dy = offsets(cells, box_cxcywh)
    w, h = float(box_cxcywh[2]), float(box_cxcywh[3])
    anchor_w, anchor_h = cells.sizes[:, 0], cells.sizes[:, 1]
    # Two intervals of lengths a and b, centres d apart, share min(a, b, (a + b) / 2 - |d|), if that is above 0.
    shared_w = np.clip(np.minimum(np.minimum(anchor_w, w), (anchor_w + w) / 2 - np.abs(dx)), 0, None)
    shared_h = np.clip(np.minimum(np.minimum(anchor_h, h), (anchor_h + h) / 2 - np.abs(dy)), 0, None)
    shared = shared_w * shared_h
    return np.asarray(shared / (anchor_w * anchor_h + w * h - shared), np.float32)


def siamban_labels(cells: Cells, box_cxcywh: Box) -> Labels:
    """Target inside the ellipse with semi-axes ``(w/4, h/4)``, background outside ``(w/2, h/2)`` (SiamBAN).

    SiamCAN's table 3 calls this "ellipse label": regions E1 and E2 (erratum S11).
    """
    inner, outer = _ellipse(cells, box_cxcywh, 4.0), _ellipse(cells, box_cxcywh, 2.0)
    return np.where(inner < 1, 1, np.where(outer > 1, 0, -1)).astype(np.int8)


def siamcan_labels(cells: Cells, box_cxcywh: Box) -> Labels:
    """Circle-and-ellipse labels (SiamCAN Eq. 10 to 12, errata S10 and S12: both around the box centre, in pixels).

    A cell is target inside the circle C2 of radius ``r = (w h / 4) / sqrt((w/2)^2 + (h/2)^2)``, background outside the
    ellipse E1 with semi-axes ``(w/2, h/2)``, ignored between.
    """
    outside = _ellipse(cells, box_cxcywh, 2.0) > 1
    return np.where(_in_circle(cells, box_cxcywh), 1, np.where(outside, 0, -1)).astype(np.int8)


def circle_labels(cells: Cells, box_cxcywh: Box) -> Labels:
    """SiamCAN's "circle label" (its table 3): target inside C2, background outside a circle too.

    The paper does not print that outer circle; taken here: as large as the ellipse E1, radius ``sqrt(w h) / 2``.
    """
    dx, dy = offsets(cells, box_cxcywh)
    outside = dx**2 + dy**2 > float(box_cxcywh[2] * box_cxcywh[3]) / 4
    return np.where(_in_circle(cells, box_cxcywh), 1, np.where(outside, 0, -1)).astype(np.int8)


def siamcar_labels(cells: Cells, box_cxcywh: Box) -> Labels:
    """Target in the central ``0.4 w x 0.4 h``, where no side is nearer than 0.3 of the size; else background."""
    dx, dy = offsets(cells, box_cxcywh)
    w, h = float(box_cxcywh[2]), float(box_cxcywh[3])
    return ((np.abs(dx) < 0.2 * w) & (np.abs(dy) < 0.2 * h)).astype(np.int8)


def siamla_labels(cells: Cells, box_cxcywh: Box) -> Labels:
    """SiamCAR's centre 1, the rest of the box 2, outside 0 (SiamLA section III-C and Fig. 4, erratum L6)."""
    dx, dy = offsets(cells, box_cxcywh)
    inside = (np.abs(dx) < float(box_cxcywh[2]) / 2) & (np.abs(dy) < float(box_cxcywh[3]) / 2)
    return np.where(siamcar_labels(cells, box_cxcywh) == 1, 1, np.where(inside, 2, 0)).astype(np.int8)


def dastsiam_labels(cells: Cells, box_cxcywh: Box, distance: float = 4.0) -> Labels:
    """Target where the squared distance to the centre, in cells, is below `distance` (DASTSiam Eq. 6, erratum D10)."""
    dx, dy = offsets(cells, box_cxcywh)
    return ((dx / cells.stride) ** 2 + (dy / cells.stride) ** 2 < distance).astype(np.int8)


RULES: dict[str, Callable[[Cells, Box], Labels]] = {
    "siamfc": siamfc_labels,
    "siamrpn": siamrpn_labels,
    "siamban": siamban_labels,
    "siamcar": siamcar_labels,
    "siamcan": siamcan_labels,
    "siamcan-circle": circle_labels,
    "siamla": siamla_labels,
    "dastsiam": dastsiam_labels,
}
"""Labels of a positive pair, by paper."""


def nearest_candidate(cells: Cells, box_cxcywh: Box) -> int:
    """Index of the cell nearest to the box's centre; of its anchors, the one that overlaps the box most."""
    dx, dy = offsets(cells, box_cxcywh)
    distance2 = dx**2 + dy**2
    if cells.sizes is None:
        return int(np.argmin(distance2))
    return int(np.argmax(np.where(distance2 == distance2.min(), anchor_iou(cells, box_cxcywh), -1)))


def at_border(cells: Cells, width: int) -> NDArray[np.bool_]:
    """Which candidates ``[M]`` stand in the outermost `width` rows and columns of the map."""
    low, high = cells.points.min(axis=0), cells.points.max(axis=0)
    inwards = np.minimum(cells.points - low, high - cells.points).min(axis=1)  # px from the outermost row or column
    return np.asarray(inwards < (width - 0.5) * cells.stride)


def foreign_labels(cells: Cells, box_cxcywh: Box, rule: Callable[[Cells, Box], Labels]) -> Labels:
    """Labels of a negative pair where only cells at the foreign target count: they are background, all others ignored.

    These are the cells that `rule`, one of `RULES`, would call target (SiamBAN), in SiamRPN++ the 7x7 cells about the
    centre.
    """
    if rule is siamrpn_labels:
        dx, dy = offsets(cells, box_cxcywh)
        at_target = np.maximum(np.abs(dx), np.abs(dy)) <= 3.5 * cells.stride
    else:
        at_target = rule(cells, box_cxcywh) > 0
    return np.where(at_target, 0, -1).astype(np.int8)


def sample(labels: Labels, positives: int, negatives: int, rng: np.random.Generator) -> Labels:
    """Keep at most so many target and background cells, drawn at random, and ignore the rest.

    SiamRPN to SiamCAN (its section 3.4) keep 16 and 48.
    """
    kept = np.full_like(labels, -1)
    for sort, limit in ((labels > 0, positives), (labels == 0, negatives)):
        cells = np.flatnonzero(sort)
        if len(cells) > limit:
            cells = rng.choice(cells, limit, replace=False)
        kept[cells] = labels[cells]
    return kept


def _in_circle(cells: Cells, box_cxcywh: Box) -> NDArray[np.bool_]:
    dx, dy = offsets(cells, box_cxcywh)
    w, h = float(box_cxcywh[2]), float(box_cxcywh[3])
    return np.asarray(dx**2 + dy**2 < (w * h / 4) ** 2 / ((w / 2) ** 2 + (h / 2) ** 2))


def _ellipse(cells: Cells, box_cxcywh: Box, part: float) -> Floats:
    """Below 1 inside the ellipse with semi-axes ``(w / part, h / part)``."""
    dx, dy = offsets(cells, box_cxcywh)
    w, h = float(box_cxcywh[2]), float(box_cxcywh[3])
    return np.asarray((dx / (w / part)) ** 2 + (dy / (h / part)) ** 2)
