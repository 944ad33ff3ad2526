"""Choose a bundle's tracking parameters: those that do well in their neighbourhood, not the luckiest ones.

    python -m evaluation.tune BUNDLE --sequences DIR [--validation DIR] [--trials 60] [--study FILE.db] [--write]

A trial is one pass over every sequence with other values of `penalty_k`, `window_influence`, `size_rate` and
`motion_rate`. Its objective is the mean success AUC of the sequences. The first trial has the manifest's present
values, the others come from Optuna's TPE sampler, which never sees the validation sequences: they are tracked in every
trial, and reported. State thresholds stay as they are: `evaluation.calibrate` chooses them, before, since sizes follow
more slowly while UNCERTAIN (`uncertain_rate`), and anew afterwards.

The best single trial is mostly a lucky one, in which the box happens to stay on a target that it loses with values next
to them. So:

1. Every trial gets the mean objective of its neighbourhood: itself and the trials nearest to it, sqrt(trials) in all
   and at least 3. Distance is Euclidean, with the range of each parameter (`RANGES`) as its unit.
2. Of the trials whose own objective is not below that of the present values, the one with the best neighbourhood is
   chosen, of equal ones the best itself; the present values stay where no neighbourhood is better than theirs.
3. Where its mean AUC on the validation sequences is more than `MARGIN` below that of the present values, the choice is
   refused and the present values stay. The next best is not tried: that would be choosing on the validation set.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from evaluation.layouts import SequenceRef, find_sequences
from evaluation.ope import choose as choose_named
from evaluation.replay import Play, players, scorable
from evaluation.trackers import TrackerSpec
from siamtrack.bundle import Bundle, TrackingSpec, load_bundle, write_manifest

# Published settings of Siamese trackers lie well inside: penalty_k 0 to 0.24, window_influence 0.1 to 0.5, size_rate
# (their lr) 0.25 to 0.5. Their motion_rate is 0: they search where the target was.
RANGES = {
    "penalty_k": (0.0, 0.4),
    "window_influence": (0.0, 0.7),
    "size_rate": (0.1, 0.8),
    "motion_rate": (0.0, 1.0),
}
DIGITS = 3  # of a parameter, behind the point
NEIGHBOURS = 3  # at least, the trial itself among them
MARGIN = 0.01  # success AUC that the choice may lose on the validation sequences
STUDY = "tracking parameters"


@dataclass(frozen=True)
class Trial:
    """Values and what they were worth.

    Attributes:
        values: of the parameters in `RANGES`.
        sequences: success AUC by sequence; their mean is the objective.
        validation: success AUC by validation sequence; empty without such a set.
    """

    values: Mapping[str, float]
    sequences: Mapping[str, float]
    validation: Mapping[str, float]

    @property
    def objective(self) -> float:
        """Mean success AUC of the sequences."""
        return _mean(self.sequences)

    @property
    def check(self) -> float:
        """Mean success AUC of the validation sequences; NaN without any."""
        return _mean(self.validation)


@dataclass(frozen=True, eq=False)
class Choice:
    """Which of T trials to take.

    Attributes:
        best: index of the trial with the best neighbourhood; that of the present values where none is better.
        refused: whether the validation sequences speak against it.
        neighbourhoods: ``[T]`` mean objectives of the neighbourhoods.
    """

    best: int
    refused: bool
    neighbourhoods: NDArray[np.float64]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 2 unusable input, 130 stopped by Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        bundle = load_bundle(options.bundle)
        refs, checks = find_sets(bundle, options)
        sequences = [scorable(ref) for ref in (*refs, *checks)]
        study = open_study(options.study, study_facts(options.bundle, refs, checks, options.seed))
        names = [ref.name for ref in refs], [ref.name for ref in checks]
        with players(bundle.path, sequences, options.processes, options.memory * 2**30) as play:
            trials = run_trials(study, bundle.manifest.tracking, options.trials, options.seed, play, *names)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "the same command goes on after the last whole trial" if options.study else "--study keeps the trials"
        print(f"tune: stopped; {again}", file=sys.stderr)
        return 130
    present = [trial.values for trial in trials].index(tuned_values(bundle.manifest.tracking))
    choice = choose(
        np.array([[trial.values[name] for name in RANGES] for trial in trials]),
        np.array([trial.objective for trial in trials]),
        np.array([trial.check for trial in trials]),
        present,
    )
    print(report(trials, present, choice))
    if choice.best == present or choice.refused:
        return 0
    if options.write:
        write(bundle.path, trials, present, choice.best, options.seed)
        print(
            f"wrote them into {bundle.path}; its thresholds and its recorded accuracy are those of the old values: "
            "run evaluation.calibrate and benchmarks.accuracy again"
        )
    else:
        print("--write puts them into the manifest")
    return 0


def find_sets(bundle: Bundle, options: argparse.Namespace) -> tuple[list[SequenceRef], list[SequenceRef]]:
    """The sequences to choose on and those to check the choice with.

    Raises:
        OSError: a folder is missing or holds no sequence.
        ValueError: a name is not there, a sequence is in both sets, or nothing says which to check with.
    """
    refs = choose_named(find_sequences(options.sequences.resolve()), options.names)
    if options.validation is None:
        if options.validation_names:
            raise ValueError("--validation-names without --validation; give the folder these sequences are in")
        return refs, []
    held_out = bundle.manifest.provenance.get("validation_videos", "").split()
    if not options.validation_names and not held_out:
        raise ValueError(
            f"{bundle.path} does not say which videos its training held out (validation_videos in its provenance); "
            "name the sequences to validate on with --validation-names"
        )
    found = find_sequences(options.validation.resolve())
    try:
        checks = choose_named(found, options.validation_names or held_out)
    except ValueError as error:
        raise ValueError(f"--validation {options.validation}: {error}") from error
    both = {(ref.images, ref.target) for ref in refs} & {(ref.images, ref.target) for ref in checks}
    if both:
        shared = ", ".join(ref.name for ref in refs if (ref.images, ref.target) in both)
        raise ValueError(f"{shared} would be both chosen and validated on; leave it out of one with --names")
    return refs, checks


def study_facts(model: str, refs: Sequence[SequenceRef], checks: Sequence[SequenceRef], seed: int) -> dict[str, Any]:
    """Everything that decides what a trial is worth, so that trials of something else are not taken for this study's.

    The values in `RANGES` are left out: a study goes on after its choice was written.
    """
    return {
        "model or thresholds": TrackerSpec(
            "", model, precision=load_bundle(model).manifest.precision, tracking=tuple((name, 0.0) for name in RANGES)
        ).fingerprint(),
        "sequences": {ref.name: ref.digest() for ref in refs},
        "validation sequences": {ref.name: ref.digest() for ref in checks},
        "seed": seed,
    }


def open_study(file: Path | None, facts: Mapping[str, Any]) -> Any:
    """The study of an SQLite file, made where it is not there yet; without a file, one that ends with the process.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: the file is no study, or the study of something else.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"tuning needs Optuna: pip install 'siamtrack[eval]' ({error})") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if file is None:
        return optuna.create_study(direction="maximize")
    if not file.parent.is_dir():
        raise ValueError(f"no folder {file.parent} for the study {file.name}; make it first")
    if file.exists() and not _is_sqlite(file):
        raise ValueError(
            f"{file} is not an SQLite file; give --study the name of a new file, or of a study to go on with"
        )
    storage = f"sqlite:///{file.resolve()}"
    study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True)
    known = study.user_attrs or facts
    differ = [name for name in facts if known.get(name) != facts[name]]
    if differ:
        raise ValueError(
            f"{file} holds trials made with another {' and other '.join(differ)}; run it as before, or give --study "
            "the name of a new file"
        )
    for name, value in facts.items():
        study.set_user_attr(name, value)
    return study


def run_trials(
    study: Any,
    tracking: TrackingSpec,
    count: int,
    seed: int,
    play: Play,
    sequences: Sequence[str],
    validation: Sequence[str],
) -> list[Trial]:
    """Add trials to a study until it has `count`, one of them with the present values; returns all, in order.

    What a trial tries follows from the seed and the trials before it, so a study that was stopped and goes on has the
    trials it would have had.

    Args:
        study: of `open_study`.
        tracking: the present parameters; those not in `RANGES` stay.
        count: trials the study shall have, those it has among them.
        seed: of the sampler.
        play: gives the success AUC of every sequence, then of every validation sequence.
        sequences: their names.
        validation: names of the validation sequences.
    """
    from optuna.samplers import TPESampler

    present = tuned_values(tracking)
    trials = finished_trials(study)
    missing = present not in [trial.values for trial in trials]
    if missing:
        study.enqueue_trial(present)
    # A value out of its range was somebody's choice: widen the range.
    spans = {name: (min(low, present[name]), max(high, present[name])) for name, (low, high) in RANGES.items()}
    total = max(count, len(trials) + missing)
    with tqdm(total=total, initial=len(trials), unit="trial", disable=None) as bar:
        for number in range(len(trials), total):
            study.sampler = TPESampler(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
            trial = study.ask()
            values = {name: round(trial.suggest_float(name, *span), DIGITS) for name, span in spans.items()}
            aucs = play(_changed(tracking, values))
            trial.set_user_attr("sequences", dict(zip(sequences, aucs[: len(sequences)], strict=True)))
            trial.set_user_attr("validation", dict(zip(validation, aucs[len(sequences) :], strict=True)))
            study.tell(trial, float(np.mean(aucs[: len(sequences)])))
            bar.set_postfix(best=f"{study.best_value:.4f}")
            bar.update()
    return finished_trials(study)


def finished_trials(study: Any) -> list[Trial]:
    """Trials of a study that came to their end, in order."""
    from optuna.trial import TrialState

    return [
        Trial(
            {name: round(done.params[name], DIGITS) for name in RANGES},
            done.user_attrs["sequences"],
            done.user_attrs["validation"],
        )
        for done in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def tuned_values(tracking: TrackingSpec) -> dict[str, float]:
    """The parameters in `RANGES`, to `DIGITS` digits."""
    return {name: round(getattr(tracking, name), DIGITS) for name in RANGES}


def choose(
    points: NDArray[np.float64], objectives: NDArray[np.float64], checks: NDArray[np.float64], present: int
) -> Choice:
    """The rule in this module's head.

    Args:
        points: ``[T, P]`` values of the trials, in the order of `RANGES`.
        objectives: ``[T]`` mean success AUC of the sequences.
        checks: ``[T]`` the same of the validation sequences; NaN without such a set.
        present: index of the trial with the present values.
    """
    means = neighbourhood_means(points, objectives)
    candidates = np.flatnonzero(objectives >= objectives[present]).tolist()
    best = max(candidates, key=lambda index: (means[index], objectives[index]))
    if not means[best] > means[present]:
        best = present
    return Choice(best, bool(checks[best] < checks[present] - MARGIN), means)


def neighbourhood_means(points: NDArray[np.float64], objectives: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[T]``: mean objective of each trial and its nearest ones; arguments as in `choose`."""
    low, high = np.array(list(RANGES.values())).T
    places = (points - low) / (high - low)
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    size = min(max(NEIGHBOURS, round(math.sqrt(len(points)))), len(points))
    # In order of trials: equal neighbourhoods must have equal means, to the last bit.
    nearest = np.sort(np.argsort(distances, axis=1, kind="stable")[:, :size], axis=1)
    return objectives[nearest].mean(axis=1)


def report(trials: Sequence[Trial], present: int, choice: Choice) -> str:
    """All trials, the AUC of every sequence with the present and the best values, and the verdict, as text."""
    before, after = trials[present], trials[choice.best]
    titles = ("trial", *RANGES, "sequences", "neighbourhood", "validation")
    lines = [" ".join(titles)]
    for index, trial in enumerate(trials):
        cells = [f"{index}", *(f"{trial.values[name]:.{DIGITS}f}" for name in RANGES)]
        cells += [f"{value:.4f}" for value in (trial.objective, choice.neighbourhoods[index], trial.check)]
        notes = ["present"] * (index == present) + ["best neighbourhood"] * (index == choice.best)
        row = " ".join(f"{cell:>{len(title)}}" for cell, title in zip(cells, titles, strict=True))
        lines.append(f"{row}  {', '.join(notes)}".rstrip())
    lines.append("\nsuccess AUC, present -> best neighbourhood")
    for title, old, new in (
        ("mean", before.sequences, after.sequences),
        ("validation mean", before.validation, after.validation),
    ):
        for name in old:
            lines.append(f"{name:>32} {old[name]:.4f} -> {new[name]:.4f}")
        if old:
            lines.append(f"{title:>32} {_mean(old):.4f} -> {_mean(new):.4f}")
    if choice.best == present:
        verdict = "the present values stay: no trial that is at least as good has a better neighbourhood"
    elif choice.refused:
        verdict = (
            f"the present values stay: on the validation sequences trial {choice.best} is "
            f"{before.check - after.check:.4f} worse than they are, and {MARGIN} is allowed"
        )
    else:
        against = "" if before.validation else "; no validation sequences were given to hold it against"
        verdict = f"chosen: trial {choice.best}, {_text(after.values)}{against}"
    return "\n".join([*lines, "", verdict])


def write(path: Path, trials: Sequence[Trial], present: int, best: int, seed: int) -> None:
    """Put a trial's values into a bundle's manifest, and how they were found into its provenance as ``tuning``."""
    from optuna import __version__

    manifest = load_bundle(path).manifest  # anew: it may have been calibrated while this ran
    before, after = trials[present], trials[best]
    summary = (
        f"evaluation.tune, optuna {__version__}, {len(trials)} trials, seed {seed}; was {_text(before.values)}; "
        f"success AUC {before.objective:.4f} -> {after.objective:.4f} on {', '.join(after.sequences)}"
    )
    if after.validation:
        summary += f"; validation {before.check:.4f} -> {after.check:.4f} on {', '.join(after.validation)}"
    changed = dataclasses.replace(
        manifest,
        tracking=_changed(manifest.tracking, after.values),
        provenance={**manifest.provenance, "tuning": summary},
    )
    write_manifest(path, changed)


def _is_sqlite(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(15) in (b"", b"SQLite format 3")


def _mean(aucs: Mapping[str, float]) -> float:
    return float(np.mean(list(aucs.values()))) if aucs else math.nan


def _changed(tracking: TrackingSpec, values: Mapping[str, Any]) -> TrackingSpec:
    return dataclasses.replace(tracking, **values)


def _text(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _count(text: str, least: int = 1) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    return _count(text, least=0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", metavar="BUNDLE", help="shipped model or bundle folder")
    parser.add_argument("--sequences", type=Path, required=True, metavar="DIR", help="folder of sequences to choose on")
    parser.add_argument("--names", nargs="*", default=[], help="only these of them; @FILE for a list in a file")
    parser.add_argument("--validation", type=Path, metavar="DIR", help="folder of sequences that may refuse the choice")
    parser.add_argument(
        "--validation-names",
        nargs="*",
        default=[],
        help="these of them (default: those the bundle's training held out)",
    )
    parser.add_argument("--trials", type=_count, default=60, help="of the whole study (default 60)")
    parser.add_argument("--processes", type=_count, default=1, help="that share the sequences (default 1)")
    parser.add_argument("--study", type=Path, metavar="FILE.db", help="keep the trials in this file, and go on with it")
    parser.add_argument("--seed", type=_seed, default=0, help="of the sampler (default 0)")
    parser.add_argument(
        "--memory", type=float, default=2.0, metavar="GIB", help="for decoded frames; others are read anew (default 2)"
    )
    parser.add_argument("--write", action="store_true", help="put the chosen values into the bundle's manifest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
