"""How a tracker acts on what a network says: box, states, search, template updates. The network is a script."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from siamtrack import Bundle, SiamTracker, State, Track
from siamtrack.bundle import CropSpec, GridSpec, Manifest, ScoreSpec, TrackingSpec, UpdateSpec
from siamtrack.crop import Window, context_size
from siamtrack.runners import Features, SearchResult
from siamtrack.state import Thresholds

WIDTH, HEIGHT = 320, 240
FRAME = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
START = (100.0, 80.0, 24.0, 20.0)  # xywh
CENTRE = (112.0, 90.0)
THRESHOLDS = Thresholds(tracking_above=0.5, uncertain_below=0.4, lost_below=0.2, lost_after=3, found_above=0.6)
Answer = tuple[tuple[float, float, float, float], float]  # cx, cy, w, h in image pixels, and the score


class ScriptedRunner:
    """A `siamtrack.runners.Runner` that answers what the test says and writes down what it was asked.

    `answer` is called for each window and may be replaced between frames.
    """

    def __init__(self, update: UpdateSpec | None = None) -> None:
        score = ScoreSpec("what the script says", THRESHOLDS)
        grid = GridSpec(16, 16, 0.5)
        self.bundle = Bundle(
            Path("no folder"),
            Manifest(1, "script", {}, CropSpec(127, 255), grid, score, "none", TrackingSpec(), update),
        )
        self.last_timing: dict[str, float] = {}
        self.helper_cores: frozenset[int] = frozenset()
        self.answer: Callable[[Window], Answer] = lambda window: ((*CENTRE, 24, 20), 0.9)
        self.windows: list[list[Window]] = []
        self.influence: list[float] = []
        self.sizes: list[np.ndarray] = []  # [N, 2] a frame, previous size in image pixels
        self.renewed: list[Window] = []
        self.sought: list[Features] = []  # the features of each frame
        self.closed = False

    def update(self, image: np.ndarray, window: Window, features: Features) -> Features:
        self.renewed.append(window)
        return dataclasses.replace(features, tensors=(*features.tensors, window))

    def template(
        self,
        image: np.ndarray,
        window: Window,
        fill_bgr: tuple[float, float, float],
        size: tuple[float, float] | None = None,
    ) -> Features:
        self.size = size
        return Features((window,), fill_bgr)

    def search(
        self,
        image: np.ndarray,
        windows: Sequence[Window],
        features: Sequence[Features],
        prev_size: np.ndarray,
        tuning: tuple[float, float, float],
    ) -> SearchResult:
        assert len(windows) == len(features) and prev_size.shape == (len(windows), 2)
        self.windows.append(list(windows))
        self.sought.append(features[0])
        self.influence.append(tuning[1])
        self.sizes.append(np.array([size * w.width / 255 for size, w in zip(prev_size, windows, strict=True)]))
        answers = [self.answer(window) for window in windows]
        boxes = [window.to_crop(box, 255) for window, (box, _) in zip(windows, answers, strict=True)]
        ones = np.ones(len(windows), np.float32)
        score = np.array([score for _, score in answers], np.float32)
        return SearchResult(np.array(boxes, np.float32), score, ones, np.ones((len(windows), 16, 16), np.float32))

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> ScriptedRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def play(tracker: SiamTracker, *scores: float, at: tuple[float, float] = CENTRE) -> list[Track]:
    """A frame a score, the best box of which is always `at`."""
    tracks = []
    for score in scores:
        tracker.runner.answer = lambda window, score=score: ((*at, 24, 20), score)
        tracks.append(tracker.update(FRAME))
    return tracks


def names(tracks: Sequence[Track]) -> str:
    return "".join(track.state.name[0] for track in tracks)


def scripted(**tracking: float) -> SiamTracker:
    runner = ScriptedRunner()
    tracker = SiamTracker(runner, dataclasses.replace(TrackingSpec(), **tracking))
    tracker.init(FRAME, START)
    return tracker


def lost(**tracking: float) -> SiamTracker:
    """A tracker that has just lost its target at `START`; what the runner saw before is forgotten."""
    tracker = scripted(**tracking)
    assert names(play(tracker, 0.1, 0.1, 0.1)) == "UUL"
    for record in (tracker.runner.windows, tracker.runner.influence, tracker.runner.sizes):
        record.clear()
    return tracker


def test_the_box_found_is_the_box_reported() -> None:
    tracker = scripted()
    (track,) = play(tracker, 0.9, at=(120.0, 95.0))
    assert track.box_xywh == pytest.approx((108, 85, 24, 20), abs=1e-3)
    assert track.score == pytest.approx(0.9)
    window = tracker.runner.windows[0][0]  # searched round the box before, not round the one found
    assert (window.left + window.width / 2, window.top + window.height / 2) == pytest.approx(CENTRE, abs=0.5)


def test_size_follows_slowly_and_no_further_than_the_image() -> None:
    tracker = scripted(size_rate=0.5)
    tracker.runner.answer = lambda window: ((*CENTRE, 48, 10), 0.8)
    assert tracker.update(FRAME).box_xywh[2:] == pytest.approx((24 + 0.4 * 24, 20 - 0.4 * 10), abs=1e-3)
    tracker.runner.answer = lambda window: ((*CENTRE, 5000, 0.01), 0.9)
    for _ in range(30):
        track = tracker.update(FRAME)
    assert track.box_xywh[2:] == (WIDTH, tracker.tracking.min_size_px)


def test_size_follows_more_slowly_while_uncertain() -> None:
    tracker = scripted(size_rate=0.5, uncertain_rate=0.25)
    tracker.runner.answer = lambda window: ((*CENTRE, 48, 20), 0.2)
    first = tracker.update(FRAME)
    assert first.state is State.UNCERTAIN
    assert first.box_xywh[2] == pytest.approx(24 + 0.25 * 0.5 * 0.2 * 24, abs=1e-3)
    tracker.runner.answer = lambda window: ((*CENTRE, 48, 20), 0.8)
    second = tracker.update(FRAME)
    assert second.state is State.TRACKING
    assert second.box_xywh[2] == pytest.approx(first.box_xywh[2] + 0.5 * 0.8 * (48 - first.box_xywh[2]), abs=1e-3)


@pytest.mark.parametrize(("found", "expected"), [((-40, 500), (0, HEIGHT)), ((999, -3), (WIDTH, 0))])
def test_centre_stays_inside_the_image(found: tuple[float, float], expected: tuple[float, float]) -> None:
    x, y, w, h = play(scripted(), 0.9, at=found)[0].box_xywh
    assert (x + w / 2, y + h / 2) == pytest.approx(expected)


def test_weak_frames_lead_to_lost() -> None:
    assert names(play(scripted(), 0.9, 0.45, 0.1, 0.1, 0.1, 0.5, 0.1)) == "TTUULLL"
    assert names(play(scripted(), 0.1, 0.1, 0.9, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1)) == "UUTUUUUUL"


def test_lost_falls_back_to_the_last_believed_box_and_freezes_it() -> None:
    tracker = scripted()
    believed = play(tracker, 0.9, 0.9, at=(130.0, 100.0))[-1]
    doubtful = play(tracker, 0.1, 0.1, at=(150.0, 60.0))
    assert doubtful[-1].box_xywh != believed.box_xywh  # the best guess moves, it is only doubtful
    assert play(tracker, 0.1, at=(170.0, 60.0))[0].box_xywh == believed.box_xywh
    rng = np.random.default_rng(0)
    for _ in range(200):  # whatever a runner answers below found_above
        box = (*rng.uniform(-100, 400, 2), *rng.uniform(1, 300, 2))
        tracker.runner.answer = lambda window, box=box: (box, float(rng.uniform(0, 0.59)))
        track = tracker.update(FRAME)
        assert track.state is State.LOST
        assert track.box_xywh == believed.box_xywh
    assert track.frame == 205


@pytest.mark.parametrize("count", [1, 2, 5])
def test_lost_searches_its_windows_a_frame_and_ever_more_of_the_image(count: int) -> None:
    tracker = lost(lost_windows=count)
    seen, growth = np.zeros((HEIGHT, WIDTH), bool), []
    for _ in range(80):
        play(tracker, 0.1)
        for w in tracker.runner.windows[-1]:
            seen[max(w.top, 0) : w.top + w.height, max(w.left, 0) : w.left + w.width] = True
        growth.append(int(seen.sum()))
    assert {len(windows) for windows in tracker.runner.windows} == {count}
    assert len(set(tracker.runner.windows[0])) == count  # no window is wasted on what another one sees
    places = [windows[0] for windows in tracker.runner.windows]
    assert len(set(places)) == 1  # the place of loss, every frame: most targets come back there
    assert (places[0].left + places[0].width / 2, places[0].top + places[0].height / 2) == pytest.approx(
        CENTRE, abs=0.5
    )
    if count == 1:
        assert growth[0] == growth[-1]
    else:
        assert growth[0] < growth[3] < growth[-1] == WIDTH * HEIGHT


def centre_of(window: Window) -> tuple[float, float]:
    return window.left + window.width / 2, window.top + window.height / 2


def strayed(second_look: float = 1.25, **tracking: float) -> SiamTracker:
    """A tracker that saw its target at `CENTRE`, and then next to nothing, 40 px to the right."""
    tracker = scripted(second_look=second_look, motion_rate=0.0, **tracking)
    play(tracker, 0.9, 0.9)
    assert names(play(tracker, 0.1, at=(152.0, 90.0))) == "U"
    tracker.runner.windows.clear()
    return tracker


def test_a_second_look_is_wider_and_where_the_target_was_last_seen() -> None:
    tracker = strayed()
    play(tracker, 0.1, at=(180.0, 90.0))
    play(tracker, 0.9, at=(180.0, 90.0))
    play(tracker, 0.9)
    first, second, third = tracker.runner.windows
    assert [len(windows) for windows in (first, second, third)] == [2, 2, 1]  # until a frame is not weak
    assert first[1] == second[1]
    assert centre_of(first[1]) == pytest.approx(CENTRE, abs=0.5)
    assert centre_of(first[0]) == pytest.approx((152, 90), abs=0.5)
    assert first[1].width == pytest.approx(1.25 * first[0].width, abs=1)
    assert tracker.runner.windows[0][0].width == tracker.runner.windows[2][0].width


@pytest.mark.parametrize("setting", [{"second_look": 0.0}, {"lost_windows": 1}])
def test_no_second_look_is_taken_where_none_is_wanted(setting: dict[str, Any]) -> None:
    tracker = strayed(**setting)
    play(tracker, 0.1)
    assert [len(windows) for windows in tracker.runner.windows] == [1]


def seen(tracker: SiamTracker, expected: float, elsewhere: Answer | float) -> Track:
    """The next frame: what is found where the target is expected, in the window's middle, and in the second window.

    A score alone stands for a find in the middle.
    """
    answers = iter([expected, elsewhere])

    def answer(window: Window) -> Answer:
        given = next(answers)
        return given if isinstance(given, tuple) else ((*centre_of(window), 24, 20), given)

    tracker.runner.answer = answer
    return tracker.update(FRAME)


@pytest.mark.parametrize(
    ("expected", "elsewhere", "goes_back"),
    [
        (0.1, 0.3, True),
        (0.1, 0.19, False),
        (0.35, 0.3, False),
        (0.05, 0.1, False),
        (math.nan, 0.3, True),
        (0.1, math.nan, False),
        (0.1, ((math.nan, 90, 24, 20), 0.9), False),
    ],
)
def test_a_second_look_counts_if_it_is_better_and_not_weak(
    expected: float, elsewhere: Answer | float, goes_back: bool
) -> None:
    track = seen(strayed(), expected, elsewhere)
    x, y, w, h = track.box_xywh
    assert (x + w / 2, y + h / 2) == pytest.approx(CENTRE if goes_back else (152, 90), abs=0.6)
    assert track.score == pytest.approx(elsewhere if goes_back else expected)


def test_a_target_seen_elsewhere_is_uncertain_and_has_no_velocity_there() -> None:
    tracker = strayed()
    tracker.tracking = dataclasses.replace(tracker.tracking, motion_rate=1.0)
    assert seen(tracker, 0.1, 0.9).state is State.UNCERTAIN
    assert names(play(tracker, 0.9)) == "T"
    assert centre_of(tracker.runner.windows[-1][0]) == pytest.approx(CENTRE, abs=0.6)


def test_a_look_alike_seen_elsewhere_does_not_put_off_the_loss() -> None:
    tracker = strayed()
    assert seen(tracker, 0.1, 0.3).state is State.UNCERTAIN
    assert names(play(tracker, 0.3, 0.3)) == "LL"  # with the weak frame before it three: `lost_after`
    tracker = strayed()
    seen(tracker, 0.1, 0.3)
    assert names(play(tracker, 0.45, 0.3, 0.3, 0.3)) == "UUUU"  # confirmed


def test_until_it_is_confirmed_the_target_is_looked_for_where_it_was_before() -> None:
    tracker = strayed()
    seen(tracker, 0.1, ((130, 110, 24, 20), 0.3))
    assert seen(tracker, 0.1, 0.19).state is State.LOST
    tracker = strayed()
    seen(tracker, 0.1, ((130, 110, 24, 20), 0.45))
    play(tracker, 0.1, at=(130.0, 110.0))
    assert len(tracker.runner.windows[-1]) == 1
    play(tracker, 0.1)
    assert centre_of(tracker.runner.windows[-1][1]) == pytest.approx((130, 110), abs=0.6)


def test_a_second_look_may_find_the_target_where_it_is_expected() -> None:
    tracker = strayed()
    tracker.tracking = dataclasses.replace(tracker.tracking, motion_rate=1.0)
    assert seen(tracker, 0.3, ((155, 91, 24, 20), 0.31)).box_xywh[0] == pytest.approx(155 - 12, abs=0.6)
    assert names(play(tracker, 0.3, 0.3, 0.3)) == "UUU"  # nothing to confirm: none of these frames is weak
    assert centre_of(tracker.runner.windows[1][0])[0] > 155.5  # it is taken for movement


def test_a_lost_target_has_nothing_to_confirm() -> None:
    tracker = strayed()
    seen(tracker, 0.1, 0.3)
    tracker.mark_lost()
    assert names(play(tracker, 0.7, 0.3, 0.3, 0.3)) == "UUUU"


@pytest.mark.parametrize(("score", "again"), [(0.19, False), (0.39, False), (0.41, True), (0.59, True)])
def test_a_glimpse_of_a_lost_target_is_looked_at_once_more(score: float, again: bool) -> None:
    tracker = lost(lost_windows=2)
    play(tracker, 0.1)
    assert seen(tracker, 0.1, ((200.0, 150.0, 24, 20), score)).state is State.LOST
    play(tracker, 0.1)
    play(tracker, 0.1)
    place, tile = tracker.runner.windows[2]
    assert (centre_of(tile) == pytest.approx((200, 150), abs=0.5)) == again
    assert tile.width == place.width
    assert centre_of(tracker.runner.windows[3][1]) != centre_of(tile)  # once
    assert {len(windows) for windows in tracker.runner.windows} == {2}


def test_a_glimpse_at_the_place_of_loss_takes_no_window_more_than_there_are() -> None:
    tracker = lost(lost_windows=1)
    play(tracker, 0.5, 0.1)
    assert [len(windows) for windows in tracker.runner.windows] == [1, 1]
    assert tracker.runner.windows[0] == tracker.runner.windows[1]


def test_no_place_is_preferred_while_lost() -> None:
    tracker = scripted(window_influence=0.3)
    play(tracker, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.7, 0.9)
    assert tracker.runner.influence == [0.3, 0.3, 0.3, 0.3, 0, 0, 0, 0.3]  # LOST from the fourth frame's end on


def test_size_is_frozen_while_lost() -> None:
    tracker = lost()
    tracker.runner.answer = lambda window: ((*CENTRE, 200, 100), 0.5)
    for _ in range(20):
        assert tracker.update(FRAME).box_xywh[2:] == START[2:]
    np.testing.assert_allclose(np.concatenate(tracker.runner.sizes), [START[2:]] * 40, rtol=1e-5)


FAR = (290.0, 210.0)


def answer_far(window: Window) -> Answer:
    """Only a window that holds the far place whole sees a target; the others see clutter in their middle."""
    inside = window.left + 12 <= FAR[0] <= window.left + window.width - 12
    inside &= window.top + 10 <= FAR[1] <= window.top + window.height - 10
    middle = (window.left + window.width / 2, window.top + window.height / 2)
    return ((*FAR, 24, 20), 0.8) if inside else ((*middle, 24, 20), 0.15)


def test_a_target_far_away_is_found_again() -> None:
    tracker = lost()
    tracker.runner.answer = answer_far
    tracks = [tracker.update(FRAME) for _ in range(60)]
    states = names(tracks)
    found = states.index("U")
    assert found > 0  # not in the first tile: it had to be searched for
    assert states == "L" * found + "U" + "T" * (59 - found)
    assert all(track.box_xywh == START for track in tracks[:found])
    assert tracks[found].box_xywh == pytest.approx((FAR[0] - 12, FAR[1] - 10, 24, 20), abs=1e-2)
    assert tracks[found].score == pytest.approx(0.8)
    assert len(tracker.runner.windows[found + 1]) == 1  # found: one window again, round the new place
    window = tracker.runner.windows[found + 1][0]
    assert (window.left + window.width / 2, window.top + window.height / 2) == pytest.approx(FAR, abs=0.5)
    # Lost again, it is the new place that counts.
    assert names(play(tracker, 0.1, 0.1, 0.1, at=FAR)) == "UUL"
    assert tracker.update(FRAME).box_xywh == pytest.approx((FAR[0] - 12, FAR[1] - 10, 24, 20), abs=1e-2)


def test_a_find_that_is_not_confirmed_goes_back_to_the_old_place() -> None:
    tracker = lost()
    first_tile = None
    tracker.runner.answer = answer_far
    while tracker.state is State.LOST:
        track = tracker.update(FRAME)
        first_tile = first_tile or tracker.runner.windows[0][1]
    assert track.box_xywh[:2] != START[:2]
    tracks = play(tracker, 0.1, 0.1, 0.1, at=FAR)
    assert names(tracks) == "UUL"
    assert tracks[-1].box_xywh == pytest.approx(START)
    play(tracker, 0.1)
    assert tracker.runner.windows[-1][1] == first_tile  # and the search begins anew, near by


def test_mark_lost_is_a_loss_like_any_other() -> None:
    tracker = scripted()
    believed = play(tracker, 0.9, at=(130.0, 100.0))[0]
    play(tracker, 0.3, at=(150.0, 60.0))
    tracker.mark_lost()
    assert tracker.state is State.LOST
    (track,) = play(tracker, 0.5)
    assert (track.state, track.box_xywh) == (State.LOST, believed.box_xywh)
    tracker.mark_lost()  # the search goes on, it does not start over
    play(tracker, 0.5)
    assert tracker.runner.windows[-1][1] != tracker.runner.windows[-2][1]
    assert names(play(tracker, 0.6, 0.6)) == "UT"
    tracker.reset()
    tracker.mark_lost()
    assert tracker.state is State.IDLE


def test_init_while_lost_starts_over() -> None:
    tracker = lost()
    assert tracker.init(FRAME, (200, 150, 30, 30)) == Track((200, 150, 30, 30), 1.0, State.TRACKING, 0)
    assert names(play(tracker, 0.1, 0.1, 0.9)) == "UUT"


def test_a_failing_runner_leaves_the_track_as_it_was() -> None:
    tracker = scripted()
    before = play(tracker, 0.1)[0]

    def fail(window: Window) -> Answer:
        raise OSError("device gone")

    tracker.runner.answer = fail
    with pytest.raises(OSError, match="device gone"):
        tracker.update(FRAME)
    after = play(tracker, 0.1)[0]
    assert (before.frame, after.frame) == (1, 2)
    assert names(play(tracker, 0.1)) == "L"  # the failed frame was not counted as weak


def test_tracking_parameters_come_from_the_manifest_unless_given() -> None:
    runner = ScriptedRunner()
    assert SiamTracker(runner).tracking is runner.bundle.manifest.tracking
    given = TrackingSpec(lost_windows=7)
    assert SiamTracker(runner, given).tracking is given


def test_the_runner_is_told_how_large_the_target_is() -> None:
    tracker = scripted()
    tracker.init(np.zeros((100, 200, 3), np.uint8), (20, 30, 24, 40))
    assert tracker.runner.size == (24.0, 40.0)  # type: ignore[attr-defined]
    tracker.init(np.zeros((100, 200, 3), np.uint8), (180, 30, 40, 50))
    assert tracker.runner.size == (20.0, 50.0)  # type: ignore[attr-defined]  # what is inside the image


def test_close_closes_the_runner() -> None:
    tracker = scripted()
    tracker.close()
    assert tracker.runner.closed
    assert tracker.state is State.IDLE


def test_an_answer_that_is_no_number_is_no_evidence() -> None:
    # An FP16 overflow gives NaN once; the track must neither jump nor break.
    tracker = scripted()
    believed = play(tracker, 0.9)[0].box_xywh
    tracker.runner.answer = lambda window: ((math.nan,) * 4, math.nan)
    track = tracker.update(FRAME)
    assert track.box_xywh == believed
    assert (track.score, track.state) == (0.0, State.UNCERTAIN)
    assert names(play(tracker, 0.9)) == "T"


def test_the_search_leads_a_moving_target() -> None:
    tracker = scripted(motion_rate=0.5)
    for step in range(1, 40):  # 5 px a frame to the right
        play(tracker, 1.0, at=(CENTRE[0] + 5 * step, CENTRE[1]))
    window = tracker.runner.windows[-1][0]
    # The last search came before the last step was seen: it was centred where that step would lead.
    assert window.left + window.width / 2 == pytest.approx(CENTRE[0] + 5 * 39, abs=1)
    assert window.top + window.height / 2 == pytest.approx(CENTRE[1], abs=1)


def test_without_a_motion_rate_the_search_stays_where_the_target_was() -> None:
    tracker = scripted(motion_rate=0.0)
    play(tracker, 1.0, 1.0, at=(CENTRE[0] + 20, CENTRE[1]))
    play(tracker, 1.0, at=(CENTRE[0] + 40, CENTRE[1]))
    window = tracker.runner.windows[-1][0]
    assert window.left + window.width / 2 == pytest.approx(CENTRE[0] + 20, abs=1)


def test_weak_evidence_coasts_on_at_the_old_velocity() -> None:
    tracker = scripted(motion_rate=1.0)
    for step in range(1, 6):
        play(tracker, 1.0, at=(CENTRE[0] + 5 * step, CENTRE[1]))
    at = (CENTRE[0] + 25, CENTRE[1])
    play(tracker, 0.0, at=at)  # a score of nothing says the target stands still: not believed
    play(tracker, 0.0, at=at)
    window = tracker.runner.windows[-1][0]
    assert window.left + window.width / 2 == pytest.approx(at[0] + 5, abs=1)


# ------------------------------------------------------------------------------------------------- template update


def renewing(min_score: float = 0.6, interval: int = 1, **tracking: float) -> SiamTracker:
    """A tracker of a model that renews its template, on its first frame."""
    tracker = SiamTracker(ScriptedRunner(UpdateSpec(min_score, interval)), TrackingSpec(**tracking))
    tracker.init(FRAME, START)
    return tracker


def renewals(tracker: SiamTracker, *scores: float) -> str:
    """Play the scores; U for each frame after which the template was renewed."""
    marks = ""
    for score in scores:
        before = len(tracker.runner.renewed)
        play(tracker, score)
        marks += ".U"[len(tracker.runner.renewed) - before]
    return marks


def test_the_template_is_renewed_after_good_frames_only() -> None:
    tracker = renewing(min_score=0.625)
    assert renewals(tracker, 0.9, 0.625, 0.64, 0.55, 0.45, 0.7) == "U.U..U"  # above, not at it ("s > 1.18", D13)


def test_a_lost_target_is_sought_as_it_was_at_the_start() -> None:
    """What hid it may be in the renewed template."""
    tracker = renewing()
    first = tracker._target.features
    assert renewals(tracker, 0.9, 0.9) == "UU"
    play(tracker, 0.9)
    assert tracker.runner.sought[-1] is not first
    tracker.mark_lost()
    assert renewals(tracker, 0.1, 0.1) == ".."
    assert all(features is first for features in tracker.runner.sought[-2:])
    assert renewals(tracker, 0.9, 0.9)[-1] == "U"  # found, it is renewed again
    assert tracker._target.features.tensors[:1] == first.tensors and len(tracker._target.features.tensors) == 2


@pytest.mark.parametrize(("interval", "marks"), [(1, "UUUUUU"), (2, ".U.U.U"), (4, "...U..")])
def test_an_interval_lies_between_two_renewals(interval: int, marks: str) -> None:
    assert renewals(renewing(interval=interval), *[0.9] * 6) == marks


def test_a_good_frame_within_the_interval_is_not_made_up_for() -> None:
    assert renewals(renewing(interval=3), 0.9, 0.9, 0.5, 0.9, 0.9, 0.9, 0.9) == "...U..U"


def test_no_renewal_while_the_target_is_doubtful_or_lost() -> None:
    tracker = renewing(min_score=0.0)  # the state alone decides
    tracks = []
    for score, renewed in [
        (0.9, True), (0.3, False), (0.45, False), (0.6, True),  # UNCERTAIN holds up to 0.5
        (0.1, False), (0.1, False), (0.1, False),  # LOST
        (0.5, False), (0.7, False), (0.7, True),  # found is UNCERTAIN first
    ]:  # fmt: skip
        before = len(tracker.runner.renewed)
        tracks += play(tracker, score)
        assert (len(tracker.runner.renewed) > before) is renewed, names(tracks)
    assert names(tracks) == "TUUTUULLUT"


@pytest.mark.parametrize(
    ("at", "size", "valid"),
    [
        ((-3.0, 90.0), (24, 20), False),
        ((100.0, HEIGHT + 1.0), (24, 20), False),
        ((WIDTH - 1.0, 90.0), (24, 20), True),
        (CENTRE, (0.0, 20), False),
    ],
)
def test_a_box_must_be_valid_to_learn_from(at: tuple[float, float], size: tuple[float, float], valid: bool) -> None:
    tracker = renewing()
    tracker.runner.answer = lambda window: ((*at, *size), 0.9)
    assert tracker.update(FRAME).state is State.TRACKING
    assert bool(tracker.runner.renewed) is valid


def test_the_new_template_is_cropped_at_the_new_box_and_sought_from_the_next_frame_on() -> None:
    tracker = renewing(size_rate=1.0)
    first = tracker.runner.sought
    play(tracker, 0.9, at=(130.0, 95.0))
    (window,) = tracker.runner.renewed
    assert (window.left + window.width / 2, window.top + window.height / 2) == pytest.approx((130, 95), abs=0.5)
    assert window.width == round(context_size(24, 20))  # a template window, not a search window
    play(tracker, 0.9)
    assert [len(features.tensors) for features in first] == [1, 2]
    assert first[1].tensors[1] == window
    tracker.init(FRAME, START)
    play(tracker, 0.5)
    assert len(first[-1].tensors) == 1  # a new target starts with its own template


def test_a_model_without_update_never_renews() -> None:
    tracker = scripted()
    play(tracker, *[0.99] * 5)
    assert tracker.runner.renewed == []
    with pytest.raises(ValueError, match="script has no update graph"):
        SiamTracker(ScriptedRunner(), template_update=UpdateSpec(0.5))


def test_update_parameters_come_from_the_manifest_unless_given() -> None:
    runner = ScriptedRunner(UpdateSpec(0.6))
    assert SiamTracker(runner).template_update == UpdateSpec(0.6)
    tracker = SiamTracker(runner, template_update=UpdateSpec(1.0))
    tracker.init(FRAME, START)
    assert renewals(tracker, 1.0, 1.0) == ".."  # 1 keeps the first template


def test_a_renewal_that_fails_keeps_the_track_and_the_old_template() -> None:
    tracker = renewing(interval=2)
    runner = tracker.runner
    good = runner.update

    def fail(*arguments: object) -> Features:
        raise OSError("device gone")

    play(tracker, 0.9)
    runner.update = fail
    with pytest.raises(OSError, match="device gone"):
        play(tracker, 0.9, at=(118.0, 90.0))
    runner.update = good
    (track,) = play(tracker, 0.9, at=(118.0, 90.0))
    assert (track.frame, track.state) == (3, State.TRACKING)  # the frame of the failure was followed
    assert len(runner.sought[-1].tensors) == 1
    assert runner.renewed == []  # and the try counts in the interval
    play(tracker, 0.9)
    assert len(runner.renewed) == 1
