"""One-pass evaluation of our models and their peers on the same frames in the same run.

    python -m benchmarks.accuracy --data ../shared/data/dev --model NAME_OR_DIR --peers csrt kcf kcf-default static

Writes ``accuracy.csv`` (a row for each tracker and sequence, and one called ``mean`` for each tracker) and
``accuracy.md``. Metrics are those of `evaluation.metrics`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks import command, markdown_table, model_title, tracker_factories, write_csv
from evaluation.layouts import read_sequences
from evaluation.metrics import mean_row
from evaluation.onepass import Result, run_ope, summarise
from evaluation.peers import PEERS
from evaluation.sequences import Sequence as ImageSequence
from evaluation.sequences import read_frame
from evaluation.tables import MEANS, STATE_COLUMNS
from siamtrack.benchmark import environment
from siamtrack.boxes import iou_xywh
from siamtrack.bundle import load_bundle, shipped_models, write_manifest
from siamtrack.drawing import contact_sheet, draw_track

DEFAULT_DATA = Path("../shared/data/dev")
DEFAULT_OUT = Path("benchmarks/results")
DEFAULT_PEERS = ("csrt", "kcf", "kcf-default", "static")
# Nearly every tracker scores about 0 on its small, blurred, tumbling target, which dilutes the mean of the others.
HARDEST = "Skiing"
SHEET_COLUMNS = 6
SHEET_TILE_PX = 320

Row = dict[str, Any]
Runs = dict[str, list[Result]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 where data or trackers are missing."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    cv2.setNumThreads(options.threads)
    try:
        sequences = read_sequences(options.data)
        factories = tracker_factories(options.model, options.peers, DEFAULT_PEERS, options.threads)
    except (OSError, ValueError, ImportError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 2
    runs = evaluate(factories, sequences)
    rows = table_rows(runs, sequences)
    command_line = command("benchmarks.accuracy", arguments)
    write_csv(options.out / "accuracy.csv", rows, command_line)
    report = format_report(rows, command_line)
    (options.out / "accuracy.md").write_text(report, encoding="utf-8")
    if options.save_boxes is not None:
        save_boxes(options.save_boxes, runs, sequences)
    if options.sheet is not None:
        save_sheets(options.sheet, runs, sequences)
    if options.record:
        record(options.model or shipped_models(), rows)
    print(report)
    return 0


def record(models: Sequence[str], rows: Sequence[Row]) -> None:
    """Put each model's mean success AUC and median update time into its manifest, for ``siamtrack models``."""
    means = {row["tracker"]: row for row in rows if row["sequence"] == "mean"}
    for model in models:
        bundle = load_bundle(model)
        row = means[model_title(model)]
        accuracy = {"dev_success_auc": round(row["auc"], 4), "update_ms_median": round(row["ms_median"], 2)}
        merged = {**bundle.manifest.accuracy, **accuracy}
        write_manifest(bundle.path, dataclasses.replace(bundle.manifest, accuracy=merged))


def evaluate(factories: Mapping[str, Callable[[], Any]], sequences: Sequence[ImageSequence]) -> Runs:
    """Run every tracker over every sequence; for each tracker its results in the order of `sequences`."""
    runs: Runs = {name: [] for name in factories}
    frames = sum(len(sequence.frames) for sequence in sequences) * len(factories)
    with tqdm(total=frames, unit="frame", disable=None) as bar:
        # Trackers inside sequences, not the other way round: a machine that slows down then slows all of them.
        for sequence in sequences:
            for name, make in factories.items():
                bar.set_description(f"{sequence.name} {name}")
                runs[name].append(run_ope(make, sequence, on_frame=bar.update))
    return runs


def table_rows(runs: Runs, sequences: Sequence[ImageSequence]) -> list[Row]:
    """A row for each tracker and sequence, and after each tracker's rows one whose sequence is ``mean``."""
    rows: list[Row] = []
    for name, results in runs.items():
        scores = [summarise(result, sequence) for result, sequence in zip(results, sequences, strict=True)]
        for sequence, score in zip(sequences, scores, strict=True):
            rows.append({"tracker": name, "sequence": sequence.name, **score})
        rows.append({"tracker": name, "sequence": "mean", **mean_row(scores)})
    return rows


def format_report(rows: Sequence[Row], command_line: str) -> str:
    """The Markdown page: means, AUC a sequence, and how far each tracker's state can be believed."""
    trackers = list(dict.fromkeys(row["tracker"] for row in rows))
    sequences = list(dict.fromkeys(row["sequence"] for row in rows if row["sequence"] != "mean"))
    cell = {(row["tracker"], row["sequence"]): row for row in rows}
    ranked = sorted(trackers, key=lambda name: -cell[name, "mean"]["auc"])
    headings = ["tracker", *MEANS.values()]
    parts = [
        "# Accuracy",
        f"`{command_line}`; " + ", ".join(f"{key} {value}" for key, value in environment().items()) + ".",
        f"One pass over {len(sequences)} sequences, {cell[trackers[0], 'mean']['frames']} scored frames; every "
        "sequence counts the same. The first frame and frames without truth are left out. Success AUC is the mean, "
        "over the 21 thresholds 0, .05, .. 1, of the share of frames with IoU above; its ceiling is 0.952. Time is "
        "that of `update`, without decoding the image; median and p95 are means over the sequences.",
        "## Mean",
        markdown_table(headings, [[name, *(cell[name, "mean"][key] for key in MEANS)] for name in ranked]),
        "## AUC by sequence",
        markdown_table(
            ["tracker", *sequences], [[name, *(cell[name, other]["auc"] for other in sequences)] for name in ranked]
        ),
    ]
    if HARDEST in sequences and len(sequences) > 1:
        kept = [other for other in sequences if other != HARDEST]
        without = {name: mean_row([_numbers(cell[name, other]) for other in kept]) for name in ranked}
        parts.append(f"## Mean without {HARDEST}")
        parts.append(markdown_table(headings, [[name, *(without[name][key] for key in MEANS)] for name in ranked]))
    parts.append("## States")
    parts.append(
        "Share of frames in each state, and of those the share whose box is on the target (IoU above 0.3). "
        "An honest tracker has a high share under TRACKING and a low one under LOST."
    )
    states = [[name, *(cell[name, "mean"][key] for key in STATE_COLUMNS)] for name in ranked]
    parts.append(markdown_table(["tracker", *STATE_COLUMNS.values()], states))
    return "\n\n".join(parts) + "\n"


def save_boxes(folder: Path, runs: Runs, sequences: Sequence[ImageSequence]) -> None:
    """Write ``<folder>/<tracker>/<sequence>.csv``: image, box, score, state and milliseconds of every frame."""
    for name, results in runs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for result, sequence in zip(results, sequences, strict=True):
            with (folder / name / f"{sequence.name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["image", "x", "y", "w", "h", "score", "state", "ms"])
                for index, path in enumerate(sequence.frames):
                    box = [f"{value:.2f}" for value in result.boxes_xywh[index]]
                    times = f"{1000 * result.seconds[index]:.3f}"
                    writer.writerow([path.name, *box, f"{result.scores[index]:.4f}", result.states[index], times])


def save_sheets(folder: Path, runs: Runs, sequences: Sequence[ImageSequence]) -> None:
    """Write ``<folder>/<sequence>.png``: a row of evenly spaced frames for each tracker, its box and the true one."""
    folder.mkdir(parents=True, exist_ok=True)
    for position, sequence in enumerate(sequences):
        last = len(sequence.frames) - 1
        chosen = np.unique(np.linspace(sequence.start, last, SHEET_COLUMNS).round().astype(int))
        images, captions = [], []
        for name, results in runs.items():
            result = results[position]
            for index in chosen.tolist():
                box = result.boxes_xywh[index].tolist()
                truth = sequence.truth_xywh[index].tolist() if sequence.has_truth[index] else None
                shown = box if np.isfinite(box).all() else None
                frame, state, score = read_frame(sequence.frames[index]), result.states[index], result.scores[index]
                images.append(draw_track(frame, shown, state, float(score), truth_xywh=truth))
                overlap = f", IoU {iou_xywh(box, truth):.2f}" if truth is not None else ""
                captions.append(f"{name}, frame {index}{overlap}")
        cv2.imwrite(str(folder / f"{sequence.name}.png"), contact_sheet(images, captions, len(chosen), SHEET_TILE_PX))


def _numbers(row: Row) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in ("tracker", "sequence")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of sequences (default: %(default)s)")
    parser.add_argument("--model", nargs="*", metavar="NAME_OR_DIR", help="bundles to run (default: all shipped ones)")
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)} (default: {', '.join(DEFAULT_PEERS)})"
    )
    parser.add_argument("--threads", type=int, default=2, help="for models and OpenCV (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the tables (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="put AUC and time into the models' manifests")
    parser.add_argument("--save-boxes", type=Path, metavar="DIR", help="also write every box, a CSV a sequence")
    parser.add_argument("--sheet", type=Path, metavar="DIR", help="also write a contact sheet PNG a sequence")
    return parser


if __name__ == "__main__":
    sys.exit(main())
