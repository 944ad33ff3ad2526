from __future__ import annotations

import dataclasses

import pytest

from siamtrack.state import State, Status, Thresholds, advance

# lost_below < uncertain_below < tracking_above: .2, .4, .5; three weak frames; found from .6 on.
THRESHOLDS = Thresholds(tracking_above=0.5, uncertain_below=0.4, lost_below=0.2, lost_after=3, found_above=0.6)
LETTERS = {State.IDLE: "I", State.TRACKING: "T", State.UNCERTAIN: "U", State.LOST: "L"}


def run(start: State, scores: list[float], thresholds: Thresholds = THRESHOLDS) -> str:
    """One letter a frame."""
    status, letters = Status(start), ""
    for score in scores:
        status = advance(status, score, thresholds)
        letters += LETTERS[status.state]
    return letters


@pytest.mark.parametrize(
    ("start", "scores", "expected"),
    [
        (State.TRACKING, [], ""),
        (State.IDLE, [0.0, 0.5, 1.0], "III"),
        (State.TRACKING, [0.9, 0.5, 0.9], "TTT"),
        # Between the two thresholds nothing changes, in either direction.
        (State.TRACKING, [0.45, 0.4, 0.49], "TTT"),
        (State.UNCERTAIN, [0.45, 0.4, 0.49], "UUU"),
        (State.TRACKING, [0.39, 0.45, 0.49, 0.5, 0.45], "UUUTT"),
        # Doubtful but not weak: uncertain for ever, never lost.
        (State.TRACKING, [0.3] * 10, "U" * 10),
        (State.TRACKING, [0.2] * 10, "U" * 10),
        # Weak frames count, and one good frame starts the count anew.
        (State.TRACKING, [0.1, 0.1, 0.1], "UUL"),
        (State.TRACKING, [0.1, 0.1, 0.9, 0.1, 0.1, 0.1], "UUTUUL"),
        (State.TRACKING, [0.1, 0.1, 0.45, 0.1, 0.1, 0.1], "UUUUUL"),
        (State.TRACKING, [0.1, 0.1, 0.3, 0.1, 0.1, 0.3], "UUUUUU"),
        # LOST is left at found_above only, by way of UNCERTAIN, whose count starts at 0.
        (State.LOST, [0.0, 0.5, 0.59], "LLL"),
        (State.LOST, [0.6, 0.5], "UT"),
        (State.LOST, [1.0, 1.0], "UT"),
        (State.LOST, [0.6, 0.1, 0.1, 0.1], "UUUL"),
    ],
)
def test_sequence_of_states(start: State, scores: list[float], expected: str) -> None:
    assert run(start, scores) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # Seen elsewhere in the second frame: weak until 0.4 is reached, then only under 0.2.
        ([0.1, 0.3, 0.3], "UUL"),
        ([0.1, 0.3, 0.39, 0.5], "UULL"),
        ([0.1, 0.3, 0.4, 0.3, 0.3, 0.3, 0.5], "UUUUUUT"),
        ([0.1, 0.3, 0.5, 0.3, 0.3, 0.3], "UUTUUU"),
        ([0.1, 0.45, 0.3, 0.3, 0.3], "UUUUU"),
        ([0.1, 0.9, 0.3, 0.3, 0.3], "UUUUU"),
        ([0.1, 0.9, 0.9, 0.1, 0.1, 0.1], "UUTUUL"),
    ],
)
def test_what_was_seen_elsewhere_is_weak_until_confirmed(scores: list[float], expected: str) -> None:
    status, letters = Status(State.TRACKING), ""
    for frame, score in enumerate(scores):
        status = advance(status, score, THRESHOLDS, elsewhere=frame == 1)
        letters += LETTERS[status.state]
    assert letters == expected


def test_where_a_lost_target_is_found_does_not_matter() -> None:
    for elsewhere in (False, True):
        assert advance(Status(State.LOST), 0.6, THRESHOLDS, elsewhere) == Status(State.UNCERTAIN)
        assert advance(Status(State.LOST), 0.5, THRESHOLDS, elsewhere) == Status(State.LOST)


def test_one_weak_frame_is_enough_where_the_thresholds_say_so() -> None:
    assert run(State.TRACKING, [0.9, 0.19], dataclasses.replace(THRESHOLDS, lost_after=1)) == "TL"


def test_equal_thresholds_switch_without_hysteresis() -> None:
    single = Thresholds(0.5, 0.5, 0.5, 2, 0.5)
    assert run(State.TRACKING, [0.49, 0.5, 0.49, 0.49, 0.5, 0.5], single) == "UTULUT"


def test_weak_frames_are_counted_in_the_status() -> None:
    once = advance(Status(State.TRACKING), 0.1, THRESHOLDS)
    assert (once.weak_frames, advance(once, 0.1, THRESHOLDS).weak_frames) == (1, 2)
    assert advance(once, 0.9, THRESHOLDS).weak_frames == 0


@pytest.mark.parametrize(
    ("change", "came"),
    [
        ({"tracking_above": 0.3}, "0.2, 0.4, 0.3"),
        ({"tracking_above": 1.1}, "0.2, 0.4, 1.1"),
        ({"uncertain_below": 0.1}, "0.2, 0.1, 0.5"),
        ({"lost_below": -0.1}, "-0.1, 0.4, 0.5"),
        ({"lost_below": float("nan")}, "nan, 0.4, 0.5"),
        ({"found_above": 0.1}, "found_above .* got 0.1"),
        ({"found_above": 1.5}, "found_above .* got 1.5"),
        ({"found_above": float("nan")}, "found_above .* got nan"),
        ({"lost_after": 0}, "lost_after .* got 0"),
    ],
)
def test_thresholds_out_of_order_are_refused_with_their_values(change: dict[str, float], came: str) -> None:
    with pytest.raises(ValueError, match=came):
        dataclasses.replace(THRESHOLDS, **change)


@pytest.mark.parametrize("state", list(State))
def test_a_state_reads_as_its_name(state: State) -> None:
    assert f"{state}" == str(state) == state.name  # str(State.LOST) would be "State.LOST" by default
