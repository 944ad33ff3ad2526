"""The rendered scene: its pixels and its truth must say the same thing."""

from __future__ import annotations

import numpy as np
import pytest

from siamtrack.boxes import iou_xywh
from siamtrack.scene import Scene


@pytest.fixture(scope="module")
def small() -> Scene:
    return Scene(width=320, height=180)


@pytest.fixture(scope="module")
def truth(small: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [300, 4], visible [300] and look-alikes [300, 2, 4] of the small scene."""
    frames = list(small)
    return tuple(np.array(column) for column in list(zip(*frames, strict=True))[1:])  # type: ignore[return-value]


@pytest.mark.parametrize(("size", "index"), [((640, 360), 0), ((640, 360), 150), ((320, 240), 40), ((240, 400), 270)])
def test_truth_box_is_where_the_target_is_painted(size: tuple[int, int], index: int) -> None:
    scene = Scene(*size, seed=2)
    with_target, without = scene.render(index), scene.render(index, with_target=False)
    assert with_target.visible > 0.99
    assert with_target.box_xywh == without.box_xywh
    change = np.abs(with_target.image.astype(int) - without.image).max(axis=2)
    rows, columns = np.flatnonzero((change > 25).any(axis=1)), np.flatnonzero((change > 25).any(axis=0))
    painted = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    x, y, w, h = with_target.box_xywh
    np.testing.assert_allclose(painted, [x, y, x + w, y + h], atol=1.25)  # a pixel, and half the motion blur
    assert (change > 6).sum() > 0.4 * w * h  # a turned body fills about half of its bounds


def test_same_seed_same_pixels_and_other_seed_other_pixels(small: Scene) -> None:
    frame = small.render(100)
    again = Scene(width=320, height=180).render(100)
    other = Scene(width=320, height=180, seed=1).render(100)
    np.testing.assert_array_equal(frame.image, again.image)
    assert (frame.box_xywh, frame.visible) == (again.box_xywh, again.visible)
    assert frame.box_xywh != other.box_xywh
    assert np.abs(frame.image.astype(int) - other.image).mean() > 10


def test_frames_come_in_any_order(small: Scene) -> None:
    late_first = small.render(200).image
    small.render(3)
    np.testing.assert_array_equal(small.render(200).image, late_first)


def test_target_stays_inside_moves_and_changes_size(truth: tuple[np.ndarray, ...]) -> None:
    boxes = truth[0]
    assert (boxes[:, :2] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] < [320, 180]).all()
    longest = boxes[:, 2:].max(axis=1) * 4  # pixels in a 1280 x 720 image
    assert 40 < longest.min() < 60
    assert 100 < longest.max() < 130
    steps = np.hypot(*np.diff(boxes[:, :2] + boxes[:, 2:] / 2, axis=0).T) * 4
    assert np.median(steps) > 2
    assert steps.max() < 16


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_one_occlusion_of_the_promised_length(seed: int) -> None:
    visible = np.array([frame.visible for frame in Scene(160, 96, seed=seed)])
    hidden = np.flatnonzero(visible < 0.05)
    assert 15 <= len(hidden) <= 25
    assert hidden[-1] - hidden[0] == len(hidden) - 1
    assert visible[hidden].min() == 0
    assert visible[:60].min() > 0.99
    assert visible[-30:].min() > 0.99
    assert 0.3 < visible[100:150].min() < 0.8  # the trees


def test_hidden_target_leaves_no_pixel(truth: tuple[np.ndarray, ...], small: Scene) -> None:
    index = int(np.flatnonzero(truth[1] == 0)[0])
    np.testing.assert_array_equal(small.render(index).image, small.render(index, with_target=False).image)


def test_a_lookalike_passes_close_by_but_never_through(truth: tuple[np.ndarray, ...]) -> None:
    boxes, _, alike = truth
    middles = alike[..., :2] + alike[..., 2:] / 2 - (boxes[:, :2] + boxes[:, 2:] / 2)[:, None]
    distance = np.hypot(middles[..., 0], middles[..., 1]) / boxes[:, 2:].max(axis=1)[:, None]
    assert distance.shape == (300, 2)
    assert (distance.min(axis=0) < 2).all()
    assert distance.min() > 0.5
    assert (iou_xywh(boxes[:, None], alike) < 0.5).all()


def test_motion_depends_on_seconds_not_frames(small: Scene) -> None:
    slow = Scene(width=320, height=180, fps=15)
    assert slow.render(50).box_xywh == pytest.approx(small.render(100).box_xywh)


def test_iteration_gives_every_frame() -> None:
    scene = Scene(width=160, height=120, frames=3)
    images = [frame.image for frame in scene]
    assert len(scene) == len(images) == 3
    assert all(image.shape == (120, 160, 3) and image.dtype == np.uint8 for image in images)
    assert not np.array_equal(images[0], images[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 64}, "64 x 720"),
        ({"width": 1280, "height": 200}, "three times"),
        ({"frames": 0}, "frames 0"),
        ({"seed": -1}, "seed -1"),
        ({"fps": 0}, "fps 0"),
        ({"fps": float("nan")}, "fps nan"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 300])
def test_frame_outside_the_clip(small: Scene, index: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 299"):
        small.render(index)
