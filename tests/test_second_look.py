"""Second looks: where and when they are taken, and what is made of what they show. The network is a script."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from siamtrack import SiamTracker, State
from tests.scripted import (
    CENTRE,
    Answer,
    centre_of,
    names,
    play,
    scripted,
    seen,
)


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
