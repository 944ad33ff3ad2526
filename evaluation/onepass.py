"""One pass over a sequence (OPE): start a tracker on the first labelled frame, never correct it, keep every box."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluation import metrics
from evaluation.official import Run
from evaluation.sequences import Sequence, read_frame
from siamtrack.boxes import iou_xywh


class Tracker(Protocol):
    """What this module needs: `siamtrack.SiamTracker` and `evaluation.peers` both have it.

    `update` returns an object with `box_xywh` (four floats, image pixels), `score` (float) and `state` (a
    `siamtrack.state.State`).
    """

    def init(self, frame_bgr: NDArray[np.uint8], box_xywh: tuple[float, float, float, float]) -> Any: ...

    def update(self, frame_bgr: NDArray[np.uint8]) -> Any: ...


@dataclass(frozen=True, eq=False)
class Result:
    """What one tracker did on one sequence of F frames.

    Attributes:
        boxes_xywh: float64 ``[F, 4]``, image pixels; NaN before `start`, the given box at `start`.
        scores: float64 ``[F]``; NaN up to `start`.
        states: F names of `siamtrack.state.State`; IDLE before `start`, TRACKING at `start`.
        seconds: float64 ``[F]``, time inside the tracker without decoding the image; NaN before `start`, the time of
            `init` at `start`.
        start: index of the frame the tracker was started on.
        size_px: width and height of the frame it was started on.
    """

    boxes_xywh: NDArray[np.float64]
    scores: NDArray[np.float64]
    states: tuple[str, ...]
    seconds: NDArray[np.float64]
    start: int
    size_px: tuple[int, int] = (0, 0)


def run_ope(
    tracker_factory: Callable[[], Tracker], sequence: Sequence, on_frame: Callable[[], Any] | None = None
) -> Result:
    """Run a tracker once over a sequence, from its first labelled frame to its end.

    Args:
        tracker_factory: makes the tracker; may return the same object every time if its `init` forgets everything.
        sequence: what to play.
        on_frame: called after each frame, for a progress bar.
    """
    count, start = len(sequence.frames), sequence.start
    boxes = np.full((count, 4), np.nan)
    scores, seconds = np.full(count, np.nan), np.full(count, np.nan)
    states = ["IDLE"] * count
    size_px = (0, 0)
    tracker = tracker_factory()
    for index, path in enumerate(sequence.frames):
        if index >= start:
            frame = read_frame(path)
            given = sequence.truth_xywh[index].tolist()
            began = time.perf_counter()
            track = tracker.init(frame, tuple(given)) if index == start else tracker.update(frame)
            seconds[index] = time.perf_counter() - began
            if index == start:
                boxes[index], states[index] = given, "TRACKING"
                size_px = (frame.shape[1], frame.shape[0])
            else:
                boxes[index], scores[index], states[index] = track.box_xywh, track.score, track.state.name
        if on_frame is not None:
            on_frame()
    return Result(boxes, scores, tuple(states), seconds, start, size_px)


def scored_frames(result: Result, sequence: Sequence) -> NDArray[np.bool_]:
    """``[F]``: True for labelled frames after the starting one in which the target can be seen."""
    return sequence.scorable & (np.arange(len(sequence.frames)) > result.start)


def summarise(result: Result, sequence: Sequence) -> dict[str, float]:
    """All metrics of one run as one table row.

    Returns:
        ``frames`` (scored ones), ``auc``, ``sr50``, ``sr75``, ``precision20``, ``norm_precision``, ``ao``,
        ``ms_median`` and ``ms_p95`` of the updates, and the columns of `evaluation.metrics.state_statistics`.
    """
    scored = scored_frames(result, sequence)
    boxes, truth = result.boxes_xywh[scored], sequence.truth_xywh[scored]
    ious = iou_xywh(boxes, truth)
    update_ms = 1000 * result.seconds[result.start + 1 :]
    median, p95 = np.percentile(update_ms, [50, 95]) if update_ms.size else (float("nan"), float("nan"))
    return {
        "frames": int(scored.sum()),
        "auc": metrics.success_auc(ious),
        "sr50": metrics.success_rate(ious, 0.5),
        "sr75": metrics.success_rate(ious, 0.75),
        "precision20": metrics.precision(boxes, truth),
        "norm_precision": metrics.norm_precision(boxes, truth),
        "ao": metrics.average_overlap(ious),
        "ms_median": float(median),
        "ms_p95": float(p95),
        **metrics.state_statistics([s for s, use in zip(result.states, scored, strict=True) if use], ious),
    }


def official_run(result: Result, sequence: Sequence) -> Run:
    """What the benchmarks' toolkits are given: the run from its starting frame on."""
    part = slice(result.start, None)
    visible = sequence.has_truth if sequence.visible is None else sequence.visible
    return Run(result.boxes_xywh[part], sequence.truth_xywh[part], visible[part], result.size_px)
