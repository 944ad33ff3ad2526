"""How much faster an evaluation is in several processes: whole commands, in turns.

    python -m benchmarks.evaluation_speed --data ../shared/data/dev

Writes ``evaluation_speed.csv``: one row a run, with its time as a multiple of the median with one process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command, write_csv
from siamtrack.bundle import DEFAULT_MODEL

DEFAULT_DATA = Path("../shared/data/dev")
DEFAULT_OUT = Path("benchmarks/results")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    seconds: dict[int, list[float]] = {processes: [] for processes in dict.fromkeys((1, *options.processes))}
    try:
        for _ in range(options.repetitions):
            for processes, times in seconds.items():  # in turns: a machine that slows down then slows all
                times.append(evaluate(options.data, processes))
    except subprocess.CalledProcessError as error:
        print(f"evaluation_speed: {error.stderr.strip()}", file=sys.stderr)
        return 2
    alone = statistics.median(seconds[1])
    rows = [
        {"processes": processes, "seconds": taken, "times_faster": alone / taken}
        for processes, times in seconds.items()
        for taken in times
    ]
    write_csv(options.out / "evaluation_speed.csv", rows, command("benchmarks.evaluation_speed", arguments))
    for processes, times in seconds.items():
        taken = statistics.median(times)
        print(f"{processes} processes: median {taken:.2f} s, {alone / taken:.2f} times as fast as one")
    return 0


def evaluate(data: Path, processes: int) -> float:
    """Seconds of one whole evaluation of the default model, from the start of Python to its end.

    Raises:
        subprocess.CalledProcessError: it failed; ``stderr`` says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        tracked = [DEFAULT_MODEL, "--sequences", str(data), "--out", folder, "--processes", str(processes)]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "evaluation.ope", *tracked], capture_output=True, text=True, check=True)
        return time.perf_counter() - began


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation_speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of sequences (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="beside one (default: 2)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the CSV (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
