"""What the device asks of a Python binding of CUDA, and which binding that is."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from siamtrack.runners.cuda.device import CudaError, Grid

BINDINGS = ("auto", "pycuda", "cuda-python")
"""pycuda where it is installed, with cuda-python for what it does not wrap; or cuda-python alone."""

logger = logging.getLogger(__name__)


class Binding(Protocol):
    """One CUDA context and one stream, through one Python package. Everything is asked for by the thread that made it.

    Handles are opaque to the device, which keeps them and gives each back once. Failures are `CudaError`, and
    `OutOfMemory` where that is the reason.
    """

    name: str
    """With its version."""
    context: int
    """Handle of the retained primary context."""
    stream: int
    """Handle of the stream."""

    def allocate(self, nbytes: int) -> Any:
        """Device memory; ``int()`` of the handle is its address."""
        ...

    def free(self, memory: Any) -> None:
        """Give device memory back."""
        ...

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked memory."""
        ...

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give page-locked memory back."""
        ...

    def upload(self, address: int, array: NDArray[np.uint8], nbytes: int) -> None:
        """Queue a copy to the device."""
        ...

    def download(self, array: NDArray[np.uint8], address: int, nbytes: int) -> None:
        """Queue a copy from the device."""
        ...

    def copy(self, to: int, address: int, nbytes: int) -> None:
        """Queue a copy within the device."""
        ...

    def load(self, image: bytes) -> Any:
        """A module, from machine code or PTX."""
        ...

    def function(self, module: Any, name: str) -> Any:
        """A kernel of a module."""
        ...

    def unload(self, module: Any) -> None:
        """Give a module back; the caller holds no other reference to it or to its kernels."""
        ...

    def launch(self, function: Any, grid: Grid, block: Grid, arguments: Sequence[Any]) -> None:
        """Queue a kernel; arguments are ctypes values."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, bytes."""
        ...

    def event(self) -> Any:
        """A point in the stream."""
        ...

    def milliseconds(self, begin: Any, end: Any) -> float:
        """GPU time between two points that were passed."""
        ...

    def release(self, event: Any) -> None:
        """Give an event back."""
        ...

    def close(self) -> None:
        """Give the stream and the context back, as far as a GPU that failed lets go. Called once.

        The thread's current context afterwards is undefined.
        """
        ...


def open_binding(name: str, driver: Any, ordinal: int) -> Binding:
    """A binding, with the device's primary context current.

    Args:
        name: one of `BINDINGS`.
        driver: module ``cuda.bindings.driver``, after ``cuInit``.
        ordinal: CUDA device number.

    Raises:
        CudaError: it is not installed, does not import, or gets no context.
    """
    if name not in BINDINGS:
        raise ValueError(f"binding must be one of {', '.join(BINDINGS)}, got {name!r}")
    if name == "pycuda" or (name == "auto" and importlib.util.find_spec("pycuda") is not None):
        from siamtrack.runners.cuda.pycuda_binding import PycudaBinding, import_pycuda

        try:
            return PycudaBinding(import_pycuda(), driver, ordinal)
        except ImportError as error:
            problem = f"pycuda does not import ({error}); compile it for this Python, NumPy and CUDA: " + (
                "pip install --force-reinstall --no-binary pycuda pycuda"
            )
            if name == "pycuda":
                raise CudaError(problem) from error
            logger.warning("using cuda-python alone: %s", problem)
    from siamtrack.runners.cuda.cuda_python_binding import CudaPythonBinding

    return CudaPythonBinding(driver, ordinal)
