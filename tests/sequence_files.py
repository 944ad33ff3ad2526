"""Small data sets in the layouts of public benchmarks, for the tests of the evaluation."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

# A 20 x 10 target that steps 5 px to the right: a box left at the start has IoU 1, 15/25, 10/30, 5/35, 0.
TRUTH = np.array([[10.0 + 5 * index, 20, 20, 10] for index in range(5)])
SIZE = (96, 64)


def write_image(path: Path, image: np.ndarray) -> Path:
    """One image; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def write_images(folder: Path, truth_xywh: np.ndarray, pattern: str = "{:04d}.jpg", first: int = 1) -> None:
    """Frames of 96 x 64 with a bright textured target on grey noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    background = rng.integers(60, 90, (64, 96, 3), dtype=np.uint8)
    target = rng.integers(120, 255, (10, 20, 3), dtype=np.uint8)
    for index, box in enumerate(truth_xywh):
        frame = background.copy()
        if np.isfinite(box).all():
            x, y = int(box[0]), int(box[1])
            frame[y : y + 10, x : x + 20] = target
        cv2.imwrite(str(folder / pattern.format(first + index)), frame)


def write_rows(path: Path, truth_xywh: np.ndarray, one_based: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.add(truth_xywh, [1, 1, 0, 0]) if one_based else truth_xywh
    path.write_text("".join(",".join(f"{value:g}" for value in row) + "\n" for row in rows))


def write_otb(folder: Path, truth_xywh: np.ndarray = TRUTH, separator: str = ",", end: str = "\n") -> Path:
    write_images(folder / "img", truth_xywh)
    rows = [separator.join(f"{value:g}" for value in np.add(row, [1, 1, 0, 0])) for row in truth_xywh]
    (folder / "groundtruth_rect.txt").write_text(end.join(rows) + end, newline="")
    return folder


def write_video(folder: Path, truth_xywh: np.ndarray = TRUTH) -> Path:
    write_images(folder / "img", truth_xywh, "{:05d}.jpg")
    np.savetxt(folder / "groundtruth.txt", truth_xywh, fmt="%.2f", delimiter=",")
    return folder


def write_lasot(folder: Path, truth_xywh: np.ndarray = TRUTH, hidden: tuple[int, ...] = ()) -> Path:
    write_images(folder / "img", truth_xywh, "{:08d}.jpg")
    write_rows(folder / "groundtruth.txt", truth_xywh)
    flags = [int(index in hidden) for index in range(len(truth_xywh))]
    (folder / "full_occlusion.txt").write_text(",".join(map(str, flags)))
    (folder / "out_of_view.txt").write_text(",".join("0" for _ in flags))
    return folder


def write_got10k(folder: Path, truth_xywh: np.ndarray = TRUTH, cover: tuple[int, ...] | None = None) -> Path:
    write_images(folder, truth_xywh, "{:08d}.jpg")
    np.savetxt(folder / "groundtruth.txt", truth_xywh, fmt="%.4f", delimiter=",")
    cover = cover or (8,) * len(truth_xywh)
    (folder / "cover.label").write_text("".join(f"{value}\n" for value in cover))
    for name in ("absence", "cut_by_image"):
        (folder / f"{name}.label").write_text("0\n" * len(cover))
    meta = "[METAINFO]\nurl: none\nresolution: (96, 64)\nmotion_class: sliding\nroot_class: box\n"
    (folder / "meta_info.ini").write_text(meta)
    return folder
