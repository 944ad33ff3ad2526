"""Objects lifted from photos by their outlines, and what is done with them: backgrounds, distractors, occluders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import Window, crop
from training.augment import Cutout, paste
from training.images import ImageCache
from training.tracks import ImageRef, Sighting, Track, source_of

Rng = np.random.Generator
CxCyWH = tuple[float, float, float, float]
Crop = NDArray[np.uint8]
OBJECT_PX = 8  # an outlined object thinner than this is not worth lifting
OBJECT_TRIES = 200


class Chooser:
    """Draws an index by weight, as ``rng.choice(n, p=...)`` does to the bit, without summing up anew each time.

    Args:
        weights: at least 0, of any sum; may be empty, then nothing can be drawn.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        shares = weights / weights.sum() if len(weights) else weights
        self._cumulative = shares.cumsum()
        if len(weights):
            self._cumulative /= self._cumulative[-1]

    def draw(self, rng: Rng) -> int:
        """One index."""
        return int(self._cumulative.searchsorted(rng.random(), side="right"))


class Objects:
    """The outlined objects of a data set, and the photos to put them on.

    Args:
        videos: tracks of several sightings, of which those with a mask are used.
        stills: the same of one sighting.
        photos: backgrounds.
        images: where pixels come from.
    """

    def __init__(
        self, videos: Sequence[Track], stills: Sequence[Track], photos: Sequence[ImageRef], images: ImageCache
    ) -> None:
        # By source, so that a large set of outlines does not drown the others.
        groups: dict[str, list[tuple[Sighting, str]]] = defaultdict(list)
        for track in videos:
            groups[track.video] += ((seen, track.video) for seen in track.outlined())
        for track in stills:
            groups[track.video] += ((seen, source_of(seen.image)) for seen in track.outlined())
        self._groups = [group for group in groups.values() if group]
        self._choose = Chooser(np.sqrt([len(group) for group in self._groups]))
        self._photos, self._images = photos, images

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def sources(self) -> set[str]:
        """Videos and photos that they are from."""
        return {source for group in self._groups for _, source in group}

    def draw(self, rng: Rng) -> tuple[Cutout, str]:
        """A random object, and the video or photo it is from.

        Raises:
            ValueError: none is large enough.
        """
        drawn = self._draw(rng, ())
        if drawn is not None:
            return drawn
        raise ValueError(f"of {OBJECT_TRIES} outlined objects drawn none is {OBJECT_PX} px large inside its photo")

    def _draw(self, rng: Rng, without: Collection[str]) -> tuple[Cutout, str] | None:
        for _ in range(OBJECT_TRIES if self._groups else 0):
            group = self._groups[self._choose.draw(rng)]
            seen, source = group[int(rng.integers(len(group)))]
            cutout = None if source in without else self._lift(seen)
            if cutout is not None:
                return cutout, source
        return None

    def draw_background(self, size_px: int, rng: Rng) -> Crop:
        """A random square of a random photo."""
        image = self._images.bgr(self._photos[int(rng.integers(len(self._photos)))])
        height, width = image.shape[:2]
        side = int(min(height, width) * rng.uniform(0.35, 1.0))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return crop(image, Window(left, top, side, side), size_px, (0, 0, 0))

    def add_distractors(self, search: Crop, box: CxCyWH, without: Collection[str], rng: Rng) -> None:
        """Paste foreign objects of about the target's size beside it.

        Args:
            search: drawn on.
            box: of the target, in its pixels.
            without: videos and photos that show the target; with objects of no other, nothing is pasted.
            rng: randomness.
        """
        for _ in range(int(rng.integers(1, 3)) if self._groups else 0):
            drawn = self._draw(rng, without)
            if drawn is None:
                return
            cutout, _ = drawn
            size = _size_like(cutout, box, rng)
            centre = rng.uniform(0, search.shape[0], 2)
            clear_x = (size[0] + box[2]) / 2 * 0.9
            clear_y = (size[1] + box[3]) / 2 * 0.9
            if abs(centre[0] - box[0]) > clear_x or abs(centre[1] - box[1]) > clear_y:
                paste(search, cutout, (centre[0], centre[1]), size, rng.uniform(-15, 15))

    def add_occluder(self, search: Crop, box: CxCyWH, without: Collection[str], rng: Rng) -> None:
        """Paste a foreign object over one side of the target, up to about half; arguments of `add_distractors`."""
        drawn = self._draw(rng, without)
        if drawn is None:
            return
        cutout, _ = drawn
        size = _size_like(cutout, box, rng)
        direction = rng.uniform(0, 2 * np.pi)
        centre_x = box[0] + np.cos(direction) * (box[2] + size[0]) / 2 * rng.uniform(0.55, 0.95)
        centre_y = box[1] + np.sin(direction) * (box[3] + size[1]) / 2 * rng.uniform(0.55, 0.95)
        paste(search, cutout, (centre_x, centre_y), size, rng.uniform(-30, 30))

    def _lift(self, seen: Sighting) -> Cutout | None:
        if seen.mask is None:
            return None
        image = self._images.bgr(seen.image)
        x, y, w, h = seen.box_xywh
        x0, y0 = max(int(x), 0), max(int(y), 0)
        x1, y1 = min(int(np.ceil(x + w)), image.shape[1]), min(int(np.ceil(y + h)), image.shape[0])
        if x1 - x0 < OBJECT_PX or y1 - y0 < OBJECT_PX:
            return None
        labels = None if seen.mask.path is None else self._images.labels(seen.mask.path)
        alpha = seen.mask.alpha(labels, (x0, y0, x1, y1), image)
        rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
        if rows.size < OBJECT_PX or columns.size < OBJECT_PX:
            return None
        tight = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return Cutout(image[y0:y1, x0:x1][tight], alpha[tight])


def _size_like(cutout: Cutout, box: CxCyWH, rng: Rng) -> tuple[float, float]:
    """Width and height at about the area of `box`."""
    height, width = cutout.alpha.shape
    scale = np.sqrt(box[2] * box[3] / (width * height)) * np.exp(rng.uniform(-0.4, 0.4))
    return width * scale, height * scale
