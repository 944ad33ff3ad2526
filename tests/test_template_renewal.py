"""When a tracker renews its template, and from what. The network is a script."""

from __future__ import annotations

import pytest

from siamtrack import SiamTracker, State
from siamtrack.bundle import TrackingSpec, UpdateSpec
from siamtrack.crop import context_size
from siamtrack.runners import Features
from tests.scripted import (
    CENTRE,
    FRAME,
    HEIGHT,
    START,
    WIDTH,
    ScriptedRunner,
    names,
    play,
    scripted,
)


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
