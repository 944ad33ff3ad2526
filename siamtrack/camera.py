"""From image pixels to directions: a calibrated camera."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

FISHEYE_MODELS = ("equidistant", "fisheye")
PINHOLE_MODELS = ("", "plumb_bob", "rational_polynomial", "thin_prism")
PINHOLE_COEFFICIENTS = (0, 4, 5, 8, 12, 14)  # what OpenCV takes
ASPECT_TOLERANCE = 0.02  # halving odd sizes rounds


@dataclass(frozen=True)
class Camera:
    """Intrinsics as a ROS CameraInfo gives them.

    Attributes:
        width: image width the calibration belongs to, pixels.
        height: likewise.
        k: intrinsic matrix, nine numbers row by row.
        d: distortion coefficients; empty for none.
        model: name of the distortion model.
    """

    width: int
    height: int
    k: tuple[float, ...]
    d: tuple[float, ...] = ()
    model: str = "plumb_bob"

    def __post_init__(self) -> None:
        if len(self.k) != 9 or not np.isfinite(self.k).all() or self.k[0] <= 0 or self.k[4] <= 0:
            raise ValueError(f"camera is not calibrated: K must be nine numbers with fx, fy above 0, got {self.k}")
        if self.model not in (*PINHOLE_MODELS, *FISHEYE_MODELS):
            known = ", ".join((*PINHOLE_MODELS[1:], *FISHEYE_MODELS))
            raise ValueError(f"unknown distortion model {self.model!r}; known: {known}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"camera is not calibrated: image size is given as {self.width}x{self.height}")
        allowed = range(5) if self.model in FISHEYE_MODELS else PINHOLE_COEFFICIENTS
        if len(self.d) not in allowed or not np.isfinite(self.d).all():
            counts = ", ".join(map(str, allowed))
            raise ValueError(f"{self.model} distortion must be {counts} finite numbers, got {self.d}")

    def bearing(self, x: float, y: float, width: int, height: int) -> tuple[float, float, float]:
        """Unit vector to an image point in the camera's optical frame (x right, y down, z forward).

        Args:
            x: continuous image coordinate (pixel i covers [i, i + 1)).
            y: likewise.
            width: width of the image the point is in; a scaled image of the same camera is allowed for.
            height: likewise.

        Raises:
            ValueError: the image has another aspect than the calibration, so it is no scaled image of that camera.
        """
        if abs(width * self.height / (height * self.width) - 1) > ASPECT_TOLERANCE:
            raise ValueError(f"image is {width}x{height}, but the camera was calibrated at {self.width}x{self.height}")
        # Calibrations count pixel centres from 0: half a pixel less than continuous coordinates.
        u = x * self.width / width - 0.5
        v = y * self.height / height - 0.5
        matrix, point = np.reshape(self.k, (3, 3)), np.array([[[u, v]]], np.float64)
        if self.model in FISHEYE_MODELS:
            coefficients = np.zeros(4)
            coefficients[: len(self.d)] = self.d
            undistorted = cv2.fisheye.undistortPoints(point, matrix, coefficients)
        else:
            undistorted = cv2.undistortPoints(point, matrix, np.asarray(self.d, np.float64) if self.d else None)
        ray = np.array([*np.asarray(undistorted).reshape(2), 1.0])
        unit = ray / np.linalg.norm(ray)
        return float(unit[0]), float(unit[1]), float(unit[2])
