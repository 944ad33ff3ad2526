"""Milliseconds a frame of our models and their peers, by image size and number of threads.

    python -m benchmarks.latency --model NAME_OR_DIR --peers csrt kcf

Plays rendered frames held in memory (`siamtrack.scene`), whose target grows with the image, as the same scene seen by a
better camera: no data is needed, and neither decoding nor rendering is timed.

Writes ``latency.csv``: a row for each tracker, thread count, image size and stage. ``lost`` is the total while LOST,
with as many windows as a second look takes; the other stages are those of a tracked target.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from benchmarks import command, markdown_table, tracker_factories, write_csv
from evaluation.peers import PEERS
from siamtrack import SiamTracker
from siamtrack.benchmark import measure, summary
from siamtrack.crop import Image
from siamtrack.scene import Scene

FRAMES = 8  # 0.27 s of the scene, played forth and back; 190 MiB at 3840 x 2160
SIZES = ("640x480", "1280x720", "1920x1080", "3840x2160")
DEFAULT_OUT = Path("benchmarks/results")
DEFAULT_PEERS = ("csrt", "kcf")

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 for trackers that are missing or sizes out of range."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    try:
        rows = measure_all(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    write_csv(options.out / "latency.csv", rows, command("benchmarks.latency", arguments))
    print(format_totals(rows))
    return 0


def measure_all(options: argparse.Namespace) -> list[Row]:
    """The rows of ``latency.csv`` for the parsed command line; one tracker runs at a time."""
    rows: list[Row] = []
    opencv_threads = cv2.getNumThreads()
    try:
        for threads in options.threads:
            cv2.setNumThreads(threads)
            factories = tracker_factories(options.model, options.peers, DEFAULT_PEERS, threads)
            with tqdm(total=len(options.sizes) * len(factories), unit="run", disable=None) as bar:
                for size in options.sizes:
                    width, height = parse_size(size)
                    images = list(Scene(width, height, FRAMES))
                    frames, box = [image.image for image in images], images[0].box_xywh
                    for name, make in factories.items():
                        bar.set_description(f"{name} {size} {threads} threads")
                        tracker = make()
                        times = measure(tracker, frames, box, options.warmup, options.iterations)
                        if isinstance(tracker, SiamTracker):
                            lost = measure(_Lost(tracker), frames, box, options.warmup, options.iterations)
                            times["lost"] = lost["total"]
                        run: Row = {"tracker": name, "threads": threads, "width": width, "height": height}
                        run |= {"box_w": round(box[2]), "box_h": round(box[3]), "iterations": options.iterations}
                        rows += [
                            {**run, "stage": stage, **{f"{key}_ms": value for key, value in row.items()}}
                            for stage, row in summary(times).items()
                        ]
                        bar.update()
    finally:
        cv2.setNumThreads(opencv_threads)
    return rows


class _Lost:
    """A tracker that is LOST whatever it finds."""

    def __init__(self, tracker: SiamTracker) -> None:
        self.init, self._tracker = tracker.init, tracker

    def update(self, frame_bgr: Image) -> None:
        self._tracker.mark_lost()
        self._tracker.update(frame_bgr)


def format_totals(rows: Sequence[Row]) -> str:
    """Markdown: median and 95th percentile of the whole update for each tracker, a column an image size."""
    totals = [row for row in rows if row["stage"] == "total"]
    sizes = list(dict.fromkeys((row["width"], row["height"]) for row in totals))
    runs = list(dict.fromkeys((row["tracker"], row["threads"]) for row in totals))
    cell = {
        (row["tracker"], row["threads"], (row["width"], row["height"])): f"{row['p50_ms']:.2f} / {row['p95_ms']:.2f}"
        for row in totals
    }
    table = [[name, threads, *(cell[name, threads, size] for size in sizes)] for name, threads in runs]
    titles = ["update, ms median / p95", "threads", *(f"{width} x {height}" for width, height in sizes)]
    return markdown_table(titles, table)


def parse_size(size: str) -> tuple[int, int]:
    """Width and height of a text such as ``640x480``.

    Raises:
        ValueError: the text is none.
    """
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"expected an image size such as 640x480, got {size!r}")
    return int(width), int(height)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="*", metavar="NAME_OR_DIR", help="bundles to run (default: all shipped ones)")
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)} (default: {', '.join(DEFAULT_PEERS)})"
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="WxH", help="default: %(default)s")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=10, help="updates not timed (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=100, help="updates timed (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the table (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
