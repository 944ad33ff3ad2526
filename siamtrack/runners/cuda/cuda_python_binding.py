"""`CudaPythonBinding`: CUDA through cuda-python alone; and what every binding needs of cuda-python."""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siamtrack.runners.cuda.compiler import HOW_TO_INSTALL
from siamtrack.runners.cuda.device import CudaError, Grid, OutOfMemory

logger = logging.getLogger(__name__)


class CudaPythonBinding:
    """See `Binding` for the methods.

    Args:
        driver: module ``cuda.bindings.driver``, after ``cuInit``.
        ordinal: CUDA device number.
    """

    def __init__(self, driver: Any, ordinal: int) -> None:
        self.name = f"cuda-python {version()}"
        self._driver = driver
        self._device = call(driver, driver.cuDeviceGet, ordinal)
        self._context = call(driver, driver.cuDevicePrimaryCtxRetain, self._device)
        try:
            call(driver, driver.cuCtxSetCurrent, self._context)
            # Not blocked by, nor blocking, the legacy stream that other libraries in this process may use.
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
            self._stream = call(driver, driver.cuStreamCreate, flags)
        except BaseException:
            driver.cuDevicePrimaryCtxRelease(self._device)
            raise
        self.context, self.stream = int(self._context), int(self._stream)

    def allocate(self, nbytes: int) -> Any:
        return self._call(self._driver.cuMemAlloc, nbytes)

    def free(self, memory: Any) -> None:
        self._call(self._driver.cuMemFree, memory)

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        pointer = int(self._call(self._driver.cuMemHostAlloc, nbytes, 0))
        array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
        return array

    def free_host(self, array: NDArray[np.uint8]) -> None:
        self._call(self._driver.cuMemFreeHost, array.ctypes.data)

    def upload(self, address: int, array: NDArray[np.uint8], nbytes: int) -> None:
        self._call(self._driver.cuMemcpyHtoDAsync, address, array.ctypes.data, nbytes, self._stream)

    def download(self, array: NDArray[np.uint8], address: int, nbytes: int) -> None:
        self._call(self._driver.cuMemcpyDtoHAsync, array.ctypes.data, address, nbytes, self._stream)

    def copy(self, to: int, address: int, nbytes: int) -> None:
        self._call(self._driver.cuMemcpyDtoDAsync, to, address, nbytes, self._stream)

    def load(self, image: bytes) -> Any:
        return self._call(self._driver.cuModuleLoadData, image)

    def function(self, module: Any, name: str) -> Any:
        return self._call(self._driver.cuModuleGetFunction, module, name.encode())

    def unload(self, module: Any) -> None:
        self._call(self._driver.cuModuleUnload, module)

    def launch(self, function: Any, grid: Grid, block: Grid, arguments: Sequence[Any]) -> None:
        values = tuple(argument.value for argument in arguments)
        kinds = tuple(type(argument) for argument in arguments)
        self._call(self._driver.cuLaunchKernel, function, *grid, *block, 0, self._stream, (values, kinds), 0)

    def synchronize(self) -> None:
        self._call(self._driver.cuStreamSynchronize, self._stream)

    def memory(self) -> tuple[int, int]:
        free, total = self._call(self._driver.cuMemGetInfo)
        return int(free), int(total)

    def event(self) -> Any:
        event = self._call(self._driver.cuEventCreate, 0)
        self._call(self._driver.cuEventRecord, event, self._stream)
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        return float(self._call(self._driver.cuEventElapsedTime, begin, end))

    def release(self, event: Any) -> None:
        self._call(self._driver.cuEventDestroy, event)

    def close(self) -> None:
        self._driver.cuStreamDestroy(self._stream)
        status = self._driver.cuDevicePrimaryCtxRelease(self._device)[0]
        if int(status) != 0:
            logger.warning("CUDA did not take its context back: %s", _describe(self._driver, status))

    def _call(self, function: Any, *arguments: Any) -> Any:
        return call(self._driver, function, *arguments)


def import_driver() -> Any:
    """Module ``cuda.bindings.driver``.

    Raises:
        CudaError: cuda-python is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise CudaError(f"running on the GPU needs cuda-python: {HOW_TO_INSTALL} ({error})") from error


def version() -> str:
    """Of cuda-python."""
    return str(importlib.import_module("cuda.bindings").__version__)


def call(driver: Any, function: Any, *arguments: Any) -> Any:
    """Call a function of cuda-python's driver module; its values: none, one, or a tuple.

    Raises:
        OutOfMemory: there was not enough.
        CudaError: any other failure.
    """
    status, *values = function(*arguments)
    if int(status) != 0:
        kind = OutOfMemory if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else CudaError
        raise kind(f"{function.__name__} failed: {_describe(driver, status)}")
    return values[0] if len(values) == 1 else tuple(values)


def _describe(driver: Any, status: Any) -> str:
    """A status as CUDA's own text."""
    failed, text = driver.cuGetErrorString(status)
    return f"{text.decode() if int(failed) == 0 and text else status} ({int(status)})"
