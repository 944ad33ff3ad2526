"""The benchmarks' own numbers: by hand, and against the got10k toolkit's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from evaluation import official
from evaluation.layouts import find_sequences, read_sequences
from evaluation.official import SCORINGS, Run
from evaluation.onepass import Result, official_run, run_ope
from evaluation.peers import PeerTrack, StaticTracker
from evaluation.records import write_record
from evaluation.sequences import Sequence
from siamtrack.state import State
from tests.sequence_files import SIZE, TRUTH, write_got10k, write_otb

NAN = float("nan")
needs_got10k = pytest.mark.skipif(importlib.util.find_spec("got10k") is None, reason="needs the got10k toolkit")


def run_of(boxes: list[list[float]], truth: list[list[float]], visible: list[bool] | None = None) -> Run:
    shown = np.ones(len(boxes), bool) if visible is None else np.array(visible)
    return Run(np.array(boxes, float), np.array(truth, float), shown, SIZE)


def static_run(truth: np.ndarray, visible: list[bool] | None = None) -> Run:
    return run_of([truth[0].tolist()] * len(truth), truth.tolist(), visible)


# By hand. A box left at the start of TRUTH has IoU 1, .6, 1/3, 1/7, 0 and passes 20, 12, 7, 3, 0 of the 21 thresholds;
# its centre is 0, 5, 10, 15, 20 px away, or 0, .25, .5, .75, 1 widths.


def test_pysot_counts_the_first_frame():
    row = official.score_pysot(static_run(TRUTH))
    assert row["success"] == pytest.approx((20 + 12 + 7 + 3) / 5 / 21)
    assert row["precision"] == 1 and row["norm_precision"] == pytest.approx(1 / 5) and row["frames"] == 5


def test_pysot_takes_frames_without_truth_for_failures_and_for_hits():
    truth = TRUTH.copy()
    truth[3:] = NAN
    row = official.score_pysot(static_run(truth))
    assert row["success"] == pytest.approx((20 + 12 + 7) / 5 / 21)
    assert row["norm_precision"] == pytest.approx(3 / 5)  # the first frame and the two without truth
    assert official.score_pysot(static_run(np.vstack([TRUTH[:1], [[-30, 0, 20, 10]]])))["precision"] == 1


def test_lasot_keeps_hidden_frames_in_the_denominator():
    row = official.score_lasot(static_run(TRUTH, visible=[True, True, False, True, True]))
    assert row["success"] == pytest.approx((20 + 12 + 3) / 5 / 21)
    assert row["precision"] == pytest.approx(4 / 5) and row["norm_precision"] == pytest.approx(1 / 5)


def test_got10k_leaves_out_the_first_frame_and_hidden_ones():
    row = official.score_got10k(static_run(TRUTH, visible=[True, True, False, True, True]))
    assert row["frames"] == 3 and row["ao"] == pytest.approx((0.6 + 1 / 7) / 3)
    assert row["sr50"] == pytest.approx(1 / 3) and row["sr75"] == 0


def test_got10k_moves_boxes_into_the_image_instead_of_cutting_them():
    run = run_of([[0, 0, 20, 10], [-10, 0, 20, 10]], [[0, 0, 20, 10], [0, 0, 20, 10]])
    assert official.score_got10k(run)["ao"] == pytest.approx(1)  # cut, it would be .5
    right = run_of([[0, 0, 20, 10], [86, 0, 20, 10]], [[0, 0, 20, 10], [86, 0, 10, 10]])
    assert official.score_got10k(right)["ao"] == pytest.approx(1)


def test_trackingnet_rounds_and_measures_areas():
    row = official.score_trackingnet(run_of([[0, 0, 20, 10]] * 2, [[0, 0, 20, 10], [0.4, 0.4, 20.3, 9.6]]))
    assert row == {"frames": 2, "success": 1.0, "precision": 1.0, "norm_precision": 1.0}
    # IoU 0 counts at threshold 0, so the first of 20 trapezoids is worth (1 + .5) / 2 and the others 1/2.
    far = official.score_trackingnet(run_of([[0, 0, 20, 10]] * 2, [[0, 0, 20, 10], [70, 0, 20, 10]]))
    assert far["success"] == pytest.approx((0.75 + 19 * 0.5) / 20)
    # 10 px away, half a width: within reach from 10 of 50 px on, and from .5 of .5 on.
    near = official.score_trackingnet(run_of([[0, 0, 20, 10]] * 2, [[0, 0, 20, 10], [10, 0, 20, 10]]))
    assert near["precision"] == pytest.approx((3 * 0.5 + 0.75 + 16) / 20)
    assert near["norm_precision"] == pytest.approx((19 * 0.5 + 0.75) / 20)


def test_a_test_set_has_no_numbers():
    truth = np.vstack([TRUTH[:1], np.full((4, 4), NAN)])
    assert np.isnan(official.score_got10k(static_run(truth))["ao"])
    assert np.isnan(official.score_trackingnet(static_run(truth))["success"])


def test_a_box_of_nan_never_counts():
    run = run_of([[0, 0, 20, 10], [NAN] * 4], [[0, 0, 20, 10], [0, 0, 20, 10]])
    assert official.score_pysot(run)["precision"] == 0.5 and official.score_lasot(run)["norm_precision"] == 0.5


def test_got10k_averages_frames_and_the_others_sequences():
    rows = [{"frames": 1, "ao": 1.0, "sr50": 1.0, "sr75": NAN}, {"frames": 3, "ao": 0.0, "sr50": 1.0, "sr75": 0.5}]
    assert official.overall(SCORINGS["got10k"], rows) == {"frames": 4, "ao": 0.25, "sr50": 1.0, "sr75": 0.5}
    successes = ((1, 1.0), (3, 0.0))
    rows = [{"frames": n, "success": value, "precision": 0.0, "norm_precision": 0.0} for n, value in successes]
    assert official.overall(SCORINGS["lasot"], rows)["success"] == 0.5
    with pytest.raises(ValueError, match="no sequences"):
        official.overall(SCORINGS["lasot"], [])


# Against the toolkit, from the files it would be given


class Drifting:
    """Strays from the truth by a seeded amount, over the image's edge at times: a tracker with every kind of frame."""

    def __init__(self, truth_xywh: np.ndarray, seed: int) -> None:
        noise = np.random.default_rng(seed).normal(0, 1, truth_xywh.shape) * [6, 4, 5, 3]
        self.boxes = np.nan_to_num(truth_xywh) + noise
        self.boxes[:, 2:] = np.maximum(self.boxes[:, 2:], 1)

    def init(self, frame_bgr: np.ndarray, box_xywh: tuple[float, ...]) -> None:
        self.index = 0

    def update(self, frame_bgr: np.ndarray) -> PeerTrack:
        self.index += 1
        x, y, w, h = self.boxes[self.index].tolist()
        return PeerTrack((x, y, w, h), 0.5, State.TRACKING)


def path_of(seed: int, count: int = 30) -> np.ndarray:
    steps = np.random.default_rng(seed).normal(0, 4, (count, 2)).cumsum(axis=0)
    return np.column_stack([np.clip(np.add(steps, [30, 20]), [0, 0], [76, 54]).round(), np.full((count, 2), [20, 10])])


def play(root: Path, out: Path) -> list[tuple[Sequence, Result]]:
    played = []
    for seed, (ref, sequence) in enumerate(zip(find_sequences(root), read_sequences(root), strict=True)):
        result = run_ope(lambda s=sequence, n=seed: Drifting(s.truth_xywh, n), sequence)
        write_record(out, "drifting", "fingerprint", ref, sequence, result)
        played.append((sequence, result))
    return played


@needs_got10k
def test_got10k_numbers_are_the_toolkits(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    from got10k.experiments import ExperimentGOT10k

    names = [f"GOT-10k_Val_{number:06d}" for number in (1, 2, 3)]
    for seed, name in enumerate(names):
        count = 20 + 10 * seed  # of different lengths, so that frames and sequences average differently
        cover = tuple(np.random.default_rng(seed).integers(0, 9, count).tolist())
        write_got10k(tmp_path / "data" / "val" / name, path_of(seed, count), cover)
    (tmp_path / "data" / "val" / "list.txt").write_text("\n".join(names))
    played = play(tmp_path / "data" / "val", tmp_path / "out")
    rows = [official.score_got10k(official_run(result, sequence)) for sequence, result in played]
    experiment = ExperimentGOT10k(str(tmp_path / "data"), "val", str(tmp_path / "results"), str(tmp_path / "reports"))
    experiment.result_dir = str(tmp_path / "out" / "got10k")
    theirs = experiment.report(["drifting"])["drifting"]
    for name, row in zip(names, rows, strict=True):
        assert row["ao"] == pytest.approx(theirs["seq_wise"][name]["ao"], abs=1e-4)
        assert row["sr50"] == pytest.approx(theirs["seq_wise"][name]["sr"])
    ours = official.overall(SCORINGS["got10k"], rows)
    assert ours["ao"] == pytest.approx(theirs["overall"]["ao"], abs=1e-4) and 0.2 < ours["ao"] < 0.8
    assert ours["sr50"] == pytest.approx(theirs["overall"]["sr"])
    assert ours["sr75"] == pytest.approx(theirs["overall"]["succ_curve"][75])
    assert ours["ao"] != pytest.approx(np.mean([row["ao"] for row in rows]), abs=1e-3)


@needs_got10k
def test_otb_numbers_are_the_toolkits(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    from got10k.experiments import ExperimentOTB

    for seed in range(3):
        write_otb(tmp_path / "data" / f"s{seed}", path_of(seed, 20 + 10 * seed))
    played = play(tmp_path / "data", tmp_path / "out")
    rows = [official.score_pysot(official_run(result, sequence)) for sequence, result in played]

    class Data:
        """What the toolkit's reader gives, without the whole benchmark. It leaves boxes 1-based; here both are not."""

        seq_names = tuple(sequence.name for sequence, _ in played)

        def __len__(self) -> int:
            return len(played)

        def __getitem__(self, index: int) -> tuple[list[str], np.ndarray]:
            return [str(path) for path in played[index][0].frames], played[index][0].truth_xywh

    experiment = ExperimentOTB.__new__(ExperimentOTB)  # its constructor would download the benchmark
    experiment.dataset, experiment.nbins_iou, experiment.nbins_ce = Data(), 21, 51
    experiment.result_dir, experiment.report_dir = str(tmp_path / "out" / "pysot"), str(tmp_path / "reports")
    theirs = experiment.report(["drifting"])["drifting"]
    for name, row in zip(Data.seq_names, rows, strict=True):
        assert row["success"] == pytest.approx(theirs["seq_wise"][name]["success_score"], abs=1e-9)
        assert row["precision"] == pytest.approx(theirs["seq_wise"][name]["precision_score"], abs=1e-9)
    ours = official.overall(SCORINGS["pysot"], rows)
    assert ours["success"] == pytest.approx(theirs["overall"]["success_score"], abs=1e-9)
    assert 0.2 < ours["success"] < 0.8


def test_official_numbers_start_where_the_tracker_did(tmp_path):
    truth = np.vstack([np.full((2, 4), NAN), TRUTH])
    sequence = Sequence("late", tuple(Path(f"{index}") for index in range(7)), truth)
    boxes = np.vstack([np.full((2, 4), NAN), np.tile(TRUTH[0], (5, 1))])
    result = Result(boxes, np.full(7, NAN), ("IDLE",) * 7, np.zeros(7), 2, SIZE)
    row = official.score_pysot(official_run(result, sequence))
    assert row == official.score_pysot(static_run(TRUTH))


def test_static_tracker_through_the_files(tmp_path):
    write_otb(tmp_path / "a")
    [sequence] = read_sequences(tmp_path)
    result = run_ope(StaticTracker, sequence)
    assert result.size_px == SIZE
    assert official.score_pysot(official_run(result, sequence)) == official.score_pysot(static_run(TRUTH))
