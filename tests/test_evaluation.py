from __future__ import annotations

import csv
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from benchmarks import accuracy, evaluation_speed, latency
from evaluation import metrics, onepass, peers
from evaluation.layouts import read_sequences
from evaluation.sequences import Sequence, read_frame, read_otb, read_video_folder
from siamtrack.benchmark import format_table, measure, resident_memory_mib, summary
from siamtrack.boxes import iou_xywh
from siamtrack.bundle import DEFAULT_MODEL
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.state import State
from tests.sequence_files import TRUTH, write_images, write_otb, write_video

NAN = float("nan")


def moving_square(count: int) -> tuple[list[np.ndarray], tuple[float, float, float, float]]:
    """Frames of 320 x 240 with a blotchy square of 60 px that steps 6 px to the right, and its first box."""
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for size in (20, 8)]
    background, target = cv2.resize(coarse[0], (320, 240)), cv2.resize(coarse[1], (60, 60))
    frames = [background.copy() for _ in range(count)]
    for index, frame in enumerate(frames):
        frame[90:150, 100 + 6 * index : 160 + 6 * index] = target
    return frames, (100.0, 90.0, 60.0, 60.0)


class Oracle:
    """Knows the truth; what a tracker of the library looks like to the evaluation."""

    def __init__(self, truth_xywh: np.ndarray, start: int = 0) -> None:
        self.truth_xywh, self.start = truth_xywh, start

    def init(self, frame_bgr: np.ndarray, box_xywh: tuple[float, float, float, float]) -> None:
        assert frame_bgr.shape == (64, 96, 3) and box_xywh == tuple(self.truth_xywh[self.start])
        self.index = self.start

    def update(self, frame_bgr: np.ndarray) -> peers.PeerTrack:
        self.index += 1
        box = self.truth_xywh[self.index]
        if np.isnan(box).any():
            return peers.PeerTrack((0.0, 0.0, 1.0, 1.0), 0.1, State.LOST)
        return peers.PeerTrack(tuple(box.tolist()), 0.9, State.TRACKING)


# Sequences


@pytest.mark.parametrize("separator", [",", "\t", " ", ", "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_otb_boxes_become_zero_based_whatever_separates_them(tmp_path, separator, end):
    sequence = read_otb(write_otb(tmp_path / "Deer", TRUTH, separator, end))
    assert sequence.name == "Deer" and sequence.start == 0
    assert [path.name for path in sequence.frames] == [f"{index:04d}.jpg" for index in range(1, 6)]
    np.testing.assert_array_equal(sequence.truth_xywh, TRUTH)


def test_otb_rows_without_size_are_absent(tmp_path):
    folder = write_otb(tmp_path / "a", TRUTH[:3])
    (folder / "groundtruth_rect.txt").write_text("11,21,20,10\n0,0,0,0\nNaN,NaN,NaN,NaN\n")
    sequence = read_otb(folder)
    assert sequence.has_truth.tolist() == [True, False, False]
    assert np.isnan(sequence.truth_xywh[1:]).all()


def test_video_folder_is_zero_based_with_nan_for_absent(tmp_path):
    truth = TRUTH.copy()
    truth[[0, 2]] = NAN
    sequence = read_video_folder(write_video(tmp_path / "v", truth))
    np.testing.assert_array_equal(sequence.truth_xywh, truth)
    assert sequence.start == 1


def test_frames_are_ordered_by_number(tmp_path):
    write_images(tmp_path / "img", TRUTH[[0] * 11], "{}.jpg")
    (tmp_path / "groundtruth_rect.txt").write_text("1,1,5,5\n" * 11)
    assert [int(path.stem) for path in read_otb(tmp_path).frames] == list(range(1, 12))
    for path in (tmp_path / "img").iterdir():
        path.rename(path.with_name(f"frame{path.name}"))
    assert [path.stem for path in read_otb(tmp_path).frames] == [f"frame{number}" for number in range(1, 12)]


def test_both_layouts_in_one_folder_and_one_sequence_by_itself(tmp_path):
    write_otb(tmp_path / "b_otb", TRUTH)
    write_video(tmp_path / "a_video", TRUTH)
    (tmp_path / "c_other").mkdir()
    sequences = read_sequences(tmp_path)
    assert [sequence.name for sequence in sequences] == ["a_video", "b_otb"]
    np.testing.assert_array_equal(sequences[0].truth_xywh, sequences[1].truth_xywh)
    assert [sequence.name for sequence in read_sequences(tmp_path / "b_otb")] == ["b_otb"]


@pytest.mark.parametrize("rows", [3, 7])
def test_rows_that_do_not_match_the_images_are_refused(tmp_path, rows):
    folder = write_otb(tmp_path / "a", TRUTH)
    (folder / "groundtruth_rect.txt").write_text("1,1,5,5\n" * rows)
    with pytest.raises(ValueError, match=f"{rows} rows for 5 images.*allow_prefix"):
        read_otb(folder)
    assert len(read_otb(folder, allow_prefix=True).frames) == min(rows, 5)


def test_documented_otb_range_is_used(tmp_path):
    write_images(tmp_path / "Football1" / "img", TRUTH[[0] * 80])
    (tmp_path / "Football1" / "groundtruth_rect.txt").write_text("1,1,5,5\n" * 74)
    assert read_otb(tmp_path / "Football1").frames[-1].stem == "0074"


def test_unreadable_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        read_sequences(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no sequence in"):
        read_sequences(tmp_path)
    folder = write_otb(tmp_path / "a", TRUTH)
    (folder / "groundtruth_rect.txt").write_text("1,1,5,5\n1,2,three,4\n")
    with pytest.raises(ValueError, match=r"groundtruth_rect.txt, line 2: .*'1,2,three,4'"):
        read_otb(folder)
    (folder / "groundtruth_rect.txt").write_text("0,0,0,0\n" * 5)
    with pytest.raises(ValueError, match="no frame has a box"):
        read_otb(folder)
    with pytest.raises(FileNotFoundError, match=r"groundtruth\.txt"):
        read_video_folder(folder)
    (tmp_path / "empty" / "img").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no image in"):
        read_otb(tmp_path / "empty")
    (tmp_path / "broken.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot decode .*broken\.jpg"):
        read_frame(tmp_path / "broken.jpg")
    with pytest.raises(ValueError, match=r"shape \[1, 4\]"):
        Sequence("s", (tmp_path / "broken.jpg",), TRUTH)


# Metrics, computed by hand


@pytest.mark.parametrize(
    ("ious", "auc", "sr50", "overlap"),
    [
        ([1.0, 1.0], 20 / 21, 1.0, 1.0),
        ([0.0], 0.0, 0.0, 0.0),
        ([0.5], 10 / 21, 0.0, 0.5),  # above 0, .05, .. .45; not above .5 itself
        ([0.15], 3 / 21, 0.0, 0.15),
        ([0.51, 0.0], 11 / 42, 0.5, 0.255),
    ],
)
def test_overlap_metrics(ious, auc, sr50, overlap):
    assert metrics.success_auc(ious) == pytest.approx(auc)
    assert metrics.success_rate(ious, 0.5) == sr50
    assert metrics.average_overlap(ious) == pytest.approx(overlap)


def test_precision_includes_its_threshold():
    truth = np.tile([100.0, 100, 40, 20], (4, 1))
    boxes = np.add(truth, [[0, 0, 0, 0], [12, 16, 0, 0], [20, 0, 2, 0], [0, 4, 0, 0]])
    # Centre errors: 0, 20, 21 and 4 px; divided by 40 x 20: 0, hypot(.3, .8), .525, .2.
    assert metrics.precision(boxes, truth) == 0.75
    assert metrics.precision(boxes, truth, 3) == 0.25
    assert metrics.norm_precision(boxes, truth) == 0.5
    assert metrics.norm_precision(boxes, truth, 0.53) == 0.75


def test_a_box_of_nan_is_a_miss_and_truth_of_nan_is_refused():
    assert metrics.precision([[NAN] * 4], TRUTH[:1]) == 0
    assert metrics.success_auc(iou_xywh([[NAN] * 4], TRUTH[:1])) == 0
    with pytest.raises(ValueError, match="scored_frames"):
        metrics.precision(TRUTH[:1], [[NAN] * 4])
    with pytest.raises(ValueError, match="shape"):
        metrics.norm_precision(TRUTH[:2], TRUTH[:1])


def test_no_frames_have_no_score():
    empty = np.empty((0, 4))
    for value in (metrics.success_auc([]), metrics.average_overlap([]), metrics.precision(empty, empty)):
        assert np.isnan(value)


def test_state_statistics():
    statistics = metrics.state_statistics(["TRACKING", "TRACKING", "LOST", "TRACKING"], [0.9, 0.31, 0.0, 0.3])
    assert statistics["share_tracking"] == 0.75 and statistics["hit_tracking"] == pytest.approx(2 / 3)
    assert statistics["share_lost"] == 0.25 and statistics["hit_lost"] == 0
    assert statistics["share_uncertain"] == 0 and np.isnan(statistics["hit_uncertain"])


def test_mean_row_counts_sequences_the_same_and_skips_missing_values():
    mean = metrics.mean_row([{"frames": 10, "auc": 0.2, "hit_lost": NAN}, {"frames": 90, "auc": 0.6, "hit_lost": 0.5}])
    assert mean == {"frames": 100, "auc": pytest.approx(0.4), "hit_lost": 0.5}
    with pytest.raises(ValueError, match="no rows"):
        metrics.mean_row([])


# One pass


def test_perfect_tracker(tmp_path):
    sequence = read_otb(write_otb(tmp_path / "a", TRUTH))
    played = []
    result = onepass.run_ope(lambda: Oracle(TRUTH), sequence, on_frame=lambda: played.append(1))
    row = onepass.summarise(result, sequence)
    assert len(played) == 5 and row["frames"] == 4
    assert row["auc"] == pytest.approx(20 / 21) and row["precision20"] == row["norm_precision"] == row["sr50"] == 1
    assert np.isfinite(result.seconds).all() and 0 <= row["ms_median"] <= row["ms_p95"]


def test_static_tracker_on_known_motion(tmp_path):
    sequence = read_otb(write_otb(tmp_path / "a", TRUTH))
    row = onepass.summarise(onepass.run_ope(peers.StaticTracker, sequence), sequence)
    # The given first box is not scored. IoU 15/25, 10/30, 5/35, 0 pass 12, 7, 3 and 0 of the 21 thresholds.
    assert row["auc"] == pytest.approx((12 + 7 + 3 + 0) / 4 / 21)
    assert row["sr50"] == 0.25 and row["ao"] == pytest.approx((15 / 25 + 10 / 30 + 5 / 35) / 4)
    assert row["precision20"] == 1  # offsets 5, 10, 15, 20 px
    assert row["norm_precision"] == 0 and row["hit_tracking"] == 0.5


def test_frames_without_truth_are_played_but_not_scored(tmp_path):
    truth = TRUTH.copy()
    truth[[0, 3]] = NAN
    sequence = read_video_folder(write_video(tmp_path / "v", truth))
    result = onepass.run_ope(lambda: Oracle(truth, start=1), sequence)
    assert result.states == ("IDLE", "TRACKING", "TRACKING", "LOST", "TRACKING")
    assert onepass.scored_frames(result, sequence).tolist() == [False, False, True, False, True]
    assert np.isnan(result.boxes_xywh[0]).all() and np.isnan(result.scores).tolist() == [True, True] + [False] * 3
    row = onepass.summarise(result, sequence)
    assert row["frames"] == 2 and row["auc"] == pytest.approx(20 / 21) and row["share_tracking"] == 1


# Peers


def test_peers_are_listed_and_unknown_ones_refused():
    assert "static" in peers.available_peers() and set(peers.available_peers()) <= set(peers.PEERS)
    with pytest.raises(ValueError, match="expected one of csrt"):
        peers.create_peer("sort")


def test_missing_peer_names_the_package(monkeypatch):
    monkeypatch.setattr(peers, "_opencv", lambda name: None)
    assert peers.available_peers() == ["static"]
    with pytest.raises(ImportError, match="pip install opencv-contrib-python"):
        peers.create_peer("kcf")


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "static"])
def test_opencv_peer_follows_a_slow_target(tmp_path, name):
    if name not in peers.available_peers():
        pytest.skip(f"this cv2 has no {name}")
    frames, box = moving_square(12)
    tracker = peers.create_peer(name)
    tracker.init(frames[0], box)
    for frame in frames[1:]:
        track = tracker.update(frame)
    moved = (box[0] + 66, box[1], box[2], box[3])  # 6 px a frame: off the first box altogether
    assert iou_xywh(track.box_xywh, moved) > 0.5
    assert track.state is State.TRACKING and track.score == 1
    assert all(type(value) is float for value in track.box_xywh)


def test_a_failed_update_repeats_the_last_box():
    answers = iter([(True, (3, 4, 5, 6)), (False, (0, 0, 0, 0))])

    class Failing:
        def init(self, image: np.ndarray, box: tuple[int, ...]) -> None:
            assert box == (2, 4, 5, 1) and all(type(value) is int for value in box)

        def update(self, image: np.ndarray) -> tuple[bool, tuple[int, ...]]:
            return next(answers)

    image = np.zeros((20, 20, 3), np.uint8)
    tracker = peers.OpenCvTracker(Failing)
    tracker.init(image, (1.6, 4.4, 5.0, 0.2))
    assert tracker.update(image) == peers.PeerTrack((3.0, 4.0, 5.0, 6.0), 1.0, State.TRACKING)
    assert tracker.update(image) == peers.PeerTrack((3.0, 4.0, 5.0, 6.0), 0.0, State.LOST)


# Measuring


def test_measure_splits_the_stages_that_a_runner_tells():
    class Timed(peers.StaticTracker):
        runner = SimpleNamespace(last_timing={"crop": 0.0, "network": 0.0})

    frames, box = moving_square(3)
    times = measure(Timed(), frames, box, warmup=2, iterations=7)
    assert set(times) == {"total", "crop", "network", "host"} and all(len(v) == 7 for v in times.values())
    np.testing.assert_allclose(times["host"], times["total"])
    assert list(measure(peers.StaticTracker(), frames, box, 0, 1)) == ["total"]
    with pytest.raises(ValueError, match="iterations=0"):
        measure(Timed(), frames, box, iterations=0)
    with pytest.raises(ValueError, match="no frames"):
        measure(Timed(), [], box)
    with pytest.raises(ValueError, match="rate_hz=-1"):
        measure(Timed(), frames, box, rate_hz=-1)
    began = time.perf_counter()
    measure(Timed(), frames, box, warmup=0, iterations=5, rate_hz=100)
    assert time.perf_counter() - began >= 0.04  # the fifth frame comes 40 ms after the first, never earlier


def test_frames_are_played_forth_and_back():
    seen: list[int] = []

    class Seeing(peers.StaticTracker):
        def update(self, frame_bgr: np.ndarray) -> peers.PeerTrack:
            seen.append(int(frame_bgr[0, 0, 0]))
            return super().update(frame_bgr)

    frames = [np.full((4, 4, 3), value, np.uint8) for value in range(4)]
    measure(Seeing(), frames, (0, 0, 2, 2), warmup=3, iterations=6)
    assert seen == [1, 2, 3, 2, 1, 0, 1, 2, 3]


def test_summary_and_table():
    times = {"total": np.arange(1.0, 102.0)}
    assert summary(times)["total"] == {"p50": 51.0, "p95": 96.0, "p99": 100.0, "mean": 51.0}
    assert "51.000" in format_table(times) and "20 frames/s" in format_table(times)
    assert resident_memory_mib() > 1


# The commands


def test_accuracy_command(tmp_path, capsys):
    write_otb(tmp_path / "data" / "Skiing", TRUTH)
    write_video(tmp_path / "data" / "walk", TRUTH)
    out = tmp_path / "results"
    arguments = ["--data", str(tmp_path / "data"), "--model", "--peers", "static", "--out", str(out)]
    arguments += ["--save-boxes", str(out / "boxes"), "--sheet", str(out / "sheets")]
    assert accuracy.main(arguments) == 0
    lines = (out / "accuracy.csv").read_text().splitlines()
    assert lines[0].startswith("# command: python -m benchmarks.accuracy --data") and "cv2: " in lines[1]
    rows = list(csv.DictReader(lines[2:]))
    assert [row["sequence"] for row in rows] == ["Skiing", "walk", "mean"]
    assert rows[2]["auc"] == f"{22 / 84:.4f}" and rows[2]["frames"] == "8" and rows[2]["hit_lost"] == ""
    report = (out / "accuracy.md").read_text()
    assert "## Mean without Skiing" in report and "| static | 0.262 |" in report
    assert report in capsys.readouterr().out
    boxes = (out / "boxes" / "static" / "walk.csv").read_text().splitlines()
    assert len(boxes) == 6 and boxes[5].startswith("00005.jpg,10.00,20.00,20.00,10.00,1.0000,TRACKING,")
    assert read_frame(out / "sheets" / "walk.png").shape[2] == 3


def test_accuracy_command_without_data_or_trackers(tmp_path, capsys):
    assert accuracy.main(["--data", str(tmp_path / "nowhere"), "--model", "--peers", "static"]) == 2
    assert "nowhere" in capsys.readouterr().err
    write_otb(tmp_path / "a", TRUTH)
    assert accuracy.main(["--data", str(tmp_path), "--model", "--peers"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_latency_command(tmp_path, capsys):
    arguments = ["--model", "--peers", "static", "--sizes", "96x96", "128x96", "--threads", "1"]
    threads = cv2.getNumThreads()
    assert latency.main([*arguments, "--iterations", "3", "--warmup", "0", "--out", str(tmp_path)]) == 0
    assert cv2.getNumThreads() == threads
    rows = list(csv.DictReader((tmp_path / "latency.csv").read_text().splitlines()[2:]))
    assert [(row["width"], row["height"], row["stage"]) for row in rows] == [
        ("96", "96", "total"),
        ("128", "96", "total"),
    ]
    assert "128 x 96" in capsys.readouterr().out
    assert latency.main(["--model", "--peers", "static", "--sizes", "big"]) == 2


def test_latency_while_lost_is_that_of_all_windows(tmp_path, monkeypatch):
    windows = []
    search = OnnxRuntimeRunner.search

    def count(runner, image, these, *rest):
        windows.append(len(these))
        return search(runner, image, these, *rest)

    monkeypatch.setattr(OnnxRuntimeRunner, "search", count)
    arguments = ["--peers", "--sizes", "320x240", "--threads", "1", "--iterations", "4", "--warmup", "1"]
    assert latency.main([*arguments, "--model", DEFAULT_MODEL, "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "latency.csv").read_text().splitlines()[2:]))
    assert [row["stage"] for row in rows[: len(rows) // 2]] == ["total", "crop", "network", "host", "lost"]
    assert windows == [1] * 5 + [2] * 5 + [1] * 5 + [2] * 5  # FP32 and INT8


def test_evaluation_speed_command(tmp_path, capsys):
    write_otb(tmp_path / "data" / "a", TRUTH)
    write_otb(tmp_path / "data" / "b", TRUTH)
    arguments = ["--repetitions", "1", "--out", str(tmp_path / "results"), "--data"]
    assert evaluation_speed.main([*arguments, str(tmp_path / "data")]) == 0
    rows = list(csv.DictReader((tmp_path / "results" / "evaluation_speed.csv").read_text().splitlines()[2:]))
    assert [row["processes"] for row in rows] == ["1", "2"] and rows[0]["times_faster"] == "1.0000"
    alone, both = (float(row["seconds"]) for row in rows)
    assert float(rows[1]["times_faster"]) == pytest.approx(alone / both, abs=1e-3)
    assert evaluation_speed.main([*arguments, str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
