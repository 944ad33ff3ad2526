"""Template-search pairs drawn from tracks, stills, cut-outs and plain photos."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siamtrack.boxes import xywh_to_cxcywh
from siamtrack.crop import Window, context_size, crop, mean_bgr
from training.augment import Cutout, Jitter, jittered_window, paste, photometric, rotate
from training.data import Sighting, Track
from training.images import ImageCache

Rng = np.random.Generator
CxCyWH = tuple[float, float, float, float]
Drawn = tuple[NDArray[np.uint8], NDArray[np.uint8], CxCyWH, str]
DEFAULT_MIX = {"video": 0.40, "still": 0.27, "cutout": 0.25, "region": 0.08}
KINDS = tuple(DEFAULT_MIX)
OBJECT_PX = 8  # an outlined object thinner than this is not worth lifting
OBJECT_TRIES = 200


@dataclass(frozen=True)
class PairConfig:
    """How pairs are drawn.

    Attributes:
        mix: share of each kind of pair (`KINDS`); shares are normalised.
        negative: share of pairs whose search crop shows another target: every cell is background.
        frame_range: furthest frame distance between template and search frame of a video.
        distractor: chance of one or two foreign objects pasted beside the target.
        occluder: chance of a foreign object pasted over part of it.
        template: window jitter of the template crop.
        search: window jitter of the search crop.
        rotation: chance that the search crop is turned about the target.
        rotation_deg: by how much at most.
        flip: chance that the search crop is mirrored left to right: another side of the same thing.
    """

    mix: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    negative: float = 0.12
    frame_range: int = 100
    distractor: float = 0.25
    occluder: float = 0.12
    template: Jitter = Jitter(shift_px=4, scale=0.05, stretch=0.05)
    search: Jitter = Jitter(shift_px=64, scale=0.25, stretch=0.12)
    rotation: float = 0.35
    rotation_deg: float = 30.0
    flip: float = 0.1

    def __post_init__(self) -> None:
        unknown = set(self.mix) - set(KINDS)
        if unknown or not any(v > 0 for v in self.mix.values()):
            raise ValueError(f"mix must give positive shares to some of {KINDS}, got {self.mix}")


@dataclass(frozen=True)
class Pair:
    """One training sample: crops uint8 BGR, the target's box (cx, cy, w, h) in search-crop pixels.

    In a negative pair the box is that of the foreign target in the search crop.
    """

    template: NDArray[np.uint8]
    search: NDArray[np.uint8]
    box_cxcywh: NDArray[np.float64]
    positive: bool


class PairSampler:
    """Draws pairs; holds no state but the image cache.

    Args:
        videos: tracks of several sightings.
        stills: tracks of one sighting.
        photos: images without annotations, for backgrounds and regions.
        config: see `PairConfig`.
        images: where pixels come from.
        template_px: template crop side.
        search_px: search crop side.
    """

    def __init__(
        self,
        videos: Sequence[Track],
        stills: Sequence[Track],
        photos: Sequence[Path],
        config: PairConfig,
        images: ImageCache,
        template_px: int,
        search_px: int,
    ) -> None:
        self.config, self.images = config, images
        self.template_px, self.search_px = template_px, search_px
        by_video: dict[str, list[Track]] = defaultdict(list)
        for track in videos:
            by_video[track.name.split(":")[0]].append(track)
        self._videos = list(by_video.values())
        self._video_names = {s.image: t.name.split(":")[0] for t in videos for s in t.sightings}
        lengths = np.sqrt([sum(len(t.sightings) for t in tracks) for tracks in self._videos])
        self._video_share = lengths / lengths.sum() if len(lengths) else lengths
        self._stills = [track.sightings[0] for track in stills]
        # Outlined objects by source, so that a large set of outlines does not drown the others.
        outlined: dict[str, list[Sighting]] = defaultdict(list)
        for track in (*videos, *stills):
            for seen in track.sightings:
                if seen.mask is not None:
                    outlined[track.name.split(":")[0]].append(seen)
        self._outlined = list(outlined.values())
        sizes = np.sqrt([len(group) for group in self._outlined])
        self._outlined_share = sizes / sizes.sum() if len(sizes) else sizes
        self._photos = list(photos) or sorted({s.image for s in self._stills})
        available = {
            "video": self._videos,
            "still": self._stills,
            "cutout": self._outlined if self._photos else [],  # an object needs something behind it
            "region": self._photos,
        }
        shares = {kind: share for kind, share in config.mix.items() if share > 0}
        empty = [kind for kind in shares if not available[kind]]
        if empty:
            raise ValueError(f"the mix asks for {', '.join(empty)} pairs but the data has none; set their share to 0")
        if config.negative and len(self._sources(shares)) < 2:
            raise ValueError("negative pairs need two videos or photos: set `negative` to 0 or add data")
        self._kinds = list(shares)
        self._kind_share = np.array(list(shares.values())) / sum(shares.values())

    def draw(self, rng: Rng) -> Pair:
        """One random pair."""
        template, search, box, source = self._draw_kind(self._draw_kind_name(rng), rng)
        positive = rng.random() >= self.config.negative
        if not positive:
            search, box = self._draw_foreign(source, rng)
        if rng.random() < self.config.flip:
            search, box = np.ascontiguousarray(search[:, ::-1]), (self.search_px - box[0], *box[1:])
        if rng.random() < self.config.distractor:
            self._add_distractors(search, box, rng)
        if positive and rng.random() < self.config.occluder:
            self._add_occluder(search, box, rng)
        return Pair(photometric(template, rng), photometric(search, rng), np.array(box), positive)

    def _draw_foreign(self, source: str, rng: Rng) -> tuple[NDArray[np.uint8], CxCyWH]:
        """A search crop from another video or photo than `source`: the same one might show the target too."""
        while True:
            _, search, box, other = self._draw_kind(self._draw_kind_name(rng), rng)
            if other != source:
                return search, box

    def _sources(self, kinds: Collection[str]) -> set[str]:
        """Videos and photos that these kinds of pairs are drawn from."""
        seen = {"video": [t.sightings[0] for tracks in self._videos for t in tracks], "still": self._stills}
        seen["cutout"] = [s for group in self._outlined for s in group]
        sources = {self._source_of(s) for kind in kinds for s in seen.get(kind, ())}
        return sources | ({str(p) for p in self._photos} if "region" in kinds else set())

    def _source_of(self, seen: Sighting) -> str:
        """The video or photo a sighting is from."""
        return self._video_names.get(seen.image, str(seen.image))

    def _draw_kind_name(self, rng: Rng) -> str:
        return self._kinds[rng.choice(len(self._kinds), p=self._kind_share)]

    def _draw_kind(self, kind: str, rng: Rng) -> Drawn:
        """Template crop, search crop, the target's box in it, and the video or photo it is from."""
        if kind == "cutout":
            return self._draw_cutout(rng)
        if kind == "video":
            tracks = self._videos[rng.choice(len(self._videos), p=self._video_share)]
            weights = np.array([len(t.sightings) for t in tracks], float)
            track = tracks[rng.choice(len(tracks), p=weights / weights.sum())]
            first = int(rng.integers(len(track.sightings)))
            frames = np.asarray(track.frames)
            near = np.flatnonzero(np.abs(frames - frames[first]) <= self.config.frame_range)
            seen, later = track.sightings[first], track.sightings[int(rng.choice(near))]
        elif kind == "still":
            seen = later = self._stills[int(rng.integers(len(self._stills)))]
        else:
            seen = later = self._draw_region(rng)
        template, _ = self._view(seen, self.template_px, self.config.template, rng)
        search, box = self._view(later, self.search_px, self.config.search, rng)
        if rng.random() < self.config.rotation:
            search, box = rotate(search, box, rng.uniform(-1, 1) * self.config.rotation_deg)
        return template, search, box, self._source_of(seen)

    def _view(self, seen: Sighting, size_px: int, jitter: Jitter, rng: Rng) -> tuple[NDArray[np.uint8], CxCyWH]:
        image = self.images.bgr(seen.image)
        cx, cy, w, h = xywh_to_cxcywh(seen.box_xywh).tolist()
        window = jittered_window((cx, cy, w, h), self.template_px, size_px, jitter, rng)
        bx, by, bw, bh = window.to_crop((cx, cy, w, h), size_px).tolist()
        return crop(image, window, size_px, mean_bgr(image)), (bx, by, bw, bh)

    def _draw_region(self, rng: Rng) -> Sighting:
        """A random rectangle of a photo, as if it were a target."""
        path = self._photos[int(rng.integers(len(self._photos)))]
        height, width = self.images.bgr(path).shape[:2]
        side = min(height, width) * rng.uniform(0.12, 0.5)
        ratio = np.exp(rng.uniform(-0.6, 0.6))
        w, h = min(side * ratio, width * 0.9), min(side / ratio, height * 0.9)
        return Sighting(path, (rng.uniform(0, width - w), rng.uniform(0, height - h), w, h))

    def _draw_background(self, rng: Rng) -> NDArray[np.uint8]:
        """A random square of a random photo at search size."""
        image = self.images.bgr(self._photos[int(rng.integers(len(self._photos)))])
        height, width = image.shape[:2]
        side = int(min(height, width) * rng.uniform(0.35, 1.0))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return crop(image, Window(left, top, side, side), self.search_px, (0, 0, 0))

    def _draw_object(self, rng: Rng) -> tuple[Cutout, str]:
        """A random outlined object, and the video or photo it is from."""
        for _ in range(OBJECT_TRIES):
            group = self._outlined[rng.choice(len(self._outlined), p=self._outlined_share)]
            seen = group[int(rng.integers(len(group)))]
            cutout = self._lift(seen)
            if cutout is not None:
                return cutout, self._source_of(seen)
        raise ValueError(f"of {OBJECT_TRIES} outlined objects drawn none is {OBJECT_PX} px large inside its photo")

    def _lift(self, seen: Sighting) -> Cutout | None:
        if seen.mask is None:
            return None
        image = self.images.bgr(seen.image)
        x, y, w, h = seen.box_xywh
        x0, y0 = max(int(x), 0), max(int(y), 0)
        x1, y1 = min(int(np.ceil(x + w)), image.shape[1]), min(int(np.ceil(y + h)), image.shape[0])
        if x1 - x0 < OBJECT_PX or y1 - y0 < OBJECT_PX:
            return None
        labels = None if seen.mask.path is None else self.images.labels(seen.mask.path)
        alpha = seen.mask.alpha(labels, (x0, y0, x1, y1))
        rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
        if rows.size < OBJECT_PX or columns.size < OBJECT_PX:
            return None
        tight = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return Cutout(image[y0:y1, x0:x1][tight], alpha[tight])

    def _draw_cutout(self, rng: Rng) -> Drawn:
        """One object on two backgrounds, on the scale tracking would show it at."""
        config = self.config
        cutout, source = self._draw_object(rng)
        height, width = cutout.alpha.shape
        scale = self.template_px / context_size(width, height)
        background = self._draw_background(rng)
        margin = (self.search_px - self.template_px) // 2
        same_place = rng.random() < 0.6
        behind = background if same_place else self._draw_background(rng)
        template = behind[margin : margin + self.template_px, margin : margin + self.template_px].copy()
        middle = self.template_px / 2
        if paste(template, cutout, (middle, middle), (width * scale, height * scale), 0) is None:
            return self._draw_cutout(rng)
        grow = scale * np.exp(rng.uniform(-config.search.scale, config.search.scale))
        stretch = np.exp(rng.uniform(-config.search.stretch, config.search.stretch))
        size = (width * grow * stretch, height * grow / stretch)
        centre = self.search_px / 2 + rng.uniform(-config.search.shift_px, config.search.shift_px, 2)
        angle = rng.uniform(-1, 1) * config.rotation_deg if rng.random() < config.rotation else 0.0
        box = paste(background, cutout, (centre[0], centre[1]), size, angle)
        return (template, background, box, source) if box is not None else self._draw_cutout(rng)

    def _add_distractors(self, search: NDArray[np.uint8], box: CxCyWH, rng: Rng) -> None:
        """Foreign objects of about the target's size beside it."""
        if not self._outlined:
            return
        for _ in range(int(rng.integers(1, 3))):
            cutout, _ = self._draw_object(rng)
            size = self._size_like(cutout, box, rng)
            centre = rng.uniform(0, self.search_px, 2)
            clear_x = (size[0] + box[2]) / 2 * 0.9
            clear_y = (size[1] + box[3]) / 2 * 0.9
            if abs(centre[0] - box[0]) > clear_x or abs(centre[1] - box[1]) > clear_y:
                paste(search, cutout, (centre[0], centre[1]), size, rng.uniform(-15, 15))

    def _add_occluder(self, search: NDArray[np.uint8], box: CxCyWH, rng: Rng) -> None:
        """A foreign object over one side of the target, hiding up to about half of it."""
        if not self._outlined:
            return
        cutout, _ = self._draw_object(rng)
        size = self._size_like(cutout, box, rng)
        direction = rng.uniform(0, 2 * np.pi)
        centre_x = box[0] + np.cos(direction) * (box[2] + size[0]) / 2 * rng.uniform(0.55, 0.95)
        centre_y = box[1] + np.sin(direction) * (box[3] + size[1]) / 2 * rng.uniform(0.55, 0.95)
        paste(search, cutout, (centre_x, centre_y), size, rng.uniform(-30, 30))

    @staticmethod
    def _size_like(cutout: Cutout, box: CxCyWH, rng: Rng) -> tuple[float, float]:
        height, width = cutout.alpha.shape
        scale = np.sqrt(box[2] * box[3] / (width * height)) * np.exp(rng.uniform(-0.4, 0.4))
        return width * scale, height * scale
