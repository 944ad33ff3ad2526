"""What a calibration goes by: scores of tracked frames with their IoU, and scores where the target is not.

Frames are tracked without thresholds, which are yet to be chosen: all count as TRACKING, so sizes follow at full rate
and no second look is taken (both have their part in `closed_loop`), and a template is renewed by its score alone.
Targets are sought elsewhere with the template of their first frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from evaluation.layouts import find_sequences
from evaluation.metrics import HIT_IOU, mean_row, state_statistics
from evaluation.ope import choose
from evaluation.sequences import read_frame
from siamtrack.boxes import iou_xywh, xywh_to_cxcywh
from siamtrack.bundle import Bundle
from siamtrack.crop import Image, context_size, mean_bgr, square_window
from siamtrack.runners import Features, Runner, open_runner
from siamtrack.scene import Scene
from siamtrack.state import Thresholds
from siamtrack.tracker import SiamTracker, Track

RESTART_AFTER = 10  # frames in a row off the target
HIDDEN_BELOW = 0.1  # a rendered target of which less is visible counts as absent
FOREIGN_STRIDE = 5  # every so manyth frame of another clip is searched for an absent target
NEVER_LOST = Thresholds(tracking_above=0, uncertain_below=0, lost_below=0, lost_after=1, found_above=0)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Clip:
    """Frames with their truth; None where the target is absent, hidden or unlabelled."""

    name: str
    frames: tuple[Path, ...] | Scene
    truth: tuple[Box | None, ...]

    def images(self) -> Iterator[Image]:
        """Decoded or rendered frames in order."""
        if isinstance(self.frames, Scene):
            yield from (frame.image for frame in self.frames)
        else:
            yield from (read_frame(path) for path in self.frames)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Scores and what they were worth.

    Attributes:
        scores: ``[F]`` of tracked frames.
        ious: ``[F]`` of these frames' boxes; 0 where the target was absent.
        absent: ``[M]`` best scores of windows that do not show the target.
    """

    scores: NDArray[np.float64]
    ious: NDArray[np.float64]
    absent: NDArray[np.float64]


def load_clips(folder: Path, names: Sequence[str], scenes: int) -> list[Clip]:
    """Sequences of a folder (all, or those named; ``@FILE`` for a list) and the first rendered scenes.

    Raises:
        OSError: the folder, a file of names or a part of a sequence is missing.
        ValueError: a name is not there, a sequence cannot be read, or fewer than two clips.
    """
    clips = []
    for sequence in (ref.load() for ref in choose(find_sequences(folder), names)):
        known = sequence.scorable
        known[sequence.start] = True  # given to the tracker, be it hidden or not
        rows = zip(sequence.truth_xywh.tolist(), known, strict=True)
        truth = tuple(_box(row) if is_known else None for row, is_known in rows)
        clips.append(Clip(sequence.name, sequence.frames[sequence.start :], truth[sequence.start :]))
    for seed in range(1, scenes + 1):
        scene = Scene(640, 360, frames=300, seed=seed)
        truth = tuple(f.box_xywh if f.visible >= HIDDEN_BELOW else None for f in scene)
        clips.append(Clip(f"scene {seed}", scene, truth))
    if len(clips) < 2:
        raise ValueError("calibration needs at least two clips: each target is also sought in the others")
    return clips


def collect(bundle: Bundle, clips: Sequence[Clip]) -> Evidence:
    """Track every clip, and seek every target in the other clips.

    Raises:
        ValueError: an image or a box of a clip cannot be used.
    """
    spec = bundle.manifest.crop
    scores: list[float] = []
    ious: list[float] = []
    absent: list[float] = []
    with _runner(bundle, NEVER_LOST) as runner:
        tracker = SiamTracker(runner)
        targets: dict[str, Features] = {}
        rendered = {clip.name for clip in clips if isinstance(clip.frames, Scene)}
        for clip in clips:
            with _naming(clip):
                first = next(clip.images())
                cx, cy, w, h = xywh_to_cxcywh(clip.truth[0]).tolist()  # type: ignore[arg-type]
                window = square_window(cx, cy, context_size(w, h, spec.context))
                targets[clip.name] = runner.template(first, window, mean_bgr(first), (w, h))
        for clip in tqdm(clips, unit="clip", disable=None):
            # The rendered scenes share their look of cars: another scene's target is not foreign enough.
            foreign = [
                features
                for other, features in targets.items()
                if other != clip.name and not (other in rendered and clip.name in rendered)
            ]
            with _naming(clip):
                for index, image, truth, track in _restarted(tracker, clip):
                    if _scored(clip, truth):
                        scores.append(track.score)
                        ious.append(_iou(track.box_xywh, truth))
                    if truth is not None and index % FOREIGN_STRIDE == 0:
                        absent.extend(_sought(runner, image, truth, foreign))
    return Evidence(np.array(scores), np.array(ious), np.array(absent))


def closed_loop(bundle: Bundle, clips: Sequence[Clip], thresholds: Thresholds) -> dict[str, float]:
    """What the states are worth in one pass over each clip, as mean over the clips.

    Returns:
        ``frames`` (scored ones), and the columns of `evaluation.metrics.state_statistics`.

    Raises:
        ValueError: an image or a box of a clip cannot be used.
    """
    rows = []
    with _runner(bundle, thresholds) as runner:
        tracker = SiamTracker(runner)
        for clip in tqdm(clips, unit="clip", disable=None):
            states: list[str] = []
            ious: list[float] = []
            with _naming(clip):
                for index, (image, truth) in enumerate(zip(clip.images(), clip.truth, strict=True)):
                    if index == 0:
                        assert truth is not None  # a clip starts with a box
                        tracker.init(image, truth)
                        continue
                    track = tracker.update(image)
                    if _scored(clip, truth):
                        states.append(track.state.name)
                        ious.append(_iou(track.box_xywh, truth))
            rows.append({"frames": len(ious), **state_statistics(states, ious)})
    return mean_row(rows)


def _restarted(tracker: SiamTracker, clip: Clip) -> Iterator[tuple[int, Image, Box | None, Track]]:
    """Index, image, truth and track of every frame that the tracker was not started on.

    After `RESTART_AFTER` frames off the target it starts anew.
    """
    off = RESTART_AFTER  # the first frame is a start like any other
    for index, image in enumerate(clip.images()):
        truth = clip.truth[index]
        if off >= RESTART_AFTER and truth is not None:
            tracker.init(image, truth)
            off = 0
            continue
        track = tracker.update(image)
        if truth is not None:
            off = off + 1 if iou_xywh(track.box_xywh, truth) <= HIT_IOU else 0
        yield index, image, truth, track


def _sought(runner: Runner, image: Image, place: Box, targets: Sequence[Features]) -> list[float]:
    """Scores of targets sought where another one is."""
    spec, penalty_k = runner.bundle.manifest.crop, runner.bundle.manifest.tracking.penalty_k
    cx, cy, w, h = xywh_to_cxcywh(place).tolist()
    window = square_window(cx, cy, context_size(w, h, spec.context) * spec.search_px / spec.template_px)
    size = np.array([w, h], np.float32) * spec.search_px / window.width
    result = runner.search(image, [window] * len(targets), targets, np.stack([size] * len(targets)), (penalty_k, 0, 0))
    return [float(score) for score in result.score]


@contextmanager
def _naming(clip: Clip) -> Iterator[None]:
    """Say of an unusable image or box which clip it is of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{clip.name}: {error}") from error


def _box(row: Sequence[float]) -> Box:
    x, y, w, h = row
    return x, y, w, h


def _runner(bundle: Bundle, thresholds: Thresholds) -> Runner:
    """Of the bundle with other thresholds, in its own precision: they must not depend on what this CPU is fast at."""
    score = dataclasses.replace(bundle.manifest.score, thresholds=thresholds)
    changed = Bundle(bundle.path, dataclasses.replace(bundle.manifest, score=score))
    return open_runner(changed, precision=bundle.manifest.precision)


def _scored(clip: Clip, truth: Box | None) -> bool:
    """In a real sequence a frame without truth may be unlabelled; in a rendered one the target is hidden."""
    return truth is not None or isinstance(clip.frames, Scene)


def _iou(box_xywh: Box, truth: Box | None) -> float:
    return float(iou_xywh(box_xywh, truth)) if truth is not None else 0.0
