"""Launches the kernels of ``kernels.cu``."""

from __future__ import annotations

import ctypes
from pathlib import Path

from siamtrack.runners.cuda.device import Device

KERNELS = Path(__file__).with_name("kernels.cu")
THREADS = (32, 8)  # of a block: columns, rows
CHECK_THREADS, CHECK_BLOCKS = 256, 256


class Kernels:
    """The crop kernel, and the one that looks for values that are no finite numbers.

    Args:
        device: compiles and runs them.
        check: the second is wanted too.

    Raises:
        CudaError: they cannot be compiled.
    """

    def __init__(self, device: Device, check: bool) -> None:
        source = KERNELS.read_text(encoding="utf-8")
        self._device = device
        self._crop = device.compile(source, "siamtrack_crop")
        self._check = device.compile(source, "siamtrack_check") if check else None

    def crop(self, table: int, images: int, size_px: int, count: int) -> None:
        """Queue the cutting of windows into ``[count, size_px, size_px, 3]`` images.

        Args:
            table: address of a `Staging`'s device buffer, whose windows are cut.
            images: address of the images.
            size_px: side of an image.
            count: windows.
        """
        grid = (-(-size_px // THREADS[0]), -(-size_px // THREADS[1]), count)
        arguments = (ctypes.c_void_p(table), ctypes.c_void_p(images), ctypes.c_int(size_px))
        self._device.launch(self._crop, grid, (*THREADS, 1), arguments)

    def check_finite(self, values: int, count: int, half: bool, flag: int) -> None:
        """Queue a look at `count` floats, 16 or 32 bits each; one that is no finite number sets the 32-bit flag."""
        arguments = (ctypes.c_void_p(values), ctypes.c_longlong(count), ctypes.c_int(half), ctypes.c_void_p(flag))
        blocks = min(-(-count // CHECK_THREADS), CHECK_BLOCKS)
        self._device.launch(self._check, (blocks, 1, 1), (CHECK_THREADS, 1, 1), arguments)
