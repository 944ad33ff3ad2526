"""Training: learning rate, readers, pairs, triplets, recipes. Numbers are worked by hand where possible."""

from __future__ import annotations

import csv
import itertools
import json
import math
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
import yaml

from siamtrack.nets import MODELS
from siamtrack.nets.backbones import ResNet50Dilated
from siamtrack.nets.build import build_model
from siamtrack.nets.decode import Grid
from siamtrack.plain import to_plain
from training import pairs as pairs_module
from training.augment import (
    PYSOT_COLOUR,
    Cutout,
    Jitter,
    LightConfig,
    corrupted,
    draw_light,
    jittered_window,
    motion_kernel,
    paste,
    photometric,
    rotate,
)
from training.data import list_images, read_coco, read_stills, read_video
from training.dataset import EpochSampler, LabelConfig, PairDataset, collate
from training.frames import pair_frames, triplet_frames
from training.images import ImageCache
from training.labels import Cells
from training.left_out import LeftOut
from training.module import SiameseModule, load_backbone, lr_factor
from training.objects import Objects
from training.pairs import Pair, PairConfig, PairSampler
from training.recipe import OptimConfig, Recipe, load_recipe, recipe_from_dict
from training.tracks import Mask, Sighting, Track, usable

RECIPES = Path(__file__).parent.parent / "training" / "recipes"
CELLS = Cells(Grid(size=25, stride=8, origin=31.5).points().numpy(), stride=8)


# --- learning rate -------------------------------------------------------------------------------------------------


def test_learning_rate_of_the_paper() -> None:
    """Section 4.1: 0.001 to 0.005 over 5 of 20 epochs, then exponentially to 0.00005."""
    optim = load_recipe(RECIPES / "siamcan-r50.yaml").optim
    rates = [optim.lr * lr_factor(step, 2000, 500, optim) for step in range(2001)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[500] == pytest.approx(0.005)
    assert rates[2000] == pytest.approx(0.00005)
    assert all(a < b for a, b in itertools.pairwise(rates[:501]))
    assert all(a > b for a, b in itertools.pairwise(rates[500:]))
    assert rates[250] == pytest.approx(math.sqrt(0.001 * 0.005))  # geometric warm-up
    assert rates[1250] == pytest.approx(math.sqrt(0.005 * 0.00005))  # exponential decay


def test_learning_rate_cosine() -> None:
    optim = OptimConfig(lr=1e-3, warmup_start=1e-4, final_lr=1e-5, decay="cosine")
    rates = [optim.lr * lr_factor(step, 1000, 200, optim) for step in range(1201)]
    assert (rates[0], rates[200], rates[1000]) == pytest.approx((1e-4, 1e-3, 1e-5))
    assert rates[600] == pytest.approx((1e-3 + 1e-5) / 2)  # half way down
    assert all(a > b for a, b in itertools.pairwise(rates[200:1001]))
    assert rates[1200] == pytest.approx(1e-5)  # past the end it stays


def test_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert lr_factor(0, 100, 0, OptimConfig()) == 1


# --- readers -------------------------------------------------------------------------------------------------------


def write_image(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


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


# --- augmentation --------------------------------------------------------------------------------------------------


def test_window_without_jitter_is_the_context_of_the_box() -> None:
    rng = np.random.default_rng(0)
    window = jittered_window((100, 80, 40, 40), 127, 255, Jitter(0, 0, 0), rng)
    side = 80 * 255 / 127  # sqrt((40 + 40) (40 + 40))
    assert (window.width, window.height) == (round(side), round(side))
    assert window.to_crop((100, 80, 40, 40), 255) == pytest.approx([127.5, 127.5, 63.5, 63.5], abs=1.0)


def test_jitter_stays_in_its_limits_and_uses_them() -> None:
    rng = np.random.default_rng(0)
    jitter = Jitter(shift_px=64, scale=0.2, stretch=0.1)
    windows = [jittered_window((500, 500, 100, 100), 127, 255, jitter, rng) for _ in range(500)]
    found = np.array([w.to_crop((500, 500, 100, 100), 255) for w in windows])
    shift, log_size = np.abs(found[:, :2] - 127.5), np.log(np.sqrt(found[:, 2] * found[:, 3]) / 63.5)
    log_stretch = np.log(found[:, 2] / found[:, 3])
    for values, limit, slack in ((shift, 64, 1), (np.abs(log_size), 0.2, 0.01), (np.abs(log_stretch), 0.1, 0.01)):
        assert 0.9 * limit < values.max() <= limit + slack


def test_photometric_returns_a_new_image_of_the_same_shape() -> None:
    image = np.random.default_rng(0).integers(0, 256, (127, 127, 3)).astype(np.uint8)
    image.flags.writeable = False
    outs = [photometric(image, np.random.default_rng(seed)) for seed in range(60)]
    assert all(o.shape == image.shape and o.dtype == np.uint8 for o in outs)
    assert len({o.tobytes() for o in outs}) == 60
    means = [abs(float(o.mean()) - float(image.mean())) for o in outs]
    assert max(means) > 10  # it does something
    assert max(means) < 100  # and leaves the picture recognisable


def test_motion_blur_keeps_brightness_and_runs_along_its_angle() -> None:
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    blurred = cv2.filter2D(image, -1, motion_kernel(9, 0.0))[:, :, 0]
    assert np.flatnonzero(blurred.any(axis=1)).tolist() == [20]
    assert np.flatnonzero(blurred.any(axis=0)).tolist() == list(range(16, 25))
    assert int(blurred.sum()) == pytest.approx(255, abs=9)
    flat = np.full((41, 41, 3), 90, np.uint8)
    np.testing.assert_array_equal(cv2.filter2D(flat, -1, motion_kernel(7, 1.0)), flat)


NO_LIGHT: dict[str, Any] = dict.fromkeys(("gain", "gamma", "tint", "grey", "motion", "gaussian", "coarse"), 0.0)


def test_light_as_pysot_has_it() -> None:
    """An offset of every crop's colour, and a cross for a kernel."""
    fields = {**NO_LIGHT, "mildest": 1, "colour": 1, "motion": 0.2}
    config = LightConfig(**fields, motion_shape="cross", motion_px=45)
    drawn = [draw_light(255, np.random.default_rng(seed), config) for seed in range(4000)]
    assert {(light.gain, light.gamma, light.grey, light.sigma_px, light.coarse_px) for light in drawn} == {
        (1.0, 1.0, False, 0.0, 0)
    }
    tints = 255 * np.array([light.tint_bgr[::-1] for light in drawn])  # red, green, blue
    np.testing.assert_allclose(np.cov(tints.T), PYSOT_COLOUR @ PYSOT_COLOUR.T, atol=2.5)
    crosses = [light for light in drawn if light.motion_px]
    assert len(crosses) / len(drawn) == pytest.approx(0.2, abs=0.02)
    assert {light.motion_px for light in crosses} == set(range(5, 46, 2))
    for light in crosses[:20]:
        kernel = light.kernel()
        assert kernel is not None and kernel.shape == (45, 45) and kernel.sum() == pytest.approx(1, abs=1e-5)
        middle, half = 22, light.motion_px // 2
        assert kernel[middle - half, middle] == pytest.approx(light.upright / light.motion_px)
        assert np.count_nonzero(kernel) == 2 * light.motion_px - 1


@pytest.mark.parametrize("deferred", [False, True])
def test_each_crop_has_its_light(tracks: Tracks, deferred: bool) -> None:
    lights = {
        "template_light": LightConfig(**NO_LIGHT),
        "search_light": LightConfig(**{**NO_LIGHT, "grey": 1.0, "mildest": 1}),
    }
    config = PairConfig(mix={"video": 1.0}, **PLAIN, **lights)
    pair = PairSampler(*tracks, config, ImageCache(0.1), 127, 255, False, deferred).draw(np.random.default_rng(0))
    if deferred:
        assert not pair.effects["template"].light.grey and pair.effects["search"].light.grey
    else:
        colourful = [np.ptp(crop.astype(int), axis=2).max() > 0 for crop in (pair.template, pair.search)]
        assert colourful == [True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mildest": 1.5}, r"mildest must be in 0 to 1, got 1\.5"),
        ({"motion_shape": "star"}, "motion_shape must be one of line, cross, got 'star'"),
        ({"motion_shape": "cross", "motion_px": 3}, "motion_px of a cross must be at least 5, got 3"),
        ({"gaussian": 0.6, "coarse": 0.5}, r"chances must be at most 1, .*got grey 0\.12, 0\.12 \+ 0\.6 \+ 0\.5"),
        ({"tint": -1.0}, "tint must be at least 0"),
    ],
)
def test_light_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightConfig(**fields)


def test_corrupted_templates() -> None:
    """DASTSiam's noise: half of the images with Gaussian noise, half with a rectangle of one colour, up to a fifth."""
    image = np.full((63, 63, 3), 128, np.uint8)
    image.flags.writeable = False
    noisy, deviations, erased = [], [], []
    for seed in range(1000):
        out = corrupted(image, np.random.default_rng([1, seed]))
        assert (out.shape, out.dtype) == (image.shape, np.uint8)
        colours, counts = np.unique(out.reshape(-1, 3), axis=0, return_counts=True)
        noisy.append(len(colours) > 2)
        if noisy[-1]:
            deviations.append(float(np.median(np.abs(out.astype(int) - 128))) / 0.6745)
        else:
            erased.append(float(counts[(colours != 128).any(axis=1)].sum()) / 63**2)
    assert np.mean(noisy) == pytest.approx(0.5, abs=0.05)
    assert 12 < max(deviations) < 20
    assert np.mean(np.array(erased) > 0) == pytest.approx(0.5, abs=0.07)
    assert 0.15 < max(erased) <= 0.2


@pytest.mark.parametrize(
    ("centre", "size", "angle", "wanted"),
    [
        ((50, 40), (20, 10), 0, (50, 40, 20, 10)),
        ((50, 40), (20, 10), 90, (50, 40, 10, 20)),
        ((50, 40), (4, 2), 0, (50, 40, 4, 2)),  # far smaller than the cut-out: shrunk by area
        ((0, 40), (20, 10), 0, (5, 40, 10, 10)),  # half outside: the visible part
    ],
)
def test_paste_returns_the_box_of_what_it_painted(
    centre: tuple[float, float], size: tuple[float, float], angle: float, wanted: tuple[float, ...]
) -> None:
    canvas = np.zeros((80, 100, 3), np.uint8)
    cutout = Cutout(np.full((20, 40, 3), 200, np.uint8), np.full((20, 40), 255, np.uint8))
    found = paste(canvas, cutout, centre, size, angle)
    assert found == pytest.approx(wanted, abs=1.0)
    painted = canvas[:, :, 0] > 100
    assert painted.sum() == pytest.approx(wanted[2] * wanted[3], rel=0.25)
    assert found is not None
    columns, rows = np.flatnonzero(painted.any(axis=0)), np.flatnonzero(painted.any(axis=1))
    assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(found[0], abs=0.6)
    assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(found[1], abs=0.6)


def test_paste_off_the_canvas() -> None:
    canvas = np.zeros((50, 50, 3), np.uint8)
    cutout = Cutout(np.full((9, 9, 3), 200, np.uint8), np.full((9, 9), 255, np.uint8))
    assert paste(canvas, cutout, (-100, 20), (20, 20), 0) is None
    assert not canvas.any()


def test_paste_leaves_what_alpha_leaves_out() -> None:
    canvas = np.full((50, 50, 3), 10, np.uint8)
    alpha = np.zeros((20, 20), np.uint8)
    alpha[:, 10:] = 255
    found = paste(canvas, Cutout(np.full((20, 20, 3), 200, np.uint8), alpha), (25, 25), (20, 20), 0)
    assert found == pytest.approx((30, 25, 10, 20), abs=1)
    assert (canvas[:, :24] == 10).all()


def test_paste_blends_by_alpha_rounded() -> None:
    rng = np.random.default_rng(0)
    canvas, bgr = (rng.integers(0, 256, (50, 50, 3)).astype(np.uint8) for _ in range(2))
    alpha = rng.integers(0, 256, (50, 50)).astype(np.uint8)
    below, share = canvas.copy(), alpha[:, :, None] / 255
    assert paste(canvas, Cutout(bgr, alpha), (25, 25), (50, 50), 0) is not None
    np.testing.assert_array_equal(canvas, np.floor(below * (1 - share) + bgr * share + 127 / 255 + 1e-9))


# --- pairs ---------------------------------------------------------------------------------------------------------

TARGET_BGR = (40, 60, 220)
BACKGROUND = 110


def painted(path: Path, box_xywh: tuple[int, int, int, int], colour: tuple[int, int, int] = TARGET_BGR) -> Sighting:
    """A plain photo with one solid rectangle, and its outline as a label image."""
    image = np.full((240, 320, 3), BACKGROUND, np.uint8)
    labels = np.zeros((240, 320), np.uint8)
    x, y, w, h = box_xywh
    image[y : y + h, x : x + w], labels[y : y + h, x : x + w] = colour, 255
    write_image(path, image)
    mask = write_image(path.parent / "mask" / path.name, labels)
    return Sighting(path, tuple(float(v) for v in box_xywh), Mask(mask))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tracks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Track], list[Track], list[Path]]:
    """One video of six frames in which the target moves and grows, two stills, two photos without annotations."""
    root = tmp_path_factory.mktemp("pairs")
    frames = [painted(root / f"v{i}.png", (60 + 20 * i, 70 + 5 * i, 40 + 4 * i, 30 + 4 * i)) for i in range(6)]
    stills = [Track(f"s:{i}", (painted(root / f"s{i}.png", (100, 80, 60, 48)),), (0,)) for i in range(2)]
    photos = [write_image(root / f"p{i}.png", np.full((240, 320, 3), BACKGROUND, np.uint8)) for i in range(2)]
    return [Track("v", tuple(frames), tuple(range(6)))], stills, photos


Tracks = tuple[list[Track], list[Track], list[Path]]
ALL = {"video": 0.4, "still": 0.2, "cutout": 0.3, "region": 0.1}
PLAIN: dict[str, Any] = {"negative": 0.0, "distractor": 0.0, "occluder": 0.0, "rotation": 0.0, "flip": 0.0}


def sampler(tracks: Tracks, **config: Any) -> PairSampler:
    return PairSampler(*tracks, PairConfig(**config), ImageCache(0.1), 127, 255)


def draw(pair_sampler: PairSampler, number: int) -> list[Pair]:
    return [pair_sampler.draw(np.random.default_rng([7, i])) for i in range(number)]


def dataset(pair_sampler: PairSampler, seed: int = 1, **labels: Any) -> PairDataset:
    return PairDataset(pair_sampler, CELLS, LabelConfig(**{"rule": "siamcan", **labels}), seed, 100)


def test_sample_depends_on_seed_and_index_alone(tracks: Tracks) -> None:
    first = dataset(sampler(tracks, mix=ALL, negative=0.3, distractor=0.5, occluder=0.5))
    again = dataset(sampler(tracks, mix=ALL, negative=0.3, distractor=0.5, occluder=0.5))
    first[0], first[1]  # what was drawn before must not matter
    for index in (5, 3, 1234):
        ours, theirs = first[index], again[index]
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert len({first[i]["search"].tobytes() for i in range(8)}) == 8
    other = dataset(first.sampler, seed=2)
    assert (first[5]["search"] != other[5]["search"]).any()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_samples_on_any_number_of_threads(tracks: Tracks, threads: int) -> None:
    data = dataset(sampler(tracks, mix=ALL, negative=0.3, distractor=0.5, occluder=0.5))
    data.sampler.images.limit_bytes = 500_000  # two photos: threads push each other's out
    wanted = [data[index] for index in range(40)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = data.__getitems__(list(range(40)))
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found, wanted, strict=True):
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_sample_shapes_and_collate(tracks: Tracks) -> None:
    batch = collate([dataset(sampler(tracks, mix=ALL))[i] for i in range(3)])
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in batch.items()}
    assert shapes == {
        "template": ((3, 127, 127, 3), torch.uint8),
        "search": ((3, 255, 255, 3), torch.uint8),
        "box": ((3, 4), torch.float32),
        "labels": ((3, 625), torch.int8),
        "positive": ((3,), torch.bool),
    }


@pytest.mark.parametrize("kind", ["video", "still", "cutout", "region"])
def test_each_kind_alone_draws_valid_pairs(tracks: Tracks, kind: str) -> None:
    for pair in draw(sampler(tracks, mix={kind: 1.0}, negative=0.0), 12):
        cx, cy, w, h = pair.box_cxcywh
        assert pair.template.shape == (127, 127, 3)
        assert pair.search.shape == (255, 255, 3)
        assert pair.template.dtype == pair.search.dtype == np.uint8
        assert 255 / 2 - 66 <= cx <= 255 / 2 + 66
        assert 255 / 2 - 66 <= cy <= 255 / 2 + 66
        # By the context rule a target is about 63.5 px wide; jitter, growth in the video and rotation add to that.
        assert 63.5 * 0.4 < math.sqrt(w * h) < 63.5 * 1.8


@pytest.mark.parametrize("kind", ["video", "still", "cutout"])
def test_box_is_where_the_target_is(tracks: Tracks, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "photometric", lambda image, *_: image)
    for pair in draw(sampler(tracks, mix={kind: 1.0}, **PLAIN), 12):
        distance = np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2)
        target = distance < 40
        cx, cy, w, h = pair.box_cxcywh
        if kind == "cutout":  # may be rotated: only its bounding box is known
            rows, columns = np.flatnonzero(target.any(axis=1)), np.flatnonzero(target.any(axis=0))
            assert columns[0] == pytest.approx(cx - w / 2, abs=2)
            assert columns[-1] + 1 == pytest.approx(cx + w / 2, abs=2)
            assert rows[0] == pytest.approx(cy - h / 2, abs=2)
            assert rows[-1] + 1 == pytest.approx(cy + h / 2, abs=2)
        else:
            x, y = np.arange(255) + 0.5, np.arange(255) + 0.5
            outer = (np.abs(x - cx) < w / 2 + 2)[None] & (np.abs(y - cy) < h / 2 + 2)[:, None]
            inner = (np.abs(x - cx) < w / 2 - 2)[None] & (np.abs(y - cy) < h / 2 - 2)[:, None]
            assert target[inner].all()
            assert not target[~outer].any()
        middle = pair.template[63, 63].astype(int)
        assert np.abs(middle - TARGET_BGR).max() < 40  # the template shows the target, in its middle


def test_a_mirrored_search_crop_takes_its_box_along(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "photometric", lambda image, *_: image)
    for pair in draw(sampler(tracks, mix={"still": 1.0}, **{**PLAIN, "flip": 1.0}), 6):
        rows, columns = np.nonzero(np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2) < 40)
        cx, cy, _, _ = pair.box_cxcywh
        assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((cx, cy), abs=2)


def test_a_part_of_an_object_is_inside_it(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "photometric", lambda image, *_: image)
    seen = np.random.default_rng(5)
    for pair in draw(sampler(tracks, mix={"still": 1.0}, part=1.0, **PLAIN), 12):
        target = np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2) < 40
        cx, cy, w, h = pair.box_cxcywh
        x, y = np.arange(255) + 0.5, np.arange(255) + 0.5
        inner = (np.abs(x - cx) < w / 2 - 2)[None] & (np.abs(y - cy) < h / 2 - 2)[:, None]
        assert target[inner].all()
        assert target.sum() > 1.5 * w * h  # the object goes on beyond it
        assert 63.5 * 0.4 < math.sqrt(w * h) < 63.5 * 1.8  # on the scale that it would be tracked at
    for side, smallest in ((200, 60), (20, 20)):  # a part of 20 px would be thinner than 16
        whole = Sighting(tracks[2][0], (30.0, 20.0, side, side))
        x0, y0, w, h = pairs_module.part_of(whole, seen).box_xywh
        assert min(w, h) >= smallest
        assert x0 >= 30
        assert y0 >= 20
        assert x0 + w <= 30 + side
        assert y0 + h <= 20 + side


# --- triplets ------------------------------------------------------------------------------------------------------


def triplets(tracks: Tracks, **config: Any) -> PairSampler:
    return PairSampler(*tracks, PairConfig(**config), ImageCache(0.1), 127, 255, triplets=True)


@pytest.mark.parametrize("kind", ["video", "still", "cutout", "region"])
def test_each_kind_draws_triplets(tracks: Tracks, kind: str) -> None:
    for pair in draw(triplets(tracks, mix={kind: 1.0}, negative=0.0), 8):
        crops = [pair.template, pair.history, pair.current]
        assert all(crop is not None and crop.shape == (127, 127, 3) and crop.dtype == np.uint8 for crop in crops)
        assert len({crop.tobytes() for crop in crops if crop is not None}) == 3  # no copies of each other
        assert pair.search.shape == (255, 255, 3)


def test_triplets_show_the_target_in_every_template(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("photometric", "corrupted"):
        monkeypatch.setattr(pairs_module, name, lambda image, *_: image)
    for kind in ("video", "still", "cutout"):
        for pair in draw(triplets(tracks, mix={kind: 1.0}, **PLAIN), 6):
            for crop in (pair.template, pair.history, pair.current):
                assert crop is not None
                assert np.abs(crop[63, 63].astype(int) - TARGET_BGR).max() < 40
                assert np.abs(crop[3, 3].astype(int) - BACKGROUND).max() < 40


def test_only_history_and_current_are_corrupted(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 2.3: noise is added to T_a and T_c."""
    monkeypatch.setattr(pairs_module, "corrupted", lambda image, rng: np.zeros_like(image))
    (pair,) = draw(triplets(tracks, mix={"video": 1.0}, **PLAIN), 1)
    assert pair.history is not None
    assert pair.current is not None
    assert (pair.template.any(), pair.search.any(), pair.history.any(), pair.current.any()) == (
        True,
        True,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("frames", "length"),
    [(range(200), 50), (range(0, 400, 7), 50), ((0, 1, 2, 30, 31, 90, 200, 201, 202, 203), 20), (range(4), 50)],
    ids=["long", "sparse", "with gaps", "short"],
)
def test_triplet_frames(frames: tuple[int, ...], length: int) -> None:
    numbers = np.array(frames)
    drawn = [triplet_frames(numbers, length, np.random.default_rng(seed)) for seed in range(300)]
    order = []
    for first, history, current, later in drawn:
        used = numbers[[first, history, current, later]]
        assert np.ptp(used) < length
        assert current - history in (0, 1)
        assert history <= current <= later
        order.append((current > history, later > current, first < history, first > later))
    by_pattern = np.mean(order, axis=0)
    if frames in (range(200), range(4)):
        assert by_pattern[:2].tolist() == [1, 1]  # neighbours, and the search crop after them
        assert by_pattern[2] > 0.1  # T_i is any frame of the part
        assert {first for first, *_ in drawn} == set(range(len(frames))) or len(frames) > 4


def test_pair_frames_are_uniform_among_those_in_range() -> None:
    frames = np.array([0, 1, 5, 6, 7, 30])
    drawn = [pair_frames(frames, 5, np.random.default_rng(seed)) for seed in range(3000)]
    later = [second for first, second in drawn if first == 2]  # frame 5: from 0 to 7
    counts = np.bincount(later, minlength=6) / len(later)
    assert counts[5] == 0
    assert counts[:5] == pytest.approx([0.2] * 5, abs=0.06)
    assert {second for first, second in drawn if first == 5} == {5}


@pytest.mark.parametrize(("count", "wanted"), [(1, {(0, 0, 0)}), (2, {(0, 1, 1)}), (3, {(0, 1, 2)})])
def test_triplets_of_very_short_tracks(count: int, wanted: set[tuple[int, int, int]]) -> None:
    drawn = {triplet_frames(np.arange(count), 50, np.random.default_rng(seed))[1:] for seed in range(50)}
    assert drawn == wanted


def test_triplet_samples_collate_and_repeat(tracks: Tracks) -> None:
    first, again = (dataset(triplets(tracks, mix=ALL, negative=0.3)) for _ in range(2))
    first[0]
    for key, value in first[3].items():
        np.testing.assert_array_equal(value, again[3][key])
    batch = collate([first[i] for i in range(2)])
    assert {key: tuple(batch[key].shape) for key in ("template", "history", "current")} == dict.fromkeys(
        ("template", "history", "current"), (2, 127, 127, 3)
    )


@pytest.mark.parametrize(
    ("angle", "size"), [(0.0, (60, 20)), (90.0, (20, 60)), (-90.0, (20, 60)), (30.0, (52.92, 34.64))]
)
def test_rotation_turns_about_the_target(angle: float, size: tuple[float, float]) -> None:
    # A filled ellipse, for which the returned box is exact.
    image = np.zeros((255, 255, 3), np.uint8)
    cv2.ellipse(image, (110, 130), (30, 10), 0, 0, 360, (255, 255, 255), -1)
    turned, (cx, cy, w, h) = rotate(image, (110.5, 130.5, 60, 20), angle)
    assert (cx, cy, w, h) == pytest.approx((110.5, 130.5, *size), abs=0.05)
    rows, columns = np.nonzero(turned[:, :, 0] > 127)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((cx, cy), abs=0.5)
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == pytest.approx((w, h), abs=2.5)


def test_video_pairs_come_from_two_frames_in_range(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = PairSampler._view

    def noted(self: PairSampler, sighting: Sighting, *rest: Any) -> Any:
        seen.append(int(sighting.image.stem[1:]))
        return original(self, sighting, *rest)

    monkeypatch.setattr(PairSampler, "_view", noted)
    draw(sampler(tracks, mix={"video": 1.0}, frame_range=2, **PLAIN), 60)
    gaps = np.abs(np.subtract(seen[::2], seen[1::2]))
    assert set(gaps.tolist()) == {0, 1, 2}


def test_negative_pairs_show_another_source(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    original = PairSampler._draw_kind

    def noted(self: PairSampler, kind: str, rng: np.random.Generator) -> Any:
        drawn = original(self, kind, rng)
        sources.append(drawn.source)
        return drawn

    monkeypatch.setattr(PairSampler, "_draw_kind", noted)
    always = sampler(tracks, mix=ALL, **{**PLAIN, "negative": 1.0})
    for i in range(40):
        sources.clear()
        always.draw(np.random.default_rng([3, i]))
        assert sources[0] != sources[-1]


def test_a_single_video_gives_no_negative_pairs(tracks: Tracks) -> None:
    videos, _, _ = tracks
    one = [t for t in videos if t.name.split(":")[0] == videos[0].name.split(":")[0]]
    with pytest.raises(ValueError, match="set `negative` to 0 or add data"):
        PairSampler(one, [], [], PairConfig(mix={"video": 1.0}, negative=0.1), ImageCache(0.1), 127, 255)


def test_negative_pairs_are_all_background(tracks: Tracks) -> None:
    samples = [dataset(sampler(tracks, mix=ALL, negative=1.0), positives=0, negatives=0)[i] for i in range(6)]
    assert not any(s["positive"] for s in samples)
    assert all((s["labels"] == 0).all() for s in samples)
    sampled = dataset(sampler(tracks, mix=ALL, negative=1.0), positives=16, negatives=48)[0]["labels"]
    assert ((sampled == 0).sum(), (sampled == 1).sum()) == (48, 0)


def test_positive_pairs_are_labelled_at_their_box(tracks: Tracks) -> None:
    sampled = dataset(sampler(tracks, mix=ALL, **PLAIN), positives=16, negatives=48)
    whole = dataset(sampler(tracks, mix=ALL, **PLAIN), positives=0, negatives=0)
    for i in range(6):
        item = whole[i]
        assert item["positive"]
        rows, columns = np.nonzero(item["labels"].reshape(25, 25) == 1)
        assert rows.size
        assert 31.5 + 8 * columns.mean() == pytest.approx(item["box"][0], abs=8)
        assert 31.5 + 8 * rows.mean() == pytest.approx(item["box"][1], abs=8)
        few = sampled[i]["labels"]
        assert (few == 1).sum() == min(16, rows.size)
        assert (few == 0).sum() == 48


def test_share_of_negatives(tracks: Tracks) -> None:
    share = np.mean([not p.positive for p in draw(sampler(tracks, mix={"region": 1.0}, negative=0.3), 150)])
    assert share == pytest.approx(0.3, abs=0.12)


@pytest.mark.parametrize("extra", ["distractor", "occluder"])
def test_pasted_objects_spare_or_cover_the_target(tracks: Tracks, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "photometric", lambda image, *_: image)
    _, _, photos = tracks
    # Green outlined objects to paste, red targets without outlines.
    root = photos[0].parent
    foreign = Track("f", (painted(root / "foreign.png", (100, 80, 60, 48), (40, 200, 40)),), (0,))
    target = Track("t", (Sighting(root / "s0.png", (100.0, 80.0, 60.0, 48.0)),), (0,))
    config = PairConfig(mix={"video": 1.0}, **{**PLAIN, extra: 1.0})
    pair_sampler = PairSampler([target], [foreign], photos, config, ImageCache(0.1), 127, 255)
    greens, covered = 0, []
    for pair in draw(pair_sampler, 12):
        green = np.abs(pair.search.astype(int) - (40, 200, 40)).max(axis=2) < 40
        greens += green.any()
        cx, cy, w, h = (int(v) for v in pair.box_cxcywh)
        inside = green[cy - h // 2 : cy + h // 2, cx - w // 2 : cx + w // 2]
        covered.append(inside.mean())
    if extra == "distractor":
        assert greens >= 6  # some fall on the target's place and are left out
        assert max(covered) < 0.2
    else:
        assert greens == 12
        assert 0.05 < np.mean(covered) < 0.5


@pytest.mark.parametrize("extra", ["distractor", "occluder"])
def test_the_target_is_no_distractor_of_itself(tracks: Tracks, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second copy of it would be labelled background; of a negative pair, neither object may come in again."""
    monkeypatch.setattr(pairs_module, "photometric", lambda image, *_: image)
    videos, _, photos = tracks
    root = photos[0].parent
    green = Track("g", (painted(root / "green.png", (100, 80, 60, 48), (40, 200, 40)),), (0,))

    def drawn(others: list[Track], negative: float) -> list[Pair]:
        config = PairConfig(mix={"video": 1.0}, **{**PLAIN, extra: 1.0, "negative": negative})
        return draw(PairSampler([*videos, *others], [green], photos, config, ImageCache(0.1), 127, 255), 25)

    def shows(pair: Pair, colour: tuple[int, int, int]) -> bool:
        close = (np.abs(pair.search.astype(int) - colour).max(axis=2) < 40).astype(np.uint8)
        return cv2.connectedComponentsWithStats(close)[2][1:, cv2.CC_STAT_AREA].max(initial=0) > 100

    def copies(pair: Pair) -> int:
        red = (np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2) < 40).astype(np.uint8)
        red = cv2.morphologyEx(red, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
        return cv2.connectedComponents(red)[0] - 1

    pairs = drawn([], 0.0)
    assert sum(shows(pair, (40, 200, 40)) for pair in pairs) > 5  # others are pasted
    if extra == "distractor":
        assert {copies(pair) for pair in pairs} == {1}
    pasted: list[tuple[Collection[str], str]] = []
    draw_one = Objects._draw

    def noted(self: Objects, rng: Any, without: Collection[str]) -> Any:
        drawn_one = draw_one(self, rng, without)
        pasted.append((set(without), drawn_one[1] if drawn_one else ""))
        return drawn_one

    monkeypatch.setattr(Objects, "_draw", noted)
    drawn([], 0.0)
    assert len(pasted) >= 25 and all("v" in without and source not in without for without, source in pasted)
    blue = Track("b", (painted(root / "blue.png", (100, 80, 60, 48), (200, 60, 40)),), (0,))
    for pair in drawn([blue], 0.5):
        if not pair.positive:  # of red and blue one is sought, the other is there
            assert not (shows(pair, TARGET_BGR) and shows(pair, (200, 60, 40)))


@pytest.mark.parametrize(
    ("mix", "data", "message"),
    [
        ({"video": 1.0}, "nothing", "the mix asks for video pairs but the data has none"),
        ({"video": 0.5, "still": 0.5}, "videos", "still"),
        ({"region": 1.0}, "videos", "region"),
        ({"cutout": 1.0}, "no outlines", "cutout"),
        ({"cutout": 1.0}, "videos", "cutout"),  # outlines, but no photo to paste them on
    ],
)
def test_mix_the_data_cannot_serve(tracks: Tracks, mix: dict[str, float], data: str, message: str) -> None:
    videos, _, photos = tracks
    bare = [Track("v", tuple(Sighting(s.image, s.box_xywh) for s in videos[0].sightings), videos[0].frames)]
    choices: dict[str, Any] = {
        "nothing": ([], [], []),
        "videos": (videos, [], []),
        "no outlines": (bare, [], photos),
    }
    with pytest.raises(ValueError, match=message):
        PairSampler(*choices[data], PairConfig(mix=mix), ImageCache(0.1), 127, 255)


@pytest.mark.parametrize("mix", [{}, {"video": 0.0}, {"film": 1.0}, {"video": -1.0}])
def test_mix_that_cannot_be(mix: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mix must give positive shares"):
        PairConfig(mix=mix)


def test_ranks_partition_what_one_process_sees() -> None:
    for epoch in (0, 3):
        whole, *parts = EpochSampler(100), EpochSampler(100, 0, 2), EpochSampler(100, 1, 2)
        for s in (whole, *parts):
            s.set_epoch(epoch)
        drawn = [list(p) for p in parts]
        assert [len(p) for p in parts] == [len(d) for d in drawn] == [50, 50]
        assert sorted(drawn[0] + drawn[1]) == list(whole)
        # Step by step, not only in sum: the k-th pairs of both ranks are the k-th two of the single process.
        assert [i for both in zip(*drawn, strict=True) for i in both] == list(whole)


def test_a_run_resumed_within_an_epoch_goes_on_behind_its_last_step() -> None:
    """Two processes, three steps of two samples each an epoch; the run has made four steps."""
    seen = []
    for rank in range(2):
        sampler = EpochSampler(12, rank, world=2, batch_size=2, steps_done=lambda: 4)
        sampler.set_epoch(1)
        assert len(sampler) == 6  # a whole epoch: the trainer counts what it has behind it
        seen += list(sampler)
    assert sorted(seen) == list(range(16, 24))


def test_epochs_do_not_overlap() -> None:
    s = EpochSampler(101, 1, 2)
    seen: list[int] = []
    for epoch in range(4):
        s.set_epoch(epoch)
        assert len(list(s)) == len(s) == 50  # the odd one out is dropped: every rank must take equally many steps
        seen += list(s)
    assert len(set(seen)) == len(seen)


# --- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_come_back(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model == path.stem.removesuffix("-head")
    assert recipe_from_dict(to_plain(recipe)) == recipe  # as checkpoints store it
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(to_plain(recipe)))) == recipe
    assert load_recipe(path, {"epochs": 3}).epochs == 3


def test_paper_recipe_is_the_paper() -> None:
    recipe = load_recipe(RECIPES / "siamcan-r50.yaml")
    assert (recipe.epochs, recipe.batch_size, recipe.unfreeze_epoch, recipe.unfreeze_stages) == (20, 28, 10, 3)
    assert (recipe.data.labels.positives, recipe.data.labels.negatives) == (16, 48)
    assert (recipe.optim.optimiser, recipe.optim.warmup_epochs, recipe.data.pairs.negative) == ("sgd", 5, 0.2)


@pytest.mark.parametrize(
    ("name", "wanted"),
    # Epochs, pairs, batch, frozen epochs, stages thawed; peak and last rate, warm-up; shares of negative pairs.
    [
        ("siamfc", (50, 9335, 8, 0, 5, 0.01, 1e-5, 0, 0.0)),
        ("siamrpnpp-r50", (20, 600_000, 224, 10, 3, 0.005, 5e-4, 5, 0.2)),
        ("siamban-r50", (20, 1_000_000, 84, 10, 3, 0.005, 5e-5, 5, 0.2)),
        ("siamcar-r50", (20, 600_000, 80, 10, 3, 0.005, 5e-4, 5, 0.0)),
        ("siamla-r50", (50, 600_000, 128, 5, 3, 0.005, 1e-5, 5, 0.0)),
        ("dastsiam-r50", (50, 60_000, 12, 10, 2, 0.005, 5e-4, 10, 0.0)),  # see the next test
    ],
)
def test_paper_recipes_are_the_papers(name: str, wanted: tuple[float, ...]) -> None:
    r = load_recipe(RECIPES / f"{name}.yaml")
    assert wanted == (
        *(r.epochs, r.pairs_per_epoch, r.batch_size, r.unfreeze_epoch, r.unfreeze_stages),
        *(r.optim.lr, r.optim.final_lr, r.optim.warmup_epochs, r.data.pairs.negative),
    )
    assert (r.optim.optimiser, r.optim.decay, r.optim.clip) == ("sgd", "exponential", 10)
    assert r.optim.weight_decay == (5e-4 if name == "siamfc" else 1e-4)


def test_dastsiam_rate_falls_when_the_backbone_thaws() -> None:
    """Section 3.1: "fixed for the first 10 epochs", then from 0.005 to 0.0005 "for the remainder"."""
    optim = load_recipe(RECIPES / "dastsiam-r50.yaml").optim
    rates = [optim.lr * lr_factor(epoch, 50, 10, optim) for epoch in (0, 5, 10, 30, 50)]
    assert rates == pytest.approx([0.005, 0.005, 0.005, math.sqrt(0.005 * 0.0005), 0.0005])


@pytest.mark.parametrize("name", ["siamrpnpp", "siamban", "siamcar", "siamcan", "siamla", "dastsiam"])
def test_paper_jitter_is_that_of_independent_sides(name: str) -> None:
    """Width and height of pysot's crops vary each on its own, by 5 % and 18 %: as much, and uncorrelated."""
    pairs = load_recipe(RECIPES / f"{name}-r50.yaml").data.pairs
    rng = np.random.default_rng(0)
    for jitter, share in ((pairs.template, 0.05), (pairs.search, 0.18)):
        windows = [jittered_window((0, 0, 2e4, 1e4), 127, 255, jitter, rng) for _ in range(3000)]
        logs = np.log([(window.width, window.height) for window in windows])
        assert logs.std(axis=0) == pytest.approx([share / math.sqrt(3)] * 2, rel=0.05)
        assert abs(np.corrcoef(logs.T)[0, 1]) < 0.08


def test_siamfc_jitter_is_one_scale_for_both_sides() -> None:
    pairs = load_recipe(RECIPES / "siamfc.yaml").data.pairs
    assert pairs.template == pairs.search == Jitter(shift_px=4, scale=0.05, stretch=0)


def test_siamban_takes_three_tenths_stills() -> None:
    assert load_recipe(RECIPES / "siamban-r50.yaml").data.pairs.mix == {"video": 0.7, "still": 0.3}


def test_training_starts_from_a_checkpoint(tmp_path: Path) -> None:
    def module(weights: Path | None, root: str | None = "") -> Any:
        return SiameseModule({"model": "siamcan-mobilenetv2", "weights": str(weights or "")}, root)

    net = MODELS["siamcan-mobilenetv2"]()
    for name, prefix in (("bare", ""), ("run", "net.")):
        state = {prefix + key: value for key, value in net.state_dict().items()}
        extra = {"search_graph.net.mix.0.weight": torch.zeros(1)} if prefix else {}
        torch.save({"state_dict": state | extra, "epoch": 3}, tmp_path / f"{name}.pth")
        for key, value in module(tmp_path / f"{name}.pth").net.state_dict().items():
            torch.testing.assert_close(value, net.state_dict()[key])
    # A run that is resumed or exported has its own weights, wherever it once started.
    assert module(tmp_path / "gone.pth", root=None).recipe.weights
    with pytest.raises(ValueError, match=r"gone.pth: no such file"):
        module(tmp_path / "gone.pth")
    torch.save(MODELS["siamla-mobilenetv2"]().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not fit SiamCANEdge: attention.conv.weight"):
        module(tmp_path / "other.pth")


def test_backbone_of_another_model_s_run(tmp_path: Path) -> None:
    run = SiameseModule(to_plain(Recipe(model="siamcan-mobilenetv2")))
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": run.state_dict(), "epoch": 3}, path)
    recipe = Recipe(model="siamla-mobilenetv2", backbone=str(path))
    module = SiameseModule(to_plain(recipe), data_root="elsewhere")  # runs are not where the data is
    ours, theirs = module.net.backbone.state_dict(), run.net.backbone.state_dict()
    assert len(ours) > 50
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)
    with pytest.raises(ValueError, match=r"run.ckpt does not fit ResNet50Dilated: "):
        load_backbone(ResNet50Dilated(), path)


def test_torchvision_backbone_is_fitted_to_raw_pixels(tmp_path: Path) -> None:
    """Weights for normalised RGB, in a network that takes BGR in 0..255: frozen, it could not make up for that."""
    torch.manual_seed(0)
    theirs, ours = ResNet50Dilated().eval(), ResNet50Dilated()
    state = {
        name: value[:, :, 1:2, 1:2] if "downsample.0" in name and value.shape[2] == 3 else value
        for name, value in theirs.state_dict().items()
    }
    path = tmp_path / "resnet50.safetensors"
    path.touch()
    with patch("training.module.read_tensors", return_value=state):
        load_backbone(ours, path)
    rgb = torch.rand(2, 3, 63, 63)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        wanted = theirs.bn1(theirs.conv1((rgb - mean[:, None, None]) / deviation[:, None, None]))
        found = ours.eval().bn1(ours.conv1(255 * rgb.flip(1)))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_paper_weights_of_the_terms() -> None:
    def weights(name: str) -> dict[str, float]:
        objective = load_recipe(RECIPES / f"{name}.yaml").build_objective()
        return {k: v for k, v in to_plain(objective).items() if type(v) is float and k != "boundary"}

    assert weights("siamrpnpp-r50") == {"cls": 1, "loc": 1.2}
    assert weights("siamcar-r50") == {"cls": 1, "loc": 3, "quality": 1}
    assert weights("siamla-r50") == {"cls": 1, "loc": 1, "quality": 1}
    assert weights("dastsiam-r50") == {"cls": 1, "loc": 1, "second": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown field colour"),
        ({"data": {"vidoes": ["x"]}}, "recipe.data: unknown field vidoes"),
        ({"data": {"pairs": {"mix": {"film": 1.0}}}}, "mix must give"),
        ({"data": {"pairs": {"search": {"shift_px": 1}}}}, r"recipe.data.pairs.search: missing field scale, stretch"),
        ({"data": []}, "recipe.data: expected a mapping, got list"),
        ({"epochs": "ten"}, "recipe.epochs: expected a whole number, got 'ten'"),
        ({"epochs": 2.5}, "recipe.epochs: expected a whole number"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"optim": {"lr": "fast"}}, "recipe.optim.lr: expected a number, got 'fast'"),
        ({"optim": {"lr": 0}}, "lr must be above 0"),
        ({"optim": {"optimiser": "lion"}}, "optimiser must be one of sgd, adamw, got 'lion'"),
        ({"optim": {"decay": "linear"}}, "decay must be one of"),
        ({"model": "siamnet"}, "model must be one of siamfc, .*, got 'siamnet'"),
        ({"model_config": {"chanels": 3}}, "model_config of siamcan-mobilenetv2: unknown field chanels; known: blocks"),
        ({"model_config": {"blocks": "two"}}, "model_config of siamcan-mobilenetv2.blocks: expected a whole number"),
        ({"model_config": ["blocks"]}, "recipe.model_config: expected a mapping"),
        ({"model": "siamban-r50", "model_config": {"correlation": "x"}}, "correlation must be one of"),
        ({"objective": "siamese"}, "objective must be one of siamfc, "),
        ({"objective_config": {"cls_weight": 1}}, "objective_config of siamcan: unknown field cls_weight; known: cent"),
        ({"objective_config": {"loc": "much"}}, "objective_config of siamcan.loc: expected a number, got 'much'"),
        ({"objective_config": {"loc": -1}}, "loc must be at least 0, got -1.0"),
        ({"objective_config": {"regression": "l1"}}, "regression must be one of iou, log_iou, giou, diou, got 'l1'"),
        ({"data": {"labels": {"rule": "circle"}}}, "recipe.data.labels: rule must be one of"),
        ({"data": {"labels": {"rule": "siamrpn"}}}, "anchors' labels; objective siamcan has no anchors"),
        ({"data": {"pairs": {"triplet_frames": 3}}}, "triplet_frames must be at least 4, got 3"),
        ({"model": None}, "recipe.model: expected text, got None"),
        ({"objective_config": {"classification": "hinge"}}, "classification must be one of balanced_ce, focal"),
        ({"data": {"labels": {"nearest": "yes"}}}, "recipe.data.labels.nearest: expected true or false"),
    ],
)
def test_recipe_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_from_dict({"model": "siamcan-mobilenetv2", **change})


def test_model_config_builds_the_model() -> None:
    recipe = recipe_from_dict({"model": "siamla-mobilenetv2", "model_config": {"channels": 32, "non_local": False}})
    net: Any = build_model(recipe.model, recipe.model_config)
    assert (net.config.channels, net.config.non_local, net.config.aggregation) == (32, False, True)
    assert net.neck16.weight.shape[0] == 32
    with pytest.raises(ValueError, match="unknown model 'siamnet'; known: siamfc"):
        build_model("siamnet")


def test_recipe_without_a_model() -> None:
    with pytest.raises(ValueError, match="recipe: missing field model"):
        recipe_from_dict({})


def test_recipe_file_errors(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"r\.yaml: expected a mapping of fields, got list"):
        load_recipe(file)
    file.write_text("model: siamcan-r50\nlr: 1\n")
    with pytest.raises(ValueError, match=r"r\.yaml: unknown field lr"):
        load_recipe(file)


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: siamcan-r50\noptim: {lr: 1e-3}\n")  # YAML 1.1 reads 1e-3 as text
    assert load_recipe(file).optim.lr == 0.001


def ablation_rows() -> list[tuple[str, str]]:
    """Name of the recipe and the fields that each row of a table in ``docs/papers.md`` changes."""
    rows, table = [], ""
    for line in (RECIPES.parent.parent / "docs" / "papers.md").read_text().splitlines():
        named = re.search(r"[Rr]ecipe `([\w-]+)`", line)
        if line.startswith("#"):
            table = ""
        elif named and not re.search(r"`model: ", line):
            table = named[1]
        fields = re.findall(r"`((?:model|model_config|objective|objective_config|labels): [^`]+)`", line)
        fields += [f"model_config: {switches}" for switches in re.findall(r"\| `(\{[^`]+\})`", line)]
        if table and fields and line.startswith("| "):
            rows.append((named[1] if named else table, "\n".join(fields)))
    return rows


@pytest.mark.parametrize(("name", "fields"), ablation_rows())
def test_documented_ablations_are_recipes(name: str, fields: str) -> None:
    changes = yaml.safe_load(fields)
    content = to_plain(load_recipe(RECIPES / f"{name}.yaml"))
    content["data"]["labels"] |= changes.pop("labels", {})
    recipe = recipe_from_dict({**content, **changes})
    assert changes == {key: to_plain(recipe)[key] for key in changes}
    assert recipe.labels.rule


def test_every_table_of_ablations_is_found() -> None:
    assert {"siamcan-r50", "siamla-r50", "dastsiam-r50", "siamfc"} <= {name for name, _ in ablation_rows()}
