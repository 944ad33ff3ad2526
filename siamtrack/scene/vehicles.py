"""Who drives where, and what each vehicle looks like: the circuit, the highway across it, bodies and their motion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Floats = NDArray[np.float64]
Colour = tuple[int, int, int]

WORLD = (3800.0, 2500.0)  # width and height of the plane, units
LANE = 52.0  # between lane centres, units
DECK = 172.0  # width of the highway on stilts, units
HALF_CANVAS = np.array([46.0, 28.0])  # half the sprite canvas, units: room around the largest body
WHEELS = ((-24.0, -18.5), (-24.0, 18.5), (23.0, -18.5), (23.0, 18.5))

# The story, in seconds of clip time: what the target meets on its way. It repeats each lap, about 23 s.
OVERTAKEN_S, UNDER_TREES_S, UNDER_HIGHWAY_S, ONCOMING_S = 2.6, 4.3, 6.2, 8.8

# Target and its look-alikes: the same car, in a neighbouring colour.
PAINT: tuple[tuple[Colour, Colour], ...] = (
    ((36, 44, 208), (30, 104, 222)),
    ((34, 150, 240), (52, 196, 236)),
    ((198, 70, 40), (180, 120, 40)),
)
TRAFFIC_BGR: tuple[Colour, ...] = ((222, 222, 218), (150, 146, 140), (64, 60, 58), (140, 96, 52), (92, 120, 70))


class Vehicle(NamedTuple):
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


@dataclass(frozen=True)
class Stage:
    """The plan of a scene: the circuit, the highway across it, and who drives where."""

    route: Floats  # [n, 2], closed, evenly spaced
    length: float
    highway: Floats  # [3, 3]: a pose on the highway where it crosses the route, heading along it
    phases: Floats
    vehicles: tuple[Vehicle, ...]  # the target last, so that it is drawn over the others

    @staticmethod
    def plan(seed: int, unit_px: float) -> Stage:
        """Draw a plan by seed."""
        rng = np.random.default_rng([seed, 1])
        paint, alike = PAINT[seed % len(PAINT)]
        phases = rng.uniform(0, 2 * math.pi, 10)
        body = _build_body(paint, unit_px)
        for _ in range(200):
            route, length = _circuit(rng)
            target = Vehicle(**body, start=rng.uniform(0, length), speed=180.0, lane=LANE, wobble=22.0)
            stage = Stage(route, length, np.eye(3), phases, (target,))
            highway = stage.pose(target, UNDER_HIGHWAY_S) @ np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
            if stage._crosses_once(highway):
                break
        alike_body = _build_body(alike, unit_px)

        def meeting(time_s: float, pace: float, lane: float) -> Vehicle:
            there = _travelled(target, time_s) - pace * time_s
            return Vehicle(**alike_body, start=there, speed=pace, lane=lane, lookalike=True)

        vehicles = [meeting(OVERTAKEN_S, 300.0, 0.0), meeting(ONCOMING_S, -190.0, -LANE)]
        bodies = [_build_body(colour, unit_px, van=k % 2 == 0) for k, colour in enumerate(TRAFFIC_BGR)]
        for k, body in enumerate(bodies):
            gap = length * (k + 1) / 6 + rng.uniform(-150, 150)
            vehicles.append(Vehicle(**body, start=vehicles[1].start + gap, speed=-190.0, lane=-LANE))
        for k in range(8):
            lane, pace, start = (k % 4 - 1.5) * 38.0, 330.0 if k % 4 >= 2 else -330.0, 2000.0 * (k // 4)
            start += rng.uniform(0, 1800)
            vehicles.append(Vehicle(**bodies[k % 5], start=start, speed=pace, lane=lane, on_highway=True))
        return Stage(route, length, highway, phases, (*vehicles, target))

    def _crosses_once(self, highway: Floats) -> bool:
        """Whether the target is in the open for the first ten seconds, but for one short spell under the highway."""
        times = np.arange(0.0, 10.5, 0.1)
        places = np.array([self.pose(self.vehicles[-1], t)[:, 2] for t in times])
        across = np.abs((places @ np.linalg.inv(highway).T)[:, 1])
        near = across < DECK / 2 + 70
        return bool((np.abs(times - UNDER_HIGHWAY_S)[near] < 1.4).all() and (across < DECK / 2 - 38).sum() < 8)

    def pose(self, vehicle: Vehicle, time_s: float) -> Floats:
        """Vehicle units to world units, ``[3, 3]``."""
        along = _travelled(vehicle, time_s)
        pose = np.eye(3)
        if vehicle.on_highway:
            pose[:2, 2] = (along % 4000.0 - 2000.0, vehicle.lane)
            pose = self.highway @ pose
        else:
            place, ahead = self._route_at(along), self._route_at(along + 6) - self._route_at(along - 6)
            angle = math.atan2(ahead[1], ahead[0])
            pose[:2, :2] = rotation(angle)
            pose[:2, 2] = place + rotation(angle) @ [0.0, vehicle.lane]
        if vehicle.speed < 0:
            pose[:2, :2] = -pose[:2, :2]
        return pose

    def _route_at(self, along: float) -> Floats:
        position = along / self.length % 1 * len(self.route)
        low = int(position)
        part = position - low
        return self.route[low % len(self.route)] * (1 - part) + self.route[(low + 1) % len(self.route)] * part


def _travelled(vehicle: Vehicle, time_s: float) -> float:
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
    return np.concatenate([arc @ rotation(math.pi / 2 * k).T + middle for k, middle in enumerate(middles)])


def rotation(angle: float) -> Floats:
    """``[2, 2]``, by an angle in radians, from +x towards +y."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
