"""Pure box arithmetic on NumPy arrays.

Boxes live in continuous coordinates: pixel ``i`` covers the interval ``[i, i + 1)``, so a box over whole pixels
``0..w-1`` is ``x=0, width=w``. Every function takes arrays of shape ``[..., 4]`` and returns a new array; none edits
its argument. Suffixes name the format:

* ``xywh``: left, top, width, height
* ``cxcywh``: centre x, centre y, width, height
* ``xyxy``: left, top, right, bottom
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Boxes = NDArray[np.float64]


def xywh_to_cxcywh(boxes_xywh: ArrayLike) -> Boxes:
    """Left-top-width-height boxes ``[..., 4]`` as centre-size boxes."""
    x, y, w, h = _columns(boxes_xywh)
    return np.stack([x + w / 2, y + h / 2, w, h], axis=-1)


def cxcywh_to_xywh(boxes_cxcywh: ArrayLike) -> Boxes:
    """Centre-size boxes ``[..., 4]`` as left-top-width-height boxes."""
    cx, cy, w, h = _columns(boxes_cxcywh)
    return np.stack([cx - w / 2, cy - h / 2, w, h], axis=-1)


def xywh_to_xyxy(boxes_xywh: ArrayLike) -> Boxes:
    """Left-top-width-height boxes ``[..., 4]`` as corner boxes."""
    x, y, w, h = _columns(boxes_xywh)
    return np.stack([x, y, x + w, y + h], axis=-1)


def xyxy_to_xywh(boxes_xyxy: ArrayLike) -> Boxes:
    """Corner boxes ``[..., 4]`` as left-top-width-height boxes."""
    x0, y0, x1, y1 = _columns(boxes_xyxy)
    return np.stack([x0, y0, x1 - x0, y1 - y0], axis=-1)


def clip_xywh(boxes_xywh: ArrayLike, width: float, height: float) -> Boxes:
    """The part of each box inside an image of ``width`` x ``height`` pixels; size 0 where nothing is inside."""
    x0, y0, x1, y1 = _columns(xywh_to_xyxy(boxes_xywh))
    x0, x1 = np.clip(x0, 0, width), np.clip(x1, 0, width)
    y0, y1 = np.clip(y0, 0, height), np.clip(y1, 0, height)
    return np.stack([x0, y0, np.maximum(x1 - x0, 0), np.maximum(y1 - y0, 0)], axis=-1)


def iou_xywh(a_xywh: ArrayLike, b_xywh: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of box pairs, in ``[0, 1]``.

    The two arguments broadcast against each other; the result has their common leading shape. A pair with a box of no
    area, or with a NaN in it, has IoU 0.
    """
    ax0, ay0, ax1, ay1 = _columns(xywh_to_xyxy(a_xywh))
    bx0, by0, bx1, by1 = _columns(xywh_to_xyxy(b_xywh))
    overlap_w = np.minimum(ax1, bx1) - np.maximum(ax0, bx0)
    overlap_h = np.minimum(ay1, by1) - np.maximum(ay0, by0)
    intersection = np.maximum(overlap_w, 0) * np.maximum(overlap_h, 0)
    area_a = np.maximum(ax1 - ax0, 0) * np.maximum(ay1 - ay0, 0)
    area_b = np.maximum(bx1 - bx0, 0) * np.maximum(by1 - by0, 0)
    union = area_a + area_b - intersection
    valid = (intersection > 0) & (union > 0)
    return np.where(valid, intersection / np.where(valid, union, 1.0), 0.0)


def _columns(boxes: ArrayLike) -> tuple[Boxes, Boxes, Boxes, Boxes]:
    array = np.asarray(boxes, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [..., 4], got {array.shape}")
    return array[..., 0], array[..., 1], array[..., 2], array[..., 3]
