"""Which cells of the response map are target, background, or neither. Pure NumPy, one function a paper.

Labels: 1 target, 0 background, -1 ignored (SiamCAN prints -1 for background and 0 for ignored; erratum S11).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int8]
Points = NDArray[np.float32]


def siamcan_labels(points: Points, box_cxcywh: NDArray[np.float64], nearest: bool = False) -> Labels:
    """Circle-and-ellipse labels (SiamCAN Eq. 10 to 12, errata S10 and S12: both around the box centre, in pixels).

    A cell is target inside the circle of radius ``r = (w h / 4) / sqrt((w/2)^2 + (h/2)^2)``, background outside the
    ellipse with semi-axes ``(w/2, h/2)``, ignored between.

    Args:
        points: cell positions ``[M, 2]`` in crop pixels.
        box_cxcywh: ground truth in crop pixels.
        nearest: also make the cell nearest to the centre a target; on a coarse grid a small box has none otherwise.

    Returns:
        int8 ``[M]``.
    """
    cx, cy, w, h = (float(v) for v in box_cxcywh)
    dx, dy = points[:, 0] - cx, points[:, 1] - cy
    distance2 = dx**2 + dy**2
    radius2 = (w * h / 4) ** 2 / ((w / 2) ** 2 + (h / 2) ** 2)
    outside = (dx / (w / 2)) ** 2 + (dy / (h / 2)) ** 2 > 1
    labels = np.where(distance2 < radius2, 1, np.where(outside, 0, -1)).astype(np.int8)
    if nearest:
        labels[np.argmin(distance2)] = 1
    return labels


def sample(labels: Labels, positives: int, negatives: int, rng: np.random.Generator) -> Labels:
    """Keep at most so many target and background cells, drawn at random, and ignore the rest (SiamCAN, section 3.4)."""
    kept = np.full_like(labels, -1)
    for value, limit in ((1, positives), (0, negatives)):
        cells = np.flatnonzero(labels == value)
        if len(cells) > limit:
            cells = rng.choice(cells, limit, replace=False)
        kept[cells] = value
    return kept
