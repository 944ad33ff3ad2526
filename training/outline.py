"""Outline the main object of photos without annotations: ``python -m training.outline PHOTOS --out STILLS``.

Name the folder under ``data.stills`` of a recipe then: every outlined object is a target, and one more to paste on
other photos, as a distractor or an occluder too. GrabCut (Rother et al., SIGGRAPH 2004; OpenCV's) parts each photo,
starting from "the margin is background". Only what looks like a single whole thing is kept; it need not be a thing that
has a name, it only has to hold together.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from siamtrack.sources import list_images

SIDE_PX = 200  # of the longer side while parting: outlines need no more, and time goes with the area
MARGIN = 0.1  # of each side of the photo
ROUNDS = 4
AREA = (0.04, 0.5)  # of the photo
TOGETHER = 0.75  # of what is foreground lies in one piece
SOLID = 0.6  # of its convex hull it fills
OBJECT = 1  # its value in the label image

Mask = NDArray[np.uint8]


def outline(photo_bgr: NDArray[np.uint8]) -> Mask | None:
    """The main object of a photo.

    Args:
        photo_bgr: uint8 ``[H, W, 3]``.

    Returns:
        uint8 ``[H, W]``, `OBJECT` on it and 0 elsewhere; None where nothing stands out as one whole thing: less or more
        than `AREA`, in pieces, ragged, or cut off by the margin on more than one side.
    """
    height, width = photo_bgr.shape[:2]
    scale = min(SIDE_PX / max(height, width), 1.0)
    small = cv2.resize(photo_bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    h, w = small.shape[:2]
    left, top = max(round(w * MARGIN), 1), max(round(h * MARGIN), 1)
    inner = (left, top, w - 2 * left, h - 2 * top)
    if min(inner[2:]) < 8:
        return None
    parts = np.zeros((h, w), np.uint8)
    cv2.setRNGSeed(0)  # GrabCut starts its colour models at random
    cv2.grabCut(small, parts, inner, np.zeros((1, 65)), np.zeros((1, 65)), ROUNDS, cv2.GC_INIT_WITH_RECT)
    foreground = np.isin(parts, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    foreground = np.asarray(cv2.morphologyEx(foreground, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)), np.uint8)
    count, pieces, statistics, _ = cv2.connectedComponentsWithStats(foreground)
    if count < 2:
        return None
    largest = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax())
    x, y, box_w, box_h, area = (int(v) for v in statistics[largest])
    piece = (pieces == largest).astype(np.uint8)
    cut_off = (x <= left, y <= top, x + box_w >= w - left, y + box_h >= h - top)
    contours, _ = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = max(cv2.contourArea(cv2.convexHull(max(contours, key=len))), 1.0)
    whole = area >= TOGETHER * foreground.sum() and area >= SOLID * hull and sum(cut_off) <= 1
    if not whole or not AREA[0] * h * w < area < AREA[1] * h * w:
        return None
    large = cv2.resize(piece * 255, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(large > 127, OBJECT, 0).astype(np.uint8)


def outline_folder(photos: Path, out: Path, processes: int = 1) -> tuple[int, int]:
    """Write ``boxes.csv`` and ``mask/*.png`` for the photos of a folder; photos stay where they are.

    Args:
        photos: folder of images, named each by its own stem.
        out: folder to write, made when missing.
        processes: how many photos at a time.

    Returns:
        How many photos have an object, and how many there are.

    Raises:
        ValueError: there are no photos, or two of one stem.
    """
    files = list_images(photos)
    if not files:
        raise ValueError(f"{photos} holds no images")
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"{photos} has images whose names differ only in their suffix; masks are named by the stem")
    (out / "img").mkdir(parents=True, exist_ok=True)  # empty: `boxes.csv` points from here to the photos
    (out / "mask").mkdir(exist_ok=True)
    rows = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        boxes = pool.map(partial(_outline_file, out=out), files, chunksize=8)
        for file, box in zip(files, tqdm(boxes, total=len(files), unit="photo", disable=None), strict=True):
            if box is not None:
                rows.append([os.path.relpath(file, out / "img"), *box, "object", OBJECT])
    with (out / "boxes.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([["image", "x", "y", "w", "h", "label", "mask"], *rows])
    return len(rows), len(files)


def _outline_file(file: Path, out: Path) -> tuple[int, int, int, int] | None:
    """Write the mask of one photo; its box ``x, y, w, h``, or None without an object or a readable image."""
    cv2.setNumThreads(1)
    photo = cv2.imread(str(file), cv2.IMREAD_COLOR)
    mask = None if photo is None else outline(np.asarray(photo, np.uint8))
    if mask is None:
        return None
    cv2.imwrite(str(out / "mask" / f"{file.stem}.png"), mask)
    x, y, w, h = cv2.boundingRect(mask)
    return x, y, w, h


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 where the photos cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m training.outline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", type=Path, help="folder of photos, best of one object each")
    parser.add_argument("--out", type=Path, required=True, help="folder of stills to write")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="photos at a time (default: cores)")
    options = parser.parse_args(arguments)
    try:
        kept, count = outline_folder(options.photos, options.out, max(options.processes, 1))
    except (OSError, ValueError) as error:
        print(f"outline: {error}", file=sys.stderr)
        return 2
    print(f"{kept} of {count} photos have an object that could be outlined: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
