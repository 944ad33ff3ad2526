"""The checks of memory of `benchmarks.gpu_check`: that it does not grow, and that a full GPU is survived."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.gpu_frames import Opener, play_frames, renew, same_results
from benchmarks.gpu_latency import FILL, TUNING, camera, moving_windows
from benchmarks.gpu_table import Table
from siamtrack.benchmark import resident_memory_mib
from siamtrack.bundle import BundleError
from siamtrack.crop import Window
from siamtrack.runners import Features
from siamtrack.runners.cuda.device import OutOfMemory
from siamtrack.runners.cuda.driver import CudaDevice

DEVICE_GROWTH_MIB = 1.0
HOST_GROWTH_MIB = 16.0


def check_memory(table: Table, subject: str, opener: Opener, frames: int) -> None:
    """Device and host memory over many frames, with targets coming and going and templates renewed."""
    with opener(max_batch=4) as runner:
        images = camera((1280, 720), 4)
        windows = moving_windows((1280, 720), 4, 300, 500)
        prev_size = np.full((4, 2), 60, np.float32)
        features: list[Features] = []

        def play(count: int) -> None:
            for turn in range(count):
                if turn % 100 == 0:
                    features[:] = [
                        runner.template(images[0], Window(50 * i, 30 * i, 90, 90), FILL, (45, 40)) for i in range(4)
                    ]
                if turn % 4 == 3:
                    renew(runner, images[turn % 4], features, turn)
                n = (1, 2, 4)[turn % 3]
                these = windows[turn % len(windows)][:n]
                runner.search(images[turn % 4], these, features[:n], prev_size[:n], TUNING)

        play(min(frames, 1000))
        gc.collect()
        free, host = runner.device.memory()[0], resident_memory_mib()
        play(frames)
        gc.collect()
        device_mib = (free - runner.device.memory()[0]) / 2**20
        host_mib = resident_memory_mib() - host
    measured = f"{frames} frames: device {device_mib:+.2f} MiB, host {host_mib:+.2f} MiB"
    wanted = f"at most {DEVICE_GROWTH_MIB:g} and {HOST_GROWTH_MIB:g} MiB more"
    table.add("memory", subject, measured, wanted, device_mib <= DEVICE_GROWTH_MIB and host_mib <= HOST_GROWTH_MIB)


def check_out_of_memory(table: Table, subject: str, opener: Opener) -> None:
    """A full GPU when a runner is opened, and when one that runs needs more: an error that says so, all given back."""
    opener().close()  # what libraries take once, they have taken
    if _shares_memory():
        table.skip("out of memory", subject, "this GPU shares its memory with the system, which would suffer")
        return
    filler = CudaDevice()
    try:
        _drop_caches()
        with _filled(filler, spare=2 << 20):
            free = filler.memory()[0]
            error = "no error"
            try:
                opener().close()
            except (RuntimeError, BundleError) as caught:  # TensorRT and PyTorch have words of their own
                error = type(caught).__name__  # not itself: it would keep what was half made
            _drop_caches()
            filler.enter()
            lost = (free - filler.memory()[0]) / 2**20
        measured = f"{error}, {lost:+.1f} MiB not given back"
        table.add("out of memory, opening", subject, measured, "an error, 1 MiB", error != "no error" and lost <= 1)
        with opener(max_batch=4) as runner:
            before = play_frames(runner, 1, 4)
            image = np.zeros((2160, 3840, 3), np.uint8)
            features = [runner.template(image, Window(0, 0, 90, 90), FILL, (45, 40))] * 4
            wide, prev_size = [Window(0, -800, 3840, 3840)] * 4, np.full((4, 2), 60, np.float32)
            told = False
            with _filled(filler, spare=0):
                try:
                    runner.search(image, wide, features, prev_size, TUNING)
                except OutOfMemory:
                    told = True
            same = same_results(before, play_frames(runner, 1, 4))
            grown = runner.search(image, wide, features, prev_size, TUNING).score.shape == (4,)
        measured = f"told {told}, same results afterwards {same}, works again with room {grown}"
        table.add("out of memory, in flight", subject, measured, "all true", told and same and grown)
    finally:
        filler.close()


def _shares_memory() -> bool:
    """Is it a GPU without memory of its own, as in a Jetson?"""
    from cuda.bindings import driver

    _, device = driver.cuDeviceGet(0)
    status, shared = driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED, device)
    return int(status) == 0 and bool(shared)


def _drop_caches() -> None:
    """PyTorch keeps the memory it has freed."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()


@contextlib.contextmanager
def _filled(device: Any, spare: int) -> Iterator[None]:
    """All device memory taken but some bytes."""
    device.enter()
    taken = []
    piece = 1 << 36
    while piece >= 1 << 12:
        try:
            if spare and device.memory()[0] - piece < spare:
                raise OutOfMemory
            taken.append(device.allocate(piece))
        except OutOfMemory:
            piece //= 2
    try:
        yield
    finally:
        device.enter()
        for address in taken:
            device.free(address)
