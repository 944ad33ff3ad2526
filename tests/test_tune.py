"""Tracking parameters from trials: the rule that chooses, the study, the passes, the command."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from evaluation import replay, tune
from evaluation.layouts import find_sequences
from evaluation.onepass import run_ope, summarise
from evaluation.replay import Player, players, share_out
from evaluation.tune import RANGES, Choice, Trial, choose, neighbourhood_means, tuned_values
from siamtrack.bundle import Bundle, TrackingSpec, load_bundle, write_manifest
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import Scene
from siamtrack.tracker import SiamTracker

pytest.importorskip("optuna", reason="needs Optuna: pip install 'siamtrack[eval]'")

NAN = float("nan")
PRESENT = TrackingSpec()
FACTS = {"model or thresholds": "a", "sequences": {"one": "1"}, "validation sequences": {}, "seed": 0}
OTHER = {"window_influence": 0.1, "motion_rate": 0.9}


# The rule


def on_a_line(places: list[float]) -> np.ndarray:
    """Trials that differ in one parameter: places from 0 to 1 of its range."""
    low, high = RANGES["window_influence"]
    points = np.array([[sum(span) / 2 for span in RANGES.values()]] * len(places))
    points[:, list(RANGES).index("window_influence")] = low + (high - low) * np.array(places)
    return points


def test_a_neighbourhood_is_the_trial_and_the_nearest_others() -> None:
    means = neighbourhood_means(on_a_line([0, 0.1, 0.3, 0.8, 1]), np.array([0.3, 0.6, 0.9, 0.0, 0.3]))
    assert means == pytest.approx([0.6, 0.6, 0.6, 0.4, 0.4])


def test_neighbourhoods_grow_with_the_root_of_the_trials() -> None:
    objectives = np.arange(25.0)
    means = neighbourhood_means(on_a_line((objectives / 24).tolist()), objectives)
    assert means[0] == 2 and means[12] == 12  # five trials each


def test_ranges_are_the_unit_of_distance() -> None:
    points = np.array([[0.0, 0.0, 0.1, 0.0], [0.1, 0.0, 0.1, 0.0], [0.0, 0.0, 0.1, 0.2], [0.0, 0.0, 0.1, 0.15]])
    # A tenth of penalty_k is a quarter of its range, further than 0.2 of motion_rate.
    assert neighbourhood_means(points, np.array([0.0, 9, 0, 0]))[0] == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_trials_have_one_neighbourhood_and_nothing_is_changed(count: int) -> None:
    objectives = np.array([0.1, 0.7, 0.3])[:count]
    choice = choose(on_a_line([0.1, 0.2, 0.9])[:count], objectives, np.full(count, NAN), 0)
    assert choice.best == 0 and len(set(choice.neighbourhoods.tolist())) == 1


def test_a_plateau_is_preferred_to_a_lucky_trial() -> None:
    places = [0.0, 0.05, 0.1, 0.15, 0.2, 0.8, 0.85, 0.9, 0.95]
    objectives = np.array([0.40, 0.42, 0.90, 0.41, 0.40, 0.62, 0.65, 0.64, 0.63])
    choice = choose(on_a_line(places), objectives, np.full(9, NAN), 0)
    assert choice.best == 7 and not choice.refused
    assert choice.neighbourhoods[7] == pytest.approx((0.65 + 0.64 + 0.63) / 3)
    assert choice.neighbourhoods[2] == pytest.approx((0.42 + 0.90 + 0.41) / 3)


@pytest.mark.parametrize(("present", "best"), [(0.48, 3), (0.50, 0)])
def test_a_trial_below_the_present_values_is_not_chosen_for_its_neighbours(present: float, best: int) -> None:
    objectives = np.array([present, 0.10, 0.70, 0.49, 0.70, 0.10])
    choice = choose(on_a_line([0.0, 0.25, 0.4, 0.6, 0.8, 0.95]), objectives, np.full(6, NAN), 0)
    assert np.argmax(choice.neighbourhoods) == 3 and choice.best == best


@pytest.mark.parametrize(
    ("check", "refused"), [(0.60, False), (0.51, False), (0.501, False), (0.499, True), (0.3, True), (NAN, False)]
)
def test_the_choice_is_refused_where_validation_loses_more_than_the_margin(check: float, refused: bool) -> None:
    checks = np.array([0.51, 0.9, 0.9, 0.9, check, 0.9])
    objectives = np.array([0.50, 0.40, 0.45, 0.70, 0.71, 0.70])  # the last three are one neighbourhood
    choice = choose(on_a_line([0.0, 0.05, 0.1, 0.7, 0.75, 0.8]), objectives, checks, 0)
    assert (choice.best, choice.refused) == (4, refused)


def test_report_says_what_was_chosen_and_why_not() -> None:
    present = tuned_values(PRESENT)
    trials = [
        Trial(present, {"a": 0.5, "b": 0.6}, {"c": 0.52}),
        Trial({**present, **OTHER}, {"a": 0.7, "b": 0.5}, {"c": 0.49}),
    ]
    means = np.array([0.55, 0.6])
    text = tune.report(trials, 0, Choice(1, False, means))
    assert (
        "a 0.5000 -> 0.7000" in text and "mean 0.5500 -> 0.6000" in text and "validation mean 0.5200 -> 0.4900" in text
    )
    assert "chosen: trial 1, penalty_k 0.06, window_influence 0.1, size_rate 0.4, motion_rate 0.9" in text
    assert "trial 1 is 0.0300 worse than they are, and 0.01 is allowed" in tune.report(
        trials, 0, Choice(1, True, means)
    )
    assert "the present values stay: no trial" in tune.report(trials, 0, Choice(0, False, means))
    alone = [Trial(trial.values, trial.sequences, {}) for trial in trials]
    assert "no validation sequences were given" in tune.report(alone, 0, Choice(1, False, means))


# The study


def made_up(tracking: TrackingSpec) -> list[float]:
    """Best at window_influence 0.1 and motion_rate 0.9; a second number that validates it."""
    off = (tracking.window_influence - 0.1) ** 2 + (tracking.motion_rate - 0.9) ** 2
    return [0.8 - off, 0.6 - off / 2]


def trials_of(study: object, count: int, seed: int = 0, tracking: TrackingSpec = PRESENT) -> list[Trial]:
    return tune.run_trials(study, tracking, count, seed, made_up, ["one"], ["check"])


def test_the_first_trial_has_the_present_values() -> None:
    first, *others = trials_of(tune.open_study(None, FACTS), 4)
    assert first.values == {"penalty_k": 0.06, "window_influence": 0.4, "size_rate": 0.4, "motion_rate": 0.5}
    assert first.sequences == {"one": made_up(PRESENT)[0]} and first.validation == {"check": made_up(PRESENT)[1]}
    assert (first.objective, first.check) == (first.sequences["one"], first.validation["check"])
    assert len({tuple(trial.values.values()) for trial in (first, *others)}) == 4
    for trial in others:
        for name, (low, high) in RANGES.items():
            assert low <= trial.values[name] <= high and round(trial.values[name], 3) == trial.values[name]


def test_a_study_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = trials_of(tune.open_study(None, FACTS), 16)
    for count in (1, 5, 13, 16):
        parts = trials_of(tune.open_study(tmp_path / "study.db", FACTS), count)
        assert parts == whole[:count]
    assert trials_of(tune.open_study(tmp_path / "study.db", FACTS), 3) == whole  # none is thrown away
    assert trials_of(tune.open_study(None, FACTS), 3, seed=1)[1] != whole[1]


def test_a_trial_that_was_stopped_does_not_count(tmp_path: Path) -> None:
    def stop(tracking: TrackingSpec) -> list[float]:
        raise KeyboardInterrupt

    study = tune.open_study(tmp_path / "study.db", FACTS)
    with pytest.raises(KeyboardInterrupt):  # in the very first, which has the present values
        tune.run_trials(study, PRESENT, 3, 0, stop, ["one"], ["check"])
    trials = trials_of(tune.open_study(tmp_path / "study.db", FACTS), 3)
    assert trials == trials_of(tune.open_study(None, FACTS), 3)


def test_the_sampler_finds_what_is_better() -> None:
    trials = trials_of(tune.open_study(None, FACTS), 40)
    points = np.array([list(trial.values.values()) for trial in trials])
    choice = choose(points, np.array([t.objective for t in trials]), np.array([t.check for t in trials]), 0)
    assert not choice.refused and trials[choice.best].objective > trials[0].objective + 0.1
    assert trials[choice.best].values["motion_rate"] == pytest.approx(0.9, abs=0.2)


def test_values_outside_the_ranges_are_tried_too() -> None:
    odd = TrackingSpec(penalty_k=1.5, size_rate=0.0)
    values = [trial.values for trial in trials_of(tune.open_study(None, FACTS), 12, tracking=odd)]
    assert (values[0]["penalty_k"], values[0]["size_rate"]) == (1.5, 0.0)
    assert max(value["penalty_k"] for value in values[1:]) > 0.4


def test_after_the_choice_was_written_the_study_knows_the_new_present(tmp_path: Path) -> None:
    before = trials_of(tune.open_study(tmp_path / "study.db", FACTS), 4)
    chosen = TrackingSpec(**before[2].values)
    assert trials_of(tune.open_study(tmp_path / "study.db", FACTS), 4, tracking=chosen) == before
    by_hand = TrackingSpec(window_influence=0.111)
    after = trials_of(tune.open_study(tmp_path / "study.db", FACTS), 4, tracking=by_hand)
    assert after[:4] == before and after[4].values == tuned_values(by_hand)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"model or thresholds": "b"}, "another model or thresholds;"),
        ({"seed": 3, "sequences": {"one": "2"}}, "another sequences and other seed;"),
        ({"validation sequences": {"check": "1"}}, "another validation sequences;"),
    ],
)
def test_trials_of_something_else_are_refused(tmp_path: Path, facts: dict[str, object], said: str) -> None:
    tune.open_study(tmp_path / "study.db", FACTS)
    with pytest.raises(ValueError, match=said):
        tune.open_study(tmp_path / "study.db", {**FACTS, **facts})


def test_files_that_are_no_study_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a data base, but a long enough text")
    for file in (tmp_path / "notes.db", tmp_path):
        with pytest.raises(ValueError, match="is not an SQLite file; give --study the name of a new file"):
            tune.open_study(file, FACTS)
    with pytest.raises(ValueError, match="make it first"):
        tune.open_study(tmp_path / "nowhere" / "study.db", FACTS)
    assert (tmp_path / "notes.db").read_text().startswith("not a data base")


def test_without_optuna_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'siamtrack\[eval\]'"):
        tune.open_study(None, FACTS)


# The passes


def write_clip(folder: Path, seed: int, frames: int = 10, absent: tuple[int, ...] = ()) -> None:
    """A sequence of the rendered scene; without boxes in the frames `absent`."""
    (folder / "img").mkdir(parents=True)
    clip = Scene(320, 180, frames=24, seed=seed)
    rows = []
    for index in range(frames):
        frame = clip.render(index)
        cv2.imwrite(str(folder / "img" / f"{index:05d}.png"), frame.image)
        rows.append("nan" if index in absent else ",".join(f"{value:.2f}" for value in frame.box_xywh))
    (folder / "groundtruth.txt").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences to choose on in ``a``, one to validate on in ``b``. Do not write into them."""
    root = tmp_path_factory.mktemp("clips")
    write_clip(root / "a" / "clip5", 5)
    write_clip(root / "a" / "clip6", 6, frames=8, absent=(0, 4))
    write_clip(root / "b" / "clip7", 7)
    return root


def test_a_pass_is_that_of_the_evaluation(clips: Path, default_bundle: Bundle) -> None:
    sequences = [ref.load() for ref in find_sequences(clips)]
    tracking = TrackingSpec(window_influence=0.6, size_rate=0.7, motion_rate=0.1)
    with OnnxRuntimeRunner(default_bundle, threads=1) as runner:  # in the bundle's own precision, as a player
        tracker = SiamTracker(runner, tracking)
        expected = [summarise(run_ope(lambda: tracker, s), s)["auc"] for s in sequences]
    with players(default_bundle.path, sequences, 1, 2**30) as play:
        assert play(tracking) == expected
        assert play(TrackingSpec()) != expected and play(tracking) == expected  # nothing is left of the pass before
    with players(default_bundle.path, sequences, 2, 2**30) as play:
        assert play(tracking) == expected


def test_frames_are_decoded_once_as_far_as_memory_goes(
    clips: Path, default_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [ref.load() for ref in find_sequences(clips / "b")]
    read: list[Path] = []
    monkeypatch.setattr(replay, "read_frame", lambda path: (read.append(path), cv2.imread(str(path)))[1])
    aucs = []
    for frames, decoded in ((10, 10), (4, 10 + 6), (0, 20)):
        read.clear()
        player = Player(default_bundle.path, sequences, frames * 320 * 180 * 3)
        aucs += [player.play(PRESENT), player.play(PRESENT)]
        player.close()
        assert len(read) == decoded
    assert all(auc == aucs[0] for auc in aucs)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sequence_that_cannot_be_played_is_named(
    clips: Path, default_bundle: Bundle, tmp_path: Path, processes: int
) -> None:
    shutil.copytree(clips / "a", tmp_path / "a")
    (tmp_path / "a" / "clip6" / "img" / "00003.png").write_bytes(b"no image")
    sequences = [ref.load() for ref in find_sequences(tmp_path / "a")]
    with (
        pytest.raises(ValueError, match=r"sequence clip6: cannot decode the image .*00003\.png"),
        players(default_bundle.path, sequences, processes, 2**30) as play,
    ):
        play(PRESENT)


@pytest.mark.parametrize(
    ("lengths", "processes", "expected"),
    [
        ([5], 4, [[0]]),
        ([10, 30, 20], 1, [[1, 2, 0]]),
        ([10, 30, 20], 2, [[1], [2, 0]]),
        ([10, 10, 10], 5, [[0], [1], [2]]),
        ([40, 30, 20, 10, 5], 2, [[0, 3, 4], [1, 2]]),
    ],
)
def test_share_out(lengths: list[int], processes: int, expected: list[list[int]]) -> None:
    assert share_out(lengths, processes) == expected


# The command


@pytest.fixture
def bundle(default_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy whose window lets the tracker choose nothing but the middle of the search area."""
    folder = tmp_path / "bundle"
    shutil.copytree(default_bundle.path, folder)
    tracking = TrackingSpec(window_influence=1.0)
    write_manifest(folder, dataclasses.replace(default_bundle.manifest, tracking=tracking))
    return folder


@pytest.fixture
def command(bundle: Path, clips: Path) -> Callable[..., int]:
    given = [str(bundle), "--sequences", str(clips / "a"), "--validation", str(clips / "b"), "--trials", "6"]
    return lambda *more: tune.main([*given, "--validation-names", "clip7", *more])


def test_the_command_writes_what_it_chose(
    command: Callable[..., int], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = load_bundle(bundle).manifest
    assert command("--study", str(tmp_path / "study.db")) == 0
    said = capsys.readouterr().out
    assert "chosen: trial" in said and "--write puts them into the manifest" in said
    assert load_bundle(bundle).manifest == old
    assert command("--study", str(tmp_path / "study.db"), "--write", "--processes", "2") == 0  # no trial is left to run
    again = capsys.readouterr().out
    assert again.split("chosen")[0] == said.split("chosen")[0] and "run evaluation.calibrate" in again
    new = load_bundle(bundle).manifest
    values = next(line.split()[1:5] for line in said.splitlines() if line.endswith("best neighbourhood"))
    assert [f"{value:.3f}" for value in tuned_values(new.tracking).values()] == values
    assert new.tracking.window_influence < 1 and new.tracking.lost_windows == old.tracking.lost_windows
    tuning = new.provenance["tuning"]
    assert "6 trials, seed 0; was penalty_k 0.06, window_influence 1, size_rate 0.4, motion_rate 0.5" in tuning
    for line in said.splitlines():
        if line.split()[:1] == ["mean"]:
            assert line.split(maxsplit=1)[1] + " on clip5, clip6" in tuning
        if line.split()[:2] == ["validation", "mean"]:
            assert line.split(maxsplit=2)[2] + " on clip7" in tuning
    assert {**new.provenance, "tuning": ""} == {**old.provenance, "tuning": ""} and new.score == old.score


def test_values_that_validate_worse_are_not_written(
    command: Callable[..., int], bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class MadeUp:
        def __enter__(self) -> tune.Play:
            return lambda tracking: [1 - tracking.window_influence] * 2 + [tracking.window_influence]

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(tune, "players", lambda *given: MadeUp())
    old = load_bundle(bundle).manifest
    assert command("--write") == 0
    said = capsys.readouterr().out
    assert "the present values stay: on the validation sequences trial" in said and "0.01 is allowed" in said
    assert "wrote" not in said and load_bundle(bundle).manifest == old


def test_the_held_out_videos_are_the_validation_sequences(
    bundle: Path, clips: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [str(bundle), "--sequences", str(clips / "a"), "--validation", str(clips / "b"), "--trials", "1"]
    manifest = (bundle / "manifest.json").read_text()
    [held_out] = [line for line in manifest.splitlines() if "validation_videos" in line]
    assert tune.main(given) == 2
    assert "no sequence called davis_drift-straight" in capsys.readouterr().err
    (bundle / "manifest.json").write_text(manifest.replace(held_out, ""))
    assert tune.main(given) == 2
    assert "does not say which videos its training held out" in capsys.readouterr().err
    (bundle / "manifest.json").write_text(manifest.replace(held_out, '"validation_videos": "clip7",'))
    assert tune.main(given) == 0
    said = capsys.readouterr().out
    assert "clip7 0." in said and "validation mean 0." in said


def test_what_cannot_be_used_is_named(
    bundle: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "short" / "clip8", 8, frames=3, absent=(1, 2))
    a, b = str(clips / "a"), str(clips / "b")
    for given, said in (
        ([str(tmp_path / "none"), "--sequences", a], "not a bundle"),
        ([str(bundle), "--sequences", str(tmp_path / "none")], "expected a folder of sequences"),
        ([str(bundle), "--sequences", a, "--names", "clip9"], "no sequence called clip9"),
        ([str(bundle), "--sequences", a, "--validation-names", "clip7"], "--validation-names without --validation"),
        ([str(bundle), "--sequences", str(tmp_path / "short")], "clip8 has no box after the one it starts with"),
        (
            [str(bundle), "--sequences", str(clips), "--validation", b, "--validation-names", "clip7"],
            "clip7 would be both chosen and validated on",
        ),
    ):
        assert tune.main([*given, "--trials", "1"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--trials", "0"), ("--processes", "two"), ("--seed", "-1")])
def test_numbers_are_checked(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["siamcan-mobilenetv2", "--sequences", "x", option, value])
    assert f"expected a whole number, at least {int(option != '--seed')}, got '{value}'" in capsys.readouterr().err


def test_ctrl_c_ends_with_what_to_do(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(*given: object) -> list[Trial]:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run_trials", stop)
    assert command() == 130
    assert "--study keeps the trials" in capsys.readouterr().err
    assert command("--study", str(tmp_path / "study.db")) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_means_of_nothing() -> None:
    assert math.isnan(Trial({}, {"a": 1.0}, {}).check)
