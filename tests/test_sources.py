"""Every kind of source, in order and by value, and every way it can fail."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from siamtrack.drawing import VideoWriter
from siamtrack.sources import natural_key, open_source


def grey_level(value: int, side: int = 24) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def write_images(folder: Path, names: list[str]) -> Path:
    """One flat image a name; its grey level is ten times its place in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        assert cv2.imwrite(str(folder / name), grey_level(10 * place))
    return folder


def levels(spec: str) -> list[int]:
    with open_source(spec) as source:
        found = list(source)
    assert [index for index, _ in found] == list(range(len(found)))
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for _, frame in found)
    return [round(float(frame.mean())) for _, frame in found]


def test_folder_in_natural_order(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "shots", ["img1.png", "img2.png", "img10.PNG", "img11.bmp"])
    (folder / "notes.txt").write_text("not an image")
    (folder / "._img1.png").write_bytes(b"what macOS leaves behind")
    assert levels(str(folder)) == [0, 10, 20, 30]
    with open_source(str(folder)) as source:
        assert (source.name, source.fps, source.length) == ("shots", None, 4)


def test_otb_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "Basketball" / "img", ["0001.png", "0002.png"])
    with open_source(str(tmp_path / "Basketball")) as source:
        assert (source.name, source.length) == ("Basketball", 2)


def test_images_of_the_folder_itself_go_before_its_img_folder(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    write_images(tmp_path / "img", ["b.png", "c.png"])
    assert open_source(str(tmp_path)).length == 1


def test_glob(tmp_path: Path) -> None:
    write_images(tmp_path, ["left9.png", "left10.png", "right1.png"])
    assert levels(str(tmp_path / "left*.png")) == [0, 10]
    assert levels(str(tmp_path / "*")) == [0, 10, 20]


def test_name_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    write_images(tmp_path / "run [3]", ["a.png"])
    assert levels(str(tmp_path / "run [3]")) == [0]


def test_single_image(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    assert levels(str(tmp_path / "b.png")) == [10]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.full((8, 8), 77, np.uint8), (77, 77, 77)),
        (np.full((8, 8), 77 * 257, np.uint16), (77, 77, 77)),
        (np.full((8, 8, 3), (10 * 257, 20 * 257, 30 * 257), np.uint16), (10, 20, 30)),
        (np.full((8, 8, 4), (10, 20, 30, 0), np.uint8), (10, 20, 30)),
    ],
    ids=["grey", "grey 16 bit", "colour 16 bit", "alpha"],
)
def test_pixel_formats(tmp_path: Path, stored: np.ndarray, expected: tuple[int, int, int]) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), stored)
    [(_, frame)] = list(open_source(str(tmp_path / "a.png")))
    assert frame.dtype == np.uint8
    np.testing.assert_allclose(frame.reshape(-1, 3), np.tile(expected, (64, 1)), atol=1)


def test_video(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", fps=12) as writer:
        for value in (20, 120, 220):
            writer.write(grey_level(value, 64))
    with open_source(str(tmp_path / "clip.mp4")) as source:
        assert (source.name, source.length) == ("clip", 3)
        assert source.fps == pytest.approx(12)
    np.testing.assert_allclose(levels(str(tmp_path / "clip.mp4")), [20, 120, 220], atol=4)


def test_closed_video_gives_no_more_frames(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for _ in range(5):
            writer.write(grey_level(90, 64))
    source = open_source(str(tmp_path / "clip.mp4"))
    frames = iter(source)
    next(frames)
    source.close()
    source.close()
    assert list(frames) == []


def test_damaged_image_is_named_when_its_turn_comes(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "2.png").write_bytes(b"not a picture")
    frames = iter(open_source(str(tmp_path)))
    assert next(frames)[0] == 0
    with pytest.raises(ValueError, match=r"2\.png does not decode"):
        next(frames)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "source is empty"),
        ("{tmp}/missing.mp4", "no such file or folder: .*missing.mp4"),
        ("{tmp}/empty", "no images in folder .*empty"),
        ("{tmp}/nothing*.png", "matches nothing"),
        ("{tmp}/*.txt", "matches 1 paths, none of them an image"),
        ("{tmp}/text.txt", "does not decode as a video"),
        ("{tmp}/broken.mp4", "does not decode as a video"),
        ("{tmp}/zero.avi", "does not decode as a video"),
        ("9731", "camera 9731 does not open"),
        ("file://{tmp}/missing-stream.mp4", "stream file://.* does not open"),
    ],
)
def test_errors(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    (tmp_path / "zero.avi").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        open_source(spec.format(tmp=tmp_path))


@pytest.mark.parametrize(
    "ordered",
    [
        ["img1", "img2", "img10"],
        ["a2b9", "a2b10", "a10b1"],
        ["1.png", "02.png", "3.png"],
        ["img01", "img1", "img2"],
        ["2.png", "10.png", "a.png"],
        ["B1", "b2", "B3"],
    ],
)
def test_natural_order(ordered: list[str]) -> None:
    paths = [Path(name) for name in ordered]
    backwards = paths[::-1]  # a sort is stable: given in order, equal keys would pass unseen
    assert sorted(backwards, key=natural_key) == paths
