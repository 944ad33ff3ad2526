"""One-pass evaluation (OPE): start a tracker on the first labelled frame, never correct it, compare every later box.

The metrics are pure functions of boxes. They are given scored frames only (`scored_frames`): the starting frame is left
out, because its box was given away, and so are frames without truth. This differs from pysot on frames without truth,
which counts them as failures for success and as hits for precision; where every frame is labelled the numbers agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.sequences import Sequence, read_frame
from siamtrack.boxes import iou_xywh

THRESHOLDS = np.arange(21) / 20  # 0, .05, .. 1 (OTB); np.arange(0, 1.05, .05) would miss .15 and others by an ulp
HIT_IOU = 0.3
STATES = ("TRACKING", "UNCERTAIN", "LOST")


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
    """

    boxes_xywh: NDArray[np.float64]
    scores: NDArray[np.float64]
    states: tuple[str, ...]
    seconds: NDArray[np.float64]
    start: int


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
            else:
                boxes[index], scores[index], states[index] = track.box_xywh, track.score, track.state.name
        if on_frame is not None:
            on_frame()
    return Result(boxes, scores, tuple(states), seconds, start)


def scored_frames(result: Result, sequence: Sequence) -> NDArray[np.bool_]:
    """``[F]``: True for labelled frames after the starting one."""
    return sequence.has_truth & (np.arange(len(sequence.frames)) > result.start)


def success_rate(ious: ArrayLike, threshold: float = 0.5) -> float:
    """Share of frames whose IoU is above `threshold`, in ``[0, 1]``; NaN for no frames."""
    values = np.asarray(ious, dtype=np.float64)
    return float(np.mean(values > threshold)) if values.size else float("nan")


def success_auc(ious: ArrayLike) -> float:
    """Area under the success plot (OTB): the mean of `success_rate` over the 21 thresholds 0, .05, .. 1.

    The comparison is strict, so no frame passes the last threshold and a perfect tracker has 20/21 = 0.952.
    """
    return float(np.mean([success_rate(ious, threshold) for threshold in THRESHOLDS]))


def average_overlap(ious: ArrayLike) -> float:
    """Mean IoU (GOT-10k's AO, without its clipping to the image), in ``[0, 1]``; NaN for no frames."""
    values = np.asarray(ious, dtype=np.float64)
    return float(np.mean(values)) if values.size else float("nan")


def precision(boxes_xywh: ArrayLike, truth_xywh: ArrayLike, threshold_px: float = 20) -> float:
    """Share of frames whose centres are at most `threshold_px` pixels apart (OTB), in ``[0, 1]``.

    OTB puts the centre at x + (w - 1) / 2 of 1-based pixels; between two boxes that half pixel cancels.

    Raises:
        ValueError: the shapes differ, or a truth row is NaN.
    """
    dx, dy, _ = _centre_offsets(boxes_xywh, truth_xywh)
    return float(np.mean(np.hypot(dx, dy) <= threshold_px)) if dx.size else float("nan")


def norm_precision(boxes_xywh: ArrayLike, truth_xywh: ArrayLike, threshold: float = 0.2) -> float:
    """Share of frames whose centre offset, divided by the true width and height, is at most `threshold`.

    LaSOT's official value at 0.20. TrackingNet and got10k print an area over 0..0.5 under the same name: a different
    number.

    Raises:
        ValueError: the shapes differ, or a truth row is NaN.
    """
    dx, dy, size = _centre_offsets(boxes_xywh, truth_xywh)
    return float(np.mean(np.hypot(dx / size[:, 0], dy / size[:, 1]) <= threshold)) if dx.size else float("nan")


def state_statistics(states: Iterable[str], ious: ArrayLike) -> dict[str, float]:
    """How often each state was reported, and how often its box was on the target.

    Args:
        states: a state name a frame.
        ious: ``[F]``, the same frames.

    Returns:
        For each of `STATES`, in lower case: ``share_<state>``, its share of the frames, and ``hit_<state>``, the share
        of its frames with IoU above 0.3 (NaN where the state never came). A state that tells the truth has
        ``hit_tracking`` near 1 and ``hit_lost`` near 0.
    """
    names, values = np.array(list(states)), np.asarray(ious, dtype=np.float64)
    if names.shape != values.shape:
        raise ValueError(f"states and IoUs must pair up, got {names.shape} and {values.shape}")
    statistics = {}
    for state in STATES:
        chosen = names == state
        statistics[f"share_{state.lower()}"] = float(np.mean(chosen)) if chosen.size else float("nan")
        statistics[f"hit_{state.lower()}"] = success_rate(values[chosen], HIT_IOU)
    return statistics


def summarise(result: Result, sequence: Sequence) -> dict[str, float]:
    """All metrics of one run as one table row.

    Returns:
        ``frames`` (scored ones), ``auc``, ``sr50``, ``precision20``, ``norm_precision``, ``ao``, ``ms_median`` and
        ``ms_p95`` of the updates, and the columns of `state_statistics`.
    """
    scored = scored_frames(result, sequence)
    boxes, truth = result.boxes_xywh[scored], sequence.truth_xywh[scored]
    ious = iou_xywh(boxes, truth)
    update_ms = 1000 * result.seconds[result.start + 1 :]
    median, p95 = np.percentile(update_ms, [50, 95]) if update_ms.size else (float("nan"), float("nan"))
    return {
        "frames": int(scored.sum()),
        "auc": success_auc(ious),
        "sr50": success_rate(ious),
        "precision20": precision(boxes, truth),
        "norm_precision": norm_precision(boxes, truth),
        "ao": average_overlap(ious),
        "ms_median": float(median),
        "ms_p95": float(p95),
        **state_statistics([s for s, use in zip(result.states, scored, strict=True) if use], ious),
    }


def mean_row(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The row of a tracker over several sequences: every sequence counts the same, ``frames`` is the sum.

    A value that a sequence lacks (NaN: a state that never came) is left out of its column's mean.
    """
    table = list(rows)
    if not table:
        raise ValueError("no rows to average; expected one a sequence")
    mean: dict[str, float] = {}
    for column in table[0]:
        values = np.array([row[column] for row in table], dtype=np.float64)
        known = values[~np.isnan(values)]
        mean[column] = float(known.mean()) if known.size else float("nan")
    mean["frames"] = sum(int(row["frames"]) for row in table)
    return mean


def _centre_offsets(
    boxes_xywh: ArrayLike, truth_xywh: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    boxes = np.asarray(boxes_xywh, dtype=np.float64)
    truth = np.asarray(truth_xywh, dtype=np.float64)
    if boxes.shape != truth.shape or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes and truth must both have shape [F, 4], got {boxes.shape} and {truth.shape}")
    if np.isnan(truth).any():
        raise ValueError("truth has NaN rows; leave out the frames without truth first (see scored_frames)")
    offset = boxes[:, :2] + boxes[:, 2:] / 2 - truth[:, :2] - truth[:, 2:] / 2
    return offset[:, 0], offset[:, 1], truth[:, 2:]
