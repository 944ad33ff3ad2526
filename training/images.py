"""Decoded images, kept in memory up to a limit."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray


class ImageCache:
    """Reads images and keeps the most recently used ones.

    Args:
        limit_gb: memory for decoded pixels, a process.
    """

    def __init__(self, limit_gb: float = 3.0) -> None:
        self.limit_bytes = int(limit_gb * 1e9)
        self._held_bytes = 0
        self._images: OrderedDict[tuple[Path, int], NDArray[np.uint8]] = OrderedDict()

    def bgr(self, path: Path) -> NDArray[np.uint8]:
        """The image as read-only uint8 ``[H, W, 3]``."""
        return self._read(path, cv2.IMREAD_COLOR)

    def labels(self, path: Path) -> NDArray[np.uint8]:
        """A label image as read-only uint8 ``[H, W]``."""
        return self._read(path, cv2.IMREAD_GRAYSCALE)

    def _read(self, path: Path, mode: int) -> NDArray[np.uint8]:
        key = (path, mode)
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        image = cv2.imread(str(path), mode)
        if image is None:
            raise ValueError(f"{path}: not a readable image")
        pixels = np.asarray(image, np.uint8)
        pixels.flags.writeable = False
        self._images[key] = pixels
        self._held_bytes += pixels.nbytes
        while self._held_bytes > self.limit_bytes and len(self._images) > 1:
            self._held_bytes -= self._images.popitem(last=False)[1].nbytes
        return pixels
