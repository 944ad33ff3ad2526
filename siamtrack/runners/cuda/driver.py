"""`CudaDevice`: a GPU, through pycuda or cuda-python. Nothing of either is imported before one is opened."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siamtrack.runners.cuda.binding import open_binding
from siamtrack.runners.cuda.compiler import compile_source
from siamtrack.runners.cuda.cuda_python_binding import call, import_driver
from siamtrack.runners.cuda.device import CudaError, Graph, Grid, OutOfMemory, Owner
from siamtrack.runners.cuda.graph import CudaGraph, capture

logger = logging.getLogger(__name__)


class Kernel:
    """A compiled kernel; its device forgets what is in it when it is closed."""

    def __init__(self, module: Any, function: Any) -> None:
        self.module, self.function = module, function


class CudaDevice:
    """A GPU in its primary context, for the thread that calls; see `Device` for the methods.

    Args:
        ordinal: CUDA device number.
        binding: one of `siamtrack.runners.cuda.binding.BINDINGS`. Graphs and the current context go through cuda-python
            in any case.

    Raises:
        CudaError: there is no cuda-python, no driver, or no such device. The message says how to mend it.
    """

    def __init__(self, ordinal: int = 0, binding: str = "auto") -> None:
        self._driver = driver = import_driver()
        self._owner = Owner()
        self._closed = False
        self._memory: dict[int, Any] = {}
        self._host: dict[int, NDArray[np.uint8]] = {}
        self._kernels: list[Kernel] = []
        self._graphs: list[CudaGraph] = []
        try:
            call(driver, driver.cuInit, 0)
            count = call(driver, driver.cuDeviceGetCount)
        except RuntimeError as error:  # cuda-python raises it itself where there is no libcuda
            reason = str(error).rstrip(".")
            raise CudaError(
                f"no CUDA driver, or no GPU that it can use: {reason}; does nvidia-smi list one?"
            ) from error
        if not 0 <= ordinal < count:
            raise CudaError(f"no CUDA device {ordinal}: the driver sees {count}; CUDA_VISIBLE_DEVICES may hide others")
        self._device = call(driver, driver.cuDeviceGet, ordinal)
        self._previous = call(driver, driver.cuCtxGetCurrent)
        self._binding = open_binding(binding, driver, ordinal)
        self._context = driver.CUcontext(self._binding.context)
        self._stream = driver.CUstream(self._binding.stream)
        self.stream, self.binding = self._binding.stream, self._binding.name
        logger.info("CUDA device %d is used through %s", ordinal, self.binding)

    def enter(self) -> None:
        self._owner.check()
        if self._closed:
            raise RuntimeError("this CUDA device is closed; open a new runner")
        call(self._driver, self._driver.cuCtxSetCurrent, self._context)

    def allocate(self, nbytes: int) -> int:
        with self._advice(nbytes):
            memory = self._binding.allocate(nbytes)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._binding.free(self._memory.pop(address))

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        with self._advice(nbytes):
            array = self._binding.allocate_host(nbytes)
        self._host[array.ctypes.data] = array
        return array

    def free_host(self, array: NDArray[np.uint8]) -> None:
        self._binding.free_host(self._host.pop(array.ctypes.data))

    def upload(self, address: int, array: NDArray[np.uint8], nbytes: int) -> None:
        self._binding.upload(address, array, nbytes)

    def download(self, array: NDArray[np.uint8], address: int, nbytes: int) -> None:
        self._binding.download(array, address, nbytes)

    def copy(self, to: int, address: int, nbytes: int) -> None:
        self._binding.copy(to, address, nbytes)

    def compile(self, source: str, name: str) -> Any:
        attribute = self._driver.CUdevice_attribute
        major, minor = (
            int(call(self._driver, self._driver.cuDeviceGetAttribute, which, self._device))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        image = compile_source(source, 10 * major + minor)
        with self._advice():
            kernel = Kernel(self._binding.load(image), None)
        self._kernels.append(kernel)
        kernel.function = self._binding.function(kernel.module, name)
        return kernel

    def launch(self, kernel: Any, grid: Grid, block: Grid, arguments: Sequence[Any]) -> None:
        self._binding.launch(kernel.function, grid, block, arguments)

    def capture(self, work: Callable[[], None]) -> Graph:
        with self._advice():
            captured = capture(self._driver, self._stream, self._context, work)
        self._graphs = [graph for graph in self._graphs if not graph.closed]
        self._graphs.append(captured)
        return captured

    def synchronize(self) -> None:
        self._binding.synchronize()

    def memory(self) -> tuple[int, int]:
        return self._binding.memory()

    def event(self) -> Any:
        """A point in the stream; `milliseconds` says how far two of them lie apart. For benchmarks."""
        return self._binding.event()

    def milliseconds(self, begin: Any, end: Any) -> float:
        """GPU time between two events, after `synchronize`."""
        return self._binding.milliseconds(begin, end)

    def release(self, events: list[Any]) -> None:
        """Give events back; empties the list."""
        while events:
            self._binding.release(events.pop())

    def close(self) -> None:
        if self._closed:
            return
        self._owner.check()
        self._closed = True
        binding = self._binding
        # After a fault on the GPU every call fails: what can be given back is, the rest goes with the process.
        self._driver.cuCtxSetCurrent(self._context)
        _try(binding.synchronize)
        for graph in self._graphs:
            graph.close()
        for kernel in self._kernels:
            module, kernel.module, kernel.function = kernel.module, None, None
            _try(binding.unload, module)
            del module
        while self._memory:
            _try(binding.free, self._memory.popitem()[1])
        while self._host:
            _try(binding.free_host, self._host.popitem()[1])
        binding.close()
        self._driver.cuCtxSetCurrent(self._outlived())

    def _outlived(self) -> Any:
        """The context that was current before this device was opened; none if that has gone with this one."""
        if int(self._previous) != self._binding.context:
            return self._previous
        failed, _, active = self._driver.cuDevicePrimaryCtxGetState(self._device)
        return self._previous if int(failed) == 0 and active else self._driver.CUcontext(0)

    @contextlib.contextmanager
    def _advice(self, nbytes: int = 0) -> Iterator[None]:
        """Say in an out-of-memory error how much was asked for, how much there is, and what to do."""
        try:
            yield
        except OutOfMemory as error:
            wanted = f" for {nbytes / 2**20:.1f} MiB" if nbytes else ""
            room = ""
            with contextlib.suppress(CudaError):
                free, total = self._binding.memory()
                room = f"; {free / 2**20:.0f} of {total / 2**20:.0f} MiB are free"
            raise OutOfMemory(
                f"{error}{wanted}{room}; free some, take a smaller model or fewer targets at once"
            ) from error


def _try(give_back: Callable[..., None], *what: Any) -> None:
    with contextlib.suppress(CudaError):
        give_back(*what)
