"""What varies between two views of a target: where it is cut, how it is lit, what lies over and beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import Window, context_size, mean_bgr
from training.checks import not_negative, one_of

Image = NDArray[np.uint8]
Rng = np.random.Generator
KERNEL_PX = 13  # side that every blur's kernel fits in, where no longer motion is asked for
MOTIONS = ("line", "cross")
# Times three normal numbers, what pysot adds to red, green and blue of 0 to 255. Its rows look like principal
# components, which would be columns then; it is multiplied as it stands, and blue varies most.
PYSOT_COLOUR = np.array(
    [
        [-0.55919361, 0.98062831, -0.41940627],
        [1.72091413, 0.19879334, -1.82968581],
        [4.64467907, 4.73710203, 4.88324118],
    ]
)
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
class LightConfig:
    """How much light and sharpness vary from crop to crop.

    Attributes:
        mildest: a crop's strength is uniform in [mildest, 1]. It scales gain, gamma, tint and all chances.
        gain: factor on a value in 0 to 1, uniform in 1 +- gain.
        gamma: log of its exponent, uniform in +-gamma.
        tint: added to each channel of 0 to 1, uniform in +-tint.
        colour: share of pysot's colour offset, added besides: `PYSOT_COLOUR` times three normal numbers.
        grey: chance of no colour.
        motion: chance of motion blur.
        motion_shape: "line", of 3 to `motion_px` pixels at any angle; or pysot's "cross", of an odd number from 5 to
            `motion_px` in each direction, a random share of it upright.
        motion_px: see there.
        gaussian: chance of Gaussian blur.
        coarse: chance of loss of resolution.
    """

    mildest: float = 0.2
    gain: float = 0.3
    gamma: float = 0.35
    tint: float = 0.08
    colour: float = 0.0
    grey: float = 0.12
    motion: float = 0.12
    motion_shape: str = "line"
    motion_px: int = KERNEL_PX
    gaussian: float = 0.10
    coarse: float = 0.12

    def __post_init__(self) -> None:
        one_of("motion_shape", self.motion_shape, MOTIONS)
        not_negative(gain=self.gain, gamma=self.gamma, tint=self.tint, colour=self.colour, grey=self.grey)
        not_negative(motion=self.motion, gaussian=self.gaussian, coarse=self.coarse)
        if not 0 <= self.mildest <= 1:
            raise ValueError(f"mildest must be in 0 to 1, got {self.mildest}")
        least = {"line": 3, "cross": 5}[self.motion_shape]
        if self.motion_px < least:
            raise ValueError(f"motion_px of a {self.motion_shape} must be at least {least}, got {self.motion_px}")
        if self.grey > 1 or self.motion + self.gaussian + self.coarse > 1:
            raise ValueError(
                f"chances must be at most 1, those of motion, gaussian and coarse together: got grey {self.grey}, "
                f"{self.motion} + {self.gaussian} + {self.coarse}"
            )

    @property
    def kernel_px(self) -> int:
        """Side that every blur's kernel fits in."""
        return max(KERNEL_PX, self.motion_px | 1)


@dataclass(frozen=True)
class Light:
    """How one crop is lit and how sharp it is. At most one of motion blur, Gaussian blur and coarse resolution.

    Attributes:
        gain: factor on a value in 0 to 1.
        gamma: exponent of the value, before the gain.
        tint_bgr: added to each channel, after the gain.
        grey: no colour.
        motion_px: length of the motion blur, at most `kernel_px`; 0 for none.
        motion_rad: direction of its line.
        upright: of a cross, share of its upright line; negative for one line.
        sigma_px: deviation of the Gaussian blur, so that `KERNEL_PX` holds three of them to each side; 0 for none.
        coarse_px: side that the crop is shrunk to before it is enlarged again; 0 for none.
        kernel_px: side of `kernel`.
    """

    gain: float
    gamma: float
    tint_bgr: tuple[float, float, float]
    grey: bool
    motion_px: int = 0
    motion_rad: float = 0.0
    upright: float = -1.0
    sigma_px: float = 0.0
    coarse_px: int = 0
    kernel_px: int = KERNEL_PX

    def table(self) -> NDArray[np.uint8]:
        """What gain, gamma and tint make of the values 0 to 255 in each channel ``[256, 3]``."""
        values = 255 * ((self.gain * RAMP**self.gamma)[:, None] + self.tint_bgr)
        return np.clip(values, 0, 255).astype(np.uint8)

    def kernel(self) -> NDArray[np.float32] | None:
        """Weights ``[kernel_px, kernel_px]`` of the blur about the middle pixel, of sum 1; None without blur."""
        if self.motion_px:
            small = self.motion()
        elif self.sigma_px:
            side = round(6 * self.sigma_px + 1) | 1  # OpenCV's choice for bytes
            line = np.asarray(cv2.getGaussianKernel(side, self.sigma_px, cv2.CV_32F), np.float32)
            small = line @ line.T
        else:
            return None
        kernel = np.zeros((self.kernel_px, self.kernel_px), np.float32)
        start = self.kernel_px // 2 - len(small) // 2
        kernel[start : start + len(small), start : start + len(small)] = small
        return kernel

    def motion(self) -> NDArray[np.float32]:
        """Weights ``[motion_px, motion_px]`` of the motion blur."""
        if self.upright < 0:
            return motion_kernel(self.motion_px, self.motion_rad)
        return cross_kernel(self.motion_px, self.upright)


def draw_light(side_px: int, rng: Rng, config: LightConfig = LightConfig()) -> Light:
    """A random light for a crop of `side_px`."""
    strength = rng.uniform(config.mildest, 1.0)
    gain = 1 + strength * rng.uniform(-config.gain, config.gain)
    gamma = float(np.exp(strength * rng.uniform(-config.gamma, config.gamma)))
    tint = np.array([strength * rng.uniform(-config.tint, config.tint) for _ in range(3)])
    if config.colour:
        tint += config.colour / 255 * (PYSOT_COLOUR @ rng.standard_normal(3))[::-1]
    blue, green, red = tint.tolist()
    grey = rng.random() < config.grey * strength
    light = Light(gain, gamma, (blue, green, red), grey, kernel_px=config.kernel_px)
    blur = rng.random()
    if blur < config.motion * strength:
        if config.motion_shape == "cross":
            length = 5 + 2 * int(rng.integers((config.motion_px - 5) // 2 + 1))
            return replace(light, motion_px=length, upright=rng.random())
        return replace(light, motion_px=int(rng.integers(3, config.motion_px + 1)), motion_rad=rng.uniform(0, np.pi))
    if blur < (config.motion + config.gaussian) * strength:
        return replace(light, sigma_px=rng.uniform(0.6, 2.0))
    if blur < (config.motion + config.gaussian + config.coarse) * strength:
        return replace(light, coarse_px=max(int(side_px * rng.uniform(0.25, 0.7)), 8))
    return light


def photometric(image: Image, rng: Rng, config: LightConfig = LightConfig()) -> Image:
    """Random light, colour, greyness, blur, motion blur and loss of resolution; same shape, new array."""
    side = image.shape[0]
    light = draw_light(side, rng, config)
    out: Any = cv2.LUT(image, light.table()[None])
    if light.grey:
        out = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    if light.motion_px:
        out = cv2.filter2D(out, -1, light.motion())
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


def draw_effects(side_px: int, corrupts: bool, rng: Rng, config: LightConfig = LightConfig()) -> Effects:
    """Random effects for a square crop of `side_px`: light, and corruption if it `corrupts`."""
    light = draw_light(side_px, rng, config)
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


def cross_kernel(length_px: int, upright: float) -> NDArray[np.float32]:
    """Weights ``[length_px, length_px]``, of sum 1: an upright line through the middle of this share, a level one."""
    kernel = np.zeros((length_px, length_px), np.float32)
    kernel[:, length_px // 2] += upright / length_px
    kernel[length_px // 2] += (1 - upright) / length_px
    return kernel


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
