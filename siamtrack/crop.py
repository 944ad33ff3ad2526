"""The context window around a target, its crop, and the way back to image pixels.

Training and tracking share this file, so a network sees in flight exactly what it was trained on. A window has whole
pixel edges; the crop is a bilinear resize of it. Coordinates are continuous (see `siamtrack.boxes`), so the map between
image and crop is exact: ``crop = (image - window.left) * size_px / window.width``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Window:
    """A rectangle of whole image pixels, which may reach outside the image.

    Attributes:
        left: first column, may be negative.
        top: first row, may be negative.
        width: columns, at least 1.
        height: rows, at least 1. Equal to `width` in tracking; augmentation stretches it.
    """

    left: int
    top: int
    width: int
    height: int

    def to_crop(self, box_cxcywh: tuple[float, float, float, float], size_px: int) -> NDArray[np.float64]:
        """An image-pixel box as a box in pixels of this window's ``size_px`` x ``size_px`` crop."""
        sx, sy = size_px / self.width, size_px / self.height
        cx, cy, w, h = box_cxcywh
        return np.array([(cx - self.left) * sx, (cy - self.top) * sy, w * sx, h * sy])

    def to_image(self, box_cxcywh: tuple[float, float, float, float], size_px: int) -> NDArray[np.float64]:
        """A crop-pixel box as a box in image pixels: the inverse of `to_crop`."""
        sx, sy = self.width / size_px, self.height / size_px
        cx, cy, w, h = box_cxcywh
        return np.array([cx * sx + self.left, cy * sy + self.top, w * sx, h * sy])


def context_size(width: float, height: float, context: float = 0.5) -> float:
    """Side of the square template window around a box, in image pixels.

    ``sqrt((w + p) (h + p))`` with ``p = context * (w + h)`` (SiamFC, section 3.1 there; 0.5 in every tracker here).
    """
    pad = context * (width + height)
    return math.sqrt((width + pad) * (height + pad))


def square_window(cx: float, cy: float, side_px: float) -> Window:
    """The square window of ``round(side_px)`` whole pixels, at least 1, best centred on ``(cx, cy)``."""
    side = max(int(round(side_px)), 1)
    return Window(math.floor(cx - side / 2 + 0.5), math.floor(cy - side / 2 + 0.5), side, side)


def mean_bgr(image: Image) -> tuple[float, float, float]:
    """Mean colour of an image ``[H, W, 3]``: the fill for window pixels outside the image."""
    blue, green, red, _ = cv2.mean(image)
    return blue, green, red


def crop(image: Image, window: Window, size_px: int, fill_bgr: tuple[float, float, float]) -> Image:
    """Cut `window` out of an image and resize it bilinearly.

    Args:
        image: uint8 ``[H, W, 3]``, any strides.
        window: what to cut; pixels outside the image take `fill_bgr`.
        size_px: side of the square result.
        fill_bgr: colour of outside pixels, 0..255 each.

    Returns:
        uint8 ``[size_px, size_px, 3]``, freshly allocated.
    """
    height, width = image.shape[:2]
    x0, y0 = max(window.left, 0), max(window.top, 0)
    x1, y1 = min(window.left + window.width, width), min(window.top + window.height, height)
    if x0 >= x1 or y0 >= y1:
        outside = np.empty((size_px, size_px, 3), np.uint8)
        outside[:] = np.round(fill_bgr)
        return outside
    patch = image[y0:y1, x0:x1]
    before_x, before_y = x0 - window.left, y0 - window.top
    after_x, after_y = window.left + window.width - x1, window.top + window.height - y1
    if before_x or before_y or after_x or after_y:
        if window.width * window.height > (4 * size_px) ** 2:
            # Padding takes memory for the whole window: 400 MB for a target as large as a 4K image.
            return _sample(patch, window, x0, y0, size_px, fill_bgr)
        colour = tuple(round(c) for c in fill_bgr)
        patch = np.asarray(
            cv2.copyMakeBorder(patch, before_y, after_y, before_x, after_x, cv2.BORDER_CONSTANT, value=colour), np.uint8
        )
    if patch.shape[:2] == (size_px, size_px):
        return patch.copy()
    return np.asarray(cv2.resize(patch, (size_px, size_px), interpolation=cv2.INTER_LINEAR), np.uint8)


def _sample(
    patch: Image, window: Window, x0: int, y0: int, size_px: int, fill_bgr: tuple[float, float, float]
) -> Image:
    """The bilinear resize of a window of which only `patch`, at ``(x0, y0)`` of the image, lies inside the image."""
    sx, sy = window.width / size_px, window.height / size_px
    crop_to_patch = np.array([[sx, 0, sx / 2 - 0.5 + window.left - x0], [0, sy, sy / 2 - 0.5 + window.top - y0]])
    sampled = cv2.warpAffine(
        patch,
        crop_to_patch,
        (size_px, size_px),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=tuple(round(c) for c in fill_bgr),
    )
    return np.asarray(sampled, np.uint8)
