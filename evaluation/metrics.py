"""Tracking metrics as pure functions of boxes: ours, which score what a user can rely on.

They are given scored frames only (`evaluation.onepass.scored_frames`): the starting frame is left out, because its box
was given away, and so are frames without truth. Benchmarks count these frames in ways of their own; their numbers are
in `evaluation.official`. Where every frame is labelled the two differ by the starting frame alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLDS = np.arange(21) / 20  # 0, .05, .. 1 (OTB); np.arange(0, 1.05, .05) would miss .15 and others by an ulp
PIXELS = np.arange(51)  # 0, 1, .. 50 px (OTB's precision plot)
HIT_IOU = 0.3
STATES = ("TRACKING", "UNCERTAIN", "LOST")


def success_rate(ious: ArrayLike, threshold: float = 0.5) -> float:
    """Share of frames whose IoU is above `threshold`, in ``[0, 1]``; NaN for no frames."""
    values = np.asarray(ious, dtype=np.float64)
    return float(np.mean(values > threshold)) if values.size else float("nan")


def success_auc(ious: ArrayLike) -> float:
    """Area under the success plot (OTB): the mean of `success_rate` over the 21 thresholds 0, .05, .. 1.

    The comparison is strict, so no frame passes the last threshold and a perfect tracker has 20/21 = 0.952.
    """
    return float(np.mean(success_curve(ious)))


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
    pixels, _ = centre_distances(boxes_xywh, truth_xywh)
    return float(np.mean(pixels <= threshold_px)) if pixels.size else float("nan")


def norm_precision(boxes_xywh: ArrayLike, truth_xywh: ArrayLike, threshold: float = 0.2) -> float:
    """Share of frames whose centre offset, divided by the true width and height, is at most `threshold`.

    LaSOT's official value at 0.20. TrackingNet and got10k print an area over 0..0.5 under the same name: a different
    number.

    Raises:
        ValueError: the shapes differ, or a truth row is NaN.
    """
    _, normalised = centre_distances(boxes_xywh, truth_xywh)
    return float(np.mean(normalised <= threshold)) if normalised.size else float("nan")


def success_curve(ious: ArrayLike) -> NDArray[np.float64]:
    """`success_rate` at each of `THRESHOLDS`, ``[21]``; its mean is `success_auc`."""
    return np.array([success_rate(ious, threshold) for threshold in THRESHOLDS])


def precision_curve(boxes_xywh: ArrayLike, truth_xywh: ArrayLike) -> NDArray[np.float64]:
    """`precision` at each of `PIXELS`, ``[51]``; element 20 is the usual single number."""
    return np.array([precision(boxes_xywh, truth_xywh, float(threshold)) for threshold in PIXELS])


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


def centre_distances(boxes_xywh: ArrayLike, truth_xywh: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances of the centres, ``[F]`` in pixels, and ``[F]`` of offsets divided by the true width and height.

    The half pixels of toolkits (x + (w - 1) / 2, or + 1) cancel between two boxes. Raises as `precision`.
    """
    boxes = np.asarray(boxes_xywh, dtype=np.float64)
    truth = np.asarray(truth_xywh, dtype=np.float64)
    if boxes.shape != truth.shape or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes and truth must both have shape [F, 4], got {boxes.shape} and {truth.shape}")
    if np.isnan(truth).any():
        raise ValueError("truth has NaN rows; leave out the frames without truth first (see scored_frames)")
    offset = boxes[:, :2] + boxes[:, 2:] / 2 - truth[:, :2] - truth[:, 2:] / 2
    with np.errstate(divide="ignore", invalid="ignore"):  # a true box that was rounded to nothing
        return np.hypot(*offset.T), np.hypot(*(offset / truth[:, 2:]).T)
