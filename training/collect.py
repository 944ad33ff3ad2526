"""All data that a recipe names, as tracks: from the data sets themselves, or from shards made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from siamtrack.sources import list_images
from training.data import read_coco, read_stills, read_video
from training.layouts import LAYOUTS
from training.left_out import LeftOut
from training.recipe import DataConfig, DataSet, Recipe
from training.shards import reach_needed, read_shards
from training.tracks import ImageRef, Track, usable


@dataclass(frozen=True)
class Collected:
    """The data of a run.

    Attributes:
        videos: tracks to train on.
        validation: tracks of the held-out videos.
        stills: tracks of one sighting.
        photos: images without annotations.
    """

    videos: list[Track]
    validation: list[Track]
    stills: list[Track]
    photos: list[ImageRef]


def collect(recipe: Recipe, root: Path, template_px: int, search_px: int) -> Collected:
    """Read the annotations of all data that a recipe names.

    Args:
        recipe: its `data` says what, from where, and what is held out.
        root: folder that its paths are relative to.
        template_px: template crop side; with `search_px` it says how much shards must show around a target.
        search_px: search crop side.

    Raises:
        ValueError: something is not there or not readable, two videos have one name, a held-out video is missing, or
            the shards do not show enough around their targets.
    """
    data = recipe.data
    if data.shards:
        needed = reach_needed(data.pairs.template, data.pairs.search, template_px, search_px)
        videos, stills, photos = read_shards(root / data.shards, needed)
    else:
        videos, stills, photos = collect_raw(data, root)
    held_out = set(data.validation_videos)
    absent = held_out - {track.video for track in videos}
    if absent:
        raise ValueError(f"validation videos not found: {', '.join(sorted(absent))}")
    training = [track for track in videos if track.video not in held_out]
    return Collected(training, [track for track in videos if track.video in held_out], stills, photos)


def collect_raw(data: DataConfig, root: Path) -> tuple[list[Track], list[Track], list[ImageRef]]:
    """Videos, stills and photos from the data sets themselves. Raises as `collect`."""
    videos = usable(t for folder in _children(data.videos, root) for t in read_video(folder))
    stills: list[Track] = []
    for name in data.stills:
        left_out = LeftOut()
        stills += read_stills(root / name, left_out)
        left_out.warn(root / name)
    for instances, folder in data.coco.items():
        left_out = LeftOut()
        stills += read_coco(root / instances, root / folder, left_out)
        left_out.warn(root / instances)
    stills = usable(stills)
    shared = {
        True: bool(data.videos) or any(not s.share for s in data.sets if LAYOUTS[s.layout].videos),
        False: bool(data.stills or data.coco) or any(not s.share for s in data.sets if not LAYOUTS[s.layout].videos),
    }
    for data_set in data.sets:
        gives_videos = LAYOUTS[data_set.layout].videos
        if data_set.share and shared[gives_videos]:
            kind = "videos" if gives_videos else "stills"
            raise ValueError(
                f"{data_set.path} has a share, other {kind} have none: name all under `sets`, with a share each"
            )
        (videos if gives_videos else stills).extend(read_set(data_set, root))
    _check_names(videos)
    return videos, stills, [photo for name in data.photos for photo in list_images(root / name)]


def read_set(data_set: DataSet, root: Path) -> list[Track]:
    """One data set, with its frame range and weight; says in one warning how many annotations are of no use.

    Raises:
        ValueError: there is nothing at its path, or nothing usable.
    """
    layout = LAYOUTS[data_set.layout]
    path, left_out = root / data_set.path, LeftOut()
    if not path.exists():
        raise ValueError(f"no data set at {path}; check --data and the path of the {data_set.layout} set in the recipe")
    tracks = usable(layout.read(path, root / data_set.images if data_set.images else path, left_out))
    left_out.warn(path)
    if not tracks:
        raise ValueError(f"no usable target in {path}: a {data_set.layout} set looks like {layout.looks_like}")
    frame_range = data_set.frame_range or layout.frame_range
    tracks = [replace(track, frame_range=frame_range) for track in tracks] if frame_range else tracks
    return weighted(tracks, data_set.share, layout.videos) if data_set.share else tracks


def weighted(tracks: list[Track], share: float, videos: bool) -> list[Track]:
    """Tracks whose drawing weights sum to `share`; among them, videos count by the root of their length."""
    frames: dict[str, int] = defaultdict(int)
    for track in tracks:
        frames[track.video] += len(track.sightings)
    total = float(np.sqrt(list(frames.values())).sum()) if videos else len(tracks)
    return [replace(track, weight=share / total) for track in tracks]


def _check_names(tracks: Iterable[Track]) -> None:
    """Refuse two videos of one name: a pair of both would not count as foreign, and held out, it means both."""
    folders: dict[str, set[str]] = defaultdict(set)
    for track in tracks:
        image = track.sightings[0].image
        folders[track.video].add(str(image.parent) if isinstance(image, Path) else "")
    twice = [name for name, places in folders.items() if len(places) > 1]
    if twice:
        places = ", ".join(sorted(folders[twice[0]]))
        raise ValueError(f"{len(twice)} names are those of two videos, such as {twice[0]}: {places}; rename one folder")


def _children(names: tuple[str, ...], root: Path) -> list[Path]:
    folders = []
    for name in names:
        if not (root / name).is_dir():
            raise ValueError(f"no folder of videos at {root / name}; check --data")
        folders += sorted(p for p in (root / name).iterdir() if p.is_dir())
    return folders
