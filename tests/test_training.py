"""Training: labels, losses, learning rate, readers, pairs, recipes. Numbers are worked by hand where possible."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from siamtrack.nets import MODELS
from siamtrack.plain import to_plain
from training import pairs as pairs_module
from training.augment import Cutout, Jitter, jittered_window, motion_blur, paste, photometric, rotate
from training.data import Mask, Sighting, Track, list_images, read_coco, read_stills, read_video, usable
from training.dataset import EpochSampler, LabelConfig, PairDataset, collate
from training.images import ImageCache
from training.labels import sample, siamcan_labels
from training.losses import balanced_cross_entropy, diou_loss, focal_loss
from training.module import lr_factor
from training.pairs import Pair, PairConfig, PairSampler
from training.recipe import OptimConfig, load_recipe, recipe_from_dict

RECIPES = Path(__file__).parent.parent / "training" / "recipes"
POINTS = MODELS["siamcan-r50"].grid.points().numpy()  # type: ignore[attr-defined]
COARSE = MODELS["siamcan-mobilenetv2"].grid.points().numpy()  # type: ignore[attr-defined]


# --- labels --------------------------------------------------------------------------------------------------------


def box(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def test_positives_of_a_typical_target() -> None:
    """A 63.5 px square: r = 22.45 px, pi r^2 / 64 = 24.7 cells of the 8 px grid on average over sub-cell positions."""
    rng = np.random.default_rng(0)
    counts = [
        int((siamcan_labels(POINTS, box(*(127.5 + rng.uniform(-4, 4, 2)), 63.5, 63.5)) == 1).sum()) for _ in range(400)
    ]
    assert np.mean(counts) == pytest.approx(24.6, abs=0.4)


@pytest.mark.parametrize(
    ("size", "offset", "label"),
    [
        # w = h = 80: r = 1600 / sqrt(3200) = 28.28, ellipse = circle of 40.
        ((80, 80), (28.2, 0), 1),
        ((80, 80), (28.4, 0), -1),
        ((80, 80), (0, -39.9), -1),
        ((80, 80), (0, -40.1), 0),
        # w = 160, h = 40: r = 1600 / sqrt(6800) = 19.40, semi-axes 80 and 20.
        ((160, 40), (19.3, 0), 1),
        ((160, 40), (0, 19.3), 1),
        ((160, 40), (19.5, 0), -1),
        ((160, 40), (79, 0), -1),
        ((160, 40), (0, 20.5), 0),
        ((160, 40), (81, 0), 0),
        # An ellipse, not the box: (60, 15) lies in the box but (60/80)^2 + (15/20)^2 = 1.125.
        ((160, 40), (60, 15), 0),
        ((160, 40), (55, 14), -1),
    ],
)
def test_circle_ring_and_ellipse(size: tuple[float, float], offset: tuple[float, float], label: int) -> None:
    point = np.array([[100 + offset[0], 120 + offset[1]]], np.float32)
    assert siamcan_labels(point, box(100, 120, *size)).tolist() == [label]


def test_nearest_gives_a_small_box_its_one_cell() -> None:
    small = box(127, 121, 9, 9)  # between the 16 px cells: r = 3.2 px reaches none
    assert (siamcan_labels(COARSE, small) == 1).sum() == 0
    labels = siamcan_labels(COARSE, small, nearest=True)
    assert np.flatnonzero(labels == 1).tolist() == [8 * 14 + 8]  # cell (8, 8) lies at 128.5
    large = box(128, 128, 90, 70)
    np.testing.assert_array_equal(siamcan_labels(COARSE, large), siamcan_labels(COARSE, large, nearest=True))


@pytest.mark.parametrize(
    ("limits", "kept"), [((16, 48), (16, 48)), ((100, 1000), (30, 500)), ((0, 5), (0, 5)), ((30, 500), (30, 500))]
)
def test_sample_keeps_at_most_so_many(limits: tuple[int, int], kept: tuple[int, int]) -> None:
    labels = np.repeat(np.array([1, 0, -1], np.int8), (30, 500, 70))
    before = labels.copy()
    sampled = sample(labels, *limits, np.random.default_rng(0))
    assert ((sampled == 1).sum(), (sampled == 0).sum()) == kept
    assert ((sampled == labels) | (sampled == -1)).all()  # nothing changes side
    np.testing.assert_array_equal(labels, before)
    assert sampled.dtype == np.int8


def test_sample_is_random() -> None:
    labels = np.zeros(625, np.int8)
    draws = [sample(labels, 16, 48, np.random.default_rng(seed)) for seed in (0, 1, 0)]
    assert (draws[0] != draws[1]).any()
    np.testing.assert_array_equal(draws[0], draws[2])


# --- losses --------------------------------------------------------------------------------------------------------


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize(
    ("predicted", "target", "loss"),
    [
        ((50, 50, 20, 30), (50, 50, 20, 30), 0.0),
        # Half overlap along x: IoU 200 / 600; hull 30 x 20, centres 10 apart.
        ((10, 10, 20, 20), (20, 10, 20, 20), 1 - 1 / 3 + 100 / 1300),
        # Same centre, a quarter of the area: no distance term.
        ((0, 0, 10, 10), (0, 0, 20, 20), 0.75),
        # Apart: IoU 0; centres 30 apart, hull 40 x 10.
        ((0, 0, 10, 10), (30, 0, 10, 10), 1 + 900 / 1700),
        ((0, 0, 10, 10), (10, 0, 10, 10), 1 + 100 / 500),  # touching
    ],
)
def test_diou_by_hand(predicted: tuple[float, ...], target: tuple[float, ...], loss: float) -> None:
    for scale in (1.0, 10.0):  # erratum S13: divided by c squared, the loss is free of scale
        value = diou_loss(boxes(predicted) * scale, boxes(target) * scale)
        assert value.tolist() == pytest.approx([loss], abs=1e-6)
    assert diou_loss(boxes(target), boxes(predicted)).tolist() == pytest.approx([loss], abs=1e-6)


def test_diou_of_far_boxes_nears_two_and_ranks_by_distance() -> None:
    target = boxes((0, 0, 10, 10))
    losses = [float(diou_loss(boxes((d, 0, 10, 10)), target)) for d in (0, 5, 10, 50, 500)]
    assert losses == sorted(losses)
    assert 1.9 < losses[-1] < 2


@pytest.mark.parametrize(
    "predicted",
    [(50, 50, 20, 20), (70, 50, 20, 20), (200, 200, 1, 1), (50, 50, 1e-6, 1e-6), (50, 50, 0, 0), (50, 50, 500, 1e-3)],
    ids=["identical", "touching", "far", "tiny", "no area", "sliver"],
)
def test_diou_gradients_are_finite(predicted: tuple[float, ...]) -> None:
    p = boxes(predicted).requires_grad_()
    diou_loss(p, boxes((50, 50, 20, 20))).sum().backward()
    assert p.grad is not None
    assert torch.isfinite(p.grad).all()


def test_diou_pulls_a_distant_box_towards_the_target() -> None:
    p = boxes((80, 50, 20, 20)).requires_grad_()  # no overlap: plain IoU would have no gradient
    diou_loss(p, boxes((50, 50, 20, 20))).sum().backward()
    assert p.grad is not None
    assert p.grad[0, 0] > 0


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# A 2 x 2 map: a target cell with probability .8, background with .1 and .4, an ignored cell that is badly wrong.
PROBABILITIES = [[0.8, 0.1], [0.4, 0.99]]
LABELS = torch.tensor([[[1, 0], [0, -1]]], dtype=torch.int8)


def sigmoid_map() -> Tensor:
    return torch.tensor([[[[logit(p) for p in row] for row in PROBABILITIES]]])


def softmax_map() -> Tensor:
    p = torch.tensor(PROBABILITIES)
    return torch.stack([torch.log(1 - p), torch.log(p)])[None] + 3.0


@pytest.mark.parametrize("logits", [sigmoid_map(), softmax_map()], ids=["sigmoid", "softmax"])
def test_balanced_cross_entropy_by_hand(logits: Tensor) -> None:
    wanted = 0.5 * -math.log(0.8) + 0.5 * (-math.log(0.9) - math.log(0.6)) / 2
    assert float(balanced_cross_entropy(logits, LABELS)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("logits", [sigmoid_map(), softmax_map()], ids=["sigmoid", "softmax"])
def test_balanced_cross_entropy_of_a_side_without_cells(logits: Tensor) -> None:
    background = torch.zeros(1, 2, 2, dtype=torch.int8)
    losses = [-math.log(1 - p) for row in PROBABILITIES for p in row]
    assert float(balanced_cross_entropy(logits, background)) == pytest.approx(0.5 * sum(losses) / 4, rel=1e-4)
    assert float(balanced_cross_entropy(logits, background - 1)) == 0


def test_focal_loss_by_hand() -> None:
    wanted = 0.25 * 0.2**2 * -math.log(0.8) + 0.75 * (0.1**2 * -math.log(0.9) + 0.4**2 * -math.log(0.6))
    assert float(focal_loss(sigmoid_map(), LABELS)) == pytest.approx(wanted, rel=1e-5)
    two_targets = torch.tensor([[[1, 1], [0, -1]]], dtype=torch.int8)
    positive = 0.25 * (0.2**2 * -math.log(0.8) + 0.9**2 * -math.log(0.1))
    wanted = (positive + 0.75 * 0.4**2 * -math.log(0.6)) / 2  # divided by the number of target cells
    assert float(focal_loss(sigmoid_map(), two_targets)) == pytest.approx(wanted, rel=1e-5)


def test_focal_loss_without_positives_or_focus() -> None:
    background = torch.zeros(1, 2, 2, dtype=torch.int8)
    wanted = sum(0.75 * p**2 * -math.log(1 - p) for row in PROBABILITIES for p in row)
    assert float(focal_loss(sigmoid_map(), background)) == pytest.approx(wanted, rel=1e-4)
    plain = 0.5 * -(math.log(0.8) + math.log(0.9) + math.log(0.6))
    assert float(focal_loss(sigmoid_map(), LABELS, alpha=0.5, gamma=0)) == pytest.approx(plain, rel=1e-5)
    assert float(focal_loss(sigmoid_map(), background - 1)) == 0


@pytest.mark.parametrize("loss", [balanced_cross_entropy, focal_loss])
def test_ignored_cells_get_no_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits = sigmoid_map().requires_grad_()
    loss(logits, LABELS).backward()
    assert logits.grad is not None
    gradient = logits.grad[0, 0]
    assert gradient[1, 1] == 0
    assert gradient[0, 0] < 0 < gradient[0, 1] < gradient[1, 0]


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
        ({"img/1.png": None, "groundtruth.txt": "nan,nan,nan,nan\n"}, "never visible"),
        ({"img/1.png": None, "tracks.csv": "frame,id,x,y,w,h\n2,1,0,0,9,9\n"}, "names frame 2, there are 1 images"),
        ({"img/1.png": None, "tracks.csv": "frame,id,x,y,w,h\n0,1,0,0,9,9\n"}, "names frame 0"),
        ({"img/1.png": None, "mask/1.png": "not an image"}, "not a readable image"),
    ],
    ids=["empty", "no annotation", "row count", "columns", "never visible", "late frame", "frame 0", "broken mask"],
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
    plain, valued, outlined = read_stills(tmp_path)
    assert plain.sightings[0] == Sighting(tmp_path / "img" / "a.jpg", (1, 2, 30, 40), None)
    assert valued.sightings[0] == Sighting(
        tmp_path / "img" / "a.jpg", (5.5, 6, 7, 8), Mask(tmp_path / "mask" / "a.png", 3)
    )
    assert outlined.sightings[0].mask == Mask(polygons=((1, 1, 9, 1, 9, 9),))
    assert len({plain.name, valued.name, outlined.name}) == 3
    with pytest.raises(FileNotFoundError):
        read_stills(tmp_path / "nowhere")


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
    tracks = read_coco(file, tmp_path / "images")
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
        read_coco(tmp_path / "a.json", tmp_path)


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
    region = (4, 2, 10, 14)
    assert (Mask(Path("m"), 3).alpha(labels, region) > 0).sum() == 16
    assert (Mask(Path("m"), 0).alpha(labels, region) > 0).sum() == 32  # 0 stands for anything
    polygon = Mask(polygons=((4, 4, 7, 4, 7, 7, 4, 7),)).alpha(None, region)
    assert polygon.shape == (12, 6)
    assert set(np.unique(polygon)) == {0, 255}
    np.testing.assert_array_equal(polygon > 0, Mask(Path("m"), 3).alpha(labels, region) > 0)


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
    blurred = motion_blur(image, 9, 0.0)[:, :, 0]
    assert np.flatnonzero(blurred.any(axis=1)).tolist() == [20]
    assert np.flatnonzero(blurred.any(axis=0)).tolist() == list(range(16, 25))
    assert int(blurred.sum()) == pytest.approx(255, abs=9)
    flat = np.full((41, 41, 3), 90, np.uint8)
    np.testing.assert_array_equal(motion_blur(flat, 7, 1.0), flat)


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
    return PairDataset(pair_sampler, POINTS, LabelConfig(**labels), seed, 100)


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


def test_sample_shapes_and_collate(tracks: Tracks) -> None:
    batch = collate([dataset(sampler(tracks, mix=ALL))[i] for i in range(3)])
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in batch.items()}
    assert shapes == {
        "template": ((3, 127, 127, 3), torch.uint8),
        "search": ((3, 255, 255, 3), torch.uint8),
        "box": ((3, 4), torch.float32),
        "labels": ((3, 25, 25), torch.int8),
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
    monkeypatch.setattr(pairs_module, "photometric", lambda image, rng: image)
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
    monkeypatch.setattr(pairs_module, "photometric", lambda image, rng: image)
    for pair in draw(sampler(tracks, mix={"still": 1.0}, **{**PLAIN, "flip": 1.0}), 6):
        rows, columns = np.nonzero(np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2) < 40)
        cx, cy, _, _ = pair.box_cxcywh
        assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((cx, cy), abs=2)


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
        sources.append(drawn[3])
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
        rows, columns = np.nonzero(item["labels"] == 1)
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
    monkeypatch.setattr(pairs_module, "photometric", lambda image, rng: image)
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
    assert recipe.model == path.stem
    assert recipe_from_dict(to_plain(recipe)) == recipe  # as checkpoints store it
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(to_plain(recipe)))) == recipe
    assert load_recipe(path, {"epochs": 3}).epochs == 3


def test_paper_recipe_is_the_paper() -> None:
    recipe = load_recipe(RECIPES / "siamcan-r50.yaml")
    assert (recipe.epochs, recipe.batch_size, recipe.unfreeze_epoch, recipe.unfreeze_stages) == (20, 28, 10, 3)
    assert (recipe.data.labels.positives, recipe.data.labels.negatives) == (16, 48)
    assert (recipe.optim.optimiser, recipe.optim.warmup_epochs, recipe.data.pairs.negative) == ("sgd", 5, 0.2)


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
        ({"model": "siamfc"}, "model must be one of siamcan-r50, siamcan-mobilenetv2, got 'siamfc'"),
        ({"model": None}, "recipe.model: expected text, got None"),
        ({"classification": "hinge"}, "classification must be one of"),
        ({"data": {"labels": {"nearest": "yes"}}}, "recipe.data.labels.nearest: expected true or false"),
    ],
)
def test_recipe_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_from_dict({"model": "siamcan-mobilenetv2", **change})


def test_recipe_without_a_model() -> None:
    with pytest.raises(ValueError, match="recipe: missing field model"):
        recipe_from_dict({})


def test_recipe_file_errors(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"r\.yaml: expected a mapping of recipe fields, got list"):
        load_recipe(file)
    file.write_text("model: siamcan-r50\nlr: 1\n")
    with pytest.raises(ValueError, match=r"r\.yaml: unknown field lr"):
        load_recipe(file)


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: siamcan-r50\noptim: {lr: 1e-3}\n")  # YAML 1.1 reads 1e-3 as text
    assert load_recipe(file).optim.lr == 0.001
