"""Cut the score into states: choose a bundle's thresholds from sequences it was not trained on.

    python -m evaluation.calibrate BUNDLE --sequences DIR [--names a b] [--plot FILE.svg] --write

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

At the end every clip is played once more with these thresholds and without help, and what the states were worth is
printed. The thresholds were chosen on the same clips: expect less on others.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from evaluation.layouts import read_sequences
from evaluation.metrics import HIT_IOU, STATES, mean_row, state_statistics
from evaluation.plots import Line, reliability_plot
from evaluation.sequences import read_frame
from siamtrack.boxes import iou_xywh, xywh_to_cxcywh
from siamtrack.bundle import Bundle, load_bundle, write_manifest
from siamtrack.crop import Image, context_size, mean_bgr, square_window
from siamtrack.runners import Features, Runner, open_runner
from siamtrack.scene import Scene
from siamtrack.state import Thresholds
from siamtrack.tracker import SiamTracker

TRACKING_HITS, CERTAIN_HITS, WEAK_HITS = 0.90, 0.75, 0.25
HYSTERESIS = 0.05
RESTART_AFTER = 10  # frames in a row off the target
FALSE_FINDS = 0.05
LOST_AFTER = 10
NEVER_LOST = Thresholds(tracking_above=0, uncertain_below=0, lost_below=0, lost_after=1, found_above=0)
BINS = 10  # of the score, in table and plot
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


@dataclass(frozen=True, eq=False)
class Bins:
    """Evidence in `BINS` equal ranges of the score; a score of 1 belongs to the last.

    Attributes:
        frames: ``[BINS]`` tracked frames.
        hits: ``[BINS]`` share of these on the target; NaN where there is no frame.
        absent: ``[BINS]`` share of all windows without the target.
    """

    frames: NDArray[np.int64]
    hits: NDArray[np.float64]
    absent: NDArray[np.float64]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 where bundle or data cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.calibrate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", help="shipped model or bundle folder")
    parser.add_argument("--sequences", type=Path, required=True, help="folder of sequences not trained on")
    parser.add_argument("--names", nargs="*", help="use only these (default: those its training held out, or all)")
    parser.add_argument("--scenes", type=int, default=3, help="rendered scenes to add (default 3)")
    parser.add_argument("--plot", type=_svg, metavar="FILE.svg", help="draw how far the score can be believed")
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
    print(state_report(closed_loop(bundle, clips, thresholds)))
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(plot(evidence, thresholds, bundle.path.resolve().name), encoding="utf-8")
        print(f"wrote {options.plot}")
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
    spec = bundle.manifest.crop
    scores: list[float] = []
    ious: list[float] = []
    absent: list[float] = []
    with _runner(bundle, NEVER_LOST) as runner:
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
                if _scored(clip, truth):
                    scores.append(track.score)
                    ious.append(_iou(track.box_xywh, truth))
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
    scores, share = np.sort(evidence.scores), isotonic(_hits_by_score(evidence))

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


def in_bins(evidence: Evidence) -> Bins:
    """Count the evidence by score."""

    def counts(scores: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.bincount(np.clip(scores * BINS, 0, BINS - 1).astype(int), minlength=BINS)

    frames, hits = counts(evidence.scores), counts(evidence.scores[evidence.ious > HIT_IOU])
    shares = np.divide(hits, frames, out=np.full(BINS, np.nan), where=frames > 0)
    return Bins(frames, shares, counts(evidence.absent) / max(evidence.absent.size, 1))


def closed_loop(bundle: Bundle, clips: Sequence[Clip], thresholds: Thresholds) -> dict[str, float]:
    """What the states are worth in one pass over each clip, as mean over the clips.

    Returns:
        ``frames`` (scored ones), and the columns of `evaluation.metrics.state_statistics`.
    """
    rows = []
    with _runner(bundle, thresholds) as runner:
        tracker = SiamTracker(runner)
        for clip in tqdm(clips, unit="clip", disable=None):
            states: list[str] = []
            ious: list[float] = []
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


def report(evidence: Evidence, thresholds: Thresholds) -> str:
    """Reliability table and the thresholds as text."""
    bins = in_bins(evidence)
    lines = ["score      frames   IoU>0.3   windows without the target"]
    for index in range(BINS):
        share = f"{bins.hits[index]:.2f}" if bins.frames[index] else "-"
        scores = f"{index / BINS:.1f}-{(index + 1) / BINS:.1f}"
        lines.append(f"{scores}{bins.frames[index]:>10}{share:>10}{bins.absent[index]:>15.3f}")
    values = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(thresholds).items())
    return "\n".join([*lines, values])


def state_report(row: Mapping[str, float]) -> str:
    """Table of what `closed_loop` found, as text."""
    lines = [
        f"state      of frames   IoU>0.3   one pass with these thresholds, {row['frames']:g} frames, mean over clips"
    ]
    for state in STATES:
        share, hit = row[f"share_{state.lower()}"], row[f"hit_{state.lower()}"]
        lines.append(f"{state:<10}{share:>10.2f}{'-' if np.isnan(hit) else f'{hit:.2f}':>10}")
    return "\n".join(lines)


def plot(evidence: Evidence, thresholds: Thresholds, name: str) -> str:
    """`evaluation.plots.reliability_plot` of a model called `name`, with the fit that the thresholds were cut from."""
    bins = in_bins(evidence)
    scores, share = np.sort(evidence.scores), isotonic(_hits_by_score(evidence))
    ends = np.flatnonzero(np.diff(share, prepend=-1.0) + np.diff(share, append=2.0))  # of each level part
    fit = Line("monotone fit", scores[ends], share[ends])
    marks = {f"{key} {value}": value for key, value in dataclasses.asdict(thresholds).items() if key != "lost_after"}
    return reliability_plot(bins.frames, bins.hits, bins.absent, fit, marks, f"What the score of {name} is worth")


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


def _hits_by_score(evidence: Evidence) -> NDArray[np.bool_]:
    return evidence.ious[np.argsort(evidence.scores, kind="stable")] > HIT_IOU


def _svg(text: str) -> Path:
    if not text.lower().endswith(".svg"):
        raise argparse.ArgumentTypeError(f"the plot is drawn as SVG; expected a name that ends in .svg, got {text!r}")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
