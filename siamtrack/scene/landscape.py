"""The painted plane: fields, roads, roofs, trees and the highway, and what of it hides or shades vehicles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.scene.vehicles import DECK, LANE, UNDER_TREES_S, WORLD, Floats, Image, Stage, rotation

SUN = np.array([0.62, 0.78])  # direction in which shadows fall


class World(NamedTuple):
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
    return corners @ rotation(angle).T + at


def paint_world(seed: int, stage: Stage, px: float) -> World:
    """Paint the plane of a seed around its stage, at ``px`` texels a unit."""
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
    return World(ground, np.dstack([hide, light]), px)


def _paint_fields(ground: Any, brush: _Brush, rng: np.random.Generator) -> None:
    crops = np.array([[58, 118, 96], [86, 146, 170], [72, 104, 128], [60, 136, 104]])
    for _ in range(16):
        at, angle = rng.uniform(0, 1, 2) * WORLD, rng.uniform(0, math.pi)
        length, breadth = rng.uniform(300, 620), rng.uniform(220, 420)
        tint = crops[rng.integers(len(crops))]
        brush.polygon(ground, _oblong(at, length, breadth, angle), tint.tolist())
        for across in np.arange(-breadth / 2 + 8, breadth / 2 - 4, 14.0):
            furrow = _oblong(at + rotation(angle) @ [0, across], length - 12, 0, angle)[:2]
            brush.stroke(ground, furrow, (tint * 0.86).tolist(), 5)


def _paint_roads(ground: Any, brush: _Brush, rng: np.random.Generator, stage: Stage) -> None:
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


def _clearance(stage: Stage, at: Floats) -> float:
    """Units from a place to the edge of circuit or highway; negative on them."""
    from_highway = abs(float((np.linalg.inv(stage.highway) @ [at[0], at[1], 1.0])[1])) - DECK / 2
    return min(float(np.hypot(*(stage.route[::4] - at).T).min()) - 1.7 * LANE, from_highway)


def _place_roofs(rng: np.random.Generator, stage: Stage) -> list[_Roof]:
    roofs: list[_Roof] = []
    for _ in range(60):
        length, breadth = rng.uniform(110, 230), rng.uniform(80, 130)
        at, angle, kind = rng.uniform(0, 1, 2) * WORLD, rng.uniform(0, math.pi), int(rng.integers(3))
        roof = _Roof(at, length, breadth, angle, kind, math.hypot(length, breadth) / 2)
        apart = all(math.dist(at, other.at) > roof.reach + other.reach + 20 for other in roofs)
        if apart and _clearance(stage, at) > roof.reach + 15:
            roofs.append(roof)
    return roofs


def _place_trees(rng: np.random.Generator, stage: Stage, roofs: list[_Roof], meadow: Any) -> list[tuple[Floats, float]]:
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
            box = at + rotation(angle) @ (rng.uniform(-0.32, 0.32, 2) * [length, breadth])
            brush.polygon(ground, _oblong(box + SUN * 5, 20, 15, angle), (76, 74, 72))
            brush.polygon(ground, _oblong(box, 20, 15, angle), (176, 176, 172))
        return
    # Gable: one side in the sun, courses of tiles, a ridge.
    across = rotation(angle) @ [0.0, 1.0]
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


def _paint_highway(ground: Any, brush: _Brush, stage: Stage) -> None:
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
