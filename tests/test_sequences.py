"""The shipped model on real footage: not a benchmark, a check that the whole chain holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.metrics import average_overlap
from evaluation.onepass import run_ope, scored_frames
from evaluation.sequences import Sequence, read_otb
from siamtrack import SiamTracker
from siamtrack.boxes import iou_xywh


@pytest.mark.parametrize("name", ["Crossing", "Coke"])
def test_default_model_stays_on_the_target(tracker: SiamTracker, dev_data: Path, name: str) -> None:
    whole = read_otb(dev_data / name)
    sequence = Sequence(name, whole.frames[:60], whole.truth_xywh[:60])
    result = run_ope(lambda: tracker, sequence)
    scored = scored_frames(result, sequence)
    assert scored.sum() >= 50
    assert average_overlap(iou_xywh(result.boxes_xywh[scored], sequence.truth_xywh[scored])) > 0.4
