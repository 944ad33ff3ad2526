"""ImageNet's layouts of videos (VID) and photos (DET): an XML file an image, in folders that mirror the images'."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from training.left_out import LeftOut, existing
from training.tracks import NumberedFrames, Sighting, Track


def read_vid(path: Path, images: Path, left_out: LeftOut) -> Iterator[Track]:
    """ImageNet VID: `path` is ``.../Annotations/VID/train``, a folder of XML files a video, one a frame.

    Images are ``000000.JPEG`` under the same path with ``Data`` for ``Annotations``. ``trackid`` names a target
    within its video only. Partly hidden targets (``occluded``) stay in: their box is of what is seen.
    """
    for folder in _folders_with_suffix(path, ".xml"):
        tracks: dict[str, list[tuple[int, list[float]]]] = defaultdict(list)
        for file in sorted(folder.glob("*.xml")):
            for item in _objects(file, left_out):
                box = _corner_box(item, left_out)
                if box is not None:
                    tracks[item.findtext("trackid", "0")].append((int(file.stem), box))
        frames = _data_folder(folder)
        for key, rows in tracks.items():
            numbers, boxes = np.array([n for n, _ in rows]), np.array([b for _, b in rows], np.float32)
            yield from existing(f"{folder.name}:{key}", NumberedFrames(frames, "{:06d}.JPEG", numbers, boxes), left_out)


def read_det(path: Path, images: Path, left_out: LeftOut) -> Iterator[Track]:
    """ImageNet DET: `path` is ``.../Annotations/DET/train``, an XML file an image; every object is a target.

    Images are ``STEM.JPEG`` under the same path with ``Data`` for ``Annotations``.
    """
    for folder in _folders_with_suffix(path, ".xml"):
        frames = _data_folder(folder)
        present = {p.name for p in frames.iterdir()} if frames.is_dir() else set()
        for file in sorted(folder.glob("*.xml")):
            for number, item in enumerate(_objects(file, left_out)):
                box = _corner_box(item, left_out)
                if box is None:
                    continue
                if f"{file.stem}.JPEG" not in present:
                    left_out.add("without an image")
                    continue
                x, y, w, h = box
                sighting = Sighting(frames / f"{file.stem}.JPEG", (x, y, w, h))
                yield Track(f"{file.stem}:{number}", (sighting,), (0,))


def _objects(path: Path, left_out: LeftOut) -> list[ET.Element]:
    try:
        return ET.parse(path).getroot().findall("object")
    except ET.ParseError:
        left_out.add("unreadable files")
        return []


def _corner_box(item: ET.Element, left_out: LeftOut) -> list[float] | None:
    """x, y, w, h of ``bndbox``."""
    try:
        x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{name}", "")) for name in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        left_out.add("unreadable")
        return None
    if not (x1 > x0 and y1 > y0):
        left_out.add("without area")
        return None
    return [x0, y0, x1 - x0, y1 - y0]


def _data_folder(annotations: Path) -> Path:
    """``Data`` for the last ``Annotations`` of a path."""
    parts = list(annotations.parts)
    if "Annotations" not in parts:
        raise ValueError(f"{annotations} lies under no folder Annotations: name .../Annotations/VID/train or DET/train")
    parts[len(parts) - 1 - parts[::-1].index("Annotations")] = "Data"
    return Path(*parts)


def _folders_with_suffix(path: Path, suffix: str) -> Iterator[Path]:
    """`path` and all folders below it that hold a file of that suffix."""
    for folder, below, files in os.walk(path, followlinks=True):
        below.sort()
        if any(name.endswith(suffix) for name in files):
            yield Path(folder)
