"""Readers of public training sets, on folders built as the sets are published; and what a recipe makes of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.sequence_files import write_got10k, write_images, write_lasot, write_rows
from training.collect import collect, read_set
from training.image_size import image_size
from training.images import ImageCache
from training.layouts import LAYOUTS
from training.pairs import PairConfig, PairSampler
from training.recipe import DataSet, recipe_from_dict
from training.tracks import NumberedFrames, Track

TRUTH = np.array([[10.0 + 5 * i, 20, 20, 12] for i in range(6)])


def read(layout: str, path: Path, **more: Any) -> tuple[dict[str, Track], str]:
    """Tracks by name, and the warning, of which there is at most one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracks = read_set(DataSet(layout, path.name, **more), path.parent)
    assert len(caught) <= 1
    assert len({t.name for t in tracks}) == len(tracks)
    for track in tracks:  # every image is where the reader says
        assert ImageCache(0.01).bgr(track.sightings[len(track.sightings) - 1].image).ndim == 3
    return {t.name: t for t in tracks}, str(caught[0].message) if caught else ""


def write_image(path: Path, size: tuple[int, int] = (96, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path.with_suffix(".jpg")), np.full((size[1], size[0], 3), 90, np.uint8))
    path.with_suffix(".jpg").rename(path)


def write_xml(path: Path, *objects: tuple[str, tuple[float, ...]]) -> None:
    """ImageNet's annotation of one image; each object a track id and xmin, ymin, xmax, ymax."""
    items = ""
    for key, (x0, y0, x1, y1) in objects:
        # VID prints xmax before xmin.
        corners = f"<xmax>{x1}</xmax><xmin>{x0}</xmin><ymax>{y1}</ymax><ymin>{y0}</ymin>"
        track = f"<trackid>{key}</trackid>" if key else ""
        items += f"<object>{track}<name>n02084071</name><bndbox>{corners}</bndbox><occluded>1</occluded></object>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><size><width>96</width><height>64</height></size>{items}</annotation>")


def test_got10k_leaves_absent_and_hidden_frames_out(tmp_path: Path) -> None:
    root = tmp_path / "train"
    folder = write_got10k(root / "GOT-10k_Train_000001", TRUTH, cover=(8, 0, 1, 8, 8, 7))
    (folder / "absence.label").write_text("0\n0\n0\n1\n0\n0\n")  # 1 = absent; cover 0 = hidden
    write_got10k(root / "GOT-10k_Train_000002", TRUTH)
    (root / "list.txt").write_text("GOT-10k_Train_000001\nGOT-10k_Train_000002\n")
    tracks, warning = read("got10k", root)
    assert set(tracks) == {"GOT-10k_Train_000001", "GOT-10k_Train_000002"}
    track = tracks["GOT-10k_Train_000001"]
    assert list(track.frames) == [1, 3, 5, 6]
    assert [Path(s.image).name for s in track.sightings] == [f"{i:08d}.jpg" for i in (1, 3, 5, 6)]  # type: ignore
    assert track.sightings[1].box_xywh == (20, 20, 20, 12)
    assert track.frame_range == 100
    assert warning == f"{root}: left out 2 absent or hidden"


def test_labels_that_do_not_match_are_an_error(tmp_path: Path) -> None:
    folder = write_got10k(tmp_path / "set" / "GOT-10k_Train_000001", TRUTH)
    (folder / "cover.label").write_text("8\n8\n")
    with pytest.raises(ValueError, match=r"cover.label has 2 labels for 6 frames"):
        read("got10k", tmp_path / "set")


def test_lasot_honours_both_files_and_its_classes(tmp_path: Path) -> None:
    write_lasot(tmp_path / "LaSOT" / "bird" / "bird-1", TRUTH, hidden=(1,))
    (tmp_path / "LaSOT" / "bird" / "bird-1" / "out_of_view.txt").write_text("0,0,0,1,0,0")
    zero = TRUTH.copy()
    zero[4] = 0  # LaSOT writes 0,0,0,0 where there is no box
    write_lasot(tmp_path / "LaSOT" / "cat" / "cat-20", zero)
    tracks, warning = read("lasot", tmp_path / "LaSOT")
    assert {name: list(t.frames) for name, t in tracks.items()} == {"bird-1": [1, 3, 5, 6], "cat-20": [1, 2, 3, 4, 6]}
    assert Path(tracks["bird-1"].sightings[0].image).parts[-4:] == ("bird", "bird-1", "img", "00000001.jpg")  # type: ignore
    assert warning.endswith("left out 2 absent or hidden, 1 without area")


def test_trackingnet_counts_frames_from_zero_and_skips_half_unpacked_videos(tmp_path: Path) -> None:
    for chunk, name in (("TRAIN_0", "_tf-hRq6UJk_0"), ("TRAIN_11", "zs0l8Z5Qq9A_1"), ("TRAIN_11", "broken_0")):
        write_images(tmp_path / chunk / "frames" / name, TRUTH, "{}.jpg", first=0)
        write_rows(tmp_path / chunk / "anno" / f"{name}.txt", TRUTH)
    (tmp_path / "TRAIN_11" / "frames" / "broken_0" / "5.jpg").unlink()
    (tmp_path / "TRAIN_0" / "anno" / "text_0.txt").write_text("no boxes\n")
    tracks, warning = read("trackingnet", tmp_path)
    assert set(tracks) == {"_tf-hRq6UJk_0", "zs0l8Z5Qq9A_1"}
    assert [Path(s.image).name for s in tracks["_tf-hRq6UJk_0"].sightings] == [f"{i}.jpg" for i in range(6)]  # type: ignore
    assert tracks["_tf-hRq6UJk_0"].sightings[2].box_xywh == tuple(TRUTH[2])
    assert warning.endswith("left out 1 unreadable files, 6 without an image")


def test_vid_tracks_are_those_of_one_video(tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC2015"
    annotations = root / "Annotations" / "VID" / "train"
    for video in ("ILSVRC2015_train_00000000", "ILSVRC2015_train_00001000"):
        for i in range(4):
            objects = [("0", (10 + i, 5, 40 + i, 30))]
            if i != 2:
                objects.append(("1", (50, 20, 80, 50)))
            relative = Path("ILSVRC2015_VID_train_0000") / video
            write_xml(annotations / relative / f"{i:06d}.xml", *objects)
            write_image(root / "Data" / "VID" / "train" / relative / f"{i:06d}.JPEG")
    last = annotations / "ILSVRC2015_VID_train_0000" / "ILSVRC2015_train_00000000"
    write_xml(last / "000003.xml", ("1", (50, 20, 50, 50)))  # no area
    (last / "000001.xml").write_text("<annotation><object>")
    tracks, warning = read("vid", annotations)
    # Track id 0 of one video is not track id 0 of another.
    assert {name: list(t.frames) for name, t in tracks.items()} == {
        "ILSVRC2015_train_00000000:0": [0, 2],
        "ILSVRC2015_train_00000000:1": [0],
        "ILSVRC2015_train_00001000:0": [0, 1, 2, 3],
        "ILSVRC2015_train_00001000:1": [0, 1, 3],
    }
    assert tracks["ILSVRC2015_train_00001000:0"].sightings[3].box_xywh == (13, 5, 30, 25)
    assert tracks["ILSVRC2015_train_00001000:0"].video == "ILSVRC2015_train_00001000"
    assert warning.endswith("left out 1 unreadable files, 1 without area")


def test_det_takes_every_object_of_an_image(tmp_path: Path) -> None:
    annotations = tmp_path / "ILSVRC" / "Annotations" / "DET" / "train"
    images = tmp_path / "ILSVRC" / "Data" / "DET" / "train"
    part = Path("ILSVRC2013_train") / "n01440764"
    write_xml(annotations / part / "n01440764_10040.xml", ("", (0, 0, 30, 20)), ("", (40, 10, 70, 60)))
    write_image(images / part / "n01440764_10040.JPEG")
    write_xml(annotations / "ILSVRC2014_train_0000" / "ILSVRC2014_train_00000001.xml", ("", (5, 6, 50, 40)))
    write_xml(annotations / "ILSVRC2014_train_0000" / "ILSVRC2014_train_00000002.xml")  # nothing in it
    write_image(images / "ILSVRC2014_train_0000" / "ILSVRC2014_train_00000002.JPEG")
    tracks, warning = read("det", annotations)
    assert {name: t.sightings[0].box_xywh for name, t in tracks.items()} == {
        "n01440764_10040:0": (0, 0, 30, 20),
        "n01440764_10040:1": (40, 10, 30, 50),
    }
    assert warning.endswith("left out 1 without an image")
    with pytest.raises(ValueError, match="lies under no folder Annotations"):
        write_xml(tmp_path / "loose" / "a.xml", ("", (0, 0, 30, 20)))
        read("det", tmp_path / "loose")


def test_youtube_bb_segments_and_shares_of_the_frame(tmp_path: Path) -> None:
    rows = [
        ("-AB_c", 1000, 0, "person", 0, "present", 0.25, 0.75, 0.1, 0.6),
        ("-AB_c", 2000, 0, "person", 0, "absent", -1, -1, -1, -1),
        ("-AB_c", 3000, 0, "person", 0, "present", 0.3, 0.8, 0.1, 0.6),
        # The same object number of another class is another segment.
        ("-AB_c", 3000, 5, "cat", 0, "present", 0.0, 0.5, 0.5, 1.0),
        ("-AB_c", 4000, 5, "cat", 0, "present", 0.5, 0.5, 0.5, 1.0),
        ("-AB_c", 5000, 5, "cat", 0, "present", 0.1, 0.5, 0.5, 1.0),
        ("gone", 1000, 5, "cat", 0, "present", 0.1, 0.5, 0.5, 1.0),
    ]
    (tmp_path / "yt_bb_detection_train.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    for time in (1000, 2000, 3000, 4000):  # the frame at 5 s was not downloaded, nor the other video
        write_image(tmp_path / "frames" / "-AB_c" / f"{time}.jpg", (200, 100))
    tracks, warning = read("youtube_bb", tmp_path / "yt_bb_detection_train.csv", images="frames")
    assert {name: list(t.frames) for name, t in tracks.items()} == {"-AB_c:0_0": [1, 3], "-AB_c:5_0": [3]}
    assert tracks["-AB_c:0_0"].sightings[0].box_xywh == pytest.approx((50, 10, 100, 50))
    assert Path(tracks["-AB_c:0_0"].sightings[1].image).name == "3000.jpg"  # type: ignore
    assert tracks["-AB_c:0_0"].frame_range == 3
    assert warning.endswith("left out 1 absent or hidden, 2 without an image, 1 without area")


def test_coco_by_layout(tmp_path: Path) -> None:
    write_image(tmp_path / "train2017" / "000000000009.jpg")
    item = {"id": 3, "image_id": 9, "bbox": [5, 6, 30, 20], "iscrowd": 0, "segmentation": [[5, 6, 35, 6, 35, 26]]}
    content = {"images": [{"id": 9, "file_name": "000000000009.jpg"}], "annotations": [item]}
    (tmp_path / "instances_train2017.json").write_text(json.dumps(content))
    tracks, warning = read("coco", tmp_path / "instances_train2017.json", images="train2017")
    (track,) = tracks.values()
    assert (track.sightings[0].box_xywh, warning) == ((5, 6, 30, 20), "")
    assert len(list(track.outlined())) == 1


@pytest.mark.parametrize(("suffix", "size"), [(".jpg", (131, 77)), (".png", (50, 31))])
def test_image_size(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    path = tmp_path / f"a{suffix}"
    assert cv2.imwrite(str(path), np.zeros((size[1], size[0], 3), np.uint8))
    assert image_size(path) == size
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable image"):
        image_size(path)


def test_jpeg_size_is_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.jpg", (131, 77))
    monkeypatch.setattr(cv2, "imread", lambda *_: pytest.fail("decoded"))
    assert image_size(tmp_path / "a.jpg") == (131, 77)


def test_numbered_frames_are_a_sequence(tmp_path: Path) -> None:
    frames = NumberedFrames(tmp_path, "{:04d}.jpg", np.arange(3, 9), TRUTH.astype(np.float32))
    assert [Path(s.image).name for s in frames[1:3]] == ["0004.jpg", "0005.jpg"]  # type: ignore
    assert frames[-1].box_xywh == tuple(TRUTH[-1])
    assert len(list(frames)) == 6
    with pytest.raises(IndexError):
        frames[6]


# --- what a recipe makes of them -----------------------------------------------------------------------------------


def two_sets(root: Path) -> list[dict[str, Any]]:
    for i in range(3):
        write_got10k(root / "got" / f"GOT-10k_Train_{i:06d}", TRUTH)
    write_lasot(root / "lasot" / "bird" / "bird-1", TRUTH)
    return [{"layout": "got10k", "path": "got"}, {"layout": "lasot", "path": "lasot", "frame_range": 1}]


def recipe(sets: list[dict[str, Any]], **data: Any) -> Any:
    pairs = {"mix": {"video": 1.0}, "negative": 0.0}
    return recipe_from_dict({"model": "siamcan-mobilenetv2", "data": {"sets": sets, "pairs": pairs, **data}})


def test_shares_say_how_often_sets_are_drawn(tmp_path: Path) -> None:
    sets = two_sets(tmp_path)
    for by_share in (False, True):
        if by_share:
            sets = [{**sets[0], "share": 1.0}, {**sets[1], "share": 4.0}]
        found = collect(recipe(sets), tmp_path, 127, 255)
        config = PairConfig(mix={"video": 1.0}, negative=0.0)
        sampler = PairSampler(found.videos, [], [], config, ImageCache(0.1), 127, 255)
        rng = np.random.default_rng(0)
        drawn = [sampler._draw_kind("video", rng).source for _ in range(300)]
        assert np.mean([name == "bird-1" for name in drawn]) == pytest.approx(0.8 if by_share else 0.25, abs=0.08)


def test_stills_have_shares_too(tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 1)):
        write_image(tmp_path / name / "img" / "0.jpg")
        rows = "0.jpg,5,6,40,30,x,\n" * count
        (tmp_path / name / "boxes.csv").write_text("image,x,y,w,h,label,mask\n" + rows)
    sets = [{"layout": "stills", "path": "a", "share": 1}, {"layout": "stills", "path": "b", "share": 1}]
    found = collect(recipe(sets), tmp_path, 127, 255)
    config = PairConfig(mix={"still": 1.0}, negative=0.0)
    sampler = PairSampler([], found.stills, [], config, ImageCache(0.1), 127, 255)
    rng = np.random.default_rng(0)
    drawn = [Path(sampler._draw_kind("still", rng).source).parts[-3] for _ in range(200)]
    assert drawn.count("b") == pytest.approx(100, abs=25)


def test_frame_range_of_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = collect(recipe(two_sets(tmp_path)), tmp_path, 127, 255)
    sampler = PairSampler(found.videos, [], [], PairConfig(mix={"video": 1.0}, negative=0.0), ImageCache(0.1), 127, 255)
    seen: dict[str, list[int]] = {}
    original = PairSampler._view

    def noted(self: PairSampler, sighting: Any, *rest: Any) -> Any:
        path = Path(sighting.image)
        seen.setdefault("lasot" if path.parent.name == "img" else "got", []).append(int(path.stem))
        return original(self, sighting, *rest)

    monkeypatch.setattr(PairSampler, "_view", noted)
    for i in range(120):
        sampler.draw(np.random.default_rng(i))
    gaps = {name: set(np.abs(np.subtract(v[::2], v[1::2])).tolist()) for name, v in seen.items()}
    assert gaps == {"lasot": {0, 1}, "got": {0, 1, 2, 3, 4, 5}}


def test_held_out_videos_of_a_public_set(tmp_path: Path) -> None:
    found = collect(recipe(two_sets(tmp_path), validation_videos=["bird-1"]), tmp_path, 127, 255)
    assert [t.name for t in found.validation] == ["bird-1"]
    assert len(found.videos) == 3


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([{"layout": "got10k", "path": "nowhere"}], "no data set at .*nowhere; check --data"),
        ([{"layout": "lasot", "path": "got"}], None),
        ([{"layout": "vid", "path": "got"}], "no usable target in .*got: a vid set looks like Annotations/VID"),
        ([{"layout": "got10k", "path": "got", "share": 1.0}, {"layout": "lasot", "path": "lasot"}], "name all under"),
        (
            [{"layout": "got10k", "path": "got"}, {"layout": "got10k", "path": "copy"}],
            "3 names are those of two videos",
        ),
    ],
)
def test_set_errors(tmp_path: Path, sets: list[dict[str, Any]], message: str | None) -> None:
    two_sets(tmp_path)
    for i in range(3):
        write_got10k(tmp_path / "copy" / f"GOT-10k_Train_{i:06d}", TRUTH)
    if message is None:  # GOT-10k read as LaSOT: no img folders, so nothing is there
        message = "no usable target"
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("ignore")
        collect(recipe(sets), tmp_path, 127, 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "kitti", "path": "x"}, f"layout must be one of {', '.join(LAYOUTS)}, got 'kitti'"),
        ({"layout": "youtube_bb", "path": "x.csv"}, "layout youtube_bb needs `images`"),
        ({"layout": "vid", "path": "x", "images": "y"}, r"layout vid takes no `images` \(got y\): it looks like Ann"),
        ({"layout": "vid", "path": "x", "share": -1}, "share must be at least 0"),
    ],
)
def test_set_fields_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe([change])
