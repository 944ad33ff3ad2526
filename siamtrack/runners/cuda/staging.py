"""The one upload of a frame: windows, numbers and pixels, side by side in page-locked memory and on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import Image, Window
from siamtrack.runners.cuda.device import Device
from siamtrack.runners.cuda.memory import addresses, align, layout
from siamtrack.runners.cuda.windows import WINDOW, plan_windows, write_pixels

STEP_BYTES = 1 << 16
"""Uploads are rounded up to this, so that a captured size seldom changes: 64 KiB take about 3 us over PCIe 4.0."""


class Staging:
    """A buffer on the host and its twin on the GPU.

    It begins with a table of windows and some numbers (`field`); pixels follow.

    Args:
        device: owns the memory.
        numbers: name, dtype and shape for each window of what is sent beside it.
        max_windows: windows in one upload.
        pixels: bytes of pixels to have room for at first. It grows where a camera needs more.
        on_move: called after the buffers have moved, when nothing may use the old ones any more.

    Raises:
        OutOfMemory: no room.
    """

    def __init__(
        self,
        device: Device,
        numbers: Sequence[tuple[str, Any, Sequence[int]]],
        max_windows: int,
        pixels: int,
        on_move: Callable[[], None],
    ) -> None:
        self._device, self._on_move = device, on_move
        self._header = layout([("windows", np.uint8, (WINDOW.itemsize,)), *numbers], max_windows)
        self.address = 0
        self.host: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._reserve(self._header.nbytes + pixels)

    def field(self, name: str, count: int) -> NDArray[Any]:
        """The host's side of the first numbers of a name, to be written before the upload."""
        return self._header.fields[name].view(self.host, count)

    @property
    def addresses(self) -> Mapping[str, int]:
        """Where the GPU has each of the numbers."""
        return addresses(self.address, self._header)

    def write(
        self, image: Image, windows: Sequence[Window], fills: Sequence[tuple[float, float, float]], size_px: int
    ) -> int:
        """Write windows and the pixels they need; returns the bytes to upload.

        Raises:
            OutOfMemory: the pixels need a larger buffer than there is memory for. All is as it was.
            ValueError: a window is out of all bounds.
        """
        plan = plan_windows(image.shape, windows, fills, size_px, self._header.nbytes)
        self._reserve(plan.nbytes)
        self.field("windows", len(windows))[:] = plan.table.view(np.uint8).reshape(len(windows), WINDOW.itemsize)
        write_pixels(image, plan, self.host)
        return plan.nbytes

    def rounded(self, nbytes: int) -> int:
        """An upload's size in whole steps, inside the buffer."""
        return min(align(nbytes, STEP_BYTES), len(self.host))

    def _reserve(self, nbytes: int) -> None:
        if nbytes <= len(self.host):
            return
        nbytes = align(max(nbytes, 2 * len(self.host)), STEP_BYTES)
        # The new buffers are taken before the old ones go: a failure leaves all as it was.
        address = self._device.allocate(nbytes)
        try:
            host = self._device.allocate_host(nbytes)
        except BaseException:
            self._device.free(address)
            raise
        host[:] = 0
        old_address, old_host = self.address, self.host
        self.address, self.host = address, host
        if old_address:
            self._on_move()
            self._device.free(old_address)
            self._device.free_host(old_host)
