"""Drawn tracks, contact sheets and video files, judged by their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from siamtrack.drawing import STATE_BGR, VideoWriter, contact_sheet, draw_track

GREY = 110


def frame(width: int = 640, height: int = 360) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def count(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(image.astype(int) - colour).max(axis=2) <= 12).sum())


@pytest.mark.parametrize("state", list(STATE_BGR))
@pytest.mark.parametrize("size", [(160, 120), (640, 360), (1920, 1080)])
def test_state_colour_is_on_the_box(state: str, size: tuple[int, int]) -> None:
    plain = frame(*size)
    x, y, w, h = size[0] * 0.4, size[1] * 0.5, size[0] * 0.3, size[1] * 0.3
    drawn = draw_track(plain, (x, y, w, h), state, 0.5)
    assert (plain == GREY).all()
    assert drawn.shape == plain.shape
    middle = drawn[round(y) - 2 : round(y) + 3, round(x) : round(x + w)]
    assert count(middle, STATE_BGR[state]) > 0.4 * w
    assert (drawn[round(y + h / 4) : round(y + h * 3 / 4), round(x + w / 4) : round(x + w * 3 / 4)] == GREY).all()


def test_box_is_drawn_at_its_edges() -> None:
    drawn = draw_track(frame(), (200.0, 150.0, 120.0, 90.0), "TRACKING", 0.9)
    rows, columns = np.nonzero((drawn != GREY).any(axis=2)[60:])  # below the header
    edges = [columns.min(), rows.min() + 60, columns.max() + 1, rows.max() + 61]
    np.testing.assert_allclose(edges, [200, 150, 320, 240], atol=3)


def test_lost_box_is_dashed() -> None:
    def share(state: str) -> float:
        edge = draw_track(frame(), (100, 200, 400, 100), state, 0.5)[198:203, 110:490]
        return float((np.abs(edge.astype(int) - STATE_BGR[state]).max(axis=2) <= 12).any(axis=0).mean())

    assert share("TRACKING") == 1
    assert 0.3 < share("LOST") < 0.8


def test_no_box_draws_the_header_only() -> None:
    drawn = draw_track(frame(), None, "IDLE", float("nan"))
    assert (drawn[60:] == GREY).all()
    assert count(drawn[:60], STATE_BGR["IDLE"]) > 200


def test_score_label_and_truth_change_the_picture() -> None:
    box = (200.0, 150.0, 120.0, 90.0)
    pictures = [
        draw_track(frame(), box, "TRACKING", 0.9),
        draw_track(frame(), box, "TRACKING", 0.1),
        draw_track(frame(), box, "TRACKING", 0.9, label="cart"),
        draw_track(frame(), box, "TRACKING", 0.9, truth_xywh=(190, 140, 130, 100)),
    ]
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.parametrize("box", [(-50, -40, 100, 80), (600, 340, 400, 300), (2000, 2000, 10, 10), (1e12, 0, 5, 5)])
@pytest.mark.parametrize("state", ["TRACKING", "LOST"])
def test_boxes_outside_the_image_do_no_harm(box: tuple[float, ...], state: str) -> None:
    assert draw_track(frame(), box, state, 0.5, label="far away").shape == (360, 640, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 4), np.uint8), None, "IDLE", 0.0), r"uint8 BGR image .*uint8 \[4, 4\]"),
        ((np.zeros((4, 4, 3)), None, "IDLE", 0.0), "float64"),
        ((frame(), None, "tracking", 0.0), "unknown state 'tracking': expected one of TRACKING"),
        ((frame(), (1, 2, 3), "IDLE", 0.0), "box_xywh must be four finite numbers"),
        ((frame(), (1, 2, float("nan"), 4), "IDLE", 0.0), "box_xywh must be four finite numbers"),
        ((frame(), (1, 2, -3, 4), "LOST", 0.0), r"sizes 0 or more; got \(1, 2, -3, 4\)"),
        ((frame(), None, "IDLE", 0.0, "", (1, 2, float("inf"), 4)), "truth_xywh must be"),
    ],
)
def test_draw_track_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_track(*arguments)


def test_contact_sheet_places_tiles_in_rows() -> None:
    images = [np.full((90, 160, 3), value, np.uint8) for value in (40, 80, 120, 160, 200)]
    sheet = contact_sheet(images, [""] * 5, columns=3, tile_width=80, margin=4)
    assert sheet.shape == (2 * 49 + 4, 3 * 84 + 4, 3)
    middles = [(4 + 22, 4 + 40 + 84 * k) for k in range(3)] + [(53 + 22, 4 + 40 + 84 * k) for k in range(2)]
    assert [int(sheet[at][0]) for at in middles] == [40, 80, 120, 160, 200]


def test_contact_sheet_keeps_aspect_and_writes_captions() -> None:
    wide, tall = np.full((90, 160, 3), 200, np.uint8), np.full((160, 90, 3), 201, np.uint8)
    sheet = contact_sheet([wide, tall], ["first", "a caption far too long for the tile that it stands under"])
    assert 255 < (sheet == 201).all(axis=2).sum() / 270 * 160 / 90 < 285  # 270 high, so 152 wide
    bare = contact_sheet([wide, tall], ["", ""])
    assert sheet.shape[0] > bare.shape[0]
    assert (sheet[280:] > 220).any()


@pytest.mark.parametrize(
    ("images", "captions", "settings", "message"),
    [
        ([], [], {}, "at least one image"),
        ([frame()], [], {}, "got 1 and 0"),
        ([frame()], [""], {"columns": 0}, "columns >= 1"),
        ([frame(), np.zeros((3, 3), np.uint8)], ["", ""], {}, r"images\[1\]"),
    ],
)
def test_contact_sheet_errors(images: list[Any], captions: list[str], settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(images, captions, **settings)


def test_video_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, fps=10) as writer:
        for value in (30, 200):
            writer.write(np.full((48, 64, 3), value, np.uint8))
    capture = cv2.VideoCapture(str(path))
    means = [capture.read()[1].mean() for _ in range(2)]
    assert capture.read()[0] is False
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    np.testing.assert_allclose(means, [30, 200], atol=4)


def test_video_size_must_not_change(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4") as writer:
        writer.write(frame(64, 48))
        with pytest.raises(ValueError, match=r"holds frames of shape \(48, 64, 3\), got \(48, 66, 3\)"):
            writer.write(frame(66, 48))


def test_video_that_cannot_open(tmp_path: Path) -> None:
    (tmp_path / "taken.mp4").mkdir()
    with VideoWriter(tmp_path / "taken.mp4") as writer, pytest.raises(ValueError, match="OpenCV cannot open"):
        writer.write(frame(64, 48))


@pytest.mark.parametrize(
    ("name", "fps", "message"),
    [("a.avi", 30, "ends in .mp4"), ("nowhere/a.mp4", 30, "there is no folder"), ("a.mp4", 0, "fps above 0")],
)
def test_video_writer_errors(tmp_path: Path, name: str, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / name, fps)
