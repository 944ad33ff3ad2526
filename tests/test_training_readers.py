"""Annotations read into tracks, and the images they name."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sequence_files import write_image
from training.data import list_images, read_coco, read_stills, read_video
from training.images import ImageCache
from training.left_out import LeftOut
from training.tracks import Mask, Sighting, Track, usable


def write_frames(folder: Path, names: list[str], side: int = 32) -> Path:
    for name in names:
        write_image(folder / name, np.zeros((side, side, 3), np.uint8))
    return folder


def test_read_groundtruth(tmp_path: Path) -> None:
    write_frames(tmp_path / "car" / "img", ["9.png", "10.png", "11.png", "12.png", "13.png"])
    rows = ["1,2,10,20", "nan,nan,nan,nan", "3\t4\t11\t21", "5 6 12.5 22", "7,8,0,20"]
    (tmp_path / "car" / "groundtruth.txt").write_text("\n".join(rows) + "\n")
    (track,) = read_video(tmp_path / "car")
    assert (track.name, track.frames) == ("car", (0, 2, 3))  # absent, and without area: left out
    assert [s.box_xywh for s in track.sightings] == [(1, 2, 10, 20), (3, 4, 11, 21), (5, 6, 12.5, 22)]
    assert [s.image.name for s in track.sightings] == ["9.png", "11.png", "12.png"]
    assert all(s.mask is None for s in track.sightings)


def test_read_video_without_an_img_folder(tmp_path: Path) -> None:
    write_frames(tmp_path, ["a.png"])
    (tmp_path / "groundtruth.txt").write_text("1,2,10,20")
    assert read_video(tmp_path)[0].sightings[0].image == tmp_path / "a.png"


def test_read_tracks(tmp_path: Path) -> None:
    write_frames(tmp_path / "street" / "img", ["1.png", "2.png", "3.png"])
    write_image(tmp_path / "street" / "mask" / "2.png", np.zeros((32, 32), np.uint8))
    (tmp_path / "street" / "tracks.csv").write_text("frame,id,x,y,w,h\n3,7,3,3,10,10\n1,7,1,1,10,10\n2,dog,5,5,12,12\n")
    tracks = {t.name: t for t in read_video(tmp_path / "street")}
    assert set(tracks) == {"street:7", "street:dog"}
    assert tracks["street:7"].frames == (0, 2)  # in time order, counted from 0
    assert [s.image.name for s in tracks["street:7"].sightings] == ["1.png", "3.png"]
    assert tracks["street:dog"].sightings[0].mask == Mask(tmp_path / "street" / "mask" / "2.png")


def test_read_masks_only(tmp_path: Path) -> None:
    write_frames(tmp_path / "cow" / "img", ["0.jpg", "1.jpg", "2.jpg"])
    mask = np.zeros((32, 32), np.uint8)
    write_image(tmp_path / "cow" / "mask" / "1.png", mask)
    mask[5:15, 8:28] = 255
    write_image(tmp_path / "cow" / "mask" / "0.png", mask)
    (track,) = read_video(tmp_path / "cow")  # frame 1: not visible; frame 2: no mask
    assert track.frames == (0,)
    assert track.sightings[0].box_xywh == (8, 5, 20, 10)
    assert track.sightings[0].mask == Mask(tmp_path / "cow" / "mask" / "0.png")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images"),
        ({"img/1.png": None}, "needs groundtruth.txt, tracks.csv or mask"),
        ({"img/1.png": None, "groundtruth.txt": "1,2,3,4\n1,2,3,4\n"}, "has 2 rows, there are 1 images"),
        ({"img/1.png": None, "groundtruth.txt": "1,2,3\n"}, r"groundtruth.txt:1: expected x,y,w,h, got '1,2,3'"),
        ({"img/1.png": None, "groundtruth.txt": "x,y,w,h\n"}, r"groundtruth.txt:1: expected x,y,w,h, got 'x,y,w,h'"),
        ({"img/1.png": None, "groundtruth.txt": "nan,nan,nan,nan\n"}, "never visible"),
        (
            {"img/1.png": None, "tracks.csv": "frame,id,x,y,w,h\n1,1,0,,9,9\n"},
            r"tracks.csv:2: expected numbers for x, y, w, h, got '0', '', '9', '9'",
        ),
        ({"img/1.png": None, "tracks.csv": "frame,id,x,y,w,h\n2,1,0,0,9,9\n"}, "names frame 2, there are 1 images"),
        ({"img/1.png": None, "tracks.csv": "frame,id,x,y,w,h\n0,1,0,0,9,9\n"}, "names frame 0"),
        ({"img/1.png": None, "mask/1.png": "not an image"}, "not a readable image"),
    ],
    ids=[
        "empty",
        "no annotation",
        "row count",
        "columns",
        "header",
        "never visible",
        "empty cell",
        "late frame",
        "frame 0",
        "broken mask",
    ],
)
def test_video_errors(tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    for name, text in files.items():
        if text is None:
            write_image(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_video(tmp_path)


def test_read_stills(tmp_path: Path) -> None:
    outline = [[1, 1, 9, 1, 9, 9], [0, 0, 1, 1]]  # the second is no area: left out
    rows = [
        ["a.jpg", "1", "2", "30", "40", "cat", ""],
        ["a.jpg", "5.5", "6", "7", "8", "dog", "3"],
        ["b.jpg", "0", "0", "9", "9", "cow", json.dumps(outline)],
    ]
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "x", "y", "w", "h", "label", "mask"], *rows])
    left_out = LeftOut()
    assert read_stills(tmp_path, left_out) == [] and left_out.counts == {"without an image": 3}
    for name in "ab":
        write_image(tmp_path / "img" / f"{name}.jpg", np.zeros((8, 8, 3), np.uint8))
    plain, valued, outlined = read_stills(tmp_path, LeftOut())
    assert plain.sightings[0] == Sighting(tmp_path / "img" / "a.jpg", (1, 2, 30, 40), None)
    assert valued.sightings[0] == Sighting(
        tmp_path / "img" / "a.jpg", (5.5, 6, 7, 8), Mask(tmp_path / "mask" / "a.png", 3)
    )
    assert outlined.sightings[0].mask == Mask(polygons=((1, 1, 9, 1, 9, 9),))
    assert len({plain.name, valued.name, outlined.name}) == 3
    with pytest.raises(FileNotFoundError):
        read_stills(tmp_path / "nowhere", LeftOut())


def test_read_coco(tmp_path: Path) -> None:
    def annotation(number: int, **more: Any) -> dict[str, Any]:
        return {"id": number, "image_id": 5, "bbox": [1, 2, 30, 40], "iscrowd": 0, **more}

    content = {
        "images": [{"id": 5, "file_name": "x/000005.jpg"}],
        "annotations": [
            annotation(1, segmentation=[[0, 0, 9, 0, 9, 9]]),
            annotation(2, iscrowd=1, segmentation={"counts": [1, 2], "size": [4, 4]}),
            annotation(3, segmentation={"counts": [1, 2], "size": [4, 4]}),
            annotation(4),
        ],
    }
    file = tmp_path / "instances_val.json"
    file.write_text(json.dumps(content))
    left_out = LeftOut()
    assert read_coco(file, tmp_path / "images", left_out) == [] and left_out.counts == {"without an image": 3}
    write_image(tmp_path / "images" / "x" / "000005.jpg", np.zeros((8, 8, 3), np.uint8))
    tracks = read_coco(file, tmp_path / "images", LeftOut())
    assert [t.name for t in tracks] == [f"instances_val:{i}" for i in (1, 3, 4)]
    first = tracks[0].sightings[0]
    assert first == Sighting(
        tmp_path / "images" / "x" / "000005.jpg", (1, 2, 30, 40), Mask(polygons=((0, 0, 9, 0, 9, 9),))
    )
    assert tracks[1].sightings[0].mask is None  # a run-length outline is not an outline to us


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_coco_errors(tmp_path: Path, key: str) -> None:
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    del content[key]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"not a COCO instances file, '{key}' is missing"):
        read_coco(tmp_path / "a.json", tmp_path, LeftOut())
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not JSON: "):
        read_coco(tmp_path / "a.json", tmp_path, LeftOut())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.jpg,1,,3,4,", r"boxes\.csv:2: expected numbers for x, y, w, h, got '1', '', '3', '4'"),
        ("a.jpg,1,2,3", r"boxes\.csv:2: expected numbers for x, y, w, h, got '1', '2', '3', None"),
        ("a.jpg,1,2,3,4,cat", r"boxes\.csv:2: expected numbers for mask, got 'cat'"),
        ("a.jpg,1,2,3,4,[1]", r"boxes\.csv:2: expected polygons \[\[x0,y0,x1,y1,\.\.\.\],\.\.\.\] in mask"),
    ],
)
def test_stills_errors_say_where(tmp_path: Path, row: str, message: str) -> None:
    write_image(tmp_path / "img" / "a.jpg", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "boxes.csv").write_text(f"image,x,y,w,h,mask\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_stills(tmp_path, LeftOut())


def test_list_images_in_natural_order(tmp_path: Path) -> None:
    for name in ("10.jpg", "2.JPG", "1.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["1.png", "2.JPG", "10.jpg"]


def test_usable_leaves_thin_sightings_out() -> None:
    def seen(w: float, h: float) -> Sighting:
        return Sighting(Path("x"), (0, 0, w, h))

    sizes = [(20, 20), (9, 20), (10, 10), (300, 20), (float("nan"), 20)]
    mixed = Track("mixed", tuple(seen(*size) for size in sizes), (0, 1, 2, 3, 4))
    kept = usable([mixed, Track("tiny", (seen(5, 5),), (0,))])
    assert [(t.name, t.frames) for t in kept] == [("mixed", (0, 2))]


@pytest.mark.parametrize("frames", [(), (0, 1)])
def test_track_refuses_frames_that_do_not_match(frames: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="track t: 1 sightings"):
        Track("t", (Sighting(Path("x"), (0, 0, 1, 1)),), frames)


def test_mask_alpha() -> None:
    labels = np.zeros((20, 20), np.uint8)
    labels[4:8, 4:8], labels[8:12, 4:8] = 3, 5
    region, photo = (4, 2, 10, 14), np.zeros((20, 20, 3), np.uint8)
    assert (Mask(Path("m"), 3).alpha(labels, region, photo) > 0).sum() == 16
    assert (Mask(Path("m"), 0).alpha(labels, region, photo) > 0).sum() == 32  # 0 stands for anything
    polygon = Mask(polygons=((4, 4, 7, 4, 7, 7, 4, 7),)).alpha(None, region, photo)
    assert polygon.shape == (12, 6)
    assert set(np.unique(polygon)) == {0, 255}
    np.testing.assert_array_equal(polygon > 0, Mask(Path("m"), 3).alpha(labels, region, photo) > 0)
    with pytest.raises(ValueError, match="m is 20x20, its photo 40x30: scale it to the photo's size"):
        Mask(Path("m"), 3).alpha(labels, region, np.zeros((30, 40, 3), np.uint8))


def test_image_cache_forgets_the_least_recently_used(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{i}.png", np.full((100, 100, 3), i, np.uint8)) for i in range(3)]
    cache = ImageCache(limit_gb=2 * 30000 / 1e9)
    first = cache.bgr(paths[0])
    assert not first.flags.writeable  # a caller that painted on it would spoil every later pair
    cache.bgr(paths[1])
    assert cache.bgr(paths[0]) is first
    cache.bgr(paths[2])  # drops 1, not 0
    assert cache.bgr(paths[0]) is first
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        cache.bgr(paths[1])
    assert cache.labels(paths[0]).shape == (100, 100)


def test_image_cache_is_empty_in_another_process(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", np.zeros((100, 100, 3), np.uint8))
    cache = ImageCache(limit_gb=0.002)
    cache.bgr(path)
    content = pickle.dumps(cache)
    assert len(content) < 1000
    assert pickle.loads(content).limit_bytes == 2_000_000


def test_image_cache_knows_the_mean_of_what_it_keeps(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    write_image(paths[0], np.full((100, 100, 3), (1, 2, 3), np.uint8))
    write_image(paths[1], np.full((100, 100, 3), 9, np.uint8))
    cache = ImageCache(limit_gb=30000 / 1e9)
    assert cache.mean_bgr(paths[0]) == (1, 2, 3)
    write_image(paths[0], np.full((100, 100, 3), 50, np.uint8))
    assert cache.mean_bgr(paths[0]) == (1, 2, 3)
    assert cache.mean_bgr(paths[1]) == (9, 9, 9)  # drops the other
    assert cache.mean_bgr(paths[0]) == (50, 50, 50)
