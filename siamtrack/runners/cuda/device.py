"""Everything a runner asks of CUDA: one device, one stream, memory, kernels, graphs.

`siamtrack.runners.cuda.driver.CudaDevice` does it; the tests put others in its place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int, int]


class CudaError(RuntimeError):
    """A call to CUDA failed, or CUDA cannot be used here."""


class OutOfMemory(CudaError):
    """There is not enough device or page-locked memory."""


class Owner:
    """The thread that opened a device, which alone may use it: CUDA keeps the current context per thread."""

    def __init__(self) -> None:
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._name = threading.current_thread().name

    def check(self) -> None:
        """Refuse other threads and forked processes.

        Raises:
            RuntimeError: this is one.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this runner was opened in process {self._process} and is used in {os.getpid()}, forked from it; CUDA "
                "does not survive a fork: start the process with the 'spawn' method and open a runner in it"
            )
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"this runner belongs to thread {self._name!r}, which opened it, and was called on "
                f"{threading.current_thread().name!r}; open, use and close a runner on one thread "
                "(siamtrack.worker.Worker does)"
            )


class Graph(Protocol):
    """Captured work, ready to be launched again and again."""

    def launch(self, upload_bytes: int) -> None:
        """Run it on the device's stream; the upload it starts with carries this many bytes, at least 1."""
        ...

    def close(self) -> None:
        """Give it back; safe to call twice."""
        ...


class Device(Protocol):
    """A GPU as the runner sees it. Addresses are device addresses; work is queued on one stream and does not wait."""

    stream: int
    """Handle of the stream."""
    binding: str
    """The package that CUDA is called through, with its version."""

    def enter(self) -> None:
        """Make the context current. Every public call of a runner starts with it.

        Raises:
            RuntimeError: called on another thread, or in another process, than the one that opened the device.
        """
        ...

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to at least 256 bytes."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back; nothing queued may still use it."""
        ...

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked memory, from which and to which the GPU copies without waiting."""
        ...

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give page-locked memory back; `array` must not be touched again."""
        ...

    def upload(self, address: int, array: NDArray[np.uint8], nbytes: int) -> None:
        """Queue a copy of the first bytes of a page-locked array to the device."""
        ...

    def download(self, array: NDArray[np.uint8], address: int, nbytes: int) -> None:
        """Queue a copy from the device to the start of a page-locked array."""
        ...

    def copy(self, to: int, address: int, nbytes: int) -> None:
        """Queue a copy within the device."""
        ...

    def compile(self, source: str, name: str) -> Any:
        """A kernel, from CUDA C++."""
        ...

    def launch(self, kernel: Any, grid: Grid, block: Grid, arguments: Sequence[Any]) -> None:
        """Queue a kernel; arguments are ctypes values."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` queues, without running it.

        Raises:
            CudaError: it cannot be captured. The stream is usable again.
        """
        ...

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, bytes."""
        ...

    def close(self) -> None:
        """Give everything back that was not, and the context; safe to call twice.

        Raises:
            RuntimeError: called on another thread.
        """
        ...
