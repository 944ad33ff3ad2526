"""Thresholds from evidence."""

from __future__ import annotations

import dataclasses
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest

from evaluation.calibrate import (
    LOST_AFTER,
    choose_thresholds,
    in_bins,
    isotonic,
    main,
    plot,
    report,
    state_report,
    write,
)
from evaluation.evidence import NEVER_LOST, Clip, Evidence, closed_loop, load_clips
from evaluation.plots import LEFT, RIGHT, WIDTH, Line, reliability_plot
from siamtrack.bundle import Bundle, load_bundle, write_manifest
from siamtrack.scene import Scene
from siamtrack.state import Thresholds
from tests.sequence_files import write_got10k


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


def test_a_score_that_windows_without_the_target_seldom_have_is_no_loss() -> None:
    """Few frames of one failure, all below 0.5, say little about a target that is seen badly."""
    scores = np.append(np.linspace(0.1, 0.5, 20), np.linspace(0.6, 1, 400))
    failed = Evidence(scores, np.append(np.zeros(20), np.full(400, 0.8)), np.linspace(0, 0.3, 1001))
    assert choose_thresholds(failed).lost_below == pytest.approx(0.27, abs=1e-3)
    alike = dataclasses.replace(failed, absent=np.linspace(0, 0.9, 1001))  # what is like the target does not bind
    assert choose_thresholds(alike).lost_below == 0.6


def test_states_do_not_flicker_where_the_score_is_sharp() -> None:
    scores = np.linspace(0, 1, 1001)
    thresholds = choose_thresholds(Evidence(scores, np.where(scores > 0.3, 0.9, 0.0), np.zeros(10)))
    assert (thresholds.uncertain_below, thresholds.tracking_above) == (0.301, 0.351)


def test_a_target_found_must_beat_windows_without_it() -> None:
    evidence = made_up()
    confusing = Evidence(evidence.scores, evidence.ious, np.linspace(0, 1, 1001))
    assert choose_thresholds(confusing).found_above == pytest.approx(0.95, abs=0.01)


def test_a_target_can_be_found_again_where_scores_crowd_near_one() -> None:
    """A softmax of many cells says 0.999 of nearly everything: what tells apart is behind the second digit."""
    on, off = np.linspace(0.99, 0.99998, 900), np.linspace(0.9, 0.98, 100)
    evidence = Evidence(np.append(on, off), np.append(np.full(900, 0.8), np.zeros(100)), np.linspace(0.9, 0.9996, 1000))
    easy = choose_thresholds(evidence)
    assert easy.uncertain_below == 0.99
    for threshold in (easy.tracking_above, easy.found_above):  # 0.05 more than 0.99 would be out of reach
        assert 0.09 < (on >= threshold).mean() < 0.11
    hard = dataclasses.replace(evidence, absent=np.full(1000, 0.99999))  # all else looks more like the target than it
    found_above = choose_thresholds(hard).found_above
    assert 0.09 < (on >= found_above).mean() < 0.11
    assert "by 1.00 of windows without it" in report(hard, choose_thresholds(hard))


def test_a_score_that_says_nothing_never_means_tracking() -> None:
    blind = Evidence(np.linspace(0, 1, 100), np.zeros(100), np.linspace(0, 1, 100))
    assert choose_thresholds(blind).tracking_above == 1.0


def test_report_counts_every_frame() -> None:
    evidence = made_up(count=500)
    rows = report(evidence, choose_thresholds(evidence)).splitlines()[1:11]
    assert sum(int(row.split()[1]) for row in rows) == 500


def test_every_score_is_in_one_bin() -> None:
    evidence = Evidence(
        np.array([0.0, 0.05, 0.1, 0.5, 0.55, 1.0]), np.array([0, 0.8, 0.8, 0.3, 0.9, 1]), np.array([1.0, 0])
    )
    bins = in_bins(evidence)
    assert bins.frames.tolist() == [2, 1, 0, 0, 0, 2, 0, 0, 0, 1]
    np.testing.assert_equal(bins.hits, [0.5, 1, *[np.nan] * 3, 0.5, *[np.nan] * 3, 1])  # an IoU of 0.3 is no hit
    assert bins.absent.tolist() == [0.5, *[0] * 8, 0.5]
    assert report(evidence, NEVER_LOST).splitlines()[3].split() == ["0.2-0.3", "0", "-", "0.000"]


def test_the_plot_shows_bins_counts_and_thresholds() -> None:
    scores = np.repeat([0.15, 0.85], [40, 60])
    evidence = Evidence(scores, np.where(scores > 0.5, 0.9, 0.0), np.full(30, 0.25))
    thresholds = Thresholds(0.85, 0.5, 0.2, 10, 0.9)
    root = ElementTree.fromstring(plot(evidence, thresholds, "one & <two>"))
    texts = [text.text for text in root.findall(".//{*}text")]
    assert texts[0] == "What the score of one & <two> is worth"
    assert {"tracking_above 0.85", "uncertain_below 0.5", "lost_below 0.2", "found_above 0.9"} <= set(texts)
    assert "lost_after 10" not in texts
    assert texts.count("40") == 1 and texts.count("60") == 1 and texts.count("1.000") == 1
    heights = [float(bar.get("height", "nan")) for bar in root.findall(".//{*}rect")]
    assert sum(height > 0 for height in heights) == 2  # the sure frames, and the windows; 40 frames are all off
    assert len(heights) == 10 + 2
    upright = {line.get("points", "").split(",")[0] for line in root.findall(".//{*}polyline")}
    assert {f"{LEFT + (WIDTH - LEFT - RIGHT) * score:.1f}" for score in (0.85, 0.5, 0.2, 0.9)} <= upright


def test_the_plotted_fit_rises_where_the_evidence_does() -> None:
    evidence = made_up(count=300)
    root = ElementTree.fromstring(plot(evidence, choose_thresholds(evidence), "made up"))
    longest = max((line.get("points", "").split() for line in root.findall(".//{*}polyline")), key=len)
    points = np.array([[float(v) for v in point.split(",")] for point in longest])
    assert len(points) > 4 and (np.diff(points[:, 0]) >= 0).all() and (np.diff(points[:, 1]) <= 0).all()


def test_a_plot_needs_a_number_a_bin() -> None:
    with pytest.raises(ValueError, match=r"expected a number a bin three times, got shapes \(3,\), \(2,\) and \(3,\)"):
        reliability_plot([1, 2, 3], [0, 1], [0, 0, 1], Line("fit", [0], [0]), {}, "title")


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
    (sequences / "broken").mkdir()
    (sequences / "broken" / "groundtruth.txt").write_text("no images here")
    assert [c.name for c in load_clips(sequences, ["clip5", "clip6"], 0)] == ["clip5", "clip6"]  # and reads no other
    with pytest.raises(ValueError, match="no sequence called clip9"):
        load_clips(sequences, ["clip5", "clip9"], 1)
    with pytest.raises(ValueError, match="at least two clips"):
        load_clips(sequences, ["clip5"], 0)


def test_closed_loop_counts_states_and_what_they_were_worth(sequences: Path, default_bundle: Bundle) -> None:
    clips = load_clips(sequences, [], 0)
    sure = closed_loop(default_bundle, clips, NEVER_LOST)
    assert (sure["frames"], sure["share_tracking"], sure["hit_tracking"]) == (22, 1.0, 1.0)
    assert np.isnan(sure["hit_lost"])
    blind = closed_loop(default_bundle, clips, Thresholds(1, 1, 1, 1, 1))  # lost at once and never found
    assert (blind["share_tracking"], blind["share_lost"]) == (0.0, 1.0)
    # A box of somewhere else for truth: the tracker is as sure as before, and wrong.
    wrong = [dataclasses.replace(clip, truth=(clip.truth[0], *[(0.0, 0.0, 5.0, 5.0)] * 11)) for clip in clips]
    assert closed_loop(default_bundle, wrong, NEVER_LOST)["hit_tracking"] == 0.0


def test_closed_loop_takes_a_hidden_target_for_a_miss_and_leaves_out_what_is_unlabelled(
    sequences: Path, default_bundle: Bundle
) -> None:
    scene = Scene(320, 180, frames=4, seed=5)
    hidden = Clip("scene", scene, (next(iter(scene)).box_xywh, None, None, None))
    row = closed_loop(default_bundle, [hidden], NEVER_LOST)
    assert (row["frames"], row["hit_tracking"]) == (3, 0.0)
    clip = load_clips(sequences, [], 0)[0]
    unlabelled = dataclasses.replace(clip, truth=(*clip.truth[:5], *[None] * 7))
    assert closed_loop(default_bundle, [unlabelled], NEVER_LOST)["frames"] == 4


def test_state_report() -> None:
    row = {"share_tracking": 0.75, "hit_tracking": 1.0, "share_uncertain": 0.25, "hit_uncertain": 0.5}
    lines = state_report({"frames": 40, **row, "share_lost": 0.0, "hit_lost": float("nan")}).splitlines()
    assert "40 frames" in lines[0]
    assert [line.split() for line in lines[1:]] == [
        ["TRACKING", "0.75", "1.00"],
        ["UNCERTAIN", "0.25", "0.50"],
        ["LOST", "0.00", "-"],
    ]
    missed = {**row, "hit_tracking": 0.89, "share_lost": 0.1, "hit_lost": 0.11}
    never = {**row, "share_tracking": 0.0, "hit_tracking": float("nan"), "share_lost": 0.0, "hit_lost": float("nan")}
    assert state_report({"frames": 40, **never}).splitlines()[4:] == [
        "goal missed: TRACKING does not mean the target in 90% of its frames"
    ]
    assert state_report({"frames": 40, **missed}).splitlines()[4:] == [
        "goal missed: TRACKING does not mean the target in 90% of its frames",
        "goal missed: LOST means the target in more than 10% of its frames",
    ]


def test_a_hidden_target_is_no_evidence_and_no_start(tmp_path: Path, default_bundle: Bundle) -> None:
    """GOT-10k and LaSOT have boxes of targets that cannot be seen: a template of the occluder would follow that."""
    folder = write_got10k(tmp_path / "GOT-10k_Val_000001", cover=(8, 8, 0, 0, 8))
    write_got10k(tmp_path / "GOT-10k_Val_000002")
    clip = load_clips(tmp_path, [folder.name], 1)[0]
    assert [truth is not None for truth in clip.truth] == [True, True, False, False, True]


def test_an_unusable_frame_is_named(
    sequences: Path, default_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    (sequences / "clip6" / "img" / "00003.png").write_text("no image")
    assert main([str(default_bundle.path), "--sequences", str(sequences), "--scenes", "0"]) == 2
    assert re.search(r"calibrate: clip6: cannot decode .*00003\.png", capsys.readouterr().err)


def test_thresholds_of_another_tracker_are_not_written(default_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(default_bundle.path, folder)
    bundle, thresholds = load_bundle(folder), Thresholds(0.8, 0.7, 0.2, 10, 0.9)
    noted = dataclasses.replace(bundle.manifest, accuracy={"dev_success_auc": 0.5})
    write_manifest(folder, noted)  # what another command notes meanwhile stays
    write(bundle, thresholds, "by hand")
    score = dataclasses.replace(noted.score, thresholds=thresholds, calibration="by hand")
    assert load_bundle(folder).manifest == dataclasses.replace(noted, score=score)
    assert noted.update is not None
    for changed in (
        dataclasses.replace(noted, tracking=dataclasses.replace(noted.tracking, penalty_k=0.123)),
        dataclasses.replace(noted, update=dataclasses.replace(noted.update, min_score=0.123)),
    ):
        write_manifest(folder, changed)
        with pytest.raises(ValueError, match="other graphs, tracking or update parameters than when this began"):
            write(bundle, thresholds, "by hand")


def test_command_writes_thresholds_that_load(
    sequences: Path, default_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(default_bundle.path, folder)
    names = ["--names", "clip5", "clip6", "--scenes", "0"]
    drawing = tmp_path / "plots" / "reliability.svg"
    assert main([str(folder), "--sequences", str(sequences), *names, "--plot", str(drawing)]) == 0
    said = capsys.readouterr().out
    assert "TRACKING " in said and "22 frames" in said and f"wrote {drawing}" in said
    assert "What the score of bundle is worth" in drawing.read_text()
    assert load_bundle(folder).manifest == default_bundle.manifest  # without --write nothing changes
    assert main([str(folder), "--sequences", str(sequences), *names, "--write"]) == 0
    score = load_bundle(folder).manifest.score
    assert score.calibration == ("evaluation.calibrate on clip5, clip6; on the target in 1.00 of TRACKING, - of LOST")
    assert f"tracking_above {score.thresholds.tracking_above}" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing"), "--sequences", str(sequences)]) == 2


def test_a_plot_of_another_kind_is_refused_before_the_work(sequences: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["siamcan-mobilenetv2", "--sequences", str(sequences), "--plot", "reliability.png"])
    assert "expected a name that ends in .svg, got 'reliability.png'" in capsys.readouterr().err
