"""The GPU and the TensorRT that are here. Nothing of either is imported until it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from siamtrack.bundle import BundleError

FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module of each TensorRT flavour, in the order in which "auto" looks for them."""


class EngineError(BundleError):
    """No usable engine: missing, foreign, stale, damaged, unsigned, or not built. The message says how to mend it."""


@dataclass(frozen=True)
class GpuInfo:
    """A GPU as the CUDA driver names it; compute capability as "8.7"."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class RuntimeInfo:
    """The TensorRT that would load an engine, and the GPU it would run on.

    Attributes:
        flavour: key of `FLAVOURS`.
        version: of TensorRT, as its module says.
        gpu: None where there is no GPU, or no driver or cuda-python to ask for it.
    """

    flavour: str
    version: str
    gpu: GpuInfo | None = None


def runtime_info(flavour: str = "auto", device: int = 0) -> RuntimeInfo:
    """The TensorRT and the GPU that are here.

    Args:
        flavour: key of `FLAVOURS`, or "auto" for the first that is installed.
        device: CUDA device number.

    Raises:
        EngineError: it is not installed, or does not import.
    """
    if flavour != "auto" and flavour not in FLAVOURS:
        raise EngineError(f"unknown TensorRT flavour {flavour!r}; known: auto, {', '.join(FLAVOURS)}")
    wanted = list(FLAVOURS) if flavour == "auto" else [flavour]
    installed = [name for name in wanted if importlib.util.find_spec(FLAVOURS[name]) is not None]
    if not installed:
        raise EngineError(
            f"{' nor '.join(wanted)} is not installed; install one: pip install 'siamtrack[tensorrt]' (data-centre "
            "GPUs) or 'siamtrack[tensorrt-rtx]' (RTX cards); on a Jetson it comes with JetPack"
        )
    return RuntimeInfo(installed[0], str(load_tensorrt(installed[0]).__version__), gpu_info(device))


def load_tensorrt(flavour: str) -> Any:
    """The Python module of a TensorRT flavour; both have the same API.

    Raises:
        EngineError: it does not import.
    """
    try:
        return importlib.import_module(FLAVOURS[flavour])
    except Exception as error:  # a broken installation fails in its own ways: ImportError, OSError, RuntimeError
        raise EngineError(
            f"{FLAVOURS[flavour]} does not import: {error}; install it again: pip install --force-reinstall "
            f"'siamtrack[{flavour}]'"
        ) from error


def gpu_info(device: int = 0) -> GpuInfo | None:
    """The GPU as the CUDA driver names it; None without a GPU, a driver, or cuda-python."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None

    def call(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if int(status) != 0:
            raise RuntimeError(f"{function.__name__}: CUDA error {int(status)}")
        return values[0] if values else None

    attribute = driver.CUdevice_attribute
    try:
        call(driver.cuInit, 0)
        handle = call(driver.cuDeviceGet, device)
        name = call(driver.cuDeviceGetName, 256, handle).split(b"\0")[0].decode(errors="replace")
        major, minor = (
            int(call(driver.cuDeviceGetAttribute, which, handle))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return GpuInfo(name, f"{major}.{minor}", int(call(driver.cuDeviceTotalMem, handle)))
    except RuntimeError:  # what cuda-python raises without libcuda.so, and `call` above
        return None
