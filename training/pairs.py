"""Template-search pairs drawn from tracks, stills, cut-outs and plain photos, and triplets of templates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import context_size, crop
from training.augment import (
    Effects,
    Jitter,
    LightConfig,
    corrupted,
    draw_effects,
    jittered_window,
    paste,
    photometric,
    rotate,
)
from training.frames import pair_frames, triplet_frames
from training.images import ImageCache
from training.objects import Chooser, Objects
from training.tracks import ImageRef, Sighting, Track, source_of

Rng = np.random.Generator
CxCyWH = tuple[float, float, float, float]
Crop = NDArray[np.uint8]
DEFAULT_MIX = {"video": 0.40, "still": 0.27, "cutout": 0.25, "region": 0.08}
KINDS = tuple(DEFAULT_MIX)
PART_SIDE = (0.3, 0.7)  # of the object's
PART_PX = 16  # a thinner part shows nothing to follow


@dataclass(frozen=True)
class PairConfig:
    """How pairs are drawn.

    Attributes:
        mix: share of each kind of pair (`KINDS`); shares are normalised.
        negative: share of pairs whose search crop shows another target: every cell is background.
        frame_range: furthest frame distance between template and search frame of a video whose data set names none.
        triplet_frames: length of the part of a video that the three templates and the search frame of a model with
            template updates are from.
        distractor: chance of one or two foreign objects pasted beside the target.
        occluder: chance of a foreign object pasted over part of it.
        template: window jitter of the template crop.
        search: window jitter of the search crop.
        template_light: light and sharpness of the template crop, and of further templates.
        search_light: those of the search crop.
        rotation: chance that the search crop is turned about the target.
        rotation_deg: by how much at most.
        flip: chance that the search crop is mirrored left to right: another side of the same thing.
        part: chance that a still's target is a random part of its object, so that what belongs to a target is learnt
            from the template and not from where objects end: a head without the neck.
    """

    mix: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    negative: float = 0.12
    frame_range: int = 100
    triplet_frames: int = 50
    distractor: float = 0.25
    occluder: float = 0.12
    template: Jitter = Jitter(shift_px=4, scale=0.05, stretch=0.05)
    search: Jitter = Jitter(shift_px=64, scale=0.25, stretch=0.12)
    template_light: LightConfig = LightConfig()
    search_light: LightConfig = LightConfig()
    rotation: float = 0.35
    rotation_deg: float = 30.0
    flip: float = 0.1
    part: float = 0.0

    def __post_init__(self) -> None:
        unknown = set(self.mix) - set(KINDS)
        if unknown or not any(v > 0 for v in self.mix.values()):
            raise ValueError(f"mix must give positive shares to some of {KINDS}, got {self.mix}")
        if self.triplet_frames < 4:
            raise ValueError(f"triplet_frames must be at least 4, got {self.triplet_frames}")


@dataclass(frozen=True)
class Pair:
    """One training sample: crops uint8 BGR, the target's box (cx, cy, w, h) in search-crop pixels.

    In a negative pair the box is that of the foreign target in the search crop. `size` is the target's width and height
    in template-crop pixels. `history` and `current` are the further templates T_a and T_c of a model with template
    updates; None for others. `effects` are light and noise that the crops are still without, by the crop's name; empty
    where they have them.
    """

    template: Crop
    search: Crop
    box_cxcywh: NDArray[np.float64]
    size: tuple[float, float]
    positive: bool
    history: Crop | None = None
    current: Crop | None = None
    effects: dict[str, Effects] = field(default_factory=dict)


@dataclass
class Drawn:
    """Crops of one target before light and noise.

    Attributes:
        templates: one, or three (first, history, current).
        search: crop.
        box: of the target in it.
        size: width and height of the target in the first template.
        source: the video or photo the target is from.
    """

    templates: list[Crop]
    search: Crop
    box: CxCyWH
    size: tuple[float, float]
    source: str


def part_of(seen: Sighting, rng: Rng) -> Sighting:
    """A random part of an object as a target of its own: 0.3 to 0.7 of each side, at least `PART_PX`.

    An object too small for a part is returned as it is.
    """
    x, y, w, h = seen.box_xywh
    part_w, part_h = rng.uniform(*PART_SIDE) * w, rng.uniform(*PART_SIDE) * h
    if min(part_w, part_h) < PART_PX:
        return seen
    return replace(seen, box_xywh=(x + rng.uniform(0, w - part_w), y + rng.uniform(0, h - part_h), part_w, part_h))


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
        triplets: draw three templates a pair (DASTSiam section 2.3), for a model with template updates.
        defer_effects: leave light and noise out of the crops, and say in `Pair.effects` which they are.
    """

    def __init__(
        self,
        videos: Sequence[Track],
        stills: Sequence[Track],
        photos: Sequence[ImageRef],
        config: PairConfig,
        images: ImageCache,
        template_px: int,
        search_px: int,
        triplets: bool = False,
        defer_effects: bool = False,
    ) -> None:
        self.config, self.images, self.triplets, self.defer_effects = config, images, triplets, defer_effects
        self.template_px, self.search_px = template_px, search_px
        by_video: dict[str, list[Track]] = defaultdict(list)
        for track in videos:
            by_video[track.video].append(track)
        self._videos = list(by_video.values())
        lengths = np.sqrt([sum(len(t.sightings) for t in tracks) for tracks in self._videos])
        self._choose_video = Chooser(lengths * [tracks[0].weight for tracks in self._videos])
        self._stills = [track.sightings[0] for track in stills]
        weights = np.array([track.weight for track in stills])
        self._choose_still = None if (weights == 1).all() else Chooser(weights)
        self._photos = list(photos) or sorted({s.image for s in self._stills})
        self._objects = Objects(videos, stills, self._photos, images)
        available = {
            "video": self._videos,
            "still": self._stills,
            "cutout": self._objects if self._photos else [],  # an object needs something behind it
            "region": self._photos,
        }
        shares = {kind: share for kind, share in config.mix.items() if share > 0}
        empty = [kind for kind in shares if not len(available[kind])]  # type: ignore[arg-type]
        if empty:
            raise ValueError(f"the mix asks for {', '.join(empty)} pairs but the data has none; set their share to 0")
        if config.negative and len(self._sources(shares)) < 2:
            raise ValueError("negative pairs need two videos or photos: set `negative` to 0 or add data")
        self._kinds = list(shares)
        self._choose_kind = Chooser(np.array(list(shares.values())))

    def draw(self, rng: Rng) -> Pair:
        """One random pair."""
        drawn = self._draw_kind(self._draw_kind_name(rng), rng)
        search, box, shown = drawn.search, drawn.box, {drawn.source}
        positive = rng.random() >= self.config.negative
        if not positive:
            foreign = self._draw_foreign(drawn.source, rng)
            search, box = foreign.search, foreign.box
            shown.add(foreign.source)
        if rng.random() < self.config.flip:
            search, box = np.ascontiguousarray(search[:, ::-1]), (self.search_px - box[0], *box[1:])
        if rng.random() < self.config.distractor:
            self._objects.add_distractors(search, box, shown, rng)
        if positive and rng.random() < self.config.occluder:
            self._objects.add_occluder(search, box, shown, rng)
        template, *further = drawn.templates
        crops = {"template": template, "search": search, **dict(zip(("history", "current"), further, strict=False))}
        effects: dict[str, Effects] = {}
        for name, image in crops.items():
            corrupts = name in ("history", "current")
            light = self.config.search_light if name == "search" else self.config.template_light
            if self.defer_effects:
                effects[name] = draw_effects(image.shape[0], corrupts, rng, light)
            else:
                lit = photometric(image, rng, light)
                crops[name] = corrupted(lit, rng) if corrupts else lit
        return Pair(**crops, box_cxcywh=np.array(box), size=drawn.size, positive=positive, effects=effects)

    def _draw_foreign(self, source: str, rng: Rng) -> Drawn:
        """What is drawn from another video or photo than `source`: the same one might show the target too."""
        while True:
            drawn = self._draw_kind(self._draw_kind_name(rng), rng)
            if drawn.source != source:
                return drawn

    def _sources(self, kinds: Collection[str]) -> set[str]:
        """Videos and photos that these kinds of pairs are drawn from."""
        sources = {
            "video": {tracks[0].video for tracks in self._videos},
            "still": {source_of(seen.image) for seen in self._stills},
            "cutout": self._objects.sources(),
            "region": {source_of(photo) for photo in self._photos},
        }
        return set().union(*(sources[kind] for kind in kinds))

    def _draw_kind_name(self, rng: Rng) -> str:
        return self._kinds[self._choose_kind.draw(rng)]

    def _draw_kind(self, kind: str, rng: Rng) -> Drawn:
        if kind == "cutout":
            return self._draw_cutout(rng)
        if kind == "video":
            tracks = self._videos[self._choose_video.draw(rng)]
            track = tracks[Chooser(np.array([len(t.sightings) for t in tracks], float)).draw(rng)]
            frames, config, source = np.asarray(track.frames), self.config, track.video
            if self.triplets:
                chosen: tuple[int, ...] = triplet_frames(frames, config.triplet_frames, rng)
            else:
                chosen = pair_frames(frames, track.frame_range or config.frame_range, rng)
            *shown, later = (track.sightings[i] for i in chosen)
        else:
            still = self._draw_still(rng) if kind == "still" else self._draw_region(rng)
            shown, later, source = [still] * (3 if self.triplets else 1), still, source_of(still.image)
        views = [self._view(seen, self.template_px, self.config.template, rng) for seen in shown]
        search, box = self._view(later, self.search_px, self.config.search, rng)
        if rng.random() < self.config.rotation:
            search, box = rotate(search, box, rng.uniform(-1, 1) * self.config.rotation_deg)
        return Drawn([view for view, _ in views], search, box, views[0][1][2:], source)

    def _view(self, seen: Sighting, size_px: int, jitter: Jitter, rng: Rng) -> tuple[Crop, CxCyWH]:
        image = self.images.bgr(seen.image)
        x, y, w, h = seen.box_xywh
        box = x + w / 2, y + h / 2, w, h
        window = jittered_window(box, self.template_px, size_px, jitter, rng)
        bx, by, bw, bh = window.to_crop(box, size_px).tolist()
        return crop(image, window, size_px, seen.fill_bgr or self.images.mean_bgr(seen.image)), (bx, by, bw, bh)

    def _draw_still(self, rng: Rng) -> Sighting:
        number = int(rng.integers(len(self._stills))) if self._choose_still is None else self._choose_still.draw(rng)
        still = self._stills[number]
        # The first test keeps the pairs of recipes without parts as they were.
        return part_of(still, rng) if self.config.part and rng.random() < self.config.part else still

    def _draw_region(self, rng: Rng) -> Sighting:
        """A random rectangle of a photo, as if it were a target."""
        path = self._photos[int(rng.integers(len(self._photos)))]
        height, width = self.images.bgr(path).shape[:2]
        side = min(height, width) * rng.uniform(0.12, 0.5)
        ratio = np.exp(rng.uniform(-0.6, 0.6))
        w, h = min(side * ratio, width * 0.9), min(side / ratio, height * 0.9)
        return Sighting(path, (rng.uniform(0, width - w), rng.uniform(0, height - h), w, h))

    def _draw_cutout(self, rng: Rng) -> Drawn:
        """One object on two backgrounds, on the scale tracking would show it at."""
        config = self.config
        cutout, source = self._objects.draw(rng)
        height, width = cutout.alpha.shape
        scale = self.template_px / context_size(width, height)
        background = self._objects.draw_background(self.search_px, rng)
        margin = (self.search_px - self.template_px) // 2
        same_place = rng.random() < 0.6
        behind = background if same_place else self._objects.draw_background(self.search_px, rng)
        middle = np.s_[margin : margin + self.template_px, margin : margin + self.template_px]
        templates, shown = [behind[middle].copy()], (width * scale, height * scale)
        if paste(templates[0], cutout, (self.template_px / 2,) * 2, shown, 0) is None:
            return self._draw_cutout(rng)
        if self.triplets:  # two more, on the background of the search crop, and a little off as while tracking
            for _ in range(2):
                further = background[middle].copy()
                grow = scale * np.exp(rng.uniform(-config.template.scale, config.template.scale))
                at = self.template_px / 2 + rng.uniform(-config.template.shift_px, config.template.shift_px, 2)
                paste(further, cutout, (at[0], at[1]), (width * grow, height * grow), 0)
                templates.append(further)
        grow = scale * np.exp(rng.uniform(-config.search.scale, config.search.scale))
        stretch = np.exp(rng.uniform(-config.search.stretch, config.search.stretch))
        size = (width * grow * stretch, height * grow / stretch)
        centre = self.search_px / 2 + rng.uniform(-config.search.shift_px, config.search.shift_px, 2)
        angle = rng.uniform(-1, 1) * config.rotation_deg if rng.random() < config.rotation else 0.0
        box = paste(background, cutout, (centre[0], centre[1]), size, angle)
        return Drawn(templates, background, box, shown, source) if box is not None else self._draw_cutout(rng)
