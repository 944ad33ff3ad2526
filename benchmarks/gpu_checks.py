"""The checks of `benchmarks.gpu_check`, one function each. A runner is opened by its `Opener`, as often as needed."""

from __future__ import annotations

import argparse
import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_frames import Opener, play_frames, same_results
from benchmarks.gpu_memory import check_memory, check_out_of_memory
from benchmarks.gpu_table import Table
from evaluation.onepass import run_ope, summarise
from evaluation.sequences import read_otb
from model_export.compare import TOLERANCES, compare, folder_clip, scene_clip
from model_export.crops import random_pairs
from siamtrack import SiamTracker
from siamtrack.bundle import Bundle
from siamtrack.crop import Window, crop
from siamtrack.runners.cuda.driver import CudaDevice
from siamtrack.runners.cuda.runner import KERNELS, THREADS
from siamtrack.runners.cuda.staging import Staging
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner

CROP_WINDOWS = 3000
PARITY_CROPS = 40


def check_runner(
    table: Table,
    subject: str,
    precision: str,
    bundle: Bundle,
    opener: Opener,
    options: argparse.Namespace,
    random_weights: bool = False,
) -> None:
    """All checks of one runner, each opened anew."""
    with table.attempt("parity", subject):
        check_parity(table, subject, precision, bundle, opener, options, random_weights)
    with table.attempt("graph replay", subject):
        check_replay(table, subject, opener)
    with table.attempt("memory", subject):
        check_memory(table, subject, opener, options.frames)
    with table.attempt("threads", subject):
        check_threads(table, subject, opener)
    with table.attempt("contexts", subject):
        check_contexts(table, subject, opener)
    with table.attempt("out of memory", subject):
        check_out_of_memory(table, subject, opener)


def check_crop(table: Table) -> None:
    """The kernel on the GPU against the CPU crop: windows of every kind, images up to 4K."""
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in ((80, 60), (641, 481), (1280, 720), (3840, 2160))
    ]
    device = CudaDevice()
    try:
        kernel = device.compile(KERNELS.read_text(encoding="utf-8"), "siamtrack_crop")
        staging = Staging(device, [], 4, 1 << 20, lambda: None)
        place, result = device.allocate(4 * 255 * 255 * 3), device.allocate_host(4 * 255 * 255 * 3)
        worst = differing = total = 0
        for turn in range(CROP_WINDOWS // 4):
            image = images[turn % len(images)]
            size_px = int(rng.choice([31, 127, 223, 255]))
            windows, fills = [], []
            for _ in range(4):
                side = int(np.exp(rng.uniform(0, np.log(4 * image.shape[1]))))
                corner = [int(rng.integers(-side - 2, limit + 2)) for limit in (image.shape[1], image.shape[0])]
                windows.append(Window(corner[0], corner[1], side, side))
                fills.append(tuple(rng.uniform(0, 255, 3)))
            upload = staging.write(image, windows, fills, size_px)
            device.upload(staging.address, staging.host, upload)
            grid = (-(-size_px // THREADS[0]), -(-size_px // THREADS[1]), 4)
            arguments = (ctypes.c_void_p(staging.address), ctypes.c_void_p(place), ctypes.c_int(size_px))
            device.launch(kernel, grid, (*THREADS, 1), arguments)
            nbytes = 4 * size_px * size_px * 3
            device.download(result, place, nbytes)
            device.synchronize()
            crops = result[:nbytes].reshape(4, size_px, size_px, 3)
            for ours, window, fill in zip(crops, windows, fills, strict=True):
                difference = np.abs(ours.astype(int) - crop(image, window, size_px, fill))
                worst = max(worst, int(difference.max()))
                differing += int((difference > 0).sum())
                total += difference.size
    finally:
        device.close()
    measured = f"{CROP_WINDOWS} windows, at most {worst}, {differing / total:.2%} of values differ"
    table.add("crop", "kernel against CPU", measured, "at most 1 grey level", worst <= 1)


def check_parity(
    table: Table,
    subject: str,
    precision: str,
    bundle: Bundle,
    opener: Opener,
    options: argparse.Namespace,
    random_weights: bool = False,
) -> None:
    """Tensors, boxes and the closed loop against ONNX Runtime in FP32.

    A network of random weights has no peak: the least difference moves its box elsewhere, so its loop is not judged.
    """
    clips = {"scene": scene_clip(options.clip_frames)}
    for folder in options.sequence:
        clips[folder.name] = folder_clip(folder, options.clip_frames)
    pairs = list(random_pairs(bundle, PARITY_CROPS))
    tolerance = TOLERANCES[precision]
    with OnnxRuntimeRunner(bundle) as reference, opener() as runner:
        for name, clip in clips.items():
            (found,) = compare(reference, [(subject, precision, runner)], pairs, clip)
            median, p95, largest = found.loop_px
            measured = (
                f"response {found.response:.1e}, box p95 {found.box_px:.3f} px, other cell {found.other_cell:.1%}; "
                f"loop median {median:.3f}, p95 {p95:.3f}, max {largest:.3f} px; overlap {found.overlap:.3f} "
                f"({found.overlap - found.reference_overlap:+.3f})"
            )
            wanted = (
                f"response {tolerance.response:g}, box {tolerance.box_px:g} px, loop median {tolerance.loop_px:g} px, "
                f"overlap -{tolerance.overlap:g}"
            )
            single = found.response <= tolerance.response and found.box_px <= tolerance.box_px
            table.add(f"parity, {name}", subject, measured, wanted, single if random_weights else found.ok)
    for folder in options.sequence if precision != "fp32" and not random_weights else []:
        _check_success(table, subject, bundle, opener, folder)


def _check_success(table: Table, subject: str, bundle: Bundle, opener: Opener, folder: Path) -> None:
    """Success AUC of a labelled sequence, as far as it goes, beside ONNX Runtime's."""
    sequence = read_otb(folder, allow_prefix=True)
    auc = []
    for open_one in (lambda: OnnxRuntimeRunner(bundle), opener):
        with open_one() as runner:
            result = run_ope(partial(_itself, SiamTracker(runner)), sequence)
            auc.append(summarise(result, sequence)["auc"])
    measured = f"{auc[1]:.4f}, FP32 {auc[0]:.4f}"
    table.add(f"success AUC, {folder.name}", subject, measured, "within 0.005", abs(auc[1] - auc[0]) <= 0.005)


def check_replay(table: Table, subject: str, opener: Opener) -> None:
    """The same frames replayed as CUDA graphs and queued call by call; bit for bit."""
    worst = 0.0
    with opener(max_batch=4) as replayed, opener(max_batch=4, graphs=False) as queued:
        if replayed.capture_error:
            table.add("graph replay", subject, f"capture failed: {replayed.capture_error}", "captured", False)
            return
        if not replayed.uses_graphs:
            table.skip("graph replay", subject, "the engine replays graphs of its own")
            return
        for targets in (1, 2, 4):
            frames = [play_frames(runner, targets) for runner in (replayed, queued)]
            for ours, theirs in zip(*frames, strict=True):
                for name in ("box_cxcywh", "score", "penalty", "response"):
                    worst = max(worst, float(np.abs(getattr(ours, name) - getattr(theirs, name)).max()))
    table.add("graph replay", subject, f"largest difference {worst:g}", "0", worst == 0)


def check_threads(table: Table, subject: str, opener: Opener) -> None:
    """Another thread is refused and harms nothing; a runner opened on another thread works there."""
    with opener() as runner:
        before = play_frames(runner, 1, 4)
        refused = [_on_a_thread(work) for work in (lambda: play_frames(runner, 1, 1), runner.close)]
        same = same_results(before, play_frames(runner, 1, 4))
    there = _on_a_thread(lambda: _open_and_close(opener))
    ok = all(isinstance(error, RuntimeError) and "belongs to thread" in str(error) for error in refused)
    measured = f"search and close refused: {ok}, unharmed: {same}, on a thread of its own: {there or 'works'}"
    table.add("threads", subject, measured, "refused, unharmed, works", ok and same and there is None)


def _open_and_close(opener: Opener) -> None:
    with opener() as runner:
        play_frames(runner, 1, 4)


def check_contexts(table: Table, subject: str, opener: Opener) -> None:
    """Another context that someone made current in between; two runners closed out of order; PyTorch afterwards."""
    import torch
    from cuda.bindings import driver

    first, second = opener(), opener()
    before = play_frames(first, 1, 4)
    status, previous = driver.cuCtxGetCurrent()
    driver.cuCtxSetCurrent(0)  # whoever was here left no context at all
    same = same_results(before, play_frames(first, 1, 4))
    first.close()
    after_first = same_results(before, play_frames(second, 1, 4))
    second.close()
    driver.cuCtxSetCurrent(previous)
    product = float(torch.ones(64, 64, device="cuda").sum())
    measured = (
        f"without a context {same}, second after first closed {after_first}, PyTorch afterwards {product == 4096}"
    )
    ok = same and after_first and product == 4096 and int(status) == 0
    table.add("contexts", subject, measured, "all the same as before", ok)


def check_interrupt(table: Table, scratch: Path) -> None:
    """SIGINT in the middle of frames: the process ends as Python does, and does not abort."""
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(scratch)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.readline()  # it runs
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    interrupted = "KeyboardInterrupt" in errors and child.returncode in (1, 130, -signal.SIGINT)
    measured = f"exit status {child.returncode}, last words {errors.strip().splitlines()[-1:]}"
    table.add("Ctrl-C", "runner left open", measured, "KeyboardInterrupt, no abort", interrupted)


INTERRUPTED = """
import sys
from pathlib import Path
from benchmarks.gpu_frames import play_frames
from benchmarks.gpu_latency import export_random, network
from benchmarks.gpu_torch import torch_engines
from siamtrack.runners.cuda.driver import CudaDevice
from siamtrack.runners.cuda.runner import CudaRunner

bundle, device = export_random("siamcan-mobilenetv2", Path(sys.argv[1])), CudaDevice()
runner = CudaRunner(bundle, device, torch_engines(bundle, network(bundle), device, half=True))
print("running", flush=True)
while True:
    play_frames(runner, 1)
"""


def _on_a_thread(work: Callable[[], Any]) -> Exception | None:
    """What a piece of work raises on another thread."""
    raised: list[Exception | None] = [None]

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised[0] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0]


def _itself(value: Any) -> Any:
    return value
