"""`PycudaBinding`: CUDA through pycuda.

pycuda keeps a stack of contexts for each thread, and ends the process with an abort when a thread or the interpreter
ends and leaves one on it. So the context is on that stack only while pycuda makes an object, which it ties to the
context on top, or frees one; for everything else it is enough that the driver has it current.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from siamtrack.runners.cuda.device import CudaError, Grid, OutOfMemory

T = TypeVar("T")
STREAM_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, for which pycuda has no name

logger = logging.getLogger(__name__)


def import_pycuda() -> Any:
    """Module ``pycuda.driver``, which is linked with the driver and so imports only where there is one.

    Raises:
        ImportError: it does not import.
    """
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError:
        raise
    except Exception as error:  # built for another NumPy or Boost it fails in its own ways
        raise ImportError(f"{type(error).__name__}: {error}") from error


class PycudaBinding:
    """See `Binding` for the methods.

    Args:
        pycuda: module ``pycuda.driver``.
        driver: module ``cuda.bindings.driver``, for what pycuda's context cannot do.
        ordinal: CUDA device number.
    """

    def __init__(self, pycuda: Any, driver: Any, ordinal: int) -> None:
        self.name = f"pycuda {importlib.import_module('pycuda').VERSION_TEXT}"
        self._pycuda, self._driver = pycuda, driver
        self._stream: Any = None
        self._call(pycuda.init)
        self._context = self._call(self._call(pycuda.Device, ordinal).retain_primary_context)
        try:
            # Not blocked by, nor blocking, the legacy stream that other libraries in this process may use.
            self.context = int(self._context.handle)
            self._stream = self._on_stack(pycuda.Stream, STREAM_NON_BLOCKING)
            self.stream = int(self._stream.handle)
        except BaseException:
            self.close()
            raise

    def allocate(self, nbytes: int) -> Any:
        return self._on_stack(self._pycuda.mem_alloc, nbytes)

    def free(self, memory: Any) -> None:
        self._on_stack(memory.free)

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        array: NDArray[np.uint8] = self._on_stack(self._pycuda.pagelocked_empty, nbytes, np.uint8)
        return array

    def free_host(self, array: NDArray[np.uint8]) -> None:
        allocation: Any = array.base
        self._on_stack(allocation.free)

    def upload(self, address: int, array: NDArray[np.uint8], nbytes: int) -> None:
        self._call(self._pycuda.memcpy_htod_async, address, array[:nbytes], self._stream)

    def download(self, array: NDArray[np.uint8], address: int, nbytes: int) -> None:
        self._call(self._pycuda.memcpy_dtoh_async, array[:nbytes], address, self._stream)

    def copy(self, to: int, address: int, nbytes: int) -> None:
        self._call(self._pycuda.memcpy_dtod_async, to, address, nbytes, self._stream)

    def load(self, image: bytes) -> Any:
        return self._on_stack(self._pycuda.module_from_buffer, image)

    def function(self, module: Any, name: str) -> Any:
        return self._call(module.get_function, name)

    def unload(self, module: Any) -> None:
        """Goes with its last reference, which the caller drops."""

    def launch(self, function: Any, grid: Grid, block: Grid, arguments: Sequence[Any]) -> None:
        # pycuda tells the sizes of arguments by the types of NumPy's numbers.
        values = [np.dtype(type(argument)).type(argument.value) for argument in arguments]
        self._call(function, *values, grid=grid, block=block, stream=self._stream)

    def synchronize(self) -> None:
        self._call(self._stream.synchronize)

    def memory(self) -> tuple[int, int]:
        free, total = self._call(self._pycuda.mem_get_info)
        return int(free), int(total)

    def event(self) -> Any:
        return self._call(self._on_stack(self._pycuda.Event).record, self._stream)

    def milliseconds(self, begin: Any, end: Any) -> float:
        return float(self._call(end.time_since, begin))

    def release(self, event: Any) -> None:
        """Goes with its last reference, which the caller drops."""

    def close(self) -> None:
        self._stream = None  # its destructor gives it back
        try:
            self._context.detach()  # also from pycuda's stack, if an interrupt came while something was made
        except self._pycuda.Error as error:
            logger.warning("CUDA did not take its context back: %s", error)
        # A primary context that is detached stays pushed: pycuda thinks of contexts that go with their last user.
        self._driver.cuCtxPopCurrent()

    def _on_stack(self, function: Callable[..., T], *arguments: Any) -> T:
        """Make or free something of this context."""
        try:
            self._call(self._context.push)
            return self._call(function, *arguments)
        finally:
            # By identity: who else retained the same primary context has an object of its own, equal to this.
            if self._pycuda.Context.get_current() is self._context:
                self._pycuda.Context.pop()
            # pycuda has made current what was below on its stack: the context of somebody else, if any.
            self._driver.cuCtxSetCurrent(self._driver.CUcontext(self.context))

    def _call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        try:
            return function(*arguments, **options)
        except self._pycuda.MemoryError as error:
            raise OutOfMemory(str(error)) from error
        except self._pycuda.Error as error:
            raise CudaError(str(error)) from error
