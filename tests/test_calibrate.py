"""Thresholds from evidence."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from evaluation.calibrate import LOST_AFTER, Evidence, choose_thresholds, isotonic, load_clips, main, report
from siamtrack.bundle import Bundle, load_bundle
from siamtrack.scene import Scene


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([1], [1]),
        ([0, 0, 1, 1], [0, 0, 1, 1]),
        ([1, 0], [0.5, 0.5]),
        ([0, 1, 0, 1], [0, 0.5, 0.5, 1]),
        ([1, 1, 0, 0], [0.5] * 4),
        ([1, 0, 0, 1, 1], [1 / 3] * 3 + [1, 1]),
    ],
)
def test_isotonic(values: list[int], expected: list[float]) -> None:
    assert isotonic(np.array(values, bool)).tolist() == pytest.approx(expected)


def made_up(seed: int = 0, count: int = 20_000) -> Evidence:
    """Frames whose chance of being on the target is their score itself."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 1, count)
    hits = rng.uniform(0, 1, count) < scores
    return Evidence(scores, np.where(hits, 0.8, 0.1), rng.uniform(0, 0.5, count))


def test_thresholds_lie_where_the_shares_are_reached() -> None:
    thresholds = choose_thresholds(made_up())
    assert thresholds.tracking_above == pytest.approx(0.90, abs=0.04)
    assert thresholds.uncertain_below == pytest.approx(0.75, abs=0.04)
    assert thresholds.lost_below == pytest.approx(0.25, abs=0.04)
    assert thresholds.lost_after == LOST_AFTER
    assert thresholds.found_above == thresholds.tracking_above  # no absent window scores higher


def test_states_do_not_flicker_where_the_score_is_sharp() -> None:
    scores = np.linspace(0, 1, 1001)
    thresholds = choose_thresholds(Evidence(scores, np.where(scores > 0.3, 0.9, 0.0), np.zeros(10)))
    assert (thresholds.uncertain_below, thresholds.tracking_above) == (0.30, 0.35)


def test_a_target_found_must_beat_windows_without_it() -> None:
    evidence = made_up()
    confusing = Evidence(evidence.scores, evidence.ious, np.linspace(0, 1, 1001))
    assert choose_thresholds(confusing).found_above == pytest.approx(0.95, abs=0.01)


def test_a_score_that_says_nothing_never_means_tracking() -> None:
    blind = Evidence(np.linspace(0, 1, 100), np.zeros(100), np.linspace(0, 1, 100))
    assert choose_thresholds(blind).tracking_above == 1.0


def test_report_counts_every_frame() -> None:
    evidence = made_up(count=500)
    rows = report(evidence, choose_thresholds(evidence)).splitlines()[1:11]
    assert sum(int(row.split()[1]) for row in rows) == 500


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    """Two short sequences of the rendered scene."""
    for seed in (5, 6):
        folder = tmp_path / "sequences" / f"clip{seed}"
        (folder / "img").mkdir(parents=True)
        frames = [Scene(320, 180, frames=24, seed=seed).render(i) for i in range(12)]
        for i, frame in enumerate(frames):
            cv2.imwrite(str(folder / "img" / f"{i:05d}.png"), frame.image)
        rows = [",".join(f"{v:.2f}" for v in frame.box_xywh) for frame in frames]
        (folder / "groundtruth.txt").write_text("\n".join(rows))
    return tmp_path / "sequences"


def test_load_clips(sequences: Path) -> None:
    assert [c.name for c in load_clips(sequences, None, 0)] == ["clip5", "clip6"]
    with pytest.raises(ValueError, match="has no sequence clip9"):
        load_clips(sequences, ["clip5", "clip9"], 1)
    with pytest.raises(ValueError, match="at least two clips"):
        load_clips(sequences, ["clip5"], 0)


def test_command_writes_thresholds_that_load(
    sequences: Path, default_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(default_bundle.path, folder)
    names = ["--names", "clip5", "clip6", "--scenes", "0"]
    assert main([str(folder), "--sequences", str(sequences), *names]) == 0
    assert load_bundle(folder).manifest == default_bundle.manifest  # without --write nothing changes
    assert main([str(folder), "--sequences", str(sequences), *names, "--write"]) == 0
    score = load_bundle(folder).manifest.score
    assert score.calibration == "evaluation.calibrate on clip5, clip6"
    assert f"tracking_above {score.thresholds.tracking_above}" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing"), "--sequences", str(sequences)]) == 2
