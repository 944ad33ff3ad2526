"""Readers of our own layouts and of COCO: annotations in, tracks of sightings out.

They touch annotation files only; images are opened when a pair is drawn. `training.layouts` has the other public
layouts.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from siamtrack.sources import list_images
from training.left_out import LeftOut
from training.tracks import Box, Mask, Sighting, Track


def read_video(folder: Path) -> list[Track]:
    """Tracks of one video: ``img/*`` with one of

    * ``groundtruth.txt``: a row a frame, ``x,y,w,h`` 0-based (commas, tabs or blanks), ``nan`` where absent;
    * ``tracks.csv``: header ``frame,id,x,y,w,h``, frames counted from 1;
    * neither, but ``mask/<image stem>.png`` (nonzero = target): boxes are taken from the masks.

    Masks are used for outlines wherever they exist.

    Raises:
        ValueError: no images, no annotations, or counts that do not match.
    """
    images = list_images(folder / "img" if (folder / "img").is_dir() else folder)
    if not images:
        raise ValueError(f"{folder}: no images in it or in its img/")
    masks = {p.stem: p for p in (folder / "mask").glob("*.png")}

    def sighting(index: int, box: Box) -> Sighting:
        image = images[index]
        return Sighting(image, box, Mask(masks[image.stem]) if image.stem in masks else None)

    if (folder / "tracks.csv").exists():
        rows: dict[str, list[tuple[int, Box]]] = defaultdict(list)
        for row in _read_csv(folder / "tracks.csv", ("frame", "id", "x", "y", "w", "h")):
            (number,) = row.numbers("frame")
            if not (number.is_integer() and 1 <= number <= len(images)):
                raise ValueError(f"{row.where} names frame {number:g}, there are {len(images)} images")
            rows[row["id"]].append((int(number) - 1, row.box()))
        return [
            Track(f"{folder.name}:{key}", tuple(sighting(i, b) for i, b in seen), tuple(i for i, _ in seen))
            for key, seen in ((key, sorted(value)) for key, value in rows.items())
        ]
    if (folder / "groundtruth.txt").exists():
        boxes = _read_boxes(folder / "groundtruth.txt")
        if len(boxes) != len(images):
            raise ValueError(f"{folder}/groundtruth.txt has {len(boxes)} rows, there are {len(images)} images")
    elif masks:
        boxes = [_mask_box(masks[i.stem]) if i.stem in masks else None for i in images]
    else:
        raise ValueError(f"{folder}: needs groundtruth.txt, tracks.csv or mask/*.png beside its images")
    present = [(i, box) for i, box in enumerate(boxes) if box is not None]
    if not present:
        raise ValueError(f"{folder}: the target is never visible")
    return [Track(folder.name, tuple(sighting(i, b) for i, b in present), tuple(i for i, _ in present))]


def read_stills(folder: Path, left_out: LeftOut) -> list[Track]:
    """One-sighting tracks of ``img/`` and ``boxes.csv`` (``image,x,y,w,h,label,mask``).

    The mask column is empty, a value in the label image ``mask/<stem>.png``, or polygons as JSON.

    Raises:
        OSError: no such file.
        ValueError: a column is missing, or a field is not what it should be.
    """
    tracks = []
    for number, row in enumerate(_read_csv(folder / "boxes.csv", ("image", "x", "y", "w", "h"))):
        image = Path(os.path.normpath(folder / "img" / row["image"]))  # a photo has one name, from wherever it is named
        if not image.exists():
            left_out.add("without an image")
            continue
        text = row.fields.get("mask") or ""
        mask = None
        if text.startswith("["):
            try:
                mask = Mask(polygons=tuple(tuple(p) for p in json.loads(text) if len(p) >= 6))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{row.where}: expected polygons [[x0,y0,x1,y1,...],...] in mask ({error})") from error
        elif text:
            mask = Mask(folder / "mask" / f"{image.stem}.png", int(row.numbers("mask")[0]))
        tracks.append(Track(f"{folder.name}:{number}", (Sighting(image, row.box(), mask),), (0,)))
    return tracks


def read_coco(annotations: Path, images: Path, left_out: LeftOut) -> list[Track]:
    """One-sighting tracks of a COCO ``instances_*.json``; crowd annotations are left out.

    Args:
        annotations: the JSON file.
        images: folder of the images it names.
        left_out: counts annotations without an image.

    Raises:
        OSError: no such file.
        ValueError: not COCO's JSON.
    """
    try:
        content = json.loads(annotations.read_text())
    except ValueError as error:
        raise ValueError(f"{annotations}: not JSON: {error}") from error
    for key in ("images", "annotations"):
        if key not in content:
            raise ValueError(f"{annotations}: not a COCO instances file, {key!r} is missing")
    files = {image["id"]: images / image["file_name"] for image in content["images"]}
    present = {number for number, file in files.items() if file.exists()}
    tracks = []
    for item in content["annotations"]:
        if item.get("iscrowd"):
            continue
        outline = item.get("segmentation")
        polygons = tuple(tuple(p) for p in outline if len(p) >= 6) if isinstance(outline, list) else ()
        if item["image_id"] not in files:
            raise ValueError(
                f"{annotations}: annotation {item['id']} names image {item['image_id']}, which is not listed"
            )
        if item["image_id"] not in present:
            left_out.add("without an image")
            continue
        x, y, w, h = item["bbox"]
        sighting = Sighting(files[item["image_id"]], (x, y, w, h), Mask(polygons=polygons) if polygons else None)
        tracks.append(Track(f"{annotations.stem}:{item['id']}", (sighting,), (0,)))
    return tracks


@dataclass(frozen=True)
class _Row:
    """A row of a CSV, and where it stands."""

    where: str
    fields: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.fields[column]

    def numbers(self, *columns: str) -> list[float]:
        try:
            return [float(self.fields[column]) for column in columns]
        except (TypeError, ValueError):
            got = ", ".join(repr(self.fields[column]) for column in columns)
            raise ValueError(f"{self.where}: expected numbers for {', '.join(columns)}, got {got}") from None

    def box(self) -> Box:
        x, y, w, h = self.numbers("x", "y", "w", "h")
        return x, y, w, h


def _read_csv(path: Path, columns: Sequence[str]) -> list[_Row]:
    csv.field_size_limit(1 << 24)  # polygon columns are long
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in columns if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: column {', '.join(missing)} missing, it has {reader.fieldnames}")
        return [_Row(f"{path}:{reader.line_num}", row) for row in reader]


def _read_boxes(path: Path) -> list[Box | None]:
    boxes: list[Box | None] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            values = [float(v) for v in re.split(r"[,\s]+", line.strip()) if v]
        except ValueError:
            values = []
        if len(values) != 4:
            raise ValueError(f"{path}:{number}: expected x,y,w,h, got {line!r}")
        x, y, w, h = values
        boxes.append((x, y, w, h) if np.isfinite(values).all() and w > 0 and h > 0 else None)
    return boxes


def _mask_box(path: Path) -> Box | None:
    labels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if labels is None:
        raise ValueError(f"{path}: not a readable image")
    rows, columns = np.flatnonzero(labels.any(axis=1)), np.flatnonzero(labels.any(axis=0))
    if not rows.size:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)
