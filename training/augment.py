"""What varies between two views of a target: where it is cut, how it is lit, what lies over and beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import Window, context_size, mean_bgr

Image = NDArray[np.uint8]
Rng = np.random.Generator
KERNEL_PX = 13  # side that every blur's kernel fits in
RAMP = np.arange(256) / 255.0
CORRUPTION_CHANCE = 0.5  # of noise, and of a rectangle


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


@dataclass(frozen=True)
class Light:
    """How one crop is lit and how sharp it is. At most one of motion blur, Gaussian blur and coarse resolution.

    Attributes:
        gain: factor on a value in 0 to 1.
        gamma: exponent of the value, before the gain.
        tint_bgr: added to each channel, after the gain.
        grey: no colour.
        motion_px: length of the motion blur, at most `KERNEL_PX` pixels; 0 for none.
        motion_rad: its direction.
        sigma_px: deviation of the Gaussian blur, so that `KERNEL_PX` holds three of them to each side; 0 for none.
        coarse_px: side that the crop is shrunk to before it is enlarged again; 0 for none.
    """

    gain: float
    gamma: float
    tint_bgr: tuple[float, float, float]
    grey: bool
    motion_px: int = 0
    motion_rad: float = 0.0
    sigma_px: float = 0.0
    coarse_px: int = 0

    def table(self) -> NDArray[np.uint8]:
        """What gain, gamma and tint make of the values 0 to 255 in each channel ``[256, 3]``."""
        values = 255 * ((self.gain * RAMP**self.gamma)[:, None] + self.tint_bgr)
        return np.clip(values, 0, 255).astype(np.uint8)

    def kernel(self) -> NDArray[np.float32] | None:
        """Weights ``[KERNEL_PX, KERNEL_PX]`` of the blur about the middle pixel, of sum 1; None without blur."""
        if self.motion_px:
            small = motion_kernel(self.motion_px, self.motion_rad)
        elif self.sigma_px:
            side = round(6 * self.sigma_px + 1) | 1  # OpenCV's choice for bytes
            line = np.asarray(cv2.getGaussianKernel(side, self.sigma_px, cv2.CV_32F), np.float32)
            small = line @ line.T
        else:
            return None
        kernel = np.zeros((KERNEL_PX, KERNEL_PX), np.float32)
        start = KERNEL_PX // 2 - len(small) // 2
        kernel[start : start + len(small), start : start + len(small)] = small
        return kernel


def draw_light(side_px: int, rng: Rng) -> Light:
    """A random light, often mild, for a crop of `side_px`."""
    strength = rng.uniform(0.2, 1.0)
    gain = 1 + strength * rng.uniform(-0.3, 0.3)
    gamma = float(np.exp(strength * rng.uniform(-0.35, 0.35)))
    blue, green, red = (strength * rng.uniform(-0.08, 0.08) for _ in range(3))
    grey = rng.random() < 0.12 * strength
    light = Light(gain, gamma, (blue, green, red), grey)
    blur = rng.random()
    if blur < 0.12 * strength:
        return replace(light, motion_px=int(rng.integers(3, KERNEL_PX + 1)), motion_rad=rng.uniform(0, np.pi))
    if blur < 0.22 * strength:
        return replace(light, sigma_px=rng.uniform(0.6, 2.0))
    if blur < 0.34 * strength:
        return replace(light, coarse_px=max(int(side_px * rng.uniform(0.25, 0.7)), 8))
    return light


def photometric(image: Image, rng: Rng) -> Image:
    """Random light, colour, greyness, blur, motion blur and loss of resolution, often mild; same shape, new array."""
    side = image.shape[0]
    light = draw_light(side, rng)
    out: Any = cv2.LUT(image, light.table()[None])
    if light.grey:
        out = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    if light.motion_px:
        out = motion_blur(out, light.motion_px, light.motion_rad)
    elif light.sigma_px:
        out = cv2.GaussianBlur(out, (0, 0), light.sigma_px)
    elif light.coarse_px:
        coarse = cv2.resize(out, (light.coarse_px, light.coarse_px), interpolation=cv2.INTER_AREA)
        out = cv2.resize(coarse, (side, side))
    return cast(Image, out)


@dataclass(frozen=True)
class Corruption:
    """Noise on one crop, and a rectangle of one colour over a part of it.

    Attributes:
        deviation: of Gaussian noise, in values of 0 to 255; 0 for none.
        patch_xyxy: the rectangle, in whole pixels; without area for none.
        patch_bgr: its colour, 0 to 255.
    """

    deviation: float = 0.0
    patch_xyxy: tuple[int, int, int, int] = (0, 0, 0, 0)
    patch_bgr: tuple[int, int, int] = (0, 0, 0)


def draw_corruption(width: int, height: int, noisy: bool, rng: Rng) -> Corruption:
    """A random corruption of a crop of this size, with a deviation if it is `noisy`."""
    deviation = rng.uniform(0, 15) if noisy else 0.0
    if rng.random() >= CORRUPTION_CHANCE:
        return Corruption(deviation)
    area, aspect = rng.uniform(0.02, 0.2), np.exp(rng.uniform(-1, 1))
    w = min(int(width * np.sqrt(area * aspect)), width)
    h = min(int(height * np.sqrt(area / aspect)), height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    blue, green, red = (int(v) for v in rng.integers(0, 256, 3))
    return Corruption(deviation, (left, top, left + w, top + h), (blue, green, red))


def corrupted(image: Image, rng: Rng) -> Image:
    """Noise for the templates that DASTSiam fuses (section 2.3), which does not say what kind.

    Each with a chance of one half: Gaussian noise of a deviation uniform in 0 to 15, and a rectangle of one random
    colour over up to a fifth of the area. Same shape, new array.
    """
    height, width = image.shape[:2]
    noise = rng.standard_normal(image.shape, np.float32) if rng.random() < CORRUPTION_CHANCE else None
    corruption = draw_corruption(width, height, noise is not None, rng)
    out = image.copy()
    if noise is not None:
        out = np.clip(np.rint(out + noise * np.float32(corruption.deviation)), 0, 255).astype(np.uint8)
    left, top, right, bottom = corruption.patch_xyxy
    out[top:bottom, left:right] = corruption.patch_bgr
    return out


@dataclass(frozen=True)
class Effects:
    """What `photometric` and `corrupted` would do to a crop, to be done later (`training.device_augment`).

    Attributes:
        light: see there.
        corruption: see there; the default is none.
        noise_seed: what its noise is drawn with.
    """

    light: Light
    corruption: Corruption = Corruption()
    noise_seed: int = 0


def draw_effects(side_px: int, corrupts: bool, rng: Rng) -> Effects:
    """Random effects for a square crop of `side_px`: light, and corruption if it `corrupts`."""
    light = draw_light(side_px, rng)
    if not corrupts:
        return Effects(light)
    noisy, seed = rng.random() < CORRUPTION_CHANCE, int(rng.integers(2**31))
    return Effects(light, draw_corruption(side_px, side_px, noisy, rng), seed)


def motion_kernel(length_px: int, angle: float) -> NDArray[np.float32]:
    """Equal weights ``[length_px, length_px]`` along a line of so many pixels at `angle` radians, of sum 1."""
    kernel = np.zeros((length_px, length_px), np.float32)
    middle = (length_px - 1) / 2
    tip = np.array([np.cos(angle), np.sin(angle)]) * middle
    start, end = np.round(middle - tip).astype(int), np.round(middle + tip).astype(int)
    cv2.line(kernel, (int(start[0]), int(start[1])), (int(end[0]), int(end[1])), 1.0)
    return kernel / kernel.sum()


def motion_blur(image: Image, length_px: int, angle: float) -> Image:
    """Average along a line of `length_px` pixels at `angle` radians."""
    return np.asarray(cv2.filter2D(image, -1, motion_kernel(length_px, angle)), np.uint8)


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
    share = cv2.merge((alpha, alpha, alpha)).astype(np.uint16)  # broadcasting over three values a pixel takes longer
    region = canvas[y0:y1, x0:x1]
    region[:] = (region * (255 - share) + bgr * share + 127) // 255
    left, right, top, bottom = x0 + columns[0], x0 + columns[-1] + 1, y0 + rows[0], y0 + rows[-1] + 1
    return (left + right) / 2, (top + bottom) / 2, float(right - left), float(bottom - top)
