"""The trial of engines in a child process; what TensorRT and the driver are asked."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import types
from pathlib import Path

import pytest

from siamtrack import Bundle
from siamtrack.engine_files import (
    EngineManifest,
    EngineSet,
)
from siamtrack.engines import open_engines, trial_load
from siamtrack.gpu import EngineError, gpu_info, load_tensorrt, runtime_info
from tests.made_engines import ORIN, RUNTIME, put_engines, writable


@pytest.fixture
def bundle(default_bundle: Bundle, tmp_path: Path) -> Bundle:
    return writable(default_bundle, tmp_path)


FAKE = """
import os
from pathlib import Path
__version__ = "10.3.0"
class Logger:
    WARNING = 1
    def __init__(self, level): ...
class ExecutionContextAllocationStrategy:
    STATIC, USER_MANAGED = 0, 2
class Engine:
    def __init__(self, content): self.content = content
    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        # Engines that insist on memory from outside, as ours for TensorRT-RTX, have no context that brings its own.
        return None if b"no context" in self.content or strategy != 2 else self
class Runtime:
    def __init__(self, logger): ...
    def deserialize_cuda_engine(self, content):
        with open(Path(__file__).with_name("loaded"), "ab") as file: file.write(content[:8] + b";")
        if b"crash" in content: os.abort()
        if b"hang" in content:
            import time; time.sleep(60)
        return None if b"no engine" in content else Engine(content)
"""


@pytest.fixture
def fake_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `tensorrt` for child processes; the folder in which it notes what it was given."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "tensorrt.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder


def opened_with(bundle: Bundle, content: bytes) -> EngineSet:
    """Engines of which the search engine is `content`."""

    def swap(manifest: EngineManifest) -> EngineManifest:
        search = dataclasses.replace(manifest.graphs["search"], sha256=hashlib.sha256(content).hexdigest())
        return dataclasses.replace(manifest, graphs={**manifest.graphs, "search": search})

    folder = put_engines(bundle, change=swap)
    (folder / "search.engine").write_bytes(content)
    return open_engines(bundle, RUNTIME)


def test_trial_loads_every_engine(bundle: Bundle, fake_tensorrt: Path) -> None:
    trial_load(opened_with(bundle, b"a sound engine"))
    assert (fake_tensorrt / "loaded").read_bytes() == b"template;a sound ;update e;"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"crash", "the process that tried was ended by SIGABRT"),
        (b"no engine", r"TensorRT 10\.3\.0 does not deserialise it"),
        (b"no context", "no execution context, perhaps for want of GPU memory"),
    ],
)
def test_trial_survives_what_a_bad_engine_does(bundle: Bundle, fake_tensorrt: Path, content: bytes, said: str) -> None:
    with pytest.raises(EngineError, match=f"the engines do not load here, build them again: .*{said}"):
        trial_load(opened_with(bundle, content))


def test_trial_ends(bundle: Bundle, fake_tensorrt: Path) -> None:
    with pytest.raises(EngineError, match="did not load within 2 s"):
        trial_load(opened_with(bundle, b"hang"), timeout_s=2)


def test_trial_gives_tensorrt_nothing_that_changed(bundle: Bundle, fake_tensorrt: Path) -> None:
    opened = opened_with(bundle, b"a sound engine")
    (opened.folder / "search.engine").write_bytes(b"crash")
    with pytest.raises(EngineError, match="changed since it was checked"):
        trial_load(opened)
    assert (fake_tensorrt / "loaded").read_bytes() == b"template;"


def test_trial_starts_in_this_installation(
    bundle: Bundle, fake_tensorrt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder of the user's that happens to be the current one, with a module of that name.
    (tmp_path / "siamtrack").mkdir()
    (tmp_path / "siamtrack" / "trial.py").write_text("raise SystemExit('hostile')")
    monkeypatch.chdir(tmp_path)
    trial_load(opened_with(bundle, b"a sound engine"))


def test_runtime_info_takes_the_first_flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("tensorrt", "10.3.0"), ("tensorrt_rtx", "1.7.1.116")):
        module = types.ModuleType(name)
        module.__version__ = version  # type: ignore[attr-defined]
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    found = runtime_info()
    assert (found.flavour, found.version) == ("tensorrt", "10.3.0")
    found = runtime_info("tensorrt-rtx")
    assert (found.flavour, found.version) == ("tensorrt-rtx", "1.7.1.116")


def test_missing_tensorrt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"tensorrt nor tensorrt-rtx is not installed.*siamtrack\[tensorrt\]"):
        runtime_info()
    with pytest.raises(EngineError, match="unknown TensorRT flavour 'tensorrt-lite'; known: auto, tensorrt, "):
        runtime_info("tensorrt-lite")


def test_broken_tensorrt_is_said(fake_tensorrt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_tensorrt / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: no such file')")
    monkeypatch.syspath_prepend(str(fake_tensorrt))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=r"tensorrt does not import: libnvinfer\.so\.10: no such file; install"):
        load_tensorrt("tensorrt")


class FakeDriver(types.ModuleType):
    """cuda-python's driver API over one made-up GPU; each call gives a status and a value."""

    class CUdevice_attribute:
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76

    def __init__(self, status: int = 0) -> None:
        super().__init__("cuda.bindings.driver")
        self.status = status

    def cuInit(self, flags: int) -> tuple[int]:
        return (self.status,)

    def cuDeviceGet(self, number: int) -> tuple[int, int]:
        return 0, number

    def cuDeviceGetName(self, length: int, device: int) -> tuple[int, bytes]:
        return 0, b"Orin" + b"\0" * (length - 4)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, {75: 8, 76: 7}[attribute]

    def cuDeviceTotalMem(self, device: int) -> tuple[int, int]:
        return 0, 8 << 30


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: types.ModuleType | None) -> None:
    bindings = types.ModuleType("cuda.bindings")
    if driver is not None:
        bindings.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)


def test_gpu_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, FakeDriver())
    assert gpu_info() == ORIN


def test_no_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, FakeDriver(status=100))  # CUDA_ERROR_NO_DEVICE
    assert gpu_info() is None
    with_driver(monkeypatch, None)
    assert gpu_info() is None
