"""A rendered drone clip with exact ground truth: a red rover among look-alikes, under trees and under a highway.

Tests, `siamtrack demo` and the ROS clip player use it, so none of them needs a download. Everything still (ground,
roads, roofs, trees) is painted once on a plane; a frame is that plane seen through a moving camera, with vehicles
stamped on it at sub-pixel positions. Every motion is a closed formula of time, so frames come in any order and one seed
always gives the same pixels.

Lengths are in units: one unit is one pixel of a 1280 x 720 image at zoom 1. Other image sizes scale the whole picture.
Coordinates are continuous (see `siamtrack.boxes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Floats = NDArray[np.float64]
Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]

WORLD = (3800.0, 2500.0)  # width and height of the plane, units
LANE = 52.0  # between lane centres, units
DECK = 172.0  # width of the highway on stilts, units
SUN = np.array([0.62, 0.78])  # direction in which shadows fall

# The story, in seconds of clip time: what the target meets on its way. It repeats each lap, about 23 s.
OVERTAKEN_S, UNDER_TREES_S, UNDER_HIGHWAY_S, ONCOMING_S = 2.6, 4.3, 6.2, 8.8

# Target and its look-alikes: the same car, in a neighbouring colour.
PAINT: tuple[tuple[Colour, Colour], ...] = (
    ((36, 44, 208), (30, 104, 222)),
    ((34, 150, 240), (52, 196, 236)),
    ((198, 70, 40), (180, 120, 40)),
)
TRAFFIC_BGR: tuple[Colour, ...] = ((222, 222, 218), (150, 146, 140), (64, 60, 58), (140, 96, 52), (92, 120, 70))


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
        return SceneFrame(cv2.convertScaleAbs(image, alpha=gain).astype(np.uint8, copy=False), boxes[-1], visible, alike)

    @property
    def _unit_px(self) -> float:
        return math.sqrt(self.width * self.height / (1280 * 720))

    @cached_property
    def _stage(self) -> _Stage:
        return _Stage.plan(self.seed, self._unit_px)

    @cached_property
    def _world(self) -> _World:
        # A plane finer than 1.5 texels a unit costs memory and shows little more.
        return _paint_world(self.seed, self._stage, px=min(self._unit_px, 1.5))

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
        matrix[:2, :2] = zoom * _rotation(turn)
        matrix[:2, 2] = np.array([target_x, target_y]) - matrix[:2, :2] @ anchor
        return matrix


# ---------------------------------------------------------------------------------------------------------- vehicles


class _Vehicle(NamedTuple):
    """A body and how it moves: along the circuit, or along the highway above it.

    `sprites` are the same picture at falling sizes: texels a unit in x and y, and premultiplied BGRA.
    """

    outline: Floats
    sprites: tuple[tuple[float, float, Image], ...]
    start: float
    speed: float
    lane: float
    on_highway: bool = False
    wobble: float = 0.0
    lookalike: bool = False


HALF_CANVAS = np.array([46.0, 28.0])  # half the sprite canvas, units: room around the largest body
WHEELS = ((-24.0, -18.5), (-24.0, 18.5), (23.0, -18.5), (23.0, 18.5))


def _build_body(paint: Colour, unit_px: float, van: bool = False) -> dict[str, Any]:
    """Outline and sprites of a vehicle that heads along +x, in units about its middle."""
    nose, tail, side = (34.0, -38.0, 18.0) if van else (38.0, -37.0, 19.0)
    body = _rounded_rectangle(tail, -side, nose, side, 7.0)
    wheels = [_rounded_rectangle(x - 8, y - 3.5, x + 8, y + 3.5, 2.0) for x, y in WHEELS]
    fine = 8.0
    size = (2 * HALF_CANVAS * fine).astype(int)
    colour, alpha = np.zeros((size[1], size[0], 3), np.uint8), np.zeros((size[1], size[0]), np.uint8)

    def fill(points: Any, bgr: Colour) -> None:
        fixed = np.round(((np.asarray(points, np.float64) + HALF_CANVAS) * fine - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(colour, [fixed], bgr, cv2.LINE_8, 4)
        cv2.fillPoly(alpha, [fixed], (255,), cv2.LINE_8, 4)

    def tone(factor: float) -> Colour:
        blue, green, red = (min(round(c * factor), 255) for c in paint)
        return blue, green, red

    for wheel in wheels:
        fill(wheel, (26, 24, 24))
    fill(body, tone(0.62))
    fill(_rounded_rectangle(tail + 2, -side + 2.5, nose - 2, side - 2.5, 6.0), tone(1.0))
    glass, pale = (74, 58, 44), (232, 236, 238)
    if van:
        fill([(17, -13), (25, -15), (25, 15), (17, 13)], glass)
        fill(_rounded_rectangle(tail + 4, -14, 13, 14, 2.0), tone(1.12))
        for x in (-24.0, -12.0, 0.0):
            fill(_rounded_rectangle(x, -13, x + 1.4, 13, 0.5), tone(0.85))
    else:
        fill([(9, -12), (20, -15), (20, 15), (9, 12)], glass)  # windscreen
        fill([(-13, -11), (-17, -13), (-17, 13), (-13, 11)], glass)
        for s in (-1, 1):
            fill([(6, s * 13.2), (17, s * 16), (-13, s * 16), (-11, s * 13.2)], glass)
        fill(_rounded_rectangle(-12, -11.5, 9, 11.5, 3.0), tone(1.18))
        fill(_rounded_rectangle(-34, -13, -20, 13, 2.0), (52, 50, 50))  # load bed
        fill(_rounded_rectangle(-32, -9, -23, 2, 1.0), (88, 132, 160))
        fill(_rounded_rectangle(-12, -4, 9, 4, 0.5), pale)  # stripe over roof and bonnet
        fill(_rounded_rectangle(21, -4, nose - 2.5, 4, 0.5), pale)
    for s in (-1, 1):
        fill(_rounded_rectangle(nose - 4, s * 12 - 3, nose - 1, s * 12 + 3, 1.0), (190, 240, 250))
        fill(_rounded_rectangle(tail + 0.8, s * 13 - 3, tail + 2.8, s * 13 + 3, 0.8), (40, 30, 190))
    premultiplied = np.dstack([cv2.bitwise_and(colour, colour, mask=alpha), alpha])
    sprites = []
    for shrink in (1.0, 0.7, 0.5, 0.35):
        texels = np.maximum(np.round(2 * HALF_CANVAS * 1.65 * unit_px * shrink), 4).astype(int)
        small: Any = cv2.resize(premultiplied, texels.tolist(), interpolation=cv2.INTER_AREA)
        sprites.append((texels[0] / (2 * HALF_CANVAS[0]), texels[1] / (2 * HALF_CANVAS[1]), small))
    return {"outline": np.concatenate([body, *wheels]), "sprites": tuple(sprites)}


def _rounded_rectangle(x0: float, y0: float, x1: float, y1: float, radius: float) -> Floats:
    angles = np.radians(np.arange(0, 91, 10))
    arc = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    left, top, right, bottom = x0 + radius, y0 + radius, x1 - radius, y1 - radius
    middles = ((right, bottom), (left, bottom), (left, top), (right, top))
    return np.concatenate([arc @ _rotation(math.pi / 2 * k).T + middle for k, middle in enumerate(middles)])


def _bounds(vehicle: _Vehicle, pose: Floats) -> Box:
    points = vehicle.outline @ pose[:2, :2].T + pose[:2, 2]
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return x0, y0, x1 - x0, y1 - y0


class _Spot(NamedTuple):
    """A vehicle's sprite in image pixels, and which of them lie inside the image."""

    sprite: Any
    rows: slice
    columns: slice
    inside: tuple[slice, slice]  # the same pixels, counted in the sprite


def _place(image: Image, vehicle: _Vehicle, pose: Floats) -> _Spot | None:
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


def _cover_at(world: _World, to_image: Floats, columns: slice, rows: slice) -> Floats:
    """``[h, w, 2]`` in 0..1 at these image pixels: what hides vehicles there, and the light that reaches them."""
    size = (columns.stop - columns.start, rows.stop - rows.start)
    matrix = _between_pixel_centres(_moved(-columns.start, -rows.start) @ to_image)
    warped: Any = cv2.warpAffine(world.cover, matrix, size, borderMode=cv2.BORDER_REFLECT_101)
    return warped.astype(np.float32) / 255


def _cast_shadow(
    image: Image, vehicle: _Vehicle, pose: Floats, offset: Floats, world: _World, to_image: Floats
) -> None:
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
    image: Image, vehicle: _Vehicle, pose: Floats, smear: Floats, world: _World, to_image: Floats, paint: bool
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


def _rotation(angle: float) -> Floats:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _moved(x: float, y: float) -> Floats:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def _between_pixel_centres(matrix: Floats) -> Floats:
    """A ``[3, 3]`` map of continuous coordinates as the ``[2, 3]`` that OpenCV wants, which counts pixel centres."""
    moved = matrix.copy()
    moved[:2, 2] += matrix[:2, :2] @ [0.5, 0.5] - 0.5
    return moved[:2]


# ------------------------------------------------------------------------------------------------ route and landscape


@dataclass(frozen=True)
class _Stage:
    """The plan of a scene: the circuit, the highway across it, and who drives where."""

    route: Floats  # [n, 2], closed, evenly spaced
    length: float
    highway: Floats  # [3, 3]: a pose on the highway where it crosses the route, heading along it
    phases: Floats
    vehicles: tuple[_Vehicle, ...]  # the target last, so that it is drawn over the others

    @staticmethod
    def plan(seed: int, unit_px: float) -> _Stage:
        """Draw a plan by seed."""
        rng = np.random.default_rng([seed, 1])
        paint, alike = PAINT[seed % len(PAINT)]
        phases = rng.uniform(0, 2 * math.pi, 10)
        body = _build_body(paint, unit_px)
        for _ in range(200):
            route, length = _circuit(rng)
            target = _Vehicle(**body, start=rng.uniform(0, length), speed=180.0, lane=LANE, wobble=22.0)
            stage = _Stage(route, length, np.eye(3), phases, (target,))
            highway = stage.pose(target, UNDER_HIGHWAY_S) @ np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
            if stage._crosses_once(highway):
                break
        alike_body = _build_body(alike, unit_px)

        def meeting(time_s: float, pace: float, lane: float) -> _Vehicle:
            there = _travelled(target, time_s) - pace * time_s
            return _Vehicle(**alike_body, start=there, speed=pace, lane=lane, lookalike=True)

        vehicles = [meeting(OVERTAKEN_S, 300.0, 0.0), meeting(ONCOMING_S, -190.0, -LANE)]
        bodies = [_build_body(colour, unit_px, van=k % 2 == 0) for k, colour in enumerate(TRAFFIC_BGR)]
        for k, body in enumerate(bodies):
            gap = length * (k + 1) / 6 + rng.uniform(-150, 150)
            vehicles.append(_Vehicle(**body, start=vehicles[1].start + gap, speed=-190.0, lane=-LANE))
        for k in range(8):
            lane, pace, start = (k % 4 - 1.5) * 38.0, 330.0 if k % 4 >= 2 else -330.0, 2000.0 * (k // 4)
            start += rng.uniform(0, 1800)
            vehicles.append(_Vehicle(**bodies[k % 5], start=start, speed=pace, lane=lane, on_highway=True))
        return _Stage(route, length, highway, phases, (*vehicles, target))

    def _crosses_once(self, highway: Floats) -> bool:
        """Whether the target is in the open for the first ten seconds, but for one short spell under the highway."""
        times = np.arange(0.0, 10.5, 0.1)
        places = np.array([self.pose(self.vehicles[-1], t)[:, 2] for t in times])
        across = np.abs((places @ np.linalg.inv(highway).T)[:, 1])
        near = across < DECK / 2 + 70
        return bool((np.abs(times - UNDER_HIGHWAY_S)[near] < 1.4).all() and (across < DECK / 2 - 38).sum() < 8)

    def pose(self, vehicle: _Vehicle, time_s: float) -> Floats:
        """Vehicle units to world units, ``[3, 3]``."""
        along = _travelled(vehicle, time_s)
        pose = np.eye(3)
        if vehicle.on_highway:
            pose[:2, 2] = (along % 4000.0 - 2000.0, vehicle.lane)
            pose = self.highway @ pose
        else:
            place, ahead = self._route_at(along), self._route_at(along + 6) - self._route_at(along - 6)
            angle = math.atan2(ahead[1], ahead[0])
            pose[:2, :2] = _rotation(angle)
            pose[:2, 2] = place + _rotation(angle) @ [0.0, vehicle.lane]
        if vehicle.speed < 0:
            pose[:2, :2] = -pose[:2, :2]
        return pose

    def _route_at(self, along: float) -> Floats:
        position = along / self.length % 1 * len(self.route)
        low = int(position)
        part = position - low
        return self.route[low % len(self.route)] * (1 - part) + self.route[(low + 1) % len(self.route)] * part


def _travelled(vehicle: _Vehicle, time_s: float) -> float:
    """Units along the route or highway: steady speed, with slow surges."""
    return vehicle.start + vehicle.speed * time_s + vehicle.wobble * math.sin(2 * math.pi * time_s / 4.7)


def _circuit(rng: np.random.Generator) -> tuple[Floats, float]:
    angle = np.linspace(0, 2 * math.pi, 4001)
    a, b = rng.uniform(0, 2 * math.pi, 2)
    swell = 1 + 0.13 * np.sin(2 * angle + a) + 0.07 * np.sin(3 * angle + b)
    dense = np.stack([800 * swell * np.cos(angle), 490 * swell * np.sin(angle)], axis=1) + np.array(WORLD) / 2
    steps = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(dense, axis=0).T))])
    even = np.linspace(0, steps[-1], 1200, endpoint=False)
    return np.stack([np.interp(even, steps, dense[:, k]) for k in (0, 1)], axis=1), float(steps[-1])


class _World(NamedTuple):
    """The painted plane: `ground` BGR, and `cover` [h, w, 2] (what hides vehicles, light on them), 0..255."""

    ground: Image
    cover: Any
    px: float


def _fractal(rng: np.random.Generator, shape: tuple[int, int], cell_px: float, octaves: int, fade: float) -> Any:
    """Smooth noise of standard deviation 1: octaves of halved cell size, each `fade` times as strong."""
    total, power, strength = np.zeros(shape, np.float32), 0.0, 1.0
    for _ in range(octaves):
        rows, columns = (max(round(side / cell_px), 2) for side in shape)
        grid = rng.standard_normal((rows, columns), np.float32)
        cv2.scaleAdd(cv2.resize(grid, shape[::-1]), strength, total, total)
        power, strength, cell_px = power + 0.5 * strength**2, strength * fade, max(cell_px / 2, 1.0)
    return total / math.sqrt(power)


@dataclass(frozen=True)
class _Brush:
    """OpenCV's drawing calls in units of the plane, at sub-pixel positions, smooth-edged."""

    px: float

    def _fixed(self, points: Any) -> NDArray[np.int32]:
        return np.round((np.asarray(points, np.float64) * self.px - 0.5) * 16).astype(np.int32)

    def polygon(self, canvas: Any, points: Any, value: Any) -> None:
        """Fill a polygon ``[n, 2]``."""
        cv2.fillPoly(canvas, [self._fixed(points)], value, cv2.LINE_AA, 4)

    def stroke(self, canvas: Any, points: Any, value: Any, breadth: float, closed: bool = False) -> None:
        """Draw a line through points ``[n, 2]``, `breadth` units wide but never under one texel."""
        cv2.polylines(canvas, [self._fixed(points)], closed, value, max(round(breadth * self.px), 1), cv2.LINE_AA, 4)

    def disc(self, canvas: Any, at: Any, radius: float, value: Any) -> None:
        """Fill a circle."""
        cv2.circle(canvas, self._fixed(at).tolist(), max(round(radius * self.px * 16), 8), value, -1, cv2.LINE_AA, 4)


def _oblong(at: Any, length: float, breadth: float, angle: float) -> Floats:
    """Corners of a turned rectangle; the first two are the ends of one long side."""
    corners = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]) * [length / 2, breadth / 2]
    return corners @ _rotation(angle).T + at


def _paint_world(seed: int, stage: _Stage, px: float) -> _World:
    rng, brush = np.random.default_rng([seed, 2]), _Brush(px)
    shape = (round(WORLD[1] * px), round(WORLD[0] * px))
    half = (shape[0] // 2, shape[1] // 2)  # noise is made for a quarter of the plane: enough for the eye, and quick
    meadow = _fractal(rng, half, 130 * px, 5, 0.62)
    ramp = np.linspace(0, 1, 256)[:, None]
    colours = np.array([48.0, 92, 70]) * (1 - ramp) + np.array([100.0, 150, 156]) * ramp
    dryness = cv2.resize(np.clip(meadow * 46 + 105, 0, 255).astype(np.uint8), shape[::-1])
    ground: Any = cv2.LUT(cv2.merge([dryness] * 3), colours.astype(np.uint8)[:, None])
    _paint_fields(ground, brush, rng)
    _paint_roads(ground, brush, rng, stage)

    # What stands up: first all places, then all shadows, then the things themselves on top.
    roofs = _place_roofs(rng, stage)
    trees = _place_trees(rng, stage, roofs, meadow)
    deck = _along(stage.highway, 0, DECK)
    light, hide = np.full(shape, 255, np.uint8), np.zeros(shape, np.uint8)
    for roof in roofs:
        for lift in (14, 28):
            brush.polygon(light, _oblong(roof.at + SUN * lift, roof.length, roof.breadth, roof.angle), 118)
    for at, radius in trees:
        brush.disc(light, at + SUN * radius * 0.75, radius * 0.97, 112)
    brush.polygon(light, deck + SUN * 46, 108)
    light = cv2.GaussianBlur(light, (0, 0), max(3.5 * px, 0.5)).astype(np.uint8)
    cv2.multiply(ground, cv2.merge([light] * 3), ground, 1 / 255)
    for roof in roofs:
        _paint_roof(ground, brush, rng, roof)
    for at, radius in trees:
        _paint_tree(ground, hide, brush, rng, at, radius)
    _paint_highway(ground, brush, stage)
    brush.polygon(hide, deck, 255)

    grain = np.clip(_fractal(rng, half, 14 * px, 4, 0.8) * 11 + 128, 60, 200).astype(np.uint8)
    rest = (shape[0] - half[0], shape[1] - half[1])
    speckle = cv2.copyMakeBorder(grain, rest[0], 0, rest[1], 0, cv2.BORDER_REFLECT_101)
    cv2.multiply(ground, cv2.merge([speckle] * 3), ground, 1 / 128)
    return _World(ground, np.dstack([hide, light]), px)


def _paint_fields(ground: Any, brush: _Brush, rng: np.random.Generator) -> None:
    crops = np.array([[58, 118, 96], [86, 146, 170], [72, 104, 128], [60, 136, 104]])
    for _ in range(16):
        at, angle = rng.uniform(0, 1, 2) * WORLD, rng.uniform(0, math.pi)
        length, breadth = rng.uniform(300, 620), rng.uniform(220, 420)
        tint = crops[rng.integers(len(crops))]
        brush.polygon(ground, _oblong(at, length, breadth, angle), tint.tolist())
        for across in np.arange(-breadth / 2 + 8, breadth / 2 - 4, 14.0):
            furrow = _oblong(at + _rotation(angle) @ [0, across], length - 12, 0, angle)[:2]
            brush.stroke(ground, furrow, (tint * 0.86).tolist(), 5)


def _paint_roads(ground: Any, brush: _Brush, rng: np.random.Generator, stage: _Stage) -> None:
    # A dirt track across the plane, under the circuit.
    x = np.linspace(0, WORLD[0], 200)
    bends = np.interp(x, np.linspace(0, WORLD[0], 9), WORLD[1] * rng.uniform(0.25, 0.75, 9))
    track = np.stack([x, np.convolve(np.pad(bends, 15, "edge"), np.ones(31) / 31, "valid")], axis=1)
    brush.stroke(ground, track, (112, 140, 160), 34)
    brush.stroke(ground, track, (92, 128, 134), 8)
    # The circuit: verge, asphalt, worn wheel tracks, edge lines, double yellow line, lane dashes.
    tangent = np.roll(stage.route, -3, axis=0) - np.roll(stage.route, 3, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1) / np.hypot(*tangent.T)[:, None]
    verge, asphalt, worn, white, yellow = (
        (104, 128, 138), (98, 94, 92), (88, 84, 83), (206, 212, 214), (90, 190, 220),
    )  # fmt: skip
    brush.stroke(ground, stage.route, verge, 3.7 * LANE, closed=True)
    brush.stroke(ground, stage.route, asphalt, 3.3 * LANE, closed=True)
    for lanes, breadth, colour in (
        ((-1.27, -0.73, -0.27, 0.27, 0.73, 1.27), 9, worn), ((-1.53, 1.53), 3, white), ((-0.53, -0.47), 2, yellow),
    ):  # fmt: skip
        for lane in lanes:
            brush.stroke(ground, stage.route + normal * (lane * LANE), colour, breadth, closed=True)
    dashes = stage.route + normal * (LANE / 2)
    for first in range(0, len(dashes) - 8, 16):
        brush.stroke(ground, dashes[first : first + 8], white, 3)


class _Roof(NamedTuple):
    at: Floats
    length: float
    breadth: float
    angle: float
    kind: int
    reach: float  # half the diagonal


def _clearance(stage: _Stage, at: Floats) -> float:
    """Units from a place to the edge of circuit or highway; negative on them."""
    from_highway = abs(float((np.linalg.inv(stage.highway) @ [at[0], at[1], 1.0])[1])) - DECK / 2
    return min(float(np.hypot(*(stage.route[::4] - at).T).min()) - 1.7 * LANE, from_highway)


def _place_roofs(rng: np.random.Generator, stage: _Stage) -> list[_Roof]:
    roofs: list[_Roof] = []
    for _ in range(60):
        length, breadth = rng.uniform(110, 230), rng.uniform(80, 130)
        at, angle, kind = rng.uniform(0, 1, 2) * WORLD, rng.uniform(0, math.pi), int(rng.integers(3))
        roof = _Roof(at, length, breadth, angle, kind, math.hypot(length, breadth) / 2)
        apart = all(math.dist(at, other.at) > roof.reach + other.reach + 20 for other in roofs)
        if apart and _clearance(stage, at) > roof.reach + 15:
            roofs.append(roof)
    return roofs


def _place_trees(
    rng: np.random.Generator, stage: _Stage, roofs: list[_Roof], meadow: Any
) -> list[tuple[Floats, float]]:
    """Middles and radii: woods where the meadow is lush, a few elsewhere, and three that hang over the road."""
    trees: list[tuple[Floats, float]] = []
    for _ in range(1400):
        share, radius = rng.uniform(0, 1, 2), rng.uniform(20, 44)
        at = share * WORLD
        lush = meadow[int(share[1] * meadow.shape[0]), int(share[0] * meadow.shape[1])] < -0.35
        if (not lush and rng.random() > 0.1) or _clearance(stage, at) < radius - 6:
            continue
        if all(math.dist(at, roof.at) > roof.reach * 0.85 + radius for roof in roofs):
            trees.append((at, radius))
    over = stage.pose(stage.vehicles[-1], UNDER_TREES_S)
    for x, y, radius in ((-36.0, 50.0, 44.0), (22.0, 34.0, 40.0), (78.0, 54.0, 42.0)):
        trees.append((over[:2, :2] @ [x, y] + over[:2, 2], radius))
    return trees


def _paint_roof(ground: Any, brush: _Brush, rng: np.random.Generator, roof: _Roof) -> None:
    at, length, breadth, angle = roof[:4]
    tint = np.array([[70, 88, 150], [150, 146, 142], [86, 92, 104]][roof.kind])
    brush.polygon(ground, _oblong(at, length, breadth, angle), tint.tolist())
    if roof.kind == 1:  # flat: a parapet, and boxes with shadows
        brush.polygon(ground, _oblong(at, length - 10, breadth - 10, angle), (128, 126, 122))
        for _ in range(4):
            box = at + _rotation(angle) @ (rng.uniform(-0.32, 0.32, 2) * [length, breadth])
            brush.polygon(ground, _oblong(box + SUN * 5, 20, 15, angle), (76, 74, 72))
            brush.polygon(ground, _oblong(box, 20, 15, angle), (176, 176, 172))
        return
    # Gable: one side in the sun, courses of tiles, a ridge.
    across = _rotation(angle) @ [0.0, 1.0]
    side = -1 if across @ SUN > 0 else 1
    brush.polygon(ground, _oblong(at + across * side * breadth / 4, length, breadth / 2, angle), (tint * 1.3).tolist())
    for course in np.arange(-breadth / 2 + 7, breadth / 2 - 3, 9.0):
        shade = tint * (1.18 if course * side > 0 else 0.9)
        brush.stroke(ground, _oblong(at + across * course, length, 0, angle)[:2], shade.tolist(), 1.5)
    brush.stroke(ground, _oblong(at, length, 0, angle)[:2], (tint * 1.5).tolist(), 3)


def _paint_tree(ground: Any, hide: Any, brush: _Brush, rng: np.random.Generator, at: Floats, radius: float) -> None:
    base = np.array([40, 78, 56]) * rng.uniform(0.8, 1.15) + [0, 0, rng.uniform(-8, 14)]
    brush.disc(ground, at, radius * 0.78, (base * 0.6).tolist())
    brush.disc(hide, at, radius * 0.78, 255)
    for step in np.linspace(0, 1, 26):  # lobes: a dark ragged rim first, then ever brighter, towards the sun
        angle = rng.uniform(0, 2 * math.pi)
        reach = radius * (rng.uniform(0.66, 0.8) if step < 0.4 else 0.74 * math.sqrt(rng.random()) * (1.3 - step))
        lobe = at + reach * np.array([math.cos(angle), math.sin(angle)]) - SUN * radius * 0.2 * step
        size = radius * rng.uniform(0.17, 0.3)
        brush.disc(ground, lobe, size, (base * (0.6 + 0.8 * step) * rng.uniform(0.92, 1.08)).tolist())
        brush.disc(hide, lobe, size, 255)


def _paint_highway(ground: Any, brush: _Brush, stage: _Stage) -> None:
    brush.polygon(ground, _along(stage.highway, 0, DECK), (150, 154, 156))
    brush.polygon(ground, _along(stage.highway, 0, DECK - 12), (112, 108, 106))
    brush.polygon(ground, _along(stage.highway, 0, 5), (168, 172, 174))
    for across in (5 - DECK / 2, DECK / 2 - 5):
        brush.polygon(ground, _along(stage.highway, across, 3), (212, 218, 220))
    for across in (-38, 38):
        for first in np.arange(-3000, 3000, 56.0):
            brush.polygon(ground, _along(stage.highway, across, 3, first, first + 26), (212, 218, 220))


def _along(highway: Floats, across: float, breadth: float, first: float = -4500.0, last: float = 4500.0) -> Floats:
    """Corners ``[4, 2]`` of a strip of the highway, `across` units from its middle."""
    strip = _oblong(((first + last) / 2, across), last - first, breadth, 0.0)
    return strip @ highway[:2, :2].T + highway[:2, 2]
