"""Shards: tar files of crops around targets, in WebDataset's naming, and how they are read again.

A crop is what pairs can need of an image, cut out unscaled: a pair drawn from it has the windows that it would have
had in the whole image. Only where a target's context is more than twice as wide as the network's template the crop is
shrunk to that. Photos for backgrounds are stored as they are, but large ones are shrunk where pixels are raw.

``SHARD.tar`` holds ``KEY.jpg``, ``KEY.json`` and for label images ``KEY.png``; of raw pixels ``KEY.npy`` and
``KEY.mask.npy``. ``SHARD.json`` says where in the tar the files of each sample lie, so that pairs are drawn by random
access, in a column a field; ``manifest.json`` names all shards and tracks.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import context_size, mean_bgr
from training.augment import Jitter
from training.images import ImageCache
from training.tracks import Box, ImageRef, Mask, Sighting, Stored, StoredFrames, Track, source_of

VERSION = 2
MARGIN_PX = 4  # for the rounding of windows, and for interpolation
OVERSAMPLING = 2.0  # crops are at most so much finer than the network's template
OUTLINES = ("png", "mask.npy")  # suffixes of label images
RAW_PHOTO_PX = 1000  # shorter side of a raw photo at most: all of it is read, to be seen at some hundred pixels
MANIFEST = "manifest.json"
COLUMNS: dict[str, type[np.generic]] = {
    "track": np.int32,  # -1 for photos
    "frame": np.int64,
    "image": np.int64,  # offset and bytes in the tar
    "outline": np.int64,  # of the label image; no bytes where there is none
    "box": np.float64,
    "fill": np.float64,
}


@dataclass(frozen=True)
class Piece:
    """One sample to store: a target's sighting, in a video or a still; or a photo (`track` -1, no sighting's box)."""

    track: int
    frame: int
    sighting: Sighting
    of_video: bool


@dataclass(frozen=True)
class ShardJob:
    """One shard to write; the same job always writes the same bytes.

    Attributes:
        folder: where.
        number: of the shard.
        first: number of its first sample.
        pieces: what is in it.
        reach: pixels shown to each side of a target's centre, as a multiple of its context.
        template_px: the network's template side.
        quality: of JPEG, 1 to 100; None for raw pixels.
    """

    folder: Path
    number: int
    first: int
    pieces: tuple[Piece, ...]
    reach: float
    template_px: int
    quality: int | None

    @property
    def tar(self) -> Path:
        """The shard's file."""
        return self.folder / f"{self.number:06d}.tar"

    @property
    def index(self) -> Path:
        """What says what is in it; written last, so it is there when the shard is complete."""
        return self.tar.with_suffix(".json")

    def plan(self) -> str:
        """Hash of all that decides what is written."""
        settings = (VERSION, self.number, self.first, self.reach, self.template_px, self.quality)
        return hashlib.sha256(repr((settings, self.pieces)).encode()).hexdigest()


def reach_needed(template: Jitter, search: Jitter, template_px: int, search_px: int) -> float:
    """How far from a target's centre the windows of pairs go, as a multiple of the target's context."""
    sides = ((template, template_px), (search, search_px))
    return max(
        size / template_px * float(np.exp(j.scale + j.stretch / 2)) * (0.5 + j.shift_px / size) for j, size in sides
    )


def finished(job: ShardJob) -> dict[str, Any] | None:
    """The index of a shard that is complete, of this very job, and whose bytes are those written; None to write it."""
    try:
        index = json.loads(job.index.read_text())
        if index["plan"] == job.plan() and index["sha256"] == _sha256(job.tar):
            return dict(index)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write_shard(job: ShardJob) -> dict[str, Any]:
    """Cut and store; returns the index. What is half-written when it is stopped is written anew the next time."""
    job.index.unlink(missing_ok=True)
    images = ImageCache(0.25)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    named: dict[str, Any] = {}  # what few samples have, by their row
    part = job.tar.with_suffix(".tar.part")
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, piece in enumerate(job.pieces):
            files, sample = _encode(piece, job, images)
            places = {"outline": (0, 0)}
            for suffix, content in {**files, "json": json.dumps(sample).encode()}.items():
                header = tarfile.TarInfo(f"{job.first + row:09d}.{suffix}")
                header.size = len(content)
                what = suffix if suffix == "json" else "outline" if suffix in OUTLINES and piece.track >= 0 else "image"
                places[what] = (tar.offset + tarfile.BLOCKSIZE, len(content))
                tar.addfile(header, io.BytesIO(content))
            about = {"box": (0, 0, 0, 0), "fill": (0, 0, 0), **sample, **places}
            for name, column in columns.items():
                column.append(about[name])
            if not piece.of_video or "polygons" in sample:
                named[str(row)] = {name: sample[name] for name in ("source", "polygons") if name in sample}
    index = {"plan": job.plan(), "sha256": _sha256(part), "bytes": part.stat().st_size, "named": named, **columns}
    part.replace(job.tar)
    text = job.index.with_suffix(".json.part")
    text.write_text(json.dumps(index))
    text.replace(job.index)
    return index


def write_manifest(folder: Path, jobs: list[ShardJob], tracks: list[Track], kinds: list[str], about: Any) -> None:
    """Name all shards, of which each must be finished, and all tracks; `about` is kept as it is."""
    shards = []
    for job in jobs:
        index = json.loads(job.index.read_text())
        shards.append({"name": job.tar.name, "sha256": index["sha256"], "bytes": index["bytes"]})
    named = [
        {"name": t.name, "kind": kind, "frame_range": t.frame_range, "weight": t.weight}
        for t, kind in zip(tracks, kinds, strict=True)
    ]
    reach = min(job.reach for job in jobs)
    content = {"version": VERSION, "reach": reach, "shards": shards, "tracks": named, "about": about}
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(content))
    part.replace(folder / MANIFEST)


def read_shards(folder: Path, reach: float) -> tuple[list[Track], list[Track], list[ImageRef]]:
    """Videos, stills and photos of shards, in the order in which they were read when the shards were made.

    Args:
        folder: what `training.prepare` wrote.
        reach: what pairs need, see `reach_needed`.

    Raises:
        ValueError: no complete set of shards, or made for windows that stray less.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"no {path}: `python -m training.prepare` writes it when all shards are done; run it (again)")
    manifest = json.loads(path.read_text())
    if manifest["version"] != VERSION:
        raise ValueError(f"{path} is of version {manifest['version']}, this reads {VERSION}: prepare the shards again")
    if manifest["reach"] < reach - 1e-9:
        raise ValueError(
            f"{folder} shows {manifest['reach']:.3f} of a target's context to each side, the recipe's jitter needs "
            f"{reach:.3f}: prepare shards with this recipe"
        )
    table = _read_table(folder, manifest["shards"])
    order = np.argsort(table.track, kind="stable")
    starts = np.searchsorted(table.track[order], np.arange(-1, len(manifest["tracks"]) + 1)).tolist()
    photos = [table.sighting(row).image for row in order[: starts[1]].tolist()]
    found: dict[str, list[Track]] = {"video": [], "still": []}
    for number, about in enumerate(manifest["tracks"]):
        rows = order[starts[number + 1] : starts[number + 2]]
        seen: Sequence[Sighting]
        if table.named.keys().isdisjoint(rows.tolist()):
            seen = replace(table.all.take(rows), source=about["name"])
        else:
            seen = tuple(map(table.sighting, rows.tolist()))
        frames: Sequence[int] = table.frame[rows]  # type: ignore[assignment]
        found[about["kind"]].append(Track(about["name"], seen, frames, about["frame_range"], about["weight"]))
    return found["video"], found["still"], photos


@dataclass(frozen=True)
class _Table:
    """All N samples of all shards.

    Attributes:
        all: their images and boxes.
        track: int32 ``[N]``, number of the track of each; -1 for photos.
        frame: int64 ``[N]``, number of the frame.
        named: source and polygons of the rows that have them.
    """

    all: StoredFrames
    track: NDArray[np.int32]
    frame: NDArray[np.int64]
    named: dict[int, dict[str, Any]]

    def sighting(self, row: int) -> Sighting:
        seen, about = self.all.sighting(row), self.named.get(row, {})
        image, polygons = seen.image, tuple(tuple(p) for p in about.get("polygons", ()))
        assert isinstance(image, Stored)
        return replace(
            seen,
            image=replace(image, source=about.get("source", "")),
            mask=Mask(polygons=polygons) if polygons else seen.mask,
        )


def _read_table(folder: Path, shards: Sequence[dict[str, Any]]) -> _Table:
    tars = tuple(folder / shard["name"] for shard in shards)
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("shard", *COLUMNS)}
    named: dict[int, dict[str, Any]] = {}
    first = 0
    for number, (tar, shard) in enumerate(zip(tars, shards, strict=True)):
        if not tar.is_file() or tar.stat().st_size != shard["bytes"]:
            raise ValueError(f"{tar} is missing or not {shard['bytes']} bytes long: run training.prepare again")
        index = json.loads(tar.with_suffix(".json").read_text())
        count = len(index["track"])
        for name, dtype in COLUMNS.items():
            columns[name].append(np.array(index[name], dtype))
        columns["shard"].append(np.full(count, number, np.int32))
        named |= {first + int(row): about for row, about in index["named"].items()}
        first += count
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    frames = StoredFrames(tars, "", *(table[name] for name in ("shard", "image", "outline", "box", "fill")))
    return _Table(frames, table["track"], table["frame"], named)


def _encode(piece: Piece, job: ShardJob, images: ImageCache) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files by suffix, and what the index says of them."""
    seen = piece.sighting
    sample: dict[str, Any] = {"track": piece.track, "frame": piece.frame, "source": source_of(seen.image)}
    if piece.track < 0 and job.quality is not None:
        path = Path(sample["source"])
        return {path.suffix.lower().lstrip("."): path.read_bytes()}, sample
    pixels = images.bgr(seen.image)
    if piece.track < 0:
        return {"npy": _npy(_at_most(pixels, RAW_PHOTO_PX))}, sample
    x0, y0, x1, y1 = _corners(seen.box_xywh, pixels.shape[1], pixels.shape[0], job.reach)
    x, y, w, h = seen.box_xywh
    shrink = min(OVERSAMPLING * job.template_px / context_size(w, h), 1.0)
    size = max(round((x1 - x0) * shrink), 1), max(round((y1 - y0) * shrink), 1)
    scale_x, scale_y = size[0] / (x1 - x0), size[1] / (y1 - y0)
    patch = pixels[y0:y1, x0:x1]
    part = patch if shrink == 1 else np.asarray(cv2.resize(patch, size, interpolation=cv2.INTER_AREA), np.uint8)
    sample["box"] = [(x - x0) * scale_x, (y - y0) * scale_y, w * scale_x, h * scale_y]
    sample["fill"] = seen.fill_bgr or mean_bgr(pixels)
    if job.quality is None:
        files = {"npy": _npy(part)}
    else:
        files = {"jpg": _encoded(".jpg", part, [cv2.IMWRITE_JPEG_QUALITY, job.quality])}
    if seen.mask is not None and seen.mask.path is None:
        outlines = [np.reshape(p, (-1, 2)) for p in seen.mask.polygons]
        sample["polygons"] = [((o - (x0, y0)) * (scale_x, scale_y)).ravel().tolist() for o in outlines]
    elif seen.mask is not None and seen.mask.path is not None:
        alpha = seen.mask.alpha(images.labels(seen.mask.path), (x0, y0, x1, y1), pixels)
        resized = alpha if shrink == 1 else cv2.resize(alpha, size, interpolation=cv2.INTER_NEAREST)
        outline = np.asarray(resized, np.uint8)
        files |= {"mask.npy": _npy(outline)} if job.quality is None else {"png": _encoded(".png", outline, [])}
    return files, sample


def _corners(box_xywh: Box, width: int, height: int, reach: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is cut, inside the image; at least a pixel."""
    x, y, w, h = box_xywh
    half = reach * context_size(w, h) + MARGIN_PX
    cx, cy = x + w / 2, y + h / 2
    x0, y0 = max(min(int(cx - half), width - 1), 0), max(min(int(cy - half), height - 1), 0)
    return x0, y0, min(max(int(np.ceil(cx + half)), x0 + 1), width), min(max(int(np.ceil(cy + half)), y0 + 1), height)


def _encoded(suffix: str, pixels: NDArray[np.uint8], options: list[int]) -> bytes:
    ok, data = cv2.imencode(suffix, pixels, options)
    if not ok:
        raise ValueError(f"a crop of shape {pixels.shape} cannot be written as {suffix}")
    return bytes(data)


def _npy(pixels: NDArray[np.uint8]) -> bytes:
    """NumPy's file of an array."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pixels), allow_pickle=False)
    return file.getvalue()


def _at_most(pixels: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """An image with a shorter side of at most `side_px`."""
    height, width = pixels.shape[:2]
    shrink = side_px / min(height, width)
    if shrink >= 1:
        return pixels
    size = round(width * shrink), round(height * shrink)
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
