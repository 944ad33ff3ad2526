"""What training data is made of, wherever it comes from.

A *sighting* is one target in one image; a *track* is the same target over images in time order. A still photo gives
tracks of one sighting.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import cv2
import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]


@dataclass(frozen=True, order=True)
class Stored:
    """An image inside a shard (`training.shards`); `source` names the photo that it was cut from, or its video."""

    shard: Path
    offset: int
    size: int
    source: str


ImageRef = Path | Stored


def source_of(image: ImageRef) -> str:
    """The photo that an image is, or was cut from."""
    return image.source if isinstance(image, Stored) else str(image)


@dataclass(frozen=True)
class Mask:
    """The outline of a target: a label image, or polygons.

    Attributes:
        path: label image of the photo's size, or None.
        value: the target's value in the label image; 0 stands for "anything not zero".
        polygons: outlines ``((x0, y0, x1, y1, ...), ...)`` in image pixels, used when `path` is None.
    """

    path: ImageRef | None = None
    value: int = 0
    polygons: tuple[tuple[float, ...], ...] = ()

    def alpha(
        self, labels: NDArray[np.uint8] | None, box_xyxy: tuple[int, int, int, int], photo: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Coverage 0 or 255 inside whole-pixel corners.

        Args:
            labels: the decoded `path`.
            box_xyxy: the corners.
            photo: ``[H, W, 3]`` that it outlines something in.

        Raises:
            ValueError: the label image has another size than the photo.
        """
        x0, y0, x1, y1 = box_xyxy
        if labels is not None:
            if labels.shape[:2] != photo.shape[:2]:
                (height, width), (rows, columns) = photo.shape[:2], labels.shape[:2]
                raise ValueError(
                    f"{self.path} is {columns}x{rows}, its photo {width}x{height}: scale it to the photo's size"
                )
            part = labels[y0:y1, x0:x1]
            inside = part == self.value if self.value else part > 0
            return inside * np.uint8(255)
        alpha = np.zeros((y1 - y0, x1 - x0), np.uint8)
        outlines = [np.round(np.reshape(p, (-1, 2)) - (x0, y0)).astype(np.int32) for p in self.polygons]
        cv2.fillPoly(alpha, outlines, 255)
        return alpha


@dataclass(frozen=True)
class Sighting:
    """One target in one image.

    Attributes:
        image: where its pixels are.
        box_xywh: in image pixels (continuous, 0-based).
        mask: its outline, where there is one.
        fill_bgr: colour for what lies outside the image; None for the image's own mean.
    """

    image: ImageRef
    box_xywh: Box
    mask: Mask | None = None
    fill_bgr: tuple[float, float, float] | None = None


class Frames(Sequence[Sighting], abc.ABC):
    """Sightings of one target that are made when asked for, of arrays: a data set may have millions.

    Attributes:
        boxes_xywh: ``[N, 4]``.
    """

    boxes_xywh: NDArray[np.floating]

    def __len__(self) -> int:
        return len(self.boxes_xywh)

    @overload
    def __getitem__(self, index: int) -> Sighting: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sighting]: ...
    def __getitem__(self, index: int | slice) -> Sighting | Sequence[Sighting]:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.sighting(index)

    @abc.abstractmethod
    def sighting(self, index: int) -> Sighting:
        """One of them."""

    @abc.abstractmethod
    def take(self, indices: NDArray[np.int_]) -> Frames:
        """Some of them."""

    @abc.abstractmethod
    def outlined(self) -> Iterator[Sighting]:
        """Those with an outline."""


@dataclass(frozen=True, eq=False)
class NumberedFrames(Frames):
    """Sightings without outlines in images that are named by number: 20 bytes each at rest.

    Attributes:
        folder: of the images.
        pattern: image name of a number, such as ``{:08d}.jpg``.
        numbers: int64 ``[N]``.
        boxes_xywh: float32 ``[N, 4]``.
    """

    folder: Path
    pattern: str
    numbers: NDArray[np.int64]
    boxes_xywh: NDArray[np.float32]

    def sighting(self, index: int) -> Sighting:
        x, y, w, h = self.boxes_xywh[index].tolist()
        return Sighting(self.folder / self.pattern.format(int(self.numbers[index])), (x, y, w, h))

    def take(self, indices: NDArray[np.int_]) -> NumberedFrames:
        return replace(self, numbers=self.numbers[indices], boxes_xywh=self.boxes_xywh[indices])

    def outlined(self) -> Iterator[Sighting]:
        return iter(())


@dataclass(frozen=True, eq=False)
class StoredFrames(Frames):
    """Sightings in shards: 92 bytes each at rest.

    Attributes:
        tars: all shards.
        source: what they were cut from.
        shard: int32 ``[N]``, index into `tars`.
        image: int64 ``[N, 2]``, offset and bytes of each image.
        outline: int64 ``[N, 2]``, those of its label image; no bytes where there is none.
        boxes_xywh: float64 ``[N, 4]``.
        fill_bgr: float64 ``[N, 3]``, see `Sighting`.
    """

    tars: tuple[Path, ...]
    source: str
    shard: NDArray[np.int32]
    image: NDArray[np.int64]
    outline: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    fill_bgr: NDArray[np.float64]

    def sighting(self, index: int) -> Sighting:
        tar = self.tars[self.shard[index]]
        (offset, size), (outline_offset, outline_size) = self.image[index].tolist(), self.outline[index].tolist()
        x, y, w, h = self.boxes_xywh[index].tolist()
        blue, green, red = self.fill_bgr[index].tolist()
        return Sighting(
            Stored(tar, offset, size, self.source),
            (x, y, w, h),
            Mask(Stored(tar, outline_offset, outline_size, self.source)) if outline_size else None,
            (blue, green, red),
        )

    def take(self, indices: NDArray[np.int_]) -> StoredFrames:
        arrays = {
            name: getattr(self, name)[indices] for name in ("shard", "image", "outline", "boxes_xywh", "fill_bgr")
        }
        return replace(self, **arrays)

    def outlined(self) -> Iterator[Sighting]:
        return map(self.sighting, np.flatnonzero(self.outline[:, 1]).tolist())


@dataclass(frozen=True)
class Track:
    """The sightings of one target in time order.

    Attributes:
        name: of its video, and behind a colon of the target in it.
        sightings: at least one.
        frames: their frame numbers, rising.
        frame_range: furthest frames of a pair; 0 for what the recipe says for all.
        weight: how much more often than its length alone would have it drawn.
    """

    name: str
    sightings: Sequence[Sighting]
    frames: Sequence[int]
    frame_range: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.sightings) or len(self.sightings) != len(self.frames):
            raise ValueError(f"track {self.name}: {len(self.sightings)} sightings, {len(self.frames)} frame numbers")

    @property
    def video(self) -> str:
        """The name without the target's."""
        return self.name.split(":")[0]

    def boxes_xywh(self) -> NDArray[np.float64]:
        """All boxes ``[N, 4]``."""
        if isinstance(self.sightings, Frames):
            return self.sightings.boxes_xywh.astype(np.float64)
        return np.array([s.box_xywh for s in self.sightings], np.float64)

    def outlined(self) -> Iterator[Sighting]:
        """Those with an outline."""
        if isinstance(self.sightings, Frames):
            return self.sightings.outlined()
        return (s for s in self.sightings if s.mask is not None)

    def take(self, indices: NDArray[np.int_]) -> Track:
        """The track at some of its sightings."""
        if isinstance(self.sightings, Frames):
            frames: Sequence[int] = np.asarray(self.frames)[indices]  # type: ignore[assignment]
            return replace(self, sightings=self.sightings.take(indices), frames=frames)
        return replace(
            self, sightings=tuple(self.sightings[i] for i in indices), frames=tuple(self.frames[i] for i in indices)
        )


def usable(tracks: Iterable[Track], min_side_px: float = 10.0) -> list[Track]:
    """Tracks without the sightings whose box is thinner than `min_side_px`; tracks left empty are dropped."""
    kept = []
    for track in tracks:
        sides = track.boxes_xywh()[:, 2:]
        good = (sides.min(axis=1) >= min_side_px) & (sides.max(axis=1) < 12 * sides.min(axis=1))
        if good.all():
            kept.append(track)
        elif good.any():
            kept.append(track.take(np.flatnonzero(good)))
    return kept
