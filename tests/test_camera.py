"""Directions from image points: against OpenCV's projection of known 3D points, and by hand."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from siamtrack.camera import Camera

WIDTH, HEIGHT = 1280, 720
K = (900.0, 0.0, 640.0, 0.0, 910.0, 350.0, 0.0, 0.0, 1.0)
NAN = float("nan")


def test_the_principal_point_looks_straight_ahead() -> None:
    # K counts pixel centres from 0; the same point is half a pixel more in continuous coordinates.
    assert Camera(WIDTH, HEIGHT, K).bearing(640.5, 350.5, WIDTH, HEIGHT) == pytest.approx((0, 0, 1))


def test_values_by_hand() -> None:
    camera = Camera(WIDTH, HEIGHT, K)
    right = camera.bearing(640.5 + 900, 350.5, WIDTH, HEIGHT)  # one focal length to the right: 45 degrees
    assert right == pytest.approx((math.sqrt(0.5), 0, math.sqrt(0.5)))
    down = camera.bearing(640.5, 350.5 + 910 * 0.75, WIDTH, HEIGHT)  # a 3-4-5 triangle
    assert down == pytest.approx((0, 0.6, 0.8))
    up_left = camera.bearing(640.5 - 90, 350.5 - 91, WIDTH, HEIGHT)
    assert up_left == pytest.approx(tuple(np.array([-0.1, -0.1, 1]) / math.sqrt(1.02)))
    assert all(type(value) is float for value in up_left)


@pytest.mark.parametrize("scale", [(640, 360), (320, 180), (2560, 1440), (1281, 721)])
def test_a_scaled_image_gives_the_same_direction(scale: tuple[int, int]) -> None:
    camera = Camera(WIDTH, HEIGHT, K)
    full = camera.bearing(1000.0, 200.0, WIDTH, HEIGHT)
    scaled = camera.bearing(1000.0 * scale[0] / WIDTH, 200.0 * scale[1] / HEIGHT, *scale)
    assert scaled == pytest.approx(full, abs=1e-9)


POINTS = np.array([[0.0, 0, 2], [0.3, -0.2, 1], [-1.2, 0.6, 2], [0.5, 0.3, 1], [-3, -1.5, 6]])
PINHOLE = [
    ("plumb_bob", ()),
    ("plumb_bob", (-0.3, 0.1, 0.001, -0.0005)),
    ("plumb_bob", (-0.3, 0.1, 0.001, -0.0005, -0.02)),
    ("rational_polynomial", (0.5, 0.1, 0.0002, -0.0004, 0.01, 0.8, 0.15, 0.03)),
    ("thin_prism", (-0.2, 0.05, 0.001, 0.0, 0.0, 0.0, 0.0, 0.0, 0.001, 0.0, -0.001, 0.0)),
    ("", (-0.1, 0.02, 0.0, 0.0)),
]


@pytest.mark.parametrize(("model", "d"), PINHOLE)
def test_distortion_is_undone(model: str, d: tuple[float, ...]) -> None:
    camera = Camera(WIDTH, HEIGHT, K, d, model)
    matrix = np.reshape(K, (3, 3))
    pixels, _ = cv2.projectPoints(POINTS, np.zeros(3), np.zeros(3), matrix, np.array(d) if d else None)
    for point, (u, v) in zip(POINTS, pixels.reshape(-1, 2), strict=True):
        bearing = camera.bearing(u + 0.5, v + 0.5, WIDTH, HEIGHT)
        assert bearing == pytest.approx(tuple(point / np.linalg.norm(point)), abs=5e-4)
        assert np.linalg.norm(bearing) == pytest.approx(1)


@pytest.mark.parametrize("model", ["equidistant", "fisheye"])
@pytest.mark.parametrize("d", [(), (0.02, -0.01, 0.003, -0.001)])
def test_fisheye_is_undone(model: str, d: tuple[float, ...]) -> None:
    k = (400.0, 0.0, 640.0, 0.0, 400.0, 360.0, 0.0, 0.0, 1.0)
    points = np.array([*POINTS, [4.0, 1.0, 1.0]])  # 76 degrees off the axis
    coefficients = np.array(d or (0.0,) * 4)
    pixels, _ = cv2.fisheye.projectPoints(
        points.reshape(-1, 1, 3), np.zeros(3), np.zeros(3), np.reshape(k, (3, 3)), coefficients
    )
    camera = Camera(WIDTH, HEIGHT, k, d, model)
    for point, (u, v) in zip(points, pixels.reshape(-1, 2), strict=True):
        assert camera.bearing(u + 0.5, v + 0.5, WIDTH, HEIGHT) == pytest.approx(
            tuple(point / np.linalg.norm(point)), abs=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": (0.0,) * 9}, "not calibrated: K must be nine numbers with fx, fy above 0"),
        ({"k": K[:8]}, "not calibrated: K must be nine numbers"),
        ({"k": (NAN, *K[1:])}, "not calibrated"),
        ({"k": (*K[:4], -1.0, *K[5:])}, "not calibrated"),
        ({"width": 0}, "not calibrated: image size is given as 0x720"),
        ({"height": 0}, "not calibrated: image size is given as 1280x0"),
        ({"model": "fov"}, "unknown distortion model 'fov'; known: plumb_bob, .*equidistant"),
        ({"d": (0.1, 0.2, 0.3)}, "plumb_bob distortion must be 0, 4, 5, 8, 12, 14 finite numbers"),
        ({"d": (0.1, NAN, 0.0, 0.0)}, "plumb_bob distortion must be .* finite numbers"),
        ({"d": (0.1,) * 5, "model": "equidistant"}, "equidistant distortion must be 0, 1, 2, 3, 4 finite numbers"),
    ],
)
def test_what_is_no_camera_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Camera(**{"width": WIDTH, "height": HEIGHT, "k": K, **arguments})


def test_an_image_of_another_aspect_is_refused() -> None:
    with pytest.raises(ValueError, match="image is 640x480, but the camera was calibrated at 1280x720"):
        Camera(WIDTH, HEIGHT, K).bearing(10, 10, 640, 480)
