"""Images from files or shards; decoded ones are kept in memory up to a limit.

Raw ones of shards are parts of mapped files: the system keeps what fits of them in memory, once for all processes.
"""

from __future__ import annotations

import mmap
import re
import threading
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import mean_bgr
from training.tracks import ImageRef, Stored

# The head of NumPy's file of bytes. NumPy's own reader of it takes longer than the cut of a crop.
NPY = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '\|u1', 'fortran_order': False, 'shape': \(([\d, ]+)\), \} *\n", re.DOTALL
)
NPY_BYTES = 128  # of that head
MAPPED_SHARDS = 256  # at once: each takes a file handle, of which a process may have about a thousand


class ImageCache:
    """Reads images and keeps the most recently used ones. Threads may share it; another process gets an empty one.

    Args:
        limit_gb: memory for decoded pixels, a process.
    """

    def __init__(self, limit_gb: float = 3.0) -> None:
        self.limit_bytes = int(limit_gb * 1e9)
        self._lock = threading.Lock()
        self._mapped = lru_cache(MAPPED_SHARDS)(_mapped)
        self._held_bytes = 0
        self._images: OrderedDict[tuple[ImageRef, int], NDArray[np.uint8]] = OrderedDict()
        self._means: dict[ImageRef, tuple[float, float, float]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageCache, (self.limit_bytes / 1e9,)

    def bgr(self, image: ImageRef) -> NDArray[np.uint8]:
        """The image as read-only uint8 ``[H, W, 3]``."""
        return self._read(image, cv2.IMREAD_COLOR)

    def mean_bgr(self, image: ImageRef) -> tuple[float, float, float]:
        """Mean colour of the image, worked out once: of a large one it takes as long as a crop."""
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
            try:
                data = np.frombuffer(self._mapped(image.shard), np.uint8, image.size, image.offset)
                raw = NPY.match(data[:NPY_BYTES].tobytes())
                if raw:
                    return data[raw.end() :].reshape([int(side) for side in raw[1].split(b",")])
            except ValueError as error:
                raise ValueError(f"{image} is no image of that size: run training.prepare again ({error})") from error
            decoded: Any = cv2.imdecode(data, mode)
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


def _mapped(shard: Path) -> mmap.mmap:
    """The bytes of a file. What is dropped here stays mapped as long as somebody looks at a part of it."""
    with shard.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
