"""Images from files or shards; decoded ones are kept in memory up to a limit.

Raw ones of shards are read anew each time: the system keeps files in memory that is free, once for all processes.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import mean_bgr
from training.tracks import ImageRef, Stored

NPY = b"\x93NUMPY\x01\x00"  # how a file of NumPy starts, of the version that all simple arrays are written in


class ImageCache:
    """Reads images and keeps the most recently used ones. Threads may share it; another process gets an empty one.

    Args:
        limit_gb: memory for decoded pixels, a process.
    """

    def __init__(self, limit_gb: float = 3.0) -> None:
        self.limit_bytes = int(limit_gb * 1e9)
        self._lock = threading.Lock()
        self._held_bytes = 0
        self._images: OrderedDict[tuple[ImageRef, int], NDArray[np.uint8]] = OrderedDict()
        self._means: dict[ImageRef, tuple[float, float, float]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageCache, (self.limit_bytes / 1e9,)

    def bgr(self, image: ImageRef) -> NDArray[np.uint8]:
        """The image as read-only uint8 ``[H, W, 3]``."""
        return self._read(image, cv2.IMREAD_COLOR)

    def mean_bgr(self, image: ImageRef) -> tuple[float, float, float]:
        """Mean colour of the image, worked out once while it is kept: of a large one it takes as long as a crop."""
        mean = self._means.get(image)
        if mean is None:
            mean = self._means[image] = mean_bgr(self.bgr(image))
        return mean

    def labels(self, image: ImageRef) -> NDArray[np.uint8]:
        """A label image as read-only uint8 ``[H, W]``."""
        return self._read(image, cv2.IMREAD_GRAYSCALE)

    def _read(self, image: ImageRef, mode: int) -> NDArray[np.uint8]:
        key = (image, mode)
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                return self._images[key]
        if isinstance(image, Stored):
            data = _read_stored(image)
            if data.startswith(NPY):
                return _raw(data)
            decoded: Any = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
        else:
            decoded = cv2.imread(str(image), mode)
        if decoded is None:
            raise ValueError(f"{image}: not a readable image")
        pixels = np.asarray(decoded, np.uint8)
        pixels.flags.writeable = False
        with self._lock:
            if key not in self._images:  # or another thread has read it too
                self._images[key] = pixels
                self._held_bytes += pixels.nbytes
            while self._held_bytes > self.limit_bytes and len(self._images) > 1:
                (dropped, _), dropped_pixels = self._images.popitem(last=False)
                self._held_bytes -= dropped_pixels.nbytes
                self._means.pop(dropped, None)
        return pixels


def _read_stored(image: Stored) -> bytes:
    with image.shard.open("rb") as file:
        file.seek(image.offset)
        return file.read(image.size)


def _raw(npy: bytes) -> NDArray[np.uint8]:
    """The array in NumPy's file, read-only and not copied."""
    file = io.BytesIO(npy)
    file.seek(len(NPY))
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.frombuffer(npy, dtype, offset=file.tell()).reshape(shape)
