"""A paper's ablation table, repeated at small scale with the edge model, every row with several seeds.

    python -m benchmarks.ablations benchmarks/ablations/siamcan.yaml --data ../shared/data

Trains, exports and tracks with every row and seed; writes ``ablations_TABLE.csv`` (a row a run) and TABLE's section of
``ablations.md`` after each. Finished runs are not repeated and a run that was stopped goes on from its last epoch, so
the same command goes on with a table that was stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2

from benchmarks import command, write_csv
from benchmarks.ablations.report import check_same_sequences, csv_rows, put_section, section
from benchmarks.ablations.runs import finished, plan, read_clips
from benchmarks.ablations.tables import Table, read_table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 1 a run failed, 2 unusable input, 130 stopped by a signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    cv2.setNumThreads(options.threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the training it waits for would go on alone
    command_line, failed = command("benchmarks.ablations", arguments), False
    try:
        table = read_table(options.table)
        runs = plan(table, options.rows, options.seeds or table.seeds, options.out)
        clips = read_clips(options.data, runs[0].recipe)
        if not options.evaluate_only:  # said before hours of training, not after
            check_same_sequences(finished(table, options.out), clips)
        for run in runs:
            title, began = f"{table.name} {run.row.name}, seed {run.seed}", time.perf_counter()
            if run.result.exists() and not options.evaluate_only:
                print(f"{title}: done before")
                continue
            if options.evaluate_only and not run.bundle.exists():
                print(f"{title}: not trained")
                continue
            try:
                run.train(options.data, options.devices, options.threads)
                result = run.evaluate(clips, options.threads)
            except RuntimeError as error:
                failed = True
                print(f"{title}: {error}", file=sys.stderr)
                continue
            if not options.keep:
                run.clean()
            minutes = (time.perf_counter() - began) / 60
            print(f"{title}: dev {result.dev_auc:.3f}, held out {result.held_out_auc:.3f}; {minutes:.1f} min")
            if not options.evaluate_only:  # there results of before and after stand side by side until all are done
                _publish(table, options, command_line)
        print(_publish(table, options, command_line))
    except (OSError, ValueError) as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablations: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _publish(table: Table, options: argparse.Namespace, command_line: str) -> str:
    """Write CSV and section of what is finished, and return the section; "" where nothing is."""
    results = finished(table, options.out)
    if not results:
        return ""
    text = section(table, results, command_line)
    write_csv(options.results / f"ablations_{table.name}.csv", csv_rows(table, results), command_line)
    put_section(options.results / "ablations.md", table.name, text)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", type=Path, help="YAML file, see benchmarks/ablations/")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        help="data root, with dev/ (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="for runs (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder for the tables (default: %(default)s)"
    )
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME", help="only these rows")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="other seeds than the table's")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, or CPU processes, of a training (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: 1)")
    parser.add_argument("--evaluate-only", action="store_true", help="track again with what is trained; train nothing")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and training curves")
    return parser


if __name__ == "__main__":
    sys.exit(main())
