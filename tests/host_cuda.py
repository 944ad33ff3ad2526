"""A GPU that is none: `Device` on host memory, and ONNX Runtime as its engine. What is queued waits for `synchronize`.

Kernels are those of ``kernels.cu``, by the host's compiler. Every address is checked against what was allocated.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnxruntime
import pytest

from siamtrack.bundle import Bundle, TensorSpec
from siamtrack.runners.cuda.device import CudaError, OutOfMemory, Owner
from siamtrack.runners.cuda.runner import KERNELS


def are_installed(*distributions: str) -> bool:
    """Whether all of these are there, whatever state they are in."""
    try:
        return all(importlib.metadata.distribution(name) for name in distributions)
    except importlib.metadata.PackageNotFoundError:
        return False


needs_nvrtc = pytest.mark.skipif(
    not are_installed("cuda-bindings", "nvidia-cuda-nvrtc"), reason="needs cuda-bindings and nvidia-cuda-nvrtc"
)


@cache
def host_kernels() -> ctypes.CDLL:
    """The kernels as a library of the host; skips where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = Path(mkdtemp(prefix="siamtrack-kernels-")) / "kernels.so"
    flags = ["-x", "c++", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(KERNELS)], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(library))


class HostGraph:
    def __init__(self, device: HostDevice, operations: list[tuple[str, Callable[[int | None], None]]]) -> None:
        self.device, self.operations, self.closed = device, operations, False
        assert operations[0][0] == "upload"

    def launch(self, upload_bytes: int) -> None:
        assert not self.closed
        assert upload_bytes >= 1
        self.device.calls.append("launch graph")
        self.device.uploads.append(upload_bytes)
        first, *rest = self.operations
        self.device.queue.append(lambda: first[1](upload_bytes))
        self.device.queue += [lambda operation=operation: operation(None) for _, operation in rest]

    def close(self) -> None:
        if not self.closed:
            self.device.calls.append("close graph")
        self.closed = True


class HostDevice:
    """See `siamtrack.runners.cuda.device.Device`.

    Attributes:
        calls: what was called, in order, without `enter`.
        limit: bytes that may be allocated.
        fails_at: number of the allocation that fails, counted from 0.
        capture_error: raised in the middle of a capture.
    """

    def __init__(self) -> None:
        self.owner = Owner()
        self.stream, self.binding = 7, "host memory"
        self.calls: list[str] = []
        self.uploads: list[int] = []
        self.downloads: list[int] = []
        self.copies: list[int] = []
        self.memory_of: dict[int, np.ndarray] = {}
        self.host_of: dict[int, np.ndarray] = {}
        self.queue: list[Callable[[], None]] = []
        self.recording: list[tuple[str, Callable[[int | None], None]]] | None = None
        self.limit = 1 << 40
        self.allocations = 0
        self.fails_at = -1
        self.capture_error: Exception | None = None
        self.interrupt = False
        self.closed = False

    def enter(self) -> None:
        self.owner.check()
        assert not self.closed

    def allocate(self, nbytes: int) -> int:
        array = self._new(nbytes)
        self.memory_of[array.ctypes.data] = array
        self.calls.append("allocate")
        return array.ctypes.data

    def free(self, address: int) -> None:
        assert not self.queue, "freed while work is queued"
        del self.memory_of[address]
        self.calls.append("free")

    def allocate_host(self, nbytes: int) -> np.ndarray:
        array = self._new(nbytes)
        self.host_of[array.ctypes.data] = array
        self.calls.append("allocate host")
        return array

    def free_host(self, array: np.ndarray) -> None:
        assert not self.queue, "freed while work is queued"
        del self.host_of[array.ctypes.data]
        self.calls.append("free host")

    def upload(self, address: int, array: np.ndarray, nbytes: int) -> None:
        self.inside(self.memory_of, address, nbytes)
        self.inside(self.host_of, array.ctypes.data, nbytes)
        source = array.ctypes.data
        self.uploads.append(nbytes)
        self.add("upload", lambda size: ctypes.memmove(address, source, nbytes if size is None else size))

    def download(self, array: np.ndarray, address: int, nbytes: int) -> None:
        self.inside(self.memory_of, address, nbytes)
        self.inside(self.host_of, array.ctypes.data, nbytes)
        target = array.ctypes.data
        self.downloads.append(nbytes)
        self.add("download", lambda _: ctypes.memmove(target, address, nbytes))

    def copy(self, to: int, address: int, nbytes: int) -> None:
        self.inside(self.memory_of, address, nbytes)
        self.inside(self.memory_of, to, nbytes)
        self.copies.append(nbytes)
        self.add("copy", lambda _: ctypes.memmove(to, address, nbytes))

    def compile(self, source: str, name: str) -> Any:
        assert name in source
        self.calls.append("compile")
        return getattr(host_kernels(), name)

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Sequence[Any]
    ) -> None:
        if kernel is host_kernels().siamtrack_crop:
            size = arguments[2].value
            assert grid[0] * block[0] >= size <= grid[1] * block[1]
            self.inside(self.memory_of, arguments[0].value, 64 * grid[2])
            self.inside(self.memory_of, arguments[1].value, grid[2] * size * size * 3)
            arguments = (*arguments, ctypes.c_int(grid[2]))
        self.add(kernel.__name__, lambda _: kernel(*arguments))

    def capture(self, work: Callable[[], None]) -> HostGraph:
        assert self.recording is None
        self.recording = []
        self.calls.append("capture")
        try:
            work()
            if self.capture_error is not None:
                raise self.capture_error
            return HostGraph(self, self.recording)
        finally:
            self.recording = None

    def synchronize(self) -> None:
        assert self.recording is None, "a capture must not wait"
        if self.interrupt:
            self.interrupt = False
            raise KeyboardInterrupt
        self.calls.append("synchronize")
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def memory(self) -> tuple[int, int]:
        used = sum(len(array) for array in self.memory_of.values())
        return self.limit - used, self.limit

    def close(self) -> None:
        self.owner.check()
        if not self.closed:
            self.calls.append("close device")
        self.closed = True
        self.memory_of.clear()
        self.host_of.clear()

    def add(self, name: str, operation: Callable[[int | None], None]) -> None:
        """Queue an operation, or record it."""
        if self.recording is not None:
            self.recording.append((name, operation))
            return
        self.calls.append(name)
        self.queue.append(lambda: operation(None))

    def take_calls(self) -> list[str]:
        """The calls since this was last asked."""
        calls, self.calls = self.calls, []
        return calls

    @staticmethod
    def inside(memory: Mapping[int, np.ndarray], address: int, nbytes: int) -> None:
        assert any(start <= address and address + nbytes <= start + len(array) for start, array in memory.items())

    def _new(self, nbytes: int) -> np.ndarray:
        assert nbytes > 0
        held = sum(len(a) for a in (*self.memory_of.values(), *self.host_of.values()))
        number, self.allocations = self.allocations, self.allocations + 1
        if number == self.fails_at or held + nbytes > self.limit:
            raise OutOfMemory(f"out of memory for {nbytes} bytes")
        raw = np.full(nbytes + 256, 0xCD, np.uint8)  # as undefined as a GPU's
        start = -raw.ctypes.data % 256
        return raw[start : start + nbytes]


class HostEngine:
    """An engine that is a function of arrays by name, run when the device's queue is."""

    def __init__(
        self,
        device: HostDevice,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    ) -> None:
        self.device, self.inputs, self.outputs, self.function = device, inputs, outputs, function
        self.is_capturable = True
        self.closed = False

    def bind(self, batch: int, tensors: Mapping[str, int]) -> Callable[[], None]:
        assert not self.closed
        assert set(tensors) >= {spec.name for spec in (*self.inputs, *self.outputs)}
        assert all(tensors[spec.name] % 256 == 0 for spec in (*self.inputs, *self.outputs))
        views = {spec.name: self._view(spec, batch, tensors[spec.name]) for spec in (*self.inputs, *self.outputs)}

        def run(_: int | None) -> None:
            for spec in (*self.inputs, *self.outputs):
                self.device.inside(self.device.memory_of, tensors[spec.name], views[spec.name].nbytes)
            results = self.function({spec.name: views[spec.name].copy() for spec in self.inputs})
            for spec in self.outputs:
                views[spec.name][...] = results[spec.name]

        return lambda: self.device.add("engine", run)

    def capturable(self, batch: int) -> bool:
        return self.is_capturable

    def close(self) -> None:
        if not self.closed:
            self.device.calls.append("close engine")
        self.closed = True

    def _view(self, spec: TensorSpec, batch: int, address: int) -> np.ndarray:
        shape = tuple(batch if isinstance(side, str) else side for side in spec.shape)
        dtype = np.dtype(spec.dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        self.device.inside(self.device.memory_of, address, nbytes)
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype).reshape(shape)


def onnx_engines(bundle: Bundle, device: HostDevice) -> dict[str, HostEngine]:
    """A bundle's own graphs as engines."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    engines = {}
    for name, graph in bundle.manifest.graphs.items():
        session = onnxruntime.InferenceSession(str(bundle.graph_path(name)), options)
        names = [spec.name for spec in graph.outputs]
        engines[name] = HostEngine(
            device,
            graph.inputs,
            graph.outputs,
            lambda feeds, session=session, names=names: dict(zip(names, session.run(names, feeds), strict=True)),
        )
    return engines


def failing_engine(engine: HostEngine, error: str) -> None:
    """Let an engine fail when it is captured."""
    bind = engine.bind

    def failing_bind(batch: int, tensors: Mapping[str, int]) -> Callable[[], None]:
        work = bind(batch, tensors)

        def run() -> None:
            if engine.device.recording is not None:
                raise CudaError(error)
            work()

        return run

    engine.bind = failing_bind  # type: ignore[method-assign]
