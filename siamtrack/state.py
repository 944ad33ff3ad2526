"""The one state machine: is the target being tracked, doubtful, or lost?

Pure functions on frozen values, so that every transition can be tested and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(str, Enum):
    """What a tracker knows of its target."""

    IDLE = "IDLE"
    """No target was given."""
    TRACKING = "TRACKING"
    """The box can be relied on."""
    UNCERTAIN = "UNCERTAIN"
    """The box is the best guess, but evidence is weak."""
    LOST = "LOST"
    """The target is not seen. The box is the last one believed, frozen; the tracker searches around it."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Thresholds:
    """Raw scores in [0, 1] that move the state; calibrated per model and kept in its manifest.

    Attributes:
        tracking_above: UNCERTAIN becomes TRACKING at this score.
        uncertain_below: TRACKING becomes UNCERTAIN under this score; at most `tracking_above`.
        lost_below: a frame under this score is weak; at most `uncertain_below`. See `advance` for others that are.
        lost_after: this many weak frames in a row make the target LOST.
        found_above: LOST becomes UNCERTAIN at this score, found anywhere in the searched area.
    """

    tracking_above: float
    uncertain_below: float
    lost_below: float
    lost_after: int
    found_above: float

    def __post_init__(self) -> None:
        if not 0 <= self.lost_below <= self.uncertain_below <= self.tracking_above <= 1:
            raise ValueError(
                "thresholds must satisfy 0 <= lost_below <= uncertain_below <= tracking_above <= 1, got "
                f"{self.lost_below}, {self.uncertain_below}, {self.tracking_above}"
            )
        if not self.lost_below <= self.found_above <= 1:
            raise ValueError(f"found_above must be in [lost_below, 1], got {self.found_above}")
        if self.lost_after < 1:
            raise ValueError(f"lost_after must be at least 1 frame, got {self.lost_after}")


@dataclass(frozen=True)
class Status:
    """A state and what it needs to remember.

    Attributes:
        state: see `State`.
        weak_frames: how many weak frames came in a row.
        unconfirmed: the target was seen elsewhere than expected, and no frame has reached `uncertain_below` since.
    """

    state: State
    weak_frames: int = 0
    unconfirmed: bool = False


def advance(status: Status, score: float, thresholds: Thresholds, elsewhere: bool = False) -> Status:
    """The status after a frame with this score.

    What was seen elsewhere may be a look-alike: it is UNCERTAIN at first, and until a score of `uncertain_below`
    confirms it, its frames are weak ones.

    Args:
        status: before the frame; IDLE stays IDLE.
        score: raw confidence of the frame's best cell, in [0, 1].
        thresholds: see `Thresholds`.
        elsewhere: the best cell is not where the target was expected, but where it was last seen. Without meaning while
            LOST.
    """
    if status.state is State.IDLE:
        return status
    if status.state is State.LOST:
        return Status(State.UNCERTAIN) if score >= thresholds.found_above else status
    unconfirmed = (elsewhere or status.unconfirmed) and score < thresholds.uncertain_below
    weak_frames = status.weak_frames + 1 if unconfirmed or score < thresholds.lost_below else 0
    if weak_frames >= thresholds.lost_after:
        return Status(State.LOST)
    if elsewhere or score < thresholds.uncertain_below:
        return Status(State.UNCERTAIN, weak_frames, unconfirmed)
    return Status(State.TRACKING if score >= thresholds.tracking_above else status.state)
