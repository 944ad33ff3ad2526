"""What varies between two views of a target: where it is cut, how it is lit, what lies over and beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import Window, context_size, mean_bgr

Image = NDArray[np.uint8]
Rng = np.random.Generator


@dataclass(frozen=True)
class Jitter:
    """How far a crop window strays from the target.

    Attributes:
        shift_px: centre offset, uniform in +-shift_px crop pixels, each axis.
        scale: log-scale, uniform in +-scale.
        stretch: log of the ratio of the two sides, uniform in +-stretch.
    """

    shift_px: float
    scale: float
    stretch: float


def jittered_window(
    box_cxcywh: tuple[float, float, float, float], template_px: int, size_px: int, jitter: Jitter, rng: Rng
) -> Window:
    """A window for a `size_px` crop, on the scale that maps the target's context to `template_px`, then jittered."""
    cx, cy, w, h = box_cxcywh
    side = context_size(w, h) * size_px / template_px * np.exp(rng.uniform(-jitter.scale, jitter.scale))
    half_stretch = np.exp(rng.uniform(-jitter.stretch, jitter.stretch) / 2)
    width, height = max(int(round(side * half_stretch)), 2), max(int(round(side / half_stretch)), 2)
    cx += rng.uniform(-jitter.shift_px, jitter.shift_px) * width / size_px
    cy += rng.uniform(-jitter.shift_px, jitter.shift_px) * height / size_px
    return Window(round(cx - width / 2), round(cy - height / 2), width, height)


def photometric(image: Image, rng: Rng) -> Image:
    """Random light, colour, greyness, blur, motion blur and loss of resolution, often mild; same shape, new array."""
    strength = rng.uniform(0.2, 1.0)
    gain = 1 + strength * rng.uniform(-0.3, 0.3)
    gamma = np.exp(strength * rng.uniform(-0.35, 0.35))
    ramp = np.arange(256) / 255.0
    table = np.empty((1, 256, 3), np.uint8)
    for channel in range(3):
        tint = strength * rng.uniform(-0.08, 0.08)
        table[0, :, channel] = np.clip(255 * (gain * ramp**gamma + tint), 0, 255)
    out: Any = cv2.LUT(image, table)
    if rng.random() < 0.12 * strength:
        out = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    blur = rng.random()
    if blur < 0.12 * strength:
        out = motion_blur(out, int(rng.integers(3, 14)), rng.uniform(0, np.pi))
    elif blur < 0.22 * strength:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.6, 2.0))
    elif blur < 0.34 * strength:
        size = out.shape[0]
        small = max(int(size * rng.uniform(0.25, 0.7)), 8)
        out = cv2.resize(cv2.resize(out, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    return cast(Image, out)


def motion_blur(image: Image, length_px: int, angle: float) -> Image:
    """Average along a line of `length_px` pixels at `angle` radians."""
    kernel = np.zeros((length_px, length_px), np.float32)
    middle = (length_px - 1) / 2
    tip = np.array([np.cos(angle), np.sin(angle)]) * middle
    start, end = np.round(middle - tip).astype(int), np.round(middle + tip).astype(int)
    cv2.line(kernel, (int(start[0]), int(start[1])), (int(end[0]), int(end[1])), 1.0)
    return np.asarray(cv2.filter2D(image, -1, kernel / kernel.sum()), np.uint8)


def rotate(
    image: Image, box_cxcywh: tuple[float, float, float, float], angle_deg: float
) -> tuple[Image, tuple[float, float, float, float]]:
    """Turn an image about a target's centre.

    Returns:
        The turned image, of the same shape and filled with its own mean colour, and the new box: that of the turned
        ellipse inscribed in the old one. Real outlines fill their boxes about so; the turned rectangle's own bounding
        box would be far too large.
    """
    cx, cy, w, h = box_cxcywh
    matrix = cv2.getRotationMatrix2D((cx - 0.5, cy - 0.5), angle_deg, 1.0)
    size = (image.shape[1], image.shape[0])
    turned = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderValue=mean_bgr(image))
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return np.asarray(turned, np.uint8), (cx, cy, float(np.hypot(w * c, h * s)), float(np.hypot(w * s, h * c)))


@dataclass(frozen=True)
class Cutout:
    """An object lifted from its photo: ``bgr`` uint8 ``[H, W, 3]`` and its coverage ``alpha`` uint8 ``[H, W]``."""

    bgr: Image
    alpha: Image


def paste(
    canvas: Image, cutout: Cutout, centre: tuple[float, float], size: tuple[float, float], angle_deg: float
) -> tuple[float, float, float, float] | None:
    """Blend a cut-out into `canvas`, in place.

    Args:
        canvas: uint8 ``[H, W, 3]``.
        cutout: what to paste.
        centre: where its middle goes, canvas pixels.
        size: width and height before rotation, canvas pixels.
        angle_deg: rotation about its middle.

    Returns:
        Tight box (cx, cy, w, h) of the covered pixels, or None when nothing of it is on the canvas.
    """
    height, width = cutout.alpha.shape
    if size[0] < 0.5 * width:  # shrink by area first: bilinear sampling alone would alias
        factor = max(2 * size[0] / width, 2 / min(width, height))
        if factor < 1:
            shape = (max(int(width * factor), 2), max(int(height * factor), 2))
            cutout = Cutout(
                np.asarray(cv2.resize(cutout.bgr, shape, interpolation=cv2.INTER_AREA), np.uint8),
                np.asarray(cv2.resize(cutout.alpha, shape, interpolation=cv2.INTER_AREA), np.uint8),
            )
            height, width = cutout.alpha.shape
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    # Only the part of the canvas that the rotated rectangle can reach is touched.
    reach_x, reach_y = (abs(c) * size[0] + abs(s) * size[1]) / 2 + 2, (abs(s) * size[0] + abs(c) * size[1]) / 2 + 2
    x0, y0 = max(int(centre[0] - reach_x), 0), max(int(centre[1] - reach_y), 0)
    x1, y1 = min(int(centre[0] + reach_x) + 1, canvas.shape[1]), min(int(centre[1] + reach_y) + 1, canvas.shape[0])
    if x1 - x0 < 2 or y1 - y0 < 2:
        return None
    scale_x, scale_y = size[0] / width, size[1] / height
    linear = np.array([[c * scale_x, -s * scale_y], [s * scale_x, c * scale_y]])
    offset = np.array([centre[0] - x0 - 0.5, centre[1] - y0 - 0.5]) - linear @ np.array(
        [(width - 1) / 2, (height - 1) / 2]
    )
    matrix = np.column_stack([linear, offset])
    shape = (x1 - x0, y1 - y0)
    bgr = cv2.warpAffine(cutout.bgr, matrix, shape, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    alpha = cv2.warpAffine(cutout.alpha, matrix, shape, flags=cv2.INTER_LINEAR)
    rows, columns = np.flatnonzero((alpha > 127).any(axis=1)), np.flatnonzero((alpha > 127).any(axis=0))
    if not rows.size or not columns.size:
        return None
    share = alpha[:, :, None].astype(np.uint16)
    region = canvas[y0:y1, x0:x1]
    region[:] = (region * (255 - share) + bgr * share + 127) // 255
    left, right, top, bottom = x0 + columns[0], x0 + columns[-1] + 1, y0 + rows[0], y0 + rows[-1] + 1
    return (left + right) / 2, (top + bottom) / 2, float(right - left), float(bottom - top)
