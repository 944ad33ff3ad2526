"""How a tracker acts on what a network says: box, states, search. The network is a script."""

from __future__ import annotations

import math

import numpy as np
import pytest

from siamtrack import SiamTracker, State, Track
from siamtrack.bundle import TrackingSpec
from siamtrack.crop import Window
from tests.scripted import (
    CENTRE,
    FRAME,
    HEIGHT,
    START,
    WIDTH,
    Answer,
    ScriptedRunner,
    centre_of,
    lost,
    names,
    play,
    scripted,
    seen,
)


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
