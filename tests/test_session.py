"""Streams: which frame a box belongs to, fast-forward, and what a stream does to a track.

Pictures come from the rendered scene and are followed by the shipped model, so that a box started a moment ago can be
compared with one that was followed from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from siamtrack import SiamTracker, State
from siamtrack.scene import SceneFrame
from siamtrack.session import FrameRing, InitRequest, Report, Session

MS = 1_000_000
PERIOD = 33 * MS
T0 = 1_000_000 * MS


@dataclass(frozen=True, eq=False)
class Shot:
    """A frame for tests; a picture of None does not decode."""

    stamp_ns: int
    image: np.ndarray | None = field(default=None, repr=False)
    size_bytes: int = 1000

    def bgr(self) -> np.ndarray:
        if self.image is None:
            raise ValueError("picture does not decode")
        return self.image


def stamp(index: int) -> int:
    return T0 + index * PERIOD


# --------------------------------------------------------------------------------------------------------------- ring


def stamps(ring: FrameRing) -> list[int]:
    return [frame.stamp_ns for frame in ring.since(0)[0]]


def test_the_ring_keeps_a_span_of_time() -> None:
    ring = FrameRing(span_s=0.1, limit_mb=1)
    for index in range(10):
        assert not ring.append(Shot(stamp(index)))
    assert stamps(ring) == [stamp(index) for index in (6, 7, 8, 9)]


def test_the_ring_keeps_to_its_memory_limit_but_for_the_newest() -> None:
    ring = FrameRing(span_s=60, limit_mb=0.0025)
    for index in range(5):
        ring.append(Shot(stamp(index)))
    assert stamps(ring) == [stamp(3), stamp(4)]
    ring.append(Shot(stamp(5), size_bytes=10_000_000))
    assert stamps(ring) == [stamp(5)]
    ring.append(Shot(stamp(6)))
    assert stamps(ring) == [stamp(6)]


def test_a_jump_back_empties_the_ring_and_a_swap_on_the_way_does_not() -> None:
    ring = FrameRing()
    for index in range(30):
        ring.append(Shot(stamp(index)))
    assert not ring.append(Shot(stamp(28)))
    assert len(stamps(ring)) == 31
    assert ring.append(Shot(stamp(0)))
    assert stamps(ring) == [stamp(0)]
    ring.clear()
    assert stamps(ring) == []
    assert ring.since(stamp(0)) == ([], "")


@pytest.mark.parametrize("unstamped", [0, -5])
def test_unstamped_frames_are_not_kept(unstamped: int) -> None:
    ring = FrameRing()
    ring.append(Shot(stamp(0)))
    assert not ring.append(Shot(unstamped))
    assert stamps(ring) == [stamp(0)]


def test_since() -> None:
    ring = FrameRing()
    shots = [Shot(stamp(index)) for index in range(4)]
    for shot in shots:
        ring.append(shot)
    assert ring.since(stamp(1)) == (shots[1:], "")
    later, warning = ring.since(stamp(1) + 1)
    assert later == shots[2:]
    assert "no frame has the box's stamp" in warning
    oldest, warning = ring.since(stamp(0) - 1500 * MS)
    assert oldest == shots
    assert "1.50 s older than the oldest" in warning
    assert ring.since(stamp(3) + 1) == ([], "")


# ------------------------------------------------------------------------------------------------------------- session


class Stream:
    """A session and the scene's frames: the ring gets each frame before the session does."""

    def __init__(self, tracker: SiamTracker, scene: list[SceneFrame]) -> None:
        self.session = Session(tracker, FrameRing())
        self.scene = scene

    def show(self, index: int, stamp_ns: int | None = None, image: np.ndarray | None = None) -> Report:
        shot = Shot(stamp(index) if stamp_ns is None else stamp_ns, self.scene[index].image if image is None else image)
        return self.pass_on(shot)

    def pass_on(self, shot: Shot) -> Report:
        self.session.ring.append(shot)
        return self.session.handle(shot)

    def box(self, index: int, stamp_ns: int = 0, target_id: str = "") -> None:
        self.session.request(InitRequest(self.scene[index].box_xywh, stamp_ns, target_id))


@pytest.fixture
def stream(tracker: SiamTracker, scene: list[SceneFrame]) -> Stream:
    return Stream(tracker, scene)


def followed(tracker: SiamTracker, scene: list[SceneFrame], first: int, last: int) -> tuple:
    """The box in frame `last` when the target is followed from frame `first` through all of them."""
    track = tracker.init(scene[first].image, scene[first].box_xywh)
    for frame in scene[first + 1 : last + 1]:
        track = tracker.update(frame.image)
    tracker.reset()
    return track.box_xywh


def test_idle_without_a_box(stream: Stream) -> None:
    report = stream.show(0)
    assert (report.state, report.track, report.reason, report.warning) == (State.IDLE, None, "", "")
    assert report.image is None  # nothing was decoded for nobody


def test_an_unstamped_box_starts_on_the_next_frame(stream: Stream, tracker: SiamTracker) -> None:
    expected = followed(tracker, stream.scene, 1, 3)
    stream.show(0)
    stream.box(1, target_id="rover")
    assert stream.session.waiting
    report = stream.show(1)
    assert report.track is not None
    assert (report.track.frame, report.track.box_xywh) == (0, pytest.approx(stream.scene[1].box_xywh))
    assert (report.state, report.target_id, report.warning) == (State.TRACKING, "rover", "")
    assert not stream.session.waiting
    stream.show(2)
    report = stream.show(3)
    assert report.track is not None
    assert (report.track.box_xywh, report.target_id) == (expected, "rover")
    assert report.image is stream.scene[3].image


def test_a_box_before_the_first_image_starts_on_that(stream: Stream) -> None:
    stream.box(0)
    assert stream.show(0).state is State.TRACKING


@pytest.mark.parametrize("drawn_on", [9, 8, 3, 0])
def test_a_stamped_box_gives_what_following_from_there_had_given(
    stream: Stream, tracker: SiamTracker, drawn_on: int
) -> None:
    expected = followed(tracker, stream.scene, drawn_on, 9)
    for index in range(9):
        stream.show(index)
    stream.box(drawn_on, stamp(drawn_on))
    report = stream.show(9)
    assert report.track is not None
    assert (report.track.box_xywh, report.track.frame, report.warning) == (expected, 9 - drawn_on, "")


def test_a_box_between_frames_starts_on_the_later_one(stream: Stream, tracker: SiamTracker) -> None:
    expected = followed(tracker, stream.scene, 3, 6)
    for index in range(6):
        stream.show(index)
    stream.box(3, stamp(2) + 1)
    report = stream.show(6)
    assert report.track is not None
    assert report.track.box_xywh == expected
    assert "no frame has the box's stamp" in report.warning


def test_a_box_older_than_the_buffer_starts_on_the_oldest(stream: Stream, tracker: SiamTracker) -> None:
    expected = followed(tracker, stream.scene, 0, 4)
    for index in range(4):
        stream.show(index)
    stream.box(0, stamp(0) - 700 * MS)
    report = stream.show(4)
    assert report.track is not None
    assert report.track.box_xywh == expected
    assert "0.70 s older than the oldest buffered frame: starting on that one" in report.warning


def test_a_box_of_the_future_waits_for_its_frame(stream: Stream) -> None:
    stream.box(3, stamp(3))
    for index in range(3):
        assert stream.show(index).state is State.IDLE
        assert stream.session.waiting
    report = stream.show(3)
    assert report.track is not None
    assert (report.track.frame, report.warning) == (0, "")


def test_a_box_far_ahead_is_told_of_while_the_old_target_is_followed(stream: Stream) -> None:
    stream.box(0)
    stream.show(0)
    stream.box(1, stamp(100))
    report = stream.show(1)
    assert report.state is State.TRACKING
    assert report.warning == "the box's stamp is 3.27 s ahead of the frames: it waits"


def test_the_latest_box_wins(stream: Stream) -> None:
    stream.box(0, target_id="first")
    stream.box(0, target_id="second")
    assert stream.show(0).target_id == "second"


def test_a_stamped_box_in_an_unstamped_stream_starts_at_once(stream: Stream) -> None:
    stream.show(0, stamp_ns=0)
    stream.box(1, stamp(1))
    report = stream.show(1, stamp_ns=0)
    assert report.state is State.TRACKING
    assert "no stamps" in report.warning


def test_frames_missed_during_a_fast_forward_are_made_up(stream: Stream, tracker: SiamTracker) -> None:
    expected = followed(tracker, stream.scene, 0, 18)
    for index in range(11):
        stream.show(index)
    stream.box(0, stamp(0))
    assert stream.show(11).track.frame == 11  # took as long as 5 frames need to come
    for index in range(12, 16):
        stream.session.ring.append(Shot(stamp(index), stream.scene[index].image))
    assert stream.show(16).track.frame == 16  # and that as long as 2
    stream.session.ring.append(Shot(stamp(17), stream.scene[17].image))
    assert stream.show(18).track.box_xywh == expected
    stream.show(19)  # nothing missed: live from here on
    stream.session.ring.append(Shot(stamp(20), stream.scene[20].image))
    assert stream.show(21).track.frame == 20


def test_a_fast_forward_that_falls_behind_gives_up(stream: Stream) -> None:
    for index in range(4):
        stream.show(index)
    stream.box(0, stamp(0))
    assert stream.show(4).track.frame == 4
    for index in range(5, 15):
        stream.session.ring.append(Shot(stamp(index), stream.scene[index].image))
    assert stream.show(15).track.frame == 5


@pytest.mark.parametrize(
    ("box", "why"),
    [((900, 900, 20, 20), "outside"), ((float("nan"), 1, 2, 3), "finite"), ((10, 10, 0, 10), "above 0")],
)
def test_a_refused_box_keeps_the_target(stream: Stream, tracker: SiamTracker, box: tuple, why: str) -> None:
    stream.session.request(InitRequest(box))
    report = stream.show(0)
    assert (report.state, report.track) == (State.IDLE, None)
    assert report.warning.startswith("box refused: ") and why in report.warning
    assert "previous" not in report.warning
    expected = followed(tracker, stream.scene, 0, 2)
    stream.box(0, target_id="rover")
    stream.show(0)
    stream.show(1)
    stream.session.request(InitRequest(box, target_id="bad"))
    report = stream.show(2)
    assert why in report.warning and "still following the previous target" in report.warning
    assert report.track is not None
    assert (report.track.box_xywh, report.target_id) == (expected, "rover")


def test_another_resolution_ends_the_track_with_a_reason(stream: Stream) -> None:
    stream.box(0)
    stream.show(0)
    report = stream.show(1, image=stream.scene[1].image[:200])
    assert (report.state, report.track) == (State.IDLE, None)
    assert "changed from 480x270 to 480x200" in report.reason
    assert report.warning == report.reason
    later = stream.show(2, image=stream.scene[2].image[:200])
    assert (later.reason, later.warning) == (report.reason, "")
    stream.box(3)
    assert stream.show(3, image=stream.scene[3].image[:200]).state is State.TRACKING


def test_a_box_that_waits_outlives_a_change_of_resolution(stream: Stream) -> None:
    stream.box(0)
    stream.show(0)
    stream.box(3, stamp(3), target_id="next")
    larger = np.zeros((480, 640, 3), np.uint8)
    assert stream.show(1, image=larger).state is State.IDLE
    assert stream.session.waiting
    report = stream.show(3)
    assert (report.state, report.target_id) == (State.TRACKING, "next")


def test_a_frame_that_does_not_decode_is_passed_over(stream: Stream, tracker: SiamTracker) -> None:
    tracker.init(stream.scene[0].image, stream.scene[0].box_xywh)
    expected = tracker.update(stream.scene[2].image).box_xywh
    tracker.reset()
    stream.box(0)
    stream.show(0)
    report = stream.pass_on(Shot(stamp(1)))
    assert (report.state, report.track, report.image) == (State.TRACKING, None, None)
    assert report.warning == "picture does not decode"
    assert stream.show(2).track.box_xywh == expected


def test_a_fast_forward_goes_on_over_a_frame_that_does_not_decode(stream: Stream) -> None:
    stream.show(0)
    stream.pass_on(Shot(stamp(1)))
    stream.show(2)
    stream.box(0, stamp(0))
    report = stream.show(3)
    assert report.track is not None
    assert (report.track.frame, report.warning) == (2, "picture does not decode")


def test_a_box_on_a_frame_that_does_not_decode_is_refused(stream: Stream) -> None:
    stream.box(0)
    report = stream.pass_on(Shot(stamp(0)))
    assert (report.state, report.warning) == (State.IDLE, "box refused: picture does not decode")
    assert not stream.session.waiting


def test_lose(stream: Stream) -> None:
    assert stream.session.lose("no image") is None
    stream.box(0, target_id="rover")
    stream.show(0)
    report = stream.session.lose("no image for 1 s")
    assert report == Report(None, None, State.LOST, "no image for 1 s", "rover")
    empty = np.zeros_like(stream.scene[0].image)
    assert stream.show(1, image=empty).reason == "no image for 1 s"  # as long as it is not found again
    for index in range(2, 12):
        report = stream.show(index)
    assert (report.state, report.reason) == (State.TRACKING, "")


def test_a_vanished_target_is_lost_with_a_reason(stream: Stream) -> None:
    stream.box(0)
    stream.show(0)
    empty = np.zeros_like(stream.scene[0].image)
    reports = [stream.show(index, image=empty) for index in range(1, 50)]
    assert reports[-1].state is State.LOST
    assert reports[-1].reason == "target not seen"


def test_reset(stream: Stream) -> None:
    stream.box(0)
    stream.show(0)
    stream.box(1)
    assert stream.session.reset("by hand") == Report(None, None, State.IDLE, "by hand")
    assert not stream.session.waiting
    report = stream.show(1)
    assert (report.state, report.reason) == (State.IDLE, "by hand")


def test_time_jumping_back_loses_the_target_and_finds_it_anew(stream: Stream) -> None:
    stream.box(20, target_id="rover")
    for index in range(20, 24):
        stream.show(index)
    report = stream.show(0)
    assert (report.state, report.track, report.reason) == (State.LOST, None, "time jumped back")
    assert stamps(stream.session.ring) == [stamp(0)]
    for index in range(1, 12):
        report = stream.show(index)
    assert (report.state, report.target_id) == (State.TRACKING, "rover")


def test_time_jumping_back_with_boxes_waiting(stream: Stream) -> None:
    for index in (20, 21):
        stream.show(index)
    stream.box(0, stamp(40))
    report = stream.show(0)
    assert (report.state, stream.session.waiting) == (State.IDLE, False)
    assert "dropped" in report.warning
    stream.show(21)
    stream.box(1)  # an unstamped one starts
    assert stream.show(1).state is State.TRACKING


def test_the_same_stream_gives_the_same_boxes(stream: Stream, tracker: SiamTracker) -> None:
    def play() -> list:
        again = Stream(tracker, stream.scene)
        again.session.reset()
        again.box(2, stamp(2))
        return [again.show(index).track for index in range(10)]

    assert play() == play()
