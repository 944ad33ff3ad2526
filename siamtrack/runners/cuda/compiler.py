"""CUDA C++ to machine code, by NVRTC: users need no nvcc."""

from __future__ import annotations

from typing import Any

from siamtrack.runners.cuda.device import CudaError

HOW_TO_INSTALL = "pip install 'siamtrack[tensorrt]' or 'siamtrack[tensorrt-rtx]'"


def compile_source(source: str, capability: int) -> bytes:
    """Machine code of CUDA C++, by the run-time compiler.

    Args:
        source: of kernels declared ``extern "C"``.
        capability: compute capability as one number, such as 87. A GPU newer than the compiler gets the newest PTX that
            the compiler knows, which the driver translates.

    Raises:
        CudaError: there is no compiler, or it refuses the source.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CudaError(f"the crop kernel needs cuda-python: {HOW_TO_INSTALL} ({error})") from error

    def call(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if int(status) != 0:
            raise CudaError(f"{function.__name__}: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
        return values[0] if values else None

    try:
        known = [int(value) for value in call(nvrtc.nvrtcGetSupportedArchs)]
        program = call(nvrtc.nvrtcCreateProgram, source.encode(), b"siamtrack.cu", 0, None, None)
    except CudaError:
        raise
    except RuntimeError as error:  # cuda-python raises it itself where there is no libnvrtc
        raise CudaError(
            f"no CUDA run-time compiler: {error}; pip install nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12, "
            "or install the CUDA toolkit"
        ) from error
    exact = capability in known
    chosen = capability if exact else max((value for value in known if value < capability), default=capability)
    option = f"--gpu-architecture={'sm' if exact else 'compute'}_{chosen}".encode()
    try:
        status = nvrtc.nvrtcCompileProgram(program, 1, [option])[0]
        if int(status) != 0:
            log = b" " * call(nvrtc.nvrtcGetProgramLogSize, program)
            call(nvrtc.nvrtcGetProgramLog, program, log)
            text = log.decode(errors="replace").strip("\0 \n")
            raise CudaError(f"the crop kernel does not compile ({option.decode()}): {text}")
        size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if exact else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        image = b" " * call(size, program)
        call(get, program, image)
        return image
    finally:
        nvrtc.nvrtcDestroyProgram(program)
