"""The tracker with the shipped weights, and what callers may get wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from siamtrack import SiamTracker, State, Track
from siamtrack.boxes import iou_xywh
from siamtrack.scene import Scene, SceneFrame
from siamtrack.tracker import check_box

NAN, INF = float("nan"), float("inf")


def follow(tracker: SiamTracker, frames: Sequence[SceneFrame]) -> list[Track]:
    """Start on the first frame's truth, then play the rest."""
    return [tracker.init(frames[0].image, frames[0].box_xywh), *(tracker.update(f.image) for f in frames[1:])]


# ------------------------------------------------------------------------------------------------- following a target


def test_follows_the_target(tracker: SiamTracker, scene: list[SceneFrame]) -> None:
    tracks = follow(tracker, scene)
    truth = [frame.box_xywh for frame in scene]
    overlap = iou_xywh([track.box_xywh for track in tracks], truth)[1:].mean()
    assert overlap > 0.4
    assert overlap > iou_xywh(truth[0], truth)[1:].mean() + 0.2  # a box that stands still is no tracker
    assert [track.frame for track in tracks] == list(range(len(scene)))
    assert all(0 <= track.score <= 1 for track in tracks)


def test_two_runs_are_equal(tracker: SiamTracker, scene: list[SceneFrame]) -> None:
    assert follow(tracker, scene[:8]) == follow(tracker, scene[:8])


def test_init_forgets_the_target_before(tracker: SiamTracker, scene: list[SceneFrame]) -> None:
    follow(tracker, scene[:5])
    tracker.update(np.zeros_like(scene[0].image))  # and the weak frames counted with it
    again = follow(tracker, scene[10:16])
    fresh = SiamTracker.from_pretrained(threads=1, precision="fp32")
    assert again == follow(fresh, scene[10:16])
    fresh.close()


def test_frames_are_neither_edited_nor_kept(tracker: SiamTracker, scene: list[SceneFrame]) -> None:
    expected = follow(tracker, scene[:4])
    buffer = scene[0].image.copy()  # one camera buffer, written over by each frame
    tracks = [tracker.init(buffer, scene[0].box_xywh)]
    for frame in scene[1:4]:
        np.testing.assert_array_equal(buffer, scene[len(tracks) - 1].image)
        buffer[:] = frame.image
        tracks.append(tracker.update(buffer))
    np.testing.assert_array_equal(buffer, scene[3].image)
    assert tracks == expected


@pytest.mark.parametrize(
    "view",
    [lambda i: i[:, ::-1], lambda i: i[::-1], lambda i: i[20:-20, 30:-10], lambda i: i.transpose(1, 0, 2)],
    ids=["mirrored", "upside_down", "roi", "transposed"],
)
def test_a_view_tracks_like_its_copy(
    tracker: SiamTracker, scene: list[SceneFrame], view: Callable[[np.ndarray], np.ndarray]
) -> None:
    def run(prepare: Callable[[np.ndarray], np.ndarray]) -> list[Track]:
        frames = [prepare(view(frame.image)) for frame in scene[:4]]
        return [tracker.init(frames[0], (100, 90, 40, 30)), *(tracker.update(frame) for frame in frames[1:])]

    assert run(lambda frame: frame) == run(np.ascontiguousarray)


@pytest.mark.parametrize(
    "box",
    [
        (240, 135, 3, 3), (0, 0, 3, 3), (477, 267, 3, 3),  # tiny, in the middle and in two corners
        (0, 0, 480, 270), (0, 0, 480, 2), (478.5, 0, 1.5, 270),  # as large as the image, and its thin edges
        (100.5, 100.5, 0.4, 0.4), (66.52, 76.68, 0.23, 0.33),  # a part of a pixel
    ],
)  # fmt: skip
def test_extreme_boxes_stay_within_limits(tracker: SiamTracker, scene: list[SceneFrame], box: tuple) -> None:
    tracks = [tracker.init(scene[0].image, box), *(tracker.update(frame.image) for frame in scene[1:12])]
    x, y, w, h = np.array([track.box_xywh for track in tracks]).T
    least = min(tracker.tracking.min_size_px, box[2], box[3])
    assert (w >= least - 1e-6).all() and (h >= least - 1e-6).all()
    assert (w <= 480).all() and (h <= 270).all()
    assert (x + w / 2 >= 0).all() and (x + w / 2 <= 480).all()
    assert (y + h / 2 >= 0).all() and (y + h / 2 <= 270).all()


@pytest.fixture(scope="module")
def empty_road() -> np.ndarray:
    """The place of `scene[12]` without the target; its shadow is still there."""
    return Scene(480, 270, frames=60).render(12, with_target=False).image


@pytest.mark.parametrize("end", ["painted over", "black", "grey"])
def test_a_vanished_target_is_noticed(
    tracker: SiamTracker, scene: list[SceneFrame], empty_road: np.ndarray, end: str
) -> None:
    empty = {"painted over": empty_road, "black": 0 * empty_road, "grey": 0 * empty_road + 128}[end]
    follow(tracker, scene[:12])
    tracks = [tracker.update(empty) for _ in range(60)]
    assert any(track.state is not State.TRACKING for track in tracks)
    # On the road something else may be taken for the target in the end; in an empty image nothing can be.
    assert end == "painted over" or tracks[-1].state is not State.TRACKING
    for before, after in itertools.pairwise(tracks):
        if before.state is after.state is State.LOST:
            assert after.box_xywh == before.box_xywh
    for x, y, w, h in (track.box_xywh for track in tracks):
        assert 0 <= x + w / 2 <= 480 and 0 <= y + h / 2 <= 270


# --------------------------------------------------------------------------------------------- what comes from callers


@pytest.mark.parametrize("box", [[100, 90, 40, 30], (100.0, 90.0, 40.0, 30.0), np.array([100, 90, 40, 30], np.int16)])
def test_init_returns_the_box(tracker: SiamTracker, scene: list[SceneFrame], box: object) -> None:
    assert tracker.init(scene[0].image, box) == Track((100.0, 90.0, 40.0, 30.0), 1.0, State.TRACKING, 0)
    assert all(type(value) is float for value in tracker.init(scene[0].image, box).box_xywh)


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((-10, -20, 40, 50), (0, 0, 30, 30)),
        ((470, 250, 40, 50), (470, 250, 10, 20)),
        ((-5, -5, 9999, 9999), (0, 0, 480, 270)),
        ((-39, 100, 40, 30), (0, 100, 1, 30)),  # a whole pixel inside is the least
    ],
)
def test_a_box_partly_outside_is_cut(tracker: SiamTracker, scene: list[SceneFrame], box: tuple, inside: tuple) -> None:
    assert tracker.init(scene[0].image, box).box_xywh == pytest.approx(inside)


def test_a_box_of_a_part_of_a_pixel_is_inside_wherever_it_lies() -> None:
    # x + w - x is not always w: clipping must not push such a box over the limit.
    for x, y, w, h in np.random.default_rng(0).uniform((5, 5, 0.2, 0.2), (80, 80, 0.9, 0.9), (200, 4)):
        assert check_box((x, y, w, h), 100, 100) == pytest.approx((x, y, w, h))


BAD_FRAMES = [
    (np.empty((0, 0, 3), np.uint8), r"frame is empty: shape \[0, 0, 3\]"),
    (np.empty((270, 0, 3), np.uint8), r"frame is empty: shape \[270, 0, 3\]"),
    (np.zeros((270, 480, 3), np.float32), r"must be uint8 \(0\.\.255\), got float32; convert it"),
    (np.zeros((270, 480, 3), bool), r"must be uint8 \(0\.\.255\), got bool"),
    (np.zeros((270, 480), np.uint8), r"got \[270, 480\]; convert it with .*COLOR_GRAY2BGR"),
    (np.zeros((270, 480, 1), np.uint8), r"got \[270, 480, 1\]; convert it with .*COLOR_GRAY2BGR"),
    (np.zeros((270, 480, 2), np.uint8), r"got \[270, 480, 2\]$"),
    (np.zeros((270, 480, 4), np.uint8), r"got \[270, 480, 4\]; convert it with .*COLOR_BGRA2BGR"),
    (np.zeros((1, 270, 480, 3), np.uint8), r"got \[1, 270, 480, 3\]$"),
    (np.zeros(0, np.uint8), r"got \[0\]$"),
    ([[[0, 0, 0]]], "must be a numpy array, got list"),
    (None, "must be a numpy array, got NoneType"),
]


@pytest.mark.parametrize(("frame", "message"), BAD_FRAMES)
def test_a_bad_frame_is_refused_and_the_track_goes_on(
    tracker: SiamTracker, scene: list[SceneFrame], frame: object, message: str
) -> None:
    expected = follow(tracker, scene[:3])
    tracker.init(scene[0].image, scene[0].box_xywh)
    with pytest.raises(ValueError, match=message):
        tracker.init(frame, (1, 1, 10, 10))
    assert tracker.update(scene[1].image) == expected[1]
    with pytest.raises(ValueError, match=message):
        tracker.update(frame)
    assert tracker.update(scene[2].image) == expected[2]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((), r"must be four numbers .* got shape \[0\]"),
        ((1, 2, 3), r"must be four numbers .* got shape \[3\]"),
        ((1, 2, 3, 4, 5), r"must be four numbers .* got shape \[5\]"),
        ([[1, 2, 30, 40]], r"must be four numbers .* got shape \[1, 4\]"),
        ("box", "must be four numbers .* got 'box'"),
        (("a", "b", "c", "d"), "must be four numbers .* got"),
        ((1, 2, (3, 4), 5), "must be four numbers .* got"),
        (None, "must be four numbers"),
        ((NAN, 1, 10, 10), r"must be finite, got \[nan, 1\.0, 10\.0, 10\.0\]"),
        ((1, 1, INF, 10), r"must be finite, got \[1\.0, 1\.0, inf, 10\.0\]"),
        ((1, 1, 0, 10), "must be above 0, got 0 x 10"),
        ((1, 1, 10, -5), "must be above 0, got 10 x -5"),
        ((500, 10, 20, 20), r"box \[500\.0, 10\.0, 20\.0, 20\.0\] lies outside the 480x270 image"),
        ((480, 10, 20, 20), "lies outside the 480x270 image"),
        ((-20, 10, 20, 20), "lies outside the 480x270 image"),
        ((10, -40, 20, 40.5), "lies outside the 480x270 image"),  # half a pixel row only
    ],
)
def test_a_bad_box_is_refused_and_the_target_before_is_kept(
    tracker: SiamTracker, scene: list[SceneFrame], box: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tracker.init(scene[0].image, box)
    assert tracker.state is State.IDLE
    expected = follow(tracker, scene[:2])[1]
    tracker.init(scene[0].image, scene[0].box_xywh)
    with pytest.raises(ValueError, match=message):
        tracker.init(scene[0].image, box)
    assert tracker.update(scene[1].image) == expected


def test_another_frame_size_is_refused_and_the_old_one_goes_on(tracker: SiamTracker, scene: list[SceneFrame]) -> None:
    expected = follow(tracker, scene[:3])
    follow(tracker, scene[:2])
    with pytest.raises(ValueError, match="changed from 480x270 to 240x200: call init"):
        tracker.update(np.zeros((200, 240, 3), np.uint8))
    assert tracker.update(scene[2].image) == expected[2]
    tracker.init(scene[0].image[:200, :240], (100, 60, 40, 30))  # init may change it
    assert tracker.update(scene[1].image[:200, :240]).frame == 1


def test_update_needs_a_target(tracker: SiamTracker, scene: list[SceneFrame]) -> None:
    assert tracker.state is State.IDLE
    with pytest.raises(RuntimeError, match=r"call init\(frame, box\) first"):
        tracker.update(scene[0].image)
    tracker.init(scene[0].image, scene[0].box_xywh)
    assert tracker.state is State.TRACKING
    tracker.reset()
    assert tracker.state is State.IDLE
    with pytest.raises(RuntimeError, match=r"call init\(frame, box\) first"):
        tracker.update(scene[0].image)


def test_a_closed_tracker_says_so(scene: list[SceneFrame]) -> None:
    tracker = SiamTracker.from_pretrained(threads=1)
    tracker.init(scene[0].image, scene[0].box_xywh)
    tracker.close()
    tracker.close()
    with pytest.raises(RuntimeError, match="call init"):
        tracker.update(scene[0].image)
    with pytest.raises(RuntimeError, match="closed"):
        tracker.init(scene[0].image, scene[0].box_xywh)
