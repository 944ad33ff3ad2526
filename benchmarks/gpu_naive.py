"""A TensorRT engine as most examples run it: what the runner is measured against."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siamtrack.bundle import Bundle
from siamtrack.crop import Image, Window, crop
from siamtrack.engines import open_engines
from siamtrack.gpu import load_tensorrt, runtime_info
from siamtrack.runners.cuda.driver import CudaDevice
from siamtrack.runners.tensorrt import load_engines

Fill = tuple[float, float, float]


class NaiveLoop:
    """An engine run as in most examples: the frame copied, crops on the host, copies that wait.

    Args:
        bundle: the model; its engines must have been built.
        precision: of the engines.
        targets: windows a frame.
        flavour: of TensorRT.
    """

    def __init__(self, bundle: Bundle, precision: str, targets: int, flavour: str) -> None:
        runtime = runtime_info(flavour)
        engines = open_engines(bundle, runtime, precision, max_batch=targets)
        self._size = bundle.manifest.crop.search_px
        self._driver = importlib.import_module("cuda.bindings.driver")
        self._device = CudaDevice()
        try:
            self._engines = load_engines(load_tensorrt(runtime.flavour), self._device, engines)
            search = self._engines["search"]
            self._places: dict[str, int] = {}
            self._host: dict[str, NDArray[Any]] = {}
            for spec in (*search.inputs, *search.outputs):
                shape = tuple(targets if isinstance(side, str) else side for side in spec.shape)
                self._host[spec.name] = np.zeros(shape, spec.dtype)
                self._places[spec.name] = self._device.allocate(max(self._host[spec.name].nbytes, 256))
            self._names = [spec.name for spec in search.inputs], [spec.name for spec in search.outputs]
            self._work = search.bind(targets, self._places)
            for name in self._names[0]:
                self._copy_in(name)
            self._settle()
        except BaseException:
            self._device.close()
            raise

    def frame(self, image: Image, windows: Sequence[Window], fill: Fill) -> NDArray[Any]:
        """Boxes of one image."""
        image = image.copy()
        for i, window in enumerate(windows):
            self._host["image"][i] = crop(image, window, self._size, fill)
        for name in ("image", "prev_size", "tuning"):
            if name in self._host:
                self._copy_in(name)
        self._settle()
        self._work()
        self._device.synchronize()
        for name in self._names[1]:
            self._copy_out(name)
        return self._host["box"]

    def __enter__(self) -> NaiveLoop:
        return self

    def __exit__(self, *error: object) -> None:
        del self._work
        for engine in self._engines.values():
            engine.close()
        self._device.close()

    def _copy_in(self, name: str) -> None:
        array = self._host[name]
        _check(self._driver.cuMemcpyHtoD(self._places[name], array.ctypes.data, array.nbytes))

    def _settle(self) -> None:
        """A copy from pageable memory may return before its end, and the engine's stream does not wait for it."""
        _check(self._driver.cuCtxSynchronize())

    def _copy_out(self, name: str) -> None:
        array = self._host[name]
        _check(self._driver.cuMemcpyDtoH(array.ctypes.data, self._places[name], array.nbytes))


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]) != 0:
        raise RuntimeError(f"a synchronous copy failed: CUDA error {int(result[0])}")
