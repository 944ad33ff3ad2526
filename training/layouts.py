"""The layouts of public training sets. Only annotation files are read, and a name or two in each folder of images.

A reader counts what is of no use (a target that is absent or hidden, a box without area, a missing image) instead of
stopping: sets of millions of boxes have some. `read_set` in `training.collect` says so in one warning a set.
"""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data import read_coco, read_stills, read_video
from training.image_size import image_size
from training.imagenet import read_det, read_vid
from training.left_out import LeftOut, existing
from training.tracks import NumberedFrames, Track

Boxes = NDArray[np.float64]
Flags = NDArray[np.bool_]


Reader = Callable[[Path, Path, LeftOut], Iterable[Track]]


@dataclass(frozen=True)
class Layout:
    """How one kind of data set is read.

    Attributes:
        read: from its path, its folder of images and a count of what is left out, to its tracks.
        videos: whether it gives videos; else stills.
        looks_like: what its path holds, for messages.
        frame_range: furthest frames of a pair in the papers; 0 for what the recipe says for all.
        needs_images: whether its folder of images must be named too.
    """

    read: Reader
    videos: bool
    looks_like: str
    frame_range: int = 0
    needs_images: bool = False


def read_got10k(path: Path, images: Path, left_out: LeftOut) -> Iterator[Track]:
    """GOT-10k: ``NAME/00000001.jpg``, ``groundtruth.txt``, ``absence.label`` and ``cover.label``.

    Absence 1 is absent, cover 0 hidden and 8 wholly visible.
    """
    for folder in _folders_with(path, "groundtruth.txt"):
        boxes = _rows(folder / "groundtruth.txt", left_out)
        if boxes is None:
            continue
        absent, cover = (_flags(folder / name, len(boxes)) for name in ("absence.label", "cover.label"))
        hidden = np.zeros(len(boxes), bool)
        for flags, meaning in ((absent, True), (cover, False)):
            if flags is not None:
                hidden |= flags == meaning
        yield from _numbered(folder.name, folder, "{:08d}.jpg", 1, boxes, hidden, left_out)


def read_lasot(path: Path, images: Path, left_out: LeftOut) -> Iterator[Track]:
    """LaSOT: ``CLASS/NAME/img/00000001.jpg``, ``groundtruth.txt``, ``full_occlusion.txt`` and ``out_of_view.txt``."""
    for folder in _folders_with(path, "groundtruth.txt"):
        boxes = _rows(folder / "groundtruth.txt", left_out)
        if boxes is None:
            continue
        hidden = np.zeros(len(boxes), bool)
        for name in ("full_occlusion.txt", "out_of_view.txt"):
            flags = _flags(folder / name, len(boxes))
            if flags is not None:
                hidden |= flags
        yield from _numbered(folder.name, folder / "img", "{:08d}.jpg", 1, boxes, hidden, left_out)


def read_trackingnet(path: Path, images: Path, left_out: LeftOut) -> Iterator[Track]:
    """TrackingNet: ``anno/NAME.txt`` and ``frames/NAME/0.jpg``, in `path` or in its ``TRAIN_0``, ``TRAIN_1``, ..."""
    for chunk in (path, *_children(path)):
        for truth in sorted((chunk / "anno").glob("*.txt")):
            boxes = _rows(truth, left_out)
            if boxes is not None:
                hidden = np.zeros(len(boxes), bool)
                yield from _numbered(truth.stem, chunk / "frames" / truth.stem, "{}.jpg", 0, boxes, hidden, left_out)


def read_youtube_bb(path: Path, images: Path, left_out: LeftOut) -> Iterator[Track]:
    """YouTube-BoundingBoxes: `path` is ``yt_bb_detection_train.csv``; images are ``VIDEO/TIME_MS.jpg``.

    Columns: video, time in ms, class, class name, object, presence, xmin, xmax, ymin, ymax as shares of the frame.
    A segment is a video, class and object together. One frame a second is labelled, and counts as a frame.
    """
    with path.open(newline="") as file:
        for video, rows in itertools.groupby(csv.reader(file), key=lambda row: row[0] if row else ""):
            yield from _youtube_segments(images / video, list(rows), left_out)


def _youtube_segments(folder: Path, rows: list[list[str]], left_out: LeftOut) -> Iterator[Track]:
    times = {int(p.stem) for p in folder.glob("*.jpg") if p.stem.isdigit()} if folder.is_dir() else set()
    segments: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for row in rows:
        try:
            _, time_ms, class_id, _, object_id, presence, *corners = row
            x0, x1, y0, y1 = (float(v) for v in corners)
            time = int(float(time_ms))
        except ValueError:
            left_out.add("unreadable")
            continue
        if presence != "present":
            left_out.add("absent or hidden")
        elif not (x1 > x0 and y1 > y0):
            left_out.add("without area")
        elif time not in times:
            left_out.add("without an image")
        else:
            segments[f"{class_id}_{object_id}"][time] = [x0, y0, x1 - x0, y1 - y0]
    if not segments:
        return
    width, height = image_size(folder / f"{min(times)}.jpg")
    for key, seen in segments.items():
        numbers = np.array(sorted(seen))
        boxes = np.array([seen[n] for n in numbers]) * (width, height, width, height)
        frames = NumberedFrames(folder, "{}.jpg", numbers, boxes.astype(np.float32))
        yield Track(f"{folder.name}:{key}", frames, np.rint(numbers / 1000).astype(int))  # type: ignore[arg-type]


def _read_video_folders(path: Path, images: Path, left_out: LeftOut) -> Iterator[Track]:
    for folder in _children(path):
        yield from read_video(folder)


def _numbered(
    name: str, folder: Path, pattern: str, first: int, boxes: Boxes, hidden: Flags, left_out: LeftOut
) -> Iterator[Track]:
    """The track of a video with a row a frame."""
    left_out.add("absent or hidden", int(hidden.sum()))
    empty = ~hidden & ~(np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1))
    left_out.add("without area", int(empty.sum()))
    indices = np.flatnonzero(~hidden & ~empty)
    if len(indices):
        yield from existing(
            name, NumberedFrames(folder, pattern, indices + first, boxes[indices].astype(np.float32)), left_out
        )


def _rows(path: Path, left_out: LeftOut) -> Boxes | None:
    """``x,y,w,h`` a line; None, counted, for a file that is not so."""
    try:
        rows = np.loadtxt(path.read_text().replace(",", " ").splitlines(), ndmin=2)
        if rows.shape[1] != 4:
            raise ValueError
    except ValueError:
        left_out.add("unreadable files")
        return None
    return rows


def _flags(path: Path, count: int) -> Flags | None:
    """Whether each frame's label is above 0; None without that file. Labels stand in one line or in one a frame.

    Raises:
        ValueError: another number of labels than frames.
    """
    if not path.is_file():
        return None
    labels = np.array(path.read_text().replace(",", " ").split(), float) > 0
    if len(labels) != count:
        raise ValueError(f"{path} has {len(labels)} labels for {count} frames; expected one a frame: unpack it again")
    return labels


def _children(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _folders_with(path: Path, name: str) -> Iterator[Path]:
    """`path`, its folders and theirs that hold a file `name`."""
    for folder in (path, *_children(path)):
        if (folder / name).is_file():
            yield folder
        elif folder != path:
            yield from (child for child in _children(folder) if (child / name).is_file())


LAYOUTS = {
    "got10k": Layout(read_got10k, True, "NAME/00000001.jpg and NAME/groundtruth.txt", 100),
    "lasot": Layout(read_lasot, True, "CLASS/NAME/img/00000001.jpg and CLASS/NAME/groundtruth.txt", 100),
    "trackingnet": Layout(read_trackingnet, True, "TRAIN_0/anno/NAME.txt and TRAIN_0/frames/NAME/0.jpg"),
    "vid": Layout(read_vid, True, "Annotations/VID/train/.../000000.xml beside Data/VID/train/.../000000.JPEG", 100),
    "det": Layout(read_det, False, "Annotations/DET/train/.../STEM.xml beside Data/DET/train/.../STEM.JPEG"),
    "youtube_bb": Layout(
        read_youtube_bb, True, "yt_bb_detection_train.csv, with VIDEO/TIME_MS.jpg in `images`", 3, needs_images=True
    ),
    "coco": Layout(
        read_coco,
        False,
        "instances_train2017.json, with photos in `images`",
        needs_images=True,
    ),
    "videos": Layout(_read_video_folders, True, "NAME/img and NAME/groundtruth.txt, tracks.csv or mask"),
    "stills": Layout(lambda path, _, left_out: read_stills(path, left_out), False, "img and boxes.csv"),
}
"""Every layout by the name that a recipe gives it."""
