"""The ``siamtrack`` command: track, demo, bench, doctor, models, import-checkpoint."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from siamtrack import doctor
from siamtrack.benchmark import environment, format_table, measure, resident_memory_mib
from siamtrack.bundle import DEFAULT_MODEL, load_bundle, shipped_models
from siamtrack.crop import Image
from siamtrack.demo import run_demo
from siamtrack.drawing import VideoWriter, contact_sheet, draw_track
from siamtrack.engine_files import DEFAULT_PRECISION
from siamtrack.engines import BUILD_POLICIES
from siamtrack.runners import BACKENDS, PRECISION_CHOICES, EngineOptions, cpu_precision, facts_of
from siamtrack.runners.cuda.device import CudaError
from siamtrack.scene import Scene
from siamtrack.sources import FrameSource, open_source
from siamtrack.tracker import SiamTracker
from siamtrack.version import __version__

CSV_HEADER = ("frame", "x", "y", "w", "h", "score", "state")
SHEET_TILES = 12
TIMED_FRAMES = 100_000  # the newest ones, so that an endless stream fits in memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 unusable input, 130 stopped by Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError, CudaError) as error:
        print(f"siamtrack: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("siamtrack: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="siamtrack", description="Follow one chosen object in a camera stream.")
    parser.add_argument("--version", action="version", version=f"siamtrack {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    track = commands.add_parser("track", help="follow a target through a video, images, a camera or a stream")
    track.add_argument("source", help="video file, image folder, quoted glob, camera index, or stream URL")
    track.add_argument("--init", type=_box, metavar="X,Y,W,H", help="the target's box in the first frame, pixels")
    track.add_argument("--out", type=Path, help="write boxes: CSV rows " + ",".join(CSV_HEADER))
    track.add_argument("--save-video", type=Path, metavar="MP4", help="write the annotated video")
    track.add_argument("--sheet", type=Path, metavar="PNG", help=f"write a contact sheet of {SHEET_TILES} frames")
    track.add_argument("--frames", type=_count, help="stop after this many frames")
    track.add_argument("--show", action="store_true", help="open a window (q or Esc ends; drag a box without --init)")
    _model_options(track)
    track.set_defaults(run=_track)

    demo = commands.add_parser("demo", help="track a rendered scene and measure against its exact ground truth")
    demo_options(demo)
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="latency a stage and memory on this machine")
    bench.add_argument("--size", type=_size, default=(1280, 720), metavar="WxH", help="image size (default 1280x720)")
    bench.add_argument("--iterations", type=_count, default=300, help="frames timed (default 300)")
    bench.add_argument(
        "--rate", type=float, default=0.0, metavar="HZ", help="give frames at a camera's pace (default: at once)"
    )
    _model_options(bench)
    bench.set_defaults(run=_bench)

    check = commands.add_parser("doctor", help="what this machine has, and the command that adds what is missing")
    check.set_defaults(run=lambda _: doctor.print_report())

    models = commands.add_parser("models", help="the models that come with the package")
    models.set_defaults(run=_models)

    public = commands.add_parser("import-checkpoint", help="a public tracker's or backbone's weights as a checkpoint")
    public.add_argument("file", type=Path, help="weights as published: docs/checkpoints.md says where they are")
    public.add_argument("--model", required=True, help="our model, such as siamban-r50")
    public.add_argument("--out", type=Path, required=True, metavar="C.pth", help="checkpoint to write")
    public.add_argument(
        "--config",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the model's configuration, in place of what the file asks for",
    )
    public.set_defaults(run=_import_checkpoint)
    return parser


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of a demo, with or without ROS."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for video, sheet and table (demo/)")
    parser.add_argument("--frames", type=_count, default=300, help="length of the scene (default 300)")
    parser.add_argument("--size", type=_size, default=(1280, 720), metavar="WxH", help="image size (default 1280x720)")
    parser.add_argument("--seed", type=int, default=0, help="which scene (default 0)")
    _model_options(parser)


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"shipped model or bundle folder (default {DEFAULT_MODEL})")
    parser.add_argument(
        "--backend", choices=BACKENDS, default=BACKENDS[0], help="what runs the graphs; auto: tensorrt where it can"
    )
    parser.add_argument("--threads", type=_count, default=0, help="CPU threads (default: the cores, up to 4)")
    parser.add_argument(
        "--precision",
        choices=PRECISION_CHOICES,
        default=PRECISION_CHOICES[0],
        help=f"auto (default): {DEFAULT_PRECISION} with tensorrt; with onnxruntime int8 where bundle and CPU have it, "
        "else fp32",
    )
    parser.add_argument(
        "--build-engines",
        choices=BUILD_POLICIES,
        default="never",
        help="auto: build missing or unfit engines at once, which takes minutes (default: say how to build them)",
    )
    parser.add_argument(
        "--engine-key", type=Path, metavar="FILE", help="load only engines signed with this key (default: unsigned too)"
    )


def _open_tracker(options: argparse.Namespace) -> SiamTracker:
    engines = EngineOptions(key_file=options.engine_key, build=options.build_engines)
    return SiamTracker.from_pretrained(options.model, options.backend, options.threads, engines, options.precision)


def _track(options: argparse.Namespace) -> int:
    if options.init is None and not options.show:
        raise ValueError("which target? give --init X,Y,W,H, or --show to drag a box in a window")
    states: Counter[str] = Counter()
    seconds: deque[float] = deque(maxlen=TIMED_FRAMES)
    kept: dict[int, Image] = {}  # thinned out as the clip goes on, so that an endless stream fits in memory
    stride = 1
    with ExitStack() as stack, _ended_by_ctrl_c() as stopped:
        source = stack.enter_context(open_source(options.source))
        tracker = _open_tracker(options)
        stack.callback(tracker.close)
        writer = stack.enter_context(VideoWriter(options.save_video, source.fps or 30)) if options.save_video else None
        rows = _csv_writer(stack, options.out) if options.out else None
        bar = stack.enter_context(tqdm(total=_total(source, options.frames), unit="frame", disable=None))
        for index, frame in source:
            if options.frames is not None and index >= options.frames:
                break
            began = time.perf_counter()
            if index == 0:
                track = tracker.init(frame, options.init if options.init is not None else _drag_box(frame))
            else:
                track = tracker.update(frame)
                seconds.append(time.perf_counter() - began)
            states[str(track.state)] += 1
            if rows is not None:
                rows.writerow((index, *(f"{v:.2f}" for v in track.box_xywh), f"{track.score:.4f}", track.state))
            if writer is not None or options.show or (options.sheet and index % stride == 0):
                drawn = draw_track(frame, track.box_xywh, str(track.state), track.score)
                if writer is not None:
                    writer.write(drawn)
                if options.sheet and index % stride == 0:
                    kept[index] = drawn
                    if len(kept) > 2 * SHEET_TILES:
                        stride *= 2
                        kept = {i: image for i, image in kept.items() if i % stride == 0}
                if options.show and not _show(source.name, drawn):
                    break
            bar.update()
            bar.set_postfix_str(f"{track.state} {track.score:.2f}", refresh=False)
    _summarise(states, seconds)
    if options.sheet and kept:
        _write_sheet(options.sheet, kept)
    for path in (options.out, options.save_video, options.sheet):
        if path:
            print(f"wrote {path}")
    return 130 if stopped else 0


@contextmanager
def _ended_by_ctrl_c() -> Iterator[list[bool]]:
    """Ctrl-C is how an endless stream ends: leave the block, and say so by a list that is no longer empty."""
    stopped: list[bool] = []
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.append(True)


def _summarise(states: Counter[str], seconds: Sequence[float]) -> None:
    print(f"{states.total()} frames: " + ", ".join(f"{state} {count}" for state, count in states.most_common()))
    if seconds:
        ranked = sorted(seconds)
        p50, p95 = (1e3 * ranked[int(share * (len(ranked) - 1))] for share in (0.5, 0.95))
        print(f"update: p50 {p50:.2f} ms, p95 {p95:.2f} ms ({1e3 / p50:.0f} frames/s at the median)")


def _write_sheet(path: Path, images: dict[int, Image]) -> None:
    indices = sorted(images)
    chosen = [indices[i * (len(indices) - 1) // max(SHEET_TILES - 1, 1)] for i in range(min(SHEET_TILES, len(indices)))]
    chosen = sorted(set(chosen))
    sheet = contact_sheet([images[i] for i in chosen], [f"frame {i}" for i in chosen])
    try:
        written = cv2.imwrite(str(path), sheet)
    except cv2.error:  # an extension it does not know
        written = False
    if not written:
        raise ValueError(f"cannot write {path}: check the folder and that the name ends in .png or .jpg")


def _csv_writer(stack: ExitStack, path: Path) -> Any:
    writer = csv.writer(stack.enter_context(path.open("w", newline="")))
    writer.writerow(CSV_HEADER)
    return writer


def _total(source: FrameSource, limit: int | None) -> int | None:
    if source.length is None or limit is None:
        return source.length or limit
    return min(source.length, limit)


def _drag_box(frame: Image) -> tuple[float, float, float, float]:
    title = "drag a box round the target, then press Enter"
    try:
        x, y, w, h = cv2.selectROI(title, frame, showCrosshair=False)
        cv2.destroyWindow(title)
    except cv2.error as error:
        raise _no_window(error) from error
    if not w or not h:
        raise ValueError("no box was drawn")
    return float(x), float(y), float(w), float(h)


def _show(title: str, image: Image) -> bool:
    try:
        cv2.imshow(title, image)
        return (cv2.waitKey(1) & 0xFF) not in (ord("q"), 27)
    except cv2.error as error:
        raise _no_window(error) from error


def _no_window(error: cv2.error) -> ValueError:
    return ValueError(f"--show needs a screen and an OpenCV with windows (opencv-python, not -headless): {error}")


def _demo(options: argparse.Namespace) -> int:
    width, height = options.size
    tracker = _open_tracker(options)
    try:
        print(run_demo(tracker, Scene(width, height, options.frames, options.seed), options.out))
    finally:
        tracker.close()
    return 0


def _bench(options: argparse.Namespace) -> int:
    width, height = options.size
    tracker = _open_tracker(options)
    try:
        blank = np.zeros((height, width, 3), np.uint8)
        tracker.init(blank, (0, 0, width, height))
        tracker.update(blank)
        memory_mib = resident_memory_mib()  # before the scene is painted: what a tracking process needs
        # A stretch of the scene in which the target is in plain sight, so that the usual path is timed.
        frames = [Scene(width, height).render(i) for i in range(60)]
        times = measure(
            tracker,
            [f.image for f in frames],
            frames[0].box_xywh,
            iterations=options.iterations,
            rate_hz=options.rate,
        )
        model = tracker.runner.bundle.manifest.model
        facts = {**facts_of(tracker.runner), **environment()}
    finally:
        tracker.close()
    backend = facts.pop("backend")
    print(f"{model}, {backend}, {width}x{height}, " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    print(format_table(times))
    print(f"resident memory {memory_mib:.0f} MiB")
    return 0


def _models(_: argparse.Namespace) -> int:
    bundles = {name: load_bundle(name) for name in shipped_models()}
    runs = {name: str(cpu_precision(bundle)) for name, bundle in bundles.items()}
    wide = max(map(len, runs.values()), default=0)
    print(f"{'model':<24}{'MB':>6}  {'on this CPU':<{wide}}{'dev AUC':>9}{'ms (CPU)':>10}  licence")
    for name, bundle in bundles.items():
        manifest = bundle.manifest
        auc, ms = (manifest.accuracy.get(key, float("nan")) for key in ("dev_success_auc", "update_ms_median"))
        default = " (default)" if name == DEFAULT_MODEL else ""
        size = bundle.size_bytes() / 1e6
        print(f"{name:<24}{size:>6.1f}  {runs[name]:<{wide}}{auc:>9.3f}{ms:>10.1f}  {manifest.licence}{default}")
    print("AUC and time were measured once, as the model card beside each model says; `siamtrack bench` measures here.")
    return 0


def _import_checkpoint(options: argparse.Namespace) -> int:
    try:
        from siamtrack.nets.importing import import_checkpoint
    except ImportError as error:
        raise ValueError(f"importing weights needs PyTorch: pip install 'siamtrack[export]' ({error})") from error
    print(import_checkpoint(options.file, options.model, options.out, dict(options.config)))
    print(f"wrote {options.out}")
    return 0


def _field(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE such as origin_px=31, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _box(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 4:
        raise argparse.ArgumentTypeError(f"expected four numbers X,Y,W,H, got {text!r}")
    return values


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.partition("x")
    if not separator or not width.isdigit() or not height.isdigit():
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1280x720, got {text!r}")
    return int(width), int(height)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
