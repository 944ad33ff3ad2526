"""`CudaDevice` through the real cuda-python and, where it is installed, the real pycuda.

Both call a libcuda that is made for this test and runs on the host.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from siamtrack.runners.cuda.runner import KERNELS
from tests.host_cuda import needs_nvrtc

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = [needs_nvrtc, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]
needs_pycuda = pytest.mark.skipif(importlib.util.find_spec("pycuda") is None, reason="needs pycuda")
BINDINGS = ("cuda-python", pytest.param("pycuda", marks=needs_pycuda))
NOTHING_HELD = str(dict.fromkeys(("device", "host", "stream", "module", "graph", "executable", "event"), 0))

PRELUDE = """
import atexit, ctypes, dataclasses, gc, math, os, signal, sys, threading
import numpy as np
sys.setdlopenflags(os.RTLD_LAZY)  # for pycuda: the library has only what is called here
library, binding = ctypes.CDLL(sys.argv[1]), sys.argv[2]
library.fake_held.restype = ctypes.c_long
KINDS = ("device", "host", "stream", "module", "graph", "executable", "event")

def held():
    return {kind: library.fake_held(kind.encode()) for kind in KINDS}

atexit.register(lambda: print("at exit", library.fake_retained(), sum(held().values())))  # runs last

from siamtrack import load_bundle
from siamtrack.crop import Window, crop
from siamtrack.runners.cuda.device import CudaError, OutOfMemory
from siamtrack.runners.cuda import driver
from siamtrack.runners.cuda.runner import CudaRunner

def CudaDevice():
    return driver.CudaDevice(binding=binding)

class CopyingEngine:
    # Every output is the start of the image, or of an update's current template: it shows the crop all the way.
    def __init__(self, device, graph):
        self.device, self.inputs, self.outputs = device, graph.inputs, graph.outputs
    def bind(self, batch, tensors):
        def work():
            for spec in self.outputs:
                sides = [batch if isinstance(side, str) else side for side in spec.shape]
                source = tensors["image" if "image" in tensors else "current"]
                self.device.copy(tensors[spec.name], source, 4 * math.prod(sides))
        return work
    def capturable(self, batch):
        return True
    def close(self):
        pass

def runner(**options):
    bundle, device = load_bundle(), options.pop("device", None) or CudaDevice()
    engines = {name: CopyingEngine(device, graph) for name, graph in bundle.manifest.graphs.items()}
    return CudaRunner(bundle, device, engines, **options)

image = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)

def search(runner, features, window):
    result = runner.search(image, [window], [features], np.ones((1, 2), np.float32), (0.0, 0.0, 0.0))
    return result.response.view(np.uint8).ravel()

SIDE = load_bundle().manifest.crop.search_px  # a window of this side is not resized
WINDOWS = [Window(0, 0, SIDE, SIDE), Window(50, 60, 100, 100), Window(-30, 9, 390, 390), Window(0, 0, 600, 400)]
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f'-DKERNELS="{KERNELS}"']
    source = Path(__file__).with_name("fake_libcuda.cpp")
    subprocess.run([compiler, *flags, "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture(params=BINDINGS)
def run(library: Path, request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """Lines that a script prints in a process of its own, where this libcuda is the only one."""
    return lambda script, **options: run_script(library, request.param, script, **options)


def run_script(library: Path, binding: str, script: str, status: int = 0, error: str = "") -> list[str]:
    """What a script prints; `error` is the last line of what it writes to standard error."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", PRELUDE + script, str(library), binding]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.rstrip("\n").rpartition("\n")[2] == error, done.stderr
    return done.stdout.splitlines()


def test_replayed_frames_equal_plain_ones_and_everything_goes_back(run: Callable[..., list[str]]) -> None:
    lines = run(
        """
replayed, plain = runner(), runner(graphs=False)
assert replayed.uses_graphs
a, b = (each.template(image, Window(5, 5, 60, 60), (1, 2, 3), (30, 24)) for each in (replayed, plain))
for window in WINDOWS * 3:
    one, other = search(replayed, a, window), search(plain, b, window)
    np.testing.assert_array_equal(one, other)
    expected = crop(image, window, SIDE, (1, 2, 3)).ravel()[: len(one)]
    assert np.abs(one.astype(int) - expected).max() <= 1
assert held()["executable"] == 1
replayed.close()  # the other goes on: contexts do not depend on the order
np.testing.assert_array_equal(search(plain, b, window), other)
stages = plain.profile(image, [window], [b], np.ones((1, 2), np.float32), (0.0, 0.0, 0.0))
assert stages == dict.fromkeys(("upload", "crop", "engine", "download"), 0.25), stages
plain.close()
print(library.fake_retained(), library.fake_contexts(), held())
""",
    )
    assert lines[0] == f"0 0 {NOTHING_HELD}"


def test_a_runner_left_open_is_closed_at_exit(run: Callable[..., list[str]]) -> None:
    assert run("left = runner(); print(library.fake_retained())") == ["1", "at exit 0 0"]


def test_a_runner_of_another_thread_ends_with_the_process(run: Callable[..., list[str]]) -> None:
    lines = run(
        """
made, done = threading.Event(), threading.Event()
def work():
    left = runner()
    made.set()
    done.wait()
threading.Thread(target=work, daemon=True).start()
made.wait()
""",
    )
    assert lines[-1].startswith("at exit 1 ")  # left alone, and no abort


def test_a_thread_may_end_before_its_runner(run: Callable[..., list[str]]) -> None:
    # pycuda aborts the process if a thread ends with a context on its stack.
    lines = run(
        """
import warnings
warnings.simplefilter("ignore")  # pycuda says of each object that it cannot be freed on another thread
kept = []
thread = threading.Thread(target=lambda: kept.append(runner()))
thread.start()
thread.join()
try:
    kept[0].close()
except RuntimeError as error:
    print(error)
""",
    )
    assert lines[0].startswith("this runner belongs to thread")
    assert lines[1].startswith("at exit 1 ")


def test_a_runner_dropped_by_its_thread_gives_everything_back(run: Callable[..., list[str]]) -> None:
    lines = run(
        """
def work():
    runner()
    gc.collect()
    print(library.fake_contexts(), library.fake_retained(), held())
thread = threading.Thread(target=work)
thread.start()
thread.join()
""",
    )
    assert lines[0] == f"0 0 {NOTHING_HELD}"


def test_ctrl_c_ends_the_process_in_order(run: Callable[..., list[str]]) -> None:
    lines = run(
        """
left = runner()
features = left.template(image, Window(5, 5, 60, 60), (1, 2, 3), (30, 24))
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
print("running", flush=True)
while True:
    search(left, features, WINDOWS[0])
""",
        status=-signal.SIGINT,
        error="KeyboardInterrupt",
    )
    assert lines == ["running", "at exit 0 0"]


def test_an_interrupt_while_something_is_made_loses_nothing(run: Callable[..., list[str]]) -> None:
    lines = run(
        """
used = driver.CudaDevice(binding=binding)
make = used._binding.allocate
def interrupted(nbytes):
    memory = make(nbytes)
    if binding == "pycuda":
        used._binding._context.push()  # as if the interrupt had come before it was taken off the stack
    raise KeyboardInterrupt
used._binding.allocate = interrupted
try:
    runner(device=used)
except KeyboardInterrupt:
    print(library.fake_contexts(), library.fake_retained(), held()["stream"])
del used, make, interrupted
""",
    )
    assert lines[0] == "0 0 0"


def test_out_of_memory_is_told_apart_and_gives_everything_back(run: Callable[..., list[str]]) -> None:
    lines = run(
        """
library.fake_limit(ctypes.c_size_t(3_000_000))
try:
    runner()
except OutOfMemory as error:
    print(error)
print(library.fake_retained(), sum(held().values()))
""",
    )
    assert re.search(r"^cuMemAlloc failed: out of memory.* for [0-9.]+ MiB; \d of 3 MiB are free; free some", lines[0])
    assert lines[1] == "0 0"


def test_work_that_cannot_be_captured_leaves_the_stream_usable(run: Callable[..., list[str]]) -> None:
    lines = run(
        """
device = CudaDevice()
address, array = device.allocate(64), device.allocate_host(64)
for work in (device.synchronize, lambda: None, lambda: device.copy(address, address + 32, 8) or 1 / 0):
    try:
        device.capture(work)
    except (CudaError, ZeroDivisionError) as error:
        print(type(error).__name__, error)
array[:] = 9
device.upload(address, array, 64)
array[:] = 0
device.download(array, address, 64)
device.synchronize()
print(array[63], held()["graph"], held()["executable"])
try:
    device.allocate(-1 + 2**50)
except CudaError as error:
    print(error)
device.close()
""",
    )
    assert re.fullmatch(r"CudaError cuStreamSynchronize failed: an error( \(900\))?", lines[0])
    assert lines[1] == "CudaError the captured frame begins with 0 operations, expected one, the upload"
    assert lines[2] == "ZeroDivisionError division by zero"
    assert lines[3] == "9 0 0"


def test_the_gpu_checks_of_crop_and_memory_run(run: Callable[..., list[str]]) -> None:
    # They are written for a GPU; here at least what they call is there, and their verdict on this one is right.
    lines = run(
        """
from benchmarks import gpu_checks, gpu_memory
from benchmarks.gpu_table import Table
gpu_checks.CROP_WINDOWS = 200
library.fake_limit(ctypes.c_size_t(200 << 20))
table = Table()
gpu_checks.check_crop(table)
gpu_memory.check_out_of_memory(table, "copies", runner)
print([check.result for check in table.checks])
""",
    )
    assert "['pass', 'pass', 'pass']" in lines


@needs_pycuda
def test_pycuda_is_taken_where_it_is_installed_and_said(library: Path) -> None:
    lines = run_script(
        library,
        "auto",
        """
import logging
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
with runner() as opened:
    print(opened.device.binding)
sys.modules["pycuda._driver"] = None  # as if it were built for another Python
del sys.modules["pycuda.driver"]
with runner() as opened:
    print(opened.device.binding)
binding = "pycuda"
try:
    CudaDevice()
except CudaError as error:
    print(error)
""",
    )
    taken, name, warned, alone_taken, alone, refused, _ = lines
    assert re.fullmatch(r"pycuda [\d.]+", name)
    assert taken == f"CUDA device 0 is used through {name}"
    assert re.fullmatch(r"cuda-python [\d.]+", alone)
    assert warned.startswith("using cuda-python alone: pycuda does not import (")
    assert alone_taken == f"CUDA device 0 is used through {alone}"
    assert refused.startswith("pycuda does not import (")
    assert "pip install" in refused


@needs_pycuda
def test_other_users_of_pycuda_on_the_thread_keep_their_context(library: Path) -> None:
    lines = run_script(
        library,
        "pycuda",
        """
import pycuda.driver as pycuda
pycuda.init()
theirs = pycuda.Device(0).make_context()
here = ctypes.c_void_p()
def current():
    library.f_get_current(ctypes.byref(here))
    return here.value
before = current()
with runner() as ours:
    features = ours.template(image, Window(5, 5, 60, 60), (1, 2, 3), (30, 24))
    search(ours, features, WINDOWS[1])
    ours.device.allocate(100)
    search(ours, features, WINDOWS[2])
    print(current() == before, pycuda.Context.get_current() == theirs)
print(current() == before, pycuda.Context.get_current() == theirs, library.fake_contexts())
pycuda.Context.pop()
theirs.detach()
""",
    )
    assert lines[:2] == ["False True", "True True 1"]
    assert lines[2] == "at exit 0 0"


def test_a_process_without_a_driver_is_told_so() -> None:
    script = "from siamtrack.runners.cuda.driver import CudaDevice; CudaDevice()"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "CudaError: no CUDA driver, or no GPU that it can use" in done.stderr
