"""Every layout found, read, and refused where it is broken."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from evaluation import attributes, masks
from evaluation.layouts import LAYOUTS, find_sequences, read_sequences
from tests.sequence_files import TRUTH, write_got10k, write_images, write_lasot, write_otb, write_rows, write_video

NAN = float("nan")


def names(root: Path, layout: str = "auto") -> list[tuple[str, str]]:
    return [(ref.name, ref.layout) for ref in find_sequences(root, layout)]


def test_finding_reads_no_truth(tmp_path):
    folder = write_otb(tmp_path / "a")
    (folder / "groundtruth_rect.txt").write_text("not a box\n")
    [ref] = find_sequences(tmp_path)
    with pytest.raises(ValueError, match="line 1"):
        ref.load()


def test_otb_folder_with_two_targets_is_two_sequences(tmp_path):
    folder = write_otb(tmp_path / "Jogging")
    (folder / "groundtruth_rect.txt").rename(folder / "groundtruth_rect.1.txt")
    write_rows(folder / "groundtruth_rect.2.txt", np.add(TRUTH, [1, 0, 0, 0]), one_based=True)
    (folder / "groundtruth_rect.3.txt").write_text("")
    assert names(tmp_path) == [("Jogging-1", "otb"), ("Jogging-2", "otb")]
    first, second = read_sequences(tmp_path)
    np.testing.assert_array_equal(second.truth_xywh, np.add(first.truth_xywh, [1, 0, 0, 0]))


def test_otb_attributes_from_the_toolkit_and_from_pysot(tmp_path):
    root = tmp_path / "OTB100"
    write_otb(root / "Deer")
    write_otb(root / "Skiing")
    (root / "OTB100.json").write_text(json.dumps({"Deer": {"attr": ["FM", "new"]}, "Skiing": {"attr": ["LR"]}}))
    (root / "anno" / "att").mkdir(parents=True)
    (root / "anno" / "att" / "Deer.txt").write_text("0,0,0,0,0,1,1,1,0,1,1\n")
    deer, skiing = read_sequences(root)
    assert deer.attributes == (
        "motion blur",
        "fast motion",
        "in-plane rotation",
        "background clutter",
        "low resolution",
    )
    assert skiing.attributes == ("low resolution",)
    (root / "anno" / "att" / "Deer.txt").write_text("0,0,0\n")
    with pytest.raises(ValueError, match="expected 11 flags"):
        read_sequences(root)


def test_pysot_attributes_must_be_an_object(tmp_path):
    root = tmp_path / "OTB50"
    write_otb(root / "Deer")
    (root / "OTB50.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"OTB50\.json: expected pysot's JSON"):
        read_sequences(root)


def test_uav123_sequences_are_cut_from_shared_videos(tmp_path):
    write_images(tmp_path / "data_seq" / "UAV123" / "bike1", TRUTH, "{:06d}.jpg")
    write_images(tmp_path / "data_seq" / "UAV123" / "truck4", TRUTH[:3], "{:06d}.jpg", first=1)
    write_images(tmp_path / "data_seq" / "UAV123" / "bird1", TRUTH[[0] * 780], "{:06d}.jpg")
    anno = tmp_path / "anno" / "UAV123"
    truth = TRUTH.copy()
    truth[2] = NAN
    write_rows(anno / "bike1.txt", truth[:4])
    write_rows(anno / "bird1_2.txt", TRUTH)
    (anno / "att").mkdir()
    (anno / "att" / "bike1.txt").write_text("1,0,1,0,0,0,0,0,1,0,0,1")
    assert names(tmp_path) == [("bike1", "uav123"), ("bird1_2", "uav123")]
    bike, bird = read_sequences(tmp_path, "uav123")
    assert bike.has_truth.tolist() == [True, True, False, True]  # as long as its truth, not as its video
    assert bike.attributes == ("scale variation", "low resolution", "illumination variation", "similar object")
    assert [path.stem for path in bird.frames] == [f"{number:06d}" for number in range(775, 780)]
    np.testing.assert_array_equal(bird.truth_xywh, TRUTH)
    write_rows(anno / "bird1_3.txt", TRUTH)  # starts at image 1573, which is not there
    with pytest.raises(ValueError, match="5 rows for 0 images"):
        read_sequences(tmp_path)


def test_lasot_knows_hidden_frames(tmp_path):
    write_lasot(tmp_path / "bird" / "bird-1", hidden=(2,))
    (tmp_path / "att").mkdir()
    (tmp_path / "att" / "bird-1.txt").write_text(",".join(["1"] + ["0"] * 12 + ["1"]))
    assert names(tmp_path) == [("bird-1", "lasot")]
    [sequence] = read_sequences(tmp_path)
    assert sequence.scorable.tolist() == [True, True, False, True, True] and sequence.has_truth.all()
    assert sequence.attributes == ("illumination variation", "aspect ratio change")
    (tmp_path / "bird" / "bird-1" / "out_of_view.txt").write_text("0,0,0")
    with pytest.raises(ValueError, match="3 labels for 5 images"):
        read_sequences(tmp_path)


def test_got10k_reads_labels_and_lets_a_test_set_have_one_box(tmp_path):
    write_got10k(tmp_path / "val" / "GOT-10k_Val_000001", cover=(8, 8, 0, 4, 8))
    folder = write_got10k(tmp_path / "test" / "GOT-10k_Test_000001")
    for label in folder.glob("*.label"):
        label.unlink()
    (folder / "groundtruth.txt").write_text("10,20,20,10\n")
    assert names(tmp_path) == [("GOT-10k_Test_000001", "got10k"), ("GOT-10k_Val_000001", "got10k")]
    test, val = read_sequences(tmp_path)
    assert test.has_truth.tolist() == [True] + [False] * 4 and len(test.frames) == 5
    assert val.scorable.tolist() == [True, True, False, True, True]
    assert val.attributes == ("occluded", "root class: box", "motion class: sliding")
    (folder / "cover.label").write_text("8 8 x 8 8")
    with pytest.raises(ValueError, match=r"cover\.label: expected a whole number"):
        read_sequences(tmp_path)


def test_trackingnet_pairs_frames_and_boxes(tmp_path):
    write_images(tmp_path / "TRAIN_0" / "frames" / "abc_0", TRUTH[[0] * 12], "{}.jpg", first=0)
    write_rows(tmp_path / "TRAIN_0" / "anno" / "abc_0.txt", TRUTH[[0] * 12])
    write_images(tmp_path / "TEST" / "frames" / "xyz_1", TRUTH, "{}.jpg", first=0)
    write_rows(tmp_path / "TEST" / "anno" / "xyz_1.txt", TRUTH[:1])
    write_rows(tmp_path / "TEST" / "anno" / "not_unpacked.txt", TRUTH[:1])
    assert names(tmp_path) == [("abc_0", "trackingnet"), ("xyz_1", "trackingnet")]
    train, test = read_sequences(tmp_path)
    assert [path.stem for path in train.frames] == [str(number) for number in range(12)]
    assert test.has_truth.tolist() == [True] + [False] * 4
    write_rows(tmp_path / "TEST" / "anno" / "xyz_1.txt", TRUTH[:3])
    with pytest.raises(ValueError, match="3 rows for 5 images"):
        read_sequences(tmp_path)


def palette_mask(ids: np.ndarray) -> np.ndarray:
    """An id image in the colours of DAVIS' palette, as OpenCV shows a palette PNG."""
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 9: (192, 0, 0)}  # RGB
    image = np.zeros((*ids.shape, 3), np.uint8)
    for number, colour in colours.items():
        image[ids == number] = colour[::-1]
    return image


def write_davis(root: Path, name: str, frames: list[np.ndarray]) -> None:
    images, annotations = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    write_images(images, TRUTH[[0] * len(frames)], "{:05d}.jpg", first=0)
    annotations.mkdir(parents=True)
    for index, mask in enumerate(frames):
        cv2.imwrite(str(annotations / f"{index:05d}.png"), mask)


def test_davis_masks_become_boxes(tmp_path):
    ids = np.zeros((64, 96), np.int64)
    ids[10:20, 30:50], ids[40:41, 5:6] = 1, 9
    gone = np.where(ids == 9, 0, ids)
    write_davis(tmp_path, "dogs", [palette_mask(ids), palette_mask(gone)])
    single = np.where(ids == 1, 255, 0).astype(np.uint8)
    write_davis(tmp_path, "bear", [single, np.zeros_like(single), single])
    assert names(tmp_path) == [("bear", "davis"), ("dogs-1", "davis"), ("dogs-9", "davis")]
    bear, dogs, small = read_sequences(tmp_path)
    np.testing.assert_array_equal(bear.truth_xywh, [[30, 10, 20, 10], [NAN] * 4, [30, 10, 20, 10]])
    np.testing.assert_array_equal(dogs.truth_xywh, [[30, 10, 20, 10]] * 2)
    np.testing.assert_array_equal(small.truth_xywh, [[5, 40, 1, 1], [NAN] * 4])


def test_own_folders_with_boxes_or_masks(tmp_path):
    write_video(tmp_path / "boxes")
    write_images(tmp_path / "masks" / "img", TRUTH[:2], "{:05d}.jpg")
    (tmp_path / "masks" / "mask").mkdir()
    mask = np.zeros((64, 96), np.uint8)
    mask[20:30, 10:30] = 2
    mask[0, 90] = 1  # every id belongs to the target
    cv2.imwrite(str(tmp_path / "masks" / "mask" / "00001.png"), mask)
    write_images(tmp_path / "flat", TRUTH)  # images beside the truth
    write_rows(tmp_path / "flat" / "groundtruth.txt", TRUTH)
    assert names(tmp_path) == [("boxes", "folder"), ("flat", "folder"), ("masks", "folder")]
    boxes, flat, masked = read_sequences(tmp_path)
    np.testing.assert_array_equal(flat.truth_xywh, boxes.truth_xywh)
    np.testing.assert_array_equal(masked.truth_xywh, [[10, 0, 81, 30], [NAN] * 4])


def test_a_mask_that_is_missing_or_broken_is_named(tmp_path):
    write_images(tmp_path / "a" / "img", TRUTH[:2], "{:05d}.jpg")
    (tmp_path / "a" / "mask").mkdir()
    with pytest.raises(FileNotFoundError, match="no mask in"):
        read_sequences(tmp_path)
    (tmp_path / "a" / "mask" / "00001.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot decode the mask .*00001\.png"):
        read_sequences(tmp_path)
    assert masks.object_ids(np.array([[0, 1, 255]])) == (1,) and masks.object_ids(np.array([[0, 255]])) == (255,)


def test_the_layout_can_be_told_and_must_fit(tmp_path):
    write_otb(tmp_path / "a")
    assert names(tmp_path, "otb") == [("a", "otb")]
    with pytest.raises(FileNotFoundError, match=r"expected lasot: CLASS/NAME"):
        find_sequences(tmp_path, "lasot")
    with pytest.raises(ValueError, match=f"expected auto or one of {', '.join(LAYOUTS)}"):
        find_sequences(tmp_path, "vot")
    write_otb(tmp_path / "b" / "a")
    with pytest.raises(ValueError, match="two sequences are called a"):
        find_sequences(tmp_path)


def test_digest_changes_with_truth_and_images(tmp_path):
    folder = write_video(tmp_path / "a")
    [ref] = find_sequences(tmp_path)
    seen = {ref.digest()}
    write_rows(folder / "groundtruth.txt", TRUTH + 1)
    seen.add(ref.digest())
    (folder / "img" / "00005.jpg").rename(folder / "img" / "00006.jpg")
    seen.add(ref.digest())
    assert len(seen) == 3


def test_labels_without_a_file_are_empty(tmp_path):
    assert attributes.label_values(tmp_path / "none.label") == [] and attributes.read_pysot(tmp_path, "a") == ()
