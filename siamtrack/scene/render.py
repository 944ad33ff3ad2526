"""A scene's frames: the plane seen through a moving camera, with shadows and vehicles stamped on it, and the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import cv2
import numpy as np

from siamtrack.scene.landscape import SUN, World, paint_world
from siamtrack.scene.vehicles import HALF_CANVAS, Floats, Image, Stage, Vehicle, rotation

Box = tuple[float, float, float, float]


class SceneFrame(NamedTuple):
    """One frame and the truth about it.

    Attributes:
        image: uint8 ``[H, W, 3]`` BGR.
        box_xywh: axis-aligned bounds of the target's whole outline in image pixels, hidden parts included.
        visible: fraction of the target's area that is inside the image and not covered, in ``[0, 1]``.
        lookalikes_xywh: the same bounds for each look-alike, also for those outside the image.
    """

    image: Image
    box_xywh: Box
    visible: float
    lookalikes_xywh: tuple[Box, ...]


@dataclass(frozen=True)
class Scene:
    """A clip of ``frames`` frames; ``scene.render(index)`` or iteration gives each with its truth.

    The target's longer side is about 45 to 125 pixels in a 1280 x 720 image. In the first ten seconds a look-alike
    overtakes it, trees hide about half of it, a highway hides it wholly for about 20 frames at 30 frames a second, and
    a second look-alike comes towards it. The first frame takes a second or so more, for painting the plane.

    Attributes:
        width: image width in pixels, at least 96.
        height: image height in pixels, at least 96; between a third of the width and three times it.
        frames: length of the clip, at least 1.
        seed: chooses landscape, route and colours; 0 or more.
        fps: frames a second, above 0; motion is so many pixels a second, whatever the frame rate.
    """

    width: int = 1280
    height: int = 720
    frames: int = 300
    seed: int = 0
    fps: float = 30.0

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 96 or not 1 / 3 <= self.width / self.height <= 3:
            raise ValueError(
                f"a scene of {self.width} x {self.height} pixels cannot be drawn: expected both sides at least 96 and "
                "neither over three times the other"
            )
        if self.frames < 1 or self.seed < 0 or not 0 < self.fps < math.inf:
            raise ValueError(
                f"expected frames >= 1, seed >= 0 and fps > 0; got frames {self.frames}, seed {self.seed}, "
                f"fps {self.fps}"
            )

    def __len__(self) -> int:
        return self.frames

    def __iter__(self) -> Iterator[SceneFrame]:
        return (self.render(index) for index in range(self.frames))

    def render(self, index: int, with_target: bool = True) -> SceneFrame:
        """Draw one frame.

        Args:
            index: 0 to ``frames - 1``.
            with_target: False leaves the target's body out (its shadow stays) and the truth as it is: the two images
                differ in the target's pixels only.

        Raises:
            ValueError: an index outside the clip.
        """
        if not 0 <= index < self.frames:
            raise ValueError(f"frame {index} is outside this scene: expected 0 to {self.frames - 1}")
        time_s, exposure_s = index / self.fps, 0.2 / self.fps
        camera, later = self._camera(time_s), self._camera(time_s + exposure_s)
        world, stage = self._world, self._stage
        to_image = camera @ np.diag([1 / world.px, 1 / world.px, 1.0])
        image: Any = cv2.warpAffine(
            world.ground, _between_pixel_centres(to_image), (self.width, self.height), borderMode=cv2.BORDER_REFLECT_101
        )
        middle = np.linalg.solve(camera, [self.width / 2, self.height / 2, 1.0])
        image = _smear(image, (later @ middle - camera @ middle)[:2])
        poses = [camera @ stage.pose(vehicle, time_s) for vehicle in stage.vehicles]
        for vehicle, pose in zip(stage.vehicles, poses, strict=True):
            _cast_shadow(image, vehicle, pose, camera[:2, :2] @ SUN * 7, world, to_image)
        visible = 0.0
        for vehicle, pose in zip(stage.vehicles, poses, strict=True):
            smear = (later @ stage.pose(vehicle, time_s + exposure_s) - pose)[:2, 2]
            paint = with_target or vehicle is not stage.vehicles[-1]
            visible = _stamp(image, vehicle, pose, smear, world, to_image, paint)  # the last one is the target
        gain = 1 + 0.09 * math.sin(2 * math.pi * time_s / 6.1 + stage.phases[0])
        boxes = [_bounds(vehicle, pose) for vehicle, pose in zip(stage.vehicles, poses, strict=True)]
        alike = tuple(box for vehicle, box in zip(stage.vehicles, boxes, strict=True) if vehicle.lookalike)
        image = cv2.convertScaleAbs(image, alpha=gain)
        return SceneFrame(image, boxes[-1], visible, alike)

    @property
    def _unit_px(self) -> float:
        return math.sqrt(self.width * self.height / (1280 * 720))

    @cached_property
    def _stage(self) -> Stage:
        return Stage.plan(self.seed, self._unit_px)

    @cached_property
    def _world(self) -> World:
        # A plane finer than 1.5 texels a unit costs memory and shows little more.
        return paint_world(self.seed, self._stage, px=min(self._unit_px, 1.5))

    def _camera(self, time_s: float) -> Floats:
        """World units to image pixels, ``[3, 3]``: a similarity that puts the target's lane at a wandering point."""

        def wave(period_s: float, phase: int) -> float:
            return math.sin(2 * math.pi * (time_s / period_s) + self._stage.phases[phase])

        zoom = math.exp(0.02 + 0.45 * wave(8.6, 1)) * self._unit_px
        turn = 0.10 * wave(11.0, 2) + 0.003 * wave(0.43, 3)
        shake_x, shake_y = wave(0.61, 4) + 0.6 * wave(0.29, 5), wave(0.53, 6) + 0.6 * wave(0.31, 7)
        target_x = self.width * (0.5 + 0.21 * wave(7.3, 8)) + 1.3 * self._unit_px * shake_x
        target_y = self.height * (0.52 + 0.17 * wave(5.7, 9)) + 1.3 * self._unit_px * shake_y
        anchor = self._stage.pose(self._stage.vehicles[-1], time_s)[:2, 2]
        matrix = np.eye(3)
        matrix[:2, :2] = zoom * rotation(turn)
        matrix[:2, 2] = np.array([target_x, target_y]) - matrix[:2, :2] @ anchor
        return matrix


def _bounds(vehicle: Vehicle, pose: Floats) -> Box:
    points = vehicle.outline @ pose[:2, :2].T + pose[:2, 2]
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return x0, y0, x1 - x0, y1 - y0


class _Spot(NamedTuple):
    """A vehicle's sprite in image pixels, and which of them lie inside the image."""

    sprite: Any
    rows: slice
    columns: slice
    inside: tuple[slice, slice]  # the same pixels, counted in the sprite


def _place(image: Image, vehicle: Vehicle, pose: Floats) -> _Spot | None:
    """Warp a sprite to its place; None where no pixel of it can be in the image."""
    reach = np.abs(pose[:2, :2]) @ HALF_CANVAS + 3
    left, top = (int(v) for v in np.floor(pose[:2, 2] - reach))
    width, height = (int(v) for v in np.ceil(2 * reach) + 1)
    x0, x1 = max(left, 0), min(left + width, image.shape[1])
    y0, y1 = max(top, 0), min(top + height, image.shape[0])
    if x0 >= x1 or y0 >= y1:
        return None
    zoom = math.hypot(*pose[:2, 0])
    fitting = [sprite for sprite in vehicle.sprites if sprite[0] >= zoom]
    sx, sy, picture = fitting[-1] if fitting else vehicle.sprites[0]
    from_texel = np.array([[1 / sx, 0, -HALF_CANVAS[0]], [0, 1 / sy, -HALF_CANVAS[1]], [0, 0, 1]])
    matrix = _between_pixel_centres(_moved(-left, -top) @ pose @ from_texel)
    sprite = cv2.warpAffine(picture, matrix, (width, height))
    return _Spot(sprite, slice(y0, y1), slice(x0, x1), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)))


def _cover_at(world: World, to_image: Floats, columns: slice, rows: slice) -> Floats:
    """``[h, w, 2]`` in 0..1 at these image pixels: what hides vehicles there, and the light that reaches them."""
    size = (columns.stop - columns.start, rows.stop - rows.start)
    matrix = _between_pixel_centres(_moved(-columns.start, -rows.start) @ to_image)
    warped: Any = cv2.warpAffine(world.cover, matrix, size, borderMode=cv2.BORDER_REFLECT_101)
    return warped.astype(np.float32) / 255


def _cast_shadow(image: Image, vehicle: Vehicle, pose: Floats, offset: Floats, world: World, to_image: Floats) -> None:
    spot = _place(image, vehicle, _moved(*offset) @ pose)
    if spot is None:
        return
    soft: Any = cv2.GaussianBlur(spot.sprite[..., 3], (0, 0), max(2.2 * math.hypot(*pose[:2, 0]), 0.5))
    shade = soft[spot.inside].astype(np.float32) * (0.55 / 255)
    if not vehicle.on_highway:
        cover = _cover_at(world, to_image, spot.columns, spot.rows)
        shade *= (1 - cover[..., 0]) * cover[..., 1] ** 2  # no second shadow where it is dark already
    ground = image[spot.rows, spot.columns]
    ground[:] = ground * (1 - shade[..., None])


def _stamp(
    image: Image, vehicle: Vehicle, pose: Floats, smear: Floats, world: World, to_image: Floats, paint: bool
) -> float:
    """Draw a vehicle under whatever covers it; the fraction of it that is seen comes back."""
    spot = _place(image, vehicle, pose)
    if spot is None:
        return 0.0
    open_sky, light = np.float32(1.0), np.float32(1.0)
    if not vehicle.on_highway:
        cover = _cover_at(world, to_image, spot.columns, spot.rows)
        open_sky, light = 1 - cover[..., :1], cover[..., 1:]
    if paint:
        body = _smear(spot.sprite, smear)[spot.inside].astype(np.float32) * open_sky
        ground = image[spot.rows, spot.columns]
        ground[:] = np.minimum(ground * (1 - body[..., 3:] / 255) + body[..., :3] * light + 0.5, 255)
    seen = (spot.sprite[spot.inside][..., 3:] * open_sky).sum()
    return min(float(seen) / max(float(spot.sprite[..., 3].sum()), 1.0), 1.0)


def _smear(image: Any, motion_px: Floats) -> Any:
    """Motion blur along a straight line as long as the motion during exposure, capped at 5 pixels."""
    length = min(math.hypot(*motion_px), 5.0)
    if length < 0.6:
        return image
    half = math.ceil(length / 2)
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    direction = np.asarray(motion_px) / math.hypot(*motion_px)
    for along in np.linspace(-length / 2, length / 2, 15):
        x, y = direction * along + half
        column, row = min(int(x), 2 * half - 1), min(int(y), 2 * half - 1)
        fx, fy = x - column, y - row
        kernel[row : row + 2, column : column + 2] += np.outer([1 - fy, fy], [1 - fx, fx])
    return cv2.filter2D(image, -1, kernel / kernel.sum())


def _moved(x: float, y: float) -> Floats:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def _between_pixel_centres(matrix: Floats) -> Floats:
    """A ``[3, 3]`` map of continuous coordinates as the ``[2, 3]`` that OpenCV wants, which counts pixel centres."""
    moved = matrix.copy()
    moved[:2, 2] += matrix[:2, :2] @ [0.5, 0.5] - 0.5
    return moved[:2]
