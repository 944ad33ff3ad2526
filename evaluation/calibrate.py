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
  the last make a loss, a third of a second at camera rate. The last is not above what 90 % of windows that show another
  target in its place stay under: few frames score so little while tracking, and those come from a handful of failures.
* ``found_above``: exceeded by 5 % of these windows, and not under ``tracking_above``.

Neither ``found_above`` nor the gap of 0.05 may ask for more than every tenth frame on the target has: otherwise, with a
score that is close to 1 for nearly everything, a target that was lost would stay lost.

At the end every clip is played once more with these thresholds and without help. What the states were worth is printed,
held against the goals (`TRACKING_HITS`, `MAX_LOST_HITS`) and kept with the thresholds. They were chosen on the same
clips: expect less on others.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.evidence import Evidence, closed_loop, collect, load_clips
from evaluation.metrics import HIT_IOU, STATES
from evaluation.plots import Line, reliability_plot
from siamtrack.bundle import Bundle, load_bundle, write_manifest
from siamtrack.state import Thresholds

TRACKING_HITS, CERTAIN_HITS, WEAK_HITS = 0.90, 0.75, 0.25
HYSTERESIS = 0.05
FALSE_FINDS = 0.05
ABSENT = 0.9  # share of the windows without the target that score below `lost_below` where this binds
REACHED = 0.1  # share of the frames on the target that `found_above` and the gap leave within reach
DIGITS = 4  # of a threshold: scores crowd near 1
MAX_LOST_HITS = 0.10  # a goal, as `TRACKING_HITS` is one
LOST_AFTER = 10
BINS = 10  # of the score, in table and plot


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
    """The command; returns its exit status: 0, 2 where bundle or data cannot be used, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.calibrate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", help="shipped model or bundle folder")
    parser.add_argument("--sequences", type=Path, required=True, help="folder of sequences not trained on")
    parser.add_argument(
        "--names",
        nargs="*",
        default=[],
        help="only these; @FILE for a list (default: those its training held out, or all)",
    )
    parser.add_argument("--scenes", type=int, default=3, help="rendered scenes to add (default 3)")
    parser.add_argument("--plot", type=_svg, metavar="FILE.svg", help="draw how far the score can be believed")
    parser.add_argument("--write", action="store_true", help="put the thresholds into the bundle's manifest")
    options = parser.parse_args(arguments)
    try:
        bundle = load_bundle(options.bundle)
        held_out = bundle.manifest.provenance.get("validation_videos", "").split()
        present = [name for name in held_out if (options.sequences / name).is_dir()]
        clips = load_clips(options.sequences, options.names or present, options.scenes)
        evidence = collect(bundle, clips)
        thresholds = choose_thresholds(evidence)
        print(report(evidence, thresholds))
        states = closed_loop(bundle, clips, thresholds)
        print(state_report(states))
        if options.plot:
            options.plot.parent.mkdir(parents=True, exist_ok=True)
            options.plot.write_text(plot(evidence, thresholds, bundle.path.resolve().name), encoding="utf-8")
            print(f"wrote {options.plot}")
        if options.write:
            write(bundle, thresholds, f"evaluation.calibrate on {', '.join(c.name for c in clips)}; {worth(states)}")
            print(f"wrote thresholds into {bundle.path}")
    except (OSError, ValueError, RuntimeError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("calibrate: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def write(bundle: Bundle, thresholds: Thresholds, calibration: str) -> None:
    """Put thresholds into a bundle's manifest, and how they were found.

    Raises:
        ValueError: the bundle is no longer the one that they were found for.
    """
    manifest = load_bundle(bundle.path).manifest  # anew: its accuracy may have been noted while this ran
    begun = bundle.manifest
    if (manifest.graphs, manifest.tracking, manifest.update) != (begun.graphs, begun.tracking, begun.update):
        raise ValueError(
            f"{bundle.path} has other graphs, tracking or update parameters than when this began; run it again"
        )
    score = dataclasses.replace(manifest.score, thresholds=thresholds, calibration=calibration)
    write_manifest(bundle.path, dataclasses.replace(manifest, score=score))


def choose_thresholds(evidence: Evidence) -> Thresholds:
    """Thresholds by the rules in this module's head, rounded down: a score at the threshold passes it."""
    scores, share = np.sort(evidence.scores), isotonic(_hits_by_score(evidence))

    def score_at(wanted: float) -> float:
        reached = np.flatnonzero(share >= wanted)
        return float(scores[reached[0]]) if reached.size else 1.0

    seen = evidence.scores[evidence.ious > HIT_IOU]
    reach = float(np.quantile(seen, 1 - REACHED)) if seen.size else 1.0
    lost_below = min(score_at(WEAK_HITS), float(np.quantile(evidence.absent, ABSENT)))
    uncertain_below = score_at(CERTAIN_HITS)
    tracking_above = max(score_at(TRACKING_HITS), min(uncertain_below + HYSTERESIS, reach))
    found_above = max(float(np.quantile(evidence.absent, 1 - FALSE_FINDS)), tracking_above)
    found_above = max(min(found_above, reach), lost_below)
    return Thresholds(
        tracking_above=_rounded_down(tracking_above),
        uncertain_below=_rounded_down(uncertain_below),
        lost_below=_rounded_down(lost_below),
        lost_after=LOST_AFTER,
        found_above=_rounded_down(found_above),
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


def report(evidence: Evidence, thresholds: Thresholds) -> str:
    """Reliability table and the thresholds as text."""
    bins = in_bins(evidence)
    lines = ["score      frames   IoU>0.3   windows without the target"]
    for index in range(BINS):
        share = f"{bins.hits[index]:.2f}" if bins.frames[index] else "-"
        scores = f"{index / BINS:.1f}-{(index + 1) / BINS:.1f}"
        lines.append(f"{scores}{bins.frames[index]:>10}{share:>10}{bins.absent[index]:>15.3f}")
    values = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(thresholds).items())
    seen = evidence.scores[evidence.ious > HIT_IOU]
    found = _share(np.mean(seen >= thresholds.found_above)) if seen.size else "-"
    falsely = _share(np.mean(evidence.absent >= thresholds.found_above))
    reached = f"found_above is reached by {found} of frames on the target, by {falsely} of windows without it"
    return "\n".join([*lines, values, reached])


def state_report(row: Mapping[str, float]) -> str:
    """Table of what `closed_loop` found, as text."""
    lines = [
        f"state      of frames   IoU>0.3   one pass with these thresholds, {row['frames']:g} frames, mean over clips"
    ]
    for state in STATES:
        share, hit = row[f"share_{state.lower()}"], row[f"hit_{state.lower()}"]
        lines.append(f"{state:<10}{share:>10.2f}{_share(hit):>10}")
    if not row["hit_tracking"] >= TRACKING_HITS:
        lines.append(f"goal missed: TRACKING does not mean the target in {TRACKING_HITS:.0%} of its frames")
    if row["hit_lost"] > MAX_LOST_HITS:
        lines.append(f"goal missed: LOST means the target in more than {MAX_LOST_HITS:.0%} of its frames")
    return "\n".join(lines)


def worth(row: Mapping[str, float]) -> str:
    """What `closed_loop` found of TRACKING and LOST, in a few words for the manifest."""
    return f"on the target in {_share(row['hit_tracking'])} of TRACKING, {_share(row['hit_lost'])} of LOST"


def plot(evidence: Evidence, thresholds: Thresholds, name: str) -> str:
    """`evaluation.plots.reliability_plot` of a model called `name`, with the fit that the thresholds were cut from."""
    bins = in_bins(evidence)
    scores, share = np.sort(evidence.scores), isotonic(_hits_by_score(evidence))
    ends = np.flatnonzero(np.diff(share, prepend=-1.0) + np.diff(share, append=2.0))  # of each level part
    fit = Line("monotone fit", scores[ends], share[ends])
    marks = {f"{key} {value}": value for key, value in dataclasses.asdict(thresholds).items() if key != "lost_after"}
    return reliability_plot(bins.frames, bins.hits, bins.absent, fit, marks, f"What the score of {name} is worth")


def _rounded_down(threshold: float) -> float:
    return math.floor(round(threshold * 10**DIGITS, 6)) / 10**DIGITS


def _share(value: float | np.floating) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _hits_by_score(evidence: Evidence) -> NDArray[np.bool_]:
    return evidence.ious[np.argsort(evidence.scores, kind="stable")] > HIT_IOU


def _svg(text: str) -> Path:
    if not text.lower().endswith(".svg"):
        raise argparse.ArgumentTypeError(f"the plot is drawn as SVG; expected a name that ends in .svg, got {text!r}")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
