"""Numbers as the benchmarks' own toolkits compute them, traps included, for comparison with published tables.

Each function scores one sequence; `overall` makes the data set's number of them. They differ from `evaluation.metrics`
in which frames count and how:

============ ============ ============================ ====================================================
scoring      first frame  frames without truth         overlap, precision
============ ============ ============================ ====================================================
pysot        counts       miss success, hit precision  mean of 21 thresholds, IoU > t; 20 px; .20 of the size
lasot        counts       in the denominator alone     as pysot
trackingnet  counts       have none                    boxes rounded, IoU >= t; all three are trapezoid areas
got10k       left out     left out, hidden ones too    boxes moved into the image; mean IoU; IoU > .5, > .75
============ ============ ============================ ====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import THRESHOLDS, centre_distances, success_auc
from evaluation.sequences import is_box
from siamtrack.boxes import iou_xywh

Floats = NDArray[np.float64]

PRECISION_PX = 20.0
NORM_PRECISION = 0.2


@dataclass(frozen=True, eq=False)
class Run:
    """A finished sequence of F frames, as the toolkits see it.

    Attributes:
        boxes_xywh: ``[F, 4]``, the first being the box that was given.
        truth_xywh: ``[F, 4]``, NaN where there is none.
        visible: ``[F]``, False where the data set says that the target is hidden.
        size_px: width and height of the images.
    """

    boxes_xywh: Floats
    truth_xywh: Floats
    visible: NDArray[np.bool_]
    size_px: tuple[int, int]

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """``[F]``: True where there is a true box of some area."""
        return is_box(self.truth_xywh)


@dataclass(frozen=True)
class Scoring:
    """A benchmark's way to score.

    Attributes:
        score: numbers of one sequence, by column; ``frames`` is how many were scored.
        columns: the columns besides ``frames``.
        by_frame: in the data set's number every frame counts the same; else every sequence does.
    """

    score: Callable[[Run], dict[str, float]]
    columns: tuple[str, ...]
    by_frame: bool = False


def score_pysot(run: Run) -> dict[str, float]:
    """OTB and UAV123 as pysot prints them.

    A frame without truth has overlap and distance -1 there: never a success, always within 20 px. So does, for the
    distance, a frame whose true centre is not inside the positive quadrant.
    """
    count = len(run.boxes_xywh)
    known = run.labelled
    boxes, truth = run.boxes_xywh[known], run.truth_xywh[known]
    centre = truth[:, :2] + (truth[:, 2:] - 1) / 2
    placed = (centre > 0).all(axis=1)
    pixels, normalised = centre_distances(boxes, truth)
    far = placed & ~(pixels <= PRECISION_PX)
    far_norm = placed & ~(normalised <= NORM_PRECISION)
    return {
        "frames": count,
        "success": success_auc(iou_xywh(boxes, truth)) * known.sum() / count if known.any() else 0.0,
        "precision": 1 - float(far.sum()) / count,
        "norm_precision": 1 - float(far_norm.sum()) / count,
    }


def score_lasot(run: Run) -> dict[str, float]:
    """LaSOT as its Matlab toolkit and pysot count: a frame without the target can win nothing, and counts."""
    count = len(run.boxes_xywh)
    known = run.labelled & run.visible
    boxes, truth = run.boxes_xywh[known], run.truth_xywh[known]
    pixels, normalised = centre_distances(boxes, truth)
    return {
        "frames": count,
        "success": success_auc(iou_xywh(boxes, truth)) * known.sum() / count if known.any() else 0.0,
        "precision": float((pixels <= PRECISION_PX).sum()) / count,
        "norm_precision": float((normalised <= NORM_PRECISION).sum()) / count,
    }


def score_trackingnet(run: Run) -> dict[str, float]:
    """TrackingNet as its development kit counts: rounded boxes, and areas under all three curves.

    NaN where only the first frame has a box (the test set): its server alone can score that.
    """
    known = run.labelled
    boxes, truth = np.round(run.boxes_xywh[known]), np.round(run.truth_xywh[known])
    if known.sum() < 2:
        return {"frames": 0, "success": float("nan"), "precision": float("nan"), "norm_precision": float("nan")}
    boxes[0] = truth[0]
    ious = iou_xywh(boxes, truth)
    pixels, normalised = centre_distances(boxes, truth)

    def area(hits: Floats) -> float:
        return float((hits[1:] + hits[:-1]).mean() / 2)  # trapezoids over an axis stretched to 0..1

    return {
        "frames": int(known.sum()),
        "success": area(np.array([np.mean(ious >= threshold) for threshold in THRESHOLDS])),
        "precision": area(np.array([np.mean(pixels <= 50 * share) for share in THRESHOLDS])),
        "norm_precision": area(np.array([np.mean(normalised <= 0.5 * share) for share in THRESHOLDS])),
    }


def score_got10k(run: Run) -> dict[str, float]:
    """GOT-10k as its toolkit counts; NaN where only the first frame has a box (the test set)."""
    known = run.labelled & run.visible
    known[0] = False
    if not known.any():
        return {"frames": 0, "ao": float("nan"), "sr50": float("nan"), "sr75": float("nan")}
    boxes, truth = (_into_image(b[known], run.size_px) for b in (run.boxes_xywh, run.truth_xywh))
    ious = iou_xywh(boxes, truth)
    return {
        "frames": int(known.sum()),
        "ao": float(ious.mean()),
        "sr50": float((ious > 0.5).mean()),
        "sr75": float((ious > 0.75).mean()),
    }


SCORINGS = {
    "pysot": Scoring(score_pysot, ("success", "precision", "norm_precision")),
    "lasot": Scoring(score_lasot, ("success", "precision", "norm_precision")),
    "trackingnet": Scoring(score_trackingnet, ("success", "precision", "norm_precision")),
    "got10k": Scoring(score_got10k, ("ao", "sr50", "sr75"), by_frame=True),
}


def overall(scoring: Scoring, rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """A data set's numbers from its sequences' rows; sequences without a number (NaN) are left out.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no sequences to average; expected a row for each")
    frames = np.array([row["frames"] for row in rows], dtype=np.float64)
    weights = frames if scoring.by_frame else np.ones(len(rows))
    result: dict[str, float] = {"frames": int(frames.sum())}
    for column in scoring.columns:
        values = np.array([row[column] for row in rows])
        known = np.isfinite(values)
        result[column] = float(np.average(values[known], weights=weights[known])) if known.any() else float("nan")
    return result


def _into_image(boxes_xywh: Floats, size_px: tuple[int, int]) -> Floats:
    """GOT-10k's clipping. A box over the left or upper edge is moved inside and keeps its size; it is not cut."""
    limit = np.array(size_px, dtype=np.float64)
    corner = np.clip(boxes_xywh[:, :2], 0, limit)
    return np.concatenate([corner, np.clip(boxes_xywh[:, 2:], 0, limit - corner)], axis=1)
