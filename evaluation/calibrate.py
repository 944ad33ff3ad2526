"""Cut the score into states: choose a bundle's thresholds from sequences it was not trained on.

    python -m evaluation.calibrate BUNDLE --sequences DIR [--names a b] --write

Every clip is tracked with a state machine that never gives up, so that scores come with the IoU they were worth. After
ten frames off the target the tracker is started anew on the truth (VOT's supervised protocol): else one early failure
would fill the evidence with a tracker at home on something else. A monotone fit (isotonic regression) turns scores into
the share of frames on the target (IoU > 0.3) at each score. Then each target is sought in the *other* clips, at the
place of their own targets: what it scores there is what a tracker sees when its target is gone and something else is in
view. From both come the thresholds:

* ``tracking_above``, ``uncertain_below``, ``lost_below``: the scores at which 90 %, 75 % and 25 % of frames are on the
  target; the first lies at least 0.05 over the second, so that the state does not flicker. Ten frames in a row under
  the last make a loss, a third of a second at camera rate.
* ``found_above``: exceeded by 5 % of windows that show another target in its place, and never under ``tracking_above``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from evaluation.sequences import read_frame, read_sequences
from siamtrack.boxes import iou_xywh, xywh_to_cxcywh
from siamtrack.bundle import Bundle, load_bundle, write_manifest
from siamtrack.crop import Image, context_size, mean_bgr, square_window
from siamtrack.runners import Features, open_runner
from siamtrack.scene import Scene
from siamtrack.state import Thresholds
from siamtrack.tracker import SiamTracker

HIT_IOU = 0.3
TRACKING_HITS, CERTAIN_HITS, WEAK_HITS = 0.90, 0.75, 0.25
HYSTERESIS = 0.05
RESTART_AFTER = 10  # frames in a row off the target
FALSE_FINDS = 0.05
LOST_AFTER = 10
NEVER_LOST = Thresholds(tracking_above=0, uncertain_below=0, lost_below=0, lost_after=1, found_above=0)
HIDDEN_BELOW = 0.1  # a rendered target of which less is visible counts as absent
FOREIGN_STRIDE = 5  # every so manyth frame of another clip is searched for an absent target

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Clip:
    """Frames with their truth; None where the target is absent or unlabelled."""

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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 where bundle or data cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.calibrate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--sequences", type=Path, required=True, help="folder of sequences not trained on")
    parser.add_argument("--names", nargs="*", help="use only these (default: those its training held out, or all)")
    parser.add_argument("--scenes", type=int, default=3, help="rendered scenes to add (default 3)")
    parser.add_argument("--write", action="store_true", help="put the thresholds into the bundle's manifest")
    options = parser.parse_args(arguments)
    try:
        bundle = load_bundle(options.bundle)
        held_out = bundle.manifest.provenance.get("validation_videos", "").split()
        present = [name for name in held_out if (options.sequences / name).is_dir()]
        clips = load_clips(options.sequences, options.names or present, options.scenes)
    except (ValueError, OSError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2
    evidence = collect(bundle, clips)
    thresholds = choose_thresholds(evidence)
    print(report(evidence, thresholds))
    if options.write:
        how = f"evaluation.calibrate on {', '.join(c.name for c in clips)}"
        score = dataclasses.replace(bundle.manifest.score, thresholds=thresholds, calibration=how)
        write_manifest(bundle.path, dataclasses.replace(bundle.manifest, score=score))
        print(f"wrote thresholds into {bundle.path}")
    return 0


def load_clips(folder: Path, names: Sequence[str] | None, scenes: int) -> list[Clip]:
    """Sequences of a folder (all, or those named) and the first rendered scenes.

    Raises:
        ValueError: a name is not there, or fewer than two clips.
    """
    sequences = [s for s in read_sequences(folder) if not names or s.name in names]
    absent = set(names or ()) - {s.name for s in sequences}
    if absent:
        raise ValueError(f"{folder} has no sequence {', '.join(sorted(absent))}")
    clips = []
    for sequence in sequences:
        rows = zip(sequence.truth_xywh.tolist(), sequence.has_truth, strict=True)
        truth = tuple(_box(row) if known else None for row, known in rows)
        clips.append(Clip(sequence.name, sequence.frames[sequence.start :], truth[sequence.start :]))
    for seed in range(1, scenes + 1):
        scene = Scene(640, 360, frames=300, seed=seed)
        truth = tuple(f.box_xywh if f.visible >= HIDDEN_BELOW else None for f in scene)
        clips.append(Clip(f"scene {seed}", scene, truth))
    if len(clips) < 2:
        raise ValueError("calibration needs at least two clips: each target is also sought in the others")
    return clips


def collect(bundle: Bundle, clips: Sequence[Clip]) -> Evidence:
    """Track every clip, and seek every target in the other clips."""
    score = dataclasses.replace(bundle.manifest.score, thresholds=NEVER_LOST)
    patient = Bundle(bundle.path, dataclasses.replace(bundle.manifest, score=score))
    spec = bundle.manifest.crop
    scores: list[float] = []
    ious: list[float] = []
    absent: list[float] = []
    with open_runner(patient) as runner:
        tracker = SiamTracker(runner)
        targets: dict[str, Features] = {}
        rendered = {clip.name for clip in clips if isinstance(clip.frames, Scene)}
        for clip in clips:
            first = next(clip.images())
            cx, cy, w, h = xywh_to_cxcywh(clip.truth[0]).tolist()  # type: ignore[arg-type]
            window = square_window(cx, cy, context_size(w, h, spec.context))
            targets[clip.name] = runner.template(first, window, mean_bgr(first))
        for clip in tqdm(clips, unit="clip", disable=None):
            # The rendered scenes share their look of cars: another scene's target is not foreign enough.
            foreign = [
                features
                for other, features in targets.items()
                if other != clip.name and not (other in rendered and clip.name in rendered)
            ]
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
                # In a real sequence a frame without truth may be unlabelled; in a rendered one the target is hidden.
                if truth is not None or isinstance(clip.frames, Scene):
                    scores.append(track.score)
                    ious.append(float(iou_xywh(track.box_xywh, truth)) if truth is not None else 0.0)
                if truth is not None and index % FOREIGN_STRIDE == 0:
                    cx, cy, w, h = xywh_to_cxcywh(truth).tolist()
                    window = square_window(cx, cy, context_size(w, h, spec.context) * spec.search_px / spec.template_px)
                    size = np.array([[w, h]], np.float32) * spec.search_px / window.width
                    result = runner.search(
                        image,
                        [window] * len(foreign),
                        foreign,
                        np.repeat(size, len(foreign), axis=0),
                        (bundle.manifest.tracking.penalty_k, 0.0, 0.0),
                    )
                    absent.extend(result.score.tolist())
    return Evidence(np.array(scores), np.array(ious), np.array(absent))


def choose_thresholds(evidence: Evidence) -> Thresholds:
    """Thresholds by the rules in this module's head, rounded to two digits."""
    order = np.argsort(evidence.scores, kind="stable")
    scores, share = evidence.scores[order], isotonic(evidence.ious[order] > HIT_IOU)

    def score_at(wanted: float) -> float:
        reached = np.flatnonzero(share >= wanted)
        return float(scores[reached[0]]) if reached.size else 1.0

    uncertain_below = score_at(CERTAIN_HITS)
    tracking_above = min(max(score_at(TRACKING_HITS), uncertain_below + HYSTERESIS), 1.0)
    found_above = max(float(np.quantile(evidence.absent, 1 - FALSE_FINDS)), tracking_above)
    return Thresholds(
        tracking_above=round(tracking_above, 2),
        uncertain_below=round(uncertain_below, 2),
        lost_below=round(score_at(WEAK_HITS), 2),
        lost_after=LOST_AFTER,
        found_above=round(found_above, 2),
    )


def isotonic(values: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The never-falling sequence nearest to `values` in squares, by pooling adjacent violators."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.astype(float):
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            count = counts[-2] + counts[-1]
            means[-2:] = [(means[-2] * counts[-2] + means[-1] * counts[-1]) / count]
            counts[-2:] = [count]
    return np.repeat(np.array(means), counts)


def report(evidence: Evidence, thresholds: Thresholds) -> str:
    """Reliability table and the thresholds as text."""
    lines = ["score      frames   IoU>0.3   windows without the target"]
    for low in np.arange(10) / 10:
        inside = (evidence.scores >= low) & (evidence.scores < low + 0.1 + 1e-9)
        share = f"{np.mean(evidence.ious[inside] > HIT_IOU):.2f}" if inside.any() else "-"
        empty = np.mean((evidence.absent >= low) & (evidence.absent < low + 0.1 + 1e-9))
        lines.append(f"{low:.1f}-{low + 0.1:.1f}{inside.sum():>10}{share:>10}{empty:>15.3f}")
    values = ", ".join(f"{f.name} {getattr(thresholds, f.name)}" for f in dataclasses.fields(thresholds))
    return "\n".join([*lines, values])


def _box(row: Sequence[float]) -> Box:
    x, y, w, h = row
    return x, y, w, h


if __name__ == "__main__":
    sys.exit(main())
