"""How long a tracker takes for a frame, and where that time goes.

`measure` plays frames to any tracker with `init` and `update` and returns raw milliseconds a stage; `summary` and
`format_table` make them readable. Images are decoded or rendered beforehand, so only the tracker is timed. Behind
``siamtrack bench`` and ``python -m benchmarks.latency``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.cpu import cpu_name

Box = tuple[float, float, float, float]
Image = NDArray[np.uint8]

PERCENTILES = (50, 95, 99)


def measure(
    tracker: Any,
    frames: Sequence[Image],
    init_box: Box,
    warmup: int = 10,
    iterations: int = 100,
    rate_hz: float = 0.0,
) -> dict[str, NDArray[np.float64]]:
    """Time `iterations` updates of a tracker.

    The frames are played forth and back, so that the target never jumps however long the run is.

    Args:
        tracker: has ``init(frame_bgr, box_xywh)`` and ``update(frame_bgr)``. Where it also has a `runner` with
            `last_timing` (seconds of the last search under ``crop`` and ``network``), the stages are split.
        frames: uint8 ``[H, W, 3]`` BGR images, at least one.
        init_box: the target in ``frames[0]``: x, y, w, h in image pixels.
        warmup: updates played first and not timed, at least 0.
        iterations: updates timed, at least 1.
        rate_hz: give frames at a camera's pace, with pauses in which caches cool and threads fall asleep; 0 gives the
            next frame as soon as one is done.

    Returns:
        Milliseconds, one array ``[iterations]`` a stage: ``total`` around `update`; for a tracker that tells its stages
        also ``crop``, ``network`` and ``host``, which is what remains of the total. They add up to it.

    Raises:
        ValueError: no frames, or a count out of range.
    """
    if not frames:
        raise ValueError("no frames to measure on; expected at least one image")
    if warmup < 0 or iterations < 1 or not rate_hz >= 0:
        raise ValueError(
            "expected warmup >= 0, iterations >= 1 and rate_hz >= 0, "
            f"got warmup={warmup}, iterations={iterations}, rate_hz={rate_hz}"
        )
    order = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
    runner = getattr(tracker, "runner", None)
    tracker.init(frames[0], init_box)
    stages: dict[str, list[float]] = {"total": []}
    start = time.perf_counter()
    for turn in range(warmup + iterations):
        if rate_hz > 0:
            time.sleep(max(start + turn / rate_hz - time.perf_counter(), 0))
        frame = frames[order[(turn + 1) % len(order)]]
        began = time.perf_counter()
        tracker.update(frame)
        total = time.perf_counter() - began
        if turn < warmup:
            continue
        stages["total"].append(total)
        timing: Mapping[str, float] | None = getattr(runner, "last_timing", None)
        if timing:
            crop, network = timing["crop"], timing["network"]
            for stage, seconds in (("crop", crop), ("network", network), ("host", total - crop - network)):
                stages.setdefault(stage, []).append(seconds)
    return {stage: 1000 * np.array(seconds) for stage, seconds in stages.items()}


def summary(times_ms: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, float]]:
    """Median, tail and mean of each stage.

    Args:
        times_ms: what `measure` returned.

    Returns:
        For each stage ``p50``, ``p95``, ``p99`` and ``mean``, milliseconds. Percentiles of stages do not add up.
    """
    rows = {}
    for stage, values in times_ms.items():
        row = {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
        rows[stage] = {**row, "mean": float(np.mean(values))}
    return rows


def format_table(times_ms: Mapping[str, NDArray[np.float64]]) -> str:
    """The stages as aligned text, milliseconds, with the frame rate that the median total allows."""
    rows = summary(times_ms)
    columns = ["p50", "p95", "p99", "mean"]
    lines = [f"{'ms':<10}" + "".join(f"{column:>9}" for column in columns)]
    lines += [f"{stage:<10}" + "".join(f"{row[column]:>9.3f}" for column in columns) for stage, row in rows.items()]
    if rows.get("total", {}).get("p50", 0) > 0:
        lines.append(f"{len(times_ms['total'])} frames, {1000 / rows['total']['p50']:.0f} frames/s at the median")
    return "\n".join(lines)


def resident_memory_mib() -> float:
    """Memory this process holds now, MiB; its peak so far where the system has no /proc (macOS); NaN on Windows."""
    try:
        with Path("/proc/self/status").open(encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def environment() -> dict[str, str]:
    """What a measurement depends on beside the code: versions and the processor, as text."""
    try:
        onnxruntime = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        onnxruntime = "absent"
    # The CPUs this process may use, which in a container are often fewer than the machine has.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return {
        "cpu": cpu_name(),
        "cpu_count": str(usable),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cv2": cv2.__version__,
        "onnxruntime": onnxruntime,
    }
