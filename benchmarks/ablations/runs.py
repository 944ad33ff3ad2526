"""One run of a table: train, export, track. Its folder keeps the bundle and the result."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.ablations.tables import CHECKOUT, Recipe, Row, Table, fingerprint
from benchmarks.accuracy import HARDEST
from evaluation.evidence import NEVER_LOST
from evaluation.layouts import find_sequences, read_sequences
from evaluation.onepass import run_ope, summarise
from evaluation.ope import choose
from evaluation.sequences import Sequence as ImageSequence
from siamtrack.bundle import Bundle, TrackingSpec, load_bundle
from siamtrack.plain import from_plain, to_plain
from siamtrack.runners import open_runner
from siamtrack.tracker import SiamTracker

DEV = "dev"  # folder of the development sequences, below the data root
CROPS = 10  # that each export is compared with PyTorch on; the graphs differ by their switches alone


@dataclass(frozen=True)
class Result:
    """What one finished run is worth.

    Attributes:
        row: name of its row.
        seed: of weights and pairs.
        fingerprint: of its recipe, see `benchmarks.ablations.tables.fingerprint`.
        commit: of the code that trained it, as ``run.json`` has it; empty outside a checkout.
        dev: success AUC, in [0, 1], by development sequence.
        held_out: the same by video that training held out.
    """

    row: str
    seed: int
    fingerprint: str
    commit: str
    dev: dict[str, float]
    held_out: dict[str, float]

    @property
    def dev_auc(self) -> float:
        """Mean over the development sequences; NaN for none, as the others."""
        return _mean(self.dev.values())

    @property
    def dev_auc_without_hardest(self) -> float:
        """The same without `benchmarks.accuracy.HARDEST`."""
        return _mean(auc for name, auc in self.dev.items() if name != HARDEST)

    @property
    def held_out_auc(self) -> float:
        """Mean over the held-out videos."""
        return _mean(self.held_out.values())


@dataclass(frozen=True)
class Clips:
    """What every run is evaluated on."""

    dev: tuple[ImageSequence, ...]
    held_out: tuple[ImageSequence, ...]


def read_clips(data: Path, recipe: Recipe) -> Clips:
    """The development sequences, and the videos that a recipe keeps from training.

    Args:
        data: the data root, with `DEV` in it.
        recipe: of any run; all of a table hold out the same videos.

    Raises:
        OSError: a folder or file is missing.
        ValueError: the recipe holds out nothing, or a video that is not in its ``data.videos``.
    """
    held_out = recipe["data"].get("validation_videos", [])
    if not held_out:
        raise ValueError("the recipe has no data.validation_videos; name videos that every run is evaluated on")
    videos = [ref for folder in recipe["data"]["videos"] for ref in find_sequences(data / folder)]
    return Clips(tuple(read_sequences(data / DEV)), tuple(ref.load() for ref in choose(videos, held_out)))


@dataclass(frozen=True)
class Run:
    """A row with a seed, and the folder that it has to itself.

    Attributes:
        row: of the table.
        seed: replaces the recipe's.
        recipe: all that decides the run.
        folder: named after all three, so that a changed recipe never meets another's files.
    """

    row: Row
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def bundle(self) -> Path:
        """The exported model."""
        return self.folder / "bundle"

    @property
    def result(self) -> Path:
        """Written last: where it is, the run is finished."""
        return self.folder / "result.json"

    def train(self, data: Path, devices: int, threads: int) -> None:
        """Train and export; goes on where it was stopped, and does nothing where the bundle is there.

        Each is a process of its own, so that its memory is given back.

        Raises:
            RuntimeError: one of them failed.
        """
        if self.bundle.exists():
            return
        recipe, log = self.folder / "recipe.yaml", self.folder / "log.txt"
        _write(recipe, json.dumps(self.recipe, indent=2) + "\n")  # JSON is YAML
        train = [recipe, "--data", data.resolve(), "--out", self._training, "--devices", devices]
        _call("training.train", train, log, threads)
        part = self.folder / "bundle.part"
        export = ["onnx", "--checkpoint", self._training / "last.ckpt", "--out", part, "--crops", CROPS]
        _call("model_export.cli", export, log, threads)
        part.replace(self.bundle)

    def evaluate(self, clips: Clips, threads: int) -> Result:
        """Track with the bundle and write the result.

        The bundle's thresholds are not calibrated, so its tracker is kept from ever calling a target lost.

        Raises:
            BundleError: the bundle is missing or damaged.
        """
        bundle = load_bundle(self.bundle)
        score = dataclasses.replace(bundle.manifest.score, thresholds=NEVER_LOST)
        patient = Bundle(bundle.path, dataclasses.replace(bundle.manifest, score=score))
        with open_runner(patient, threads=threads) as runner:
            tracker = SiamTracker(runner, TrackingSpec())  # of one table all rows alike, whatever was tuned for a model
            dev, held_out = (_aucs(tracker, sequences) for sequences in (clips.dev, clips.held_out))
        commit = json.loads((self._training / "run.json").read_text(encoding="utf-8"))[-1]["git_commit"]
        result = Result(self.row.name, self.seed, fingerprint(self.recipe), commit, dev, held_out)
        _write(self.result, json.dumps(to_plain(result), indent=2) + "\n")
        return result

    def clean(self) -> None:
        """Delete what only a run that goes on needs: checkpoints and curves, most of what it has written."""
        for pattern in ("*.ckpt", "events.*"):
            for path in self._training.glob(pattern):
                path.unlink()

    @property
    def _training(self) -> Path:
        return self.folder / "training"


def plan(table: Table, rows: Sequence[str], seeds: Sequence[int], out: Path) -> list[Run]:
    """Runs of some rows, or of all where none is named; all rows with the first seed come first.

    Raises:
        OSError: the base recipe cannot be read.
        ValueError: no such row.
    """
    chosen = [table.row(name) for name in rows] or table.rows
    return [_run(table, row, seed, out) for seed in seeds for row in chosen]


def finished(table: Table, out: Path) -> list[Result]:
    """Results of runs that have the recipe which the table gives them now, of any seed; by row, then seed."""
    order = {row.name: position for position, row in enumerate(table.rows)}
    results = []
    for path in (out / table.name).resolve().glob("*/result.json"):
        result = from_plain(Result, json.loads(path.read_text(encoding="utf-8")), str(path))
        if result.row in order and path == _run(table, table.row(result.row), result.seed, out).result:
            results.append(result)
    return sorted(results, key=lambda result: (order[result.row], result.seed))


def _run(table: Table, row: Row, seed: int, out: Path) -> Run:
    recipe = table.recipe_of(row, seed)
    return Run(row, seed, recipe, (out / table.name / f"{row.name}-{seed}-{fingerprint(recipe)}").resolve())


def _aucs(tracker: SiamTracker, sequences: Iterable[ImageSequence]) -> dict[str, float]:
    return {sequence.name: summarise(run_ope(lambda: tracker, sequence), sequence)["auc"] for sequence in sequences}


def _call(module: str, arguments: Sequence[object], log: Path, threads: int) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("ab") as file:
        status = subprocess.run(command, cwd=CHECKOUT, env=environment, stdout=file, stderr=file).returncode
    if status:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
        raise RuntimeError(f"{module} ended with status {status}: {last} (all of it: {log})")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return fmean(known) if known else float("nan")
