"""Milliseconds a frame on an NVIDIA GPU, host image in to boxes out, beside what a user would write instead.

    python -m benchmarks.gpu_latency --models siamcan-mobilenetv2 siamcan-r50

| way | what |
|---|---|
| tensorrt | `TensorRTRunner`: only the windows' pixels are uploaded, cropped on the GPU, all in one CUDA graph |
| tensorrt-queued | the same without CUDA graphs |
| tensorrt-naive | the same engine as in most examples: whole frame copied, crops on the host, synchronous copies |
| torch-runner | `CudaRunner` with the PyTorch network in FP16 in the engine's place |
| torch-eager | PyTorch in FP16, crops on the host |
| torch-graphs | the same, the network replayed as a CUDA graph |
| floor | operations over the GPU's measured matrix rate, or bytes over its measured bandwidth, and the crops' upload |

Windows move from frame to frame and images from one to the next of several, as a camera's do. Networks that no shipped
bundle has get random weights: latency does not depend on them. Writes ``gpu_latency_<GPU>.csv``: a row for each model,
precision, image size, number of targets, way and stage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import command, markdown_table, write_csv
from benchmarks.latency import parse_size
from siamtrack.bundle import Bundle, load_bundle, shipped_models
from siamtrack.crop import Image, Window
from siamtrack.gpu import EngineError, gpu_info
from siamtrack.runners import Features, Runner

MODELS = ("siamcan-mobilenetv2", "siamcan-r50")
PRECISIONS = ("fp32", "fp16")
SIZES = ("1280x720", "3840x2160")
TARGETS = (1, 4, 8, 16)
IMAGES = 8
FILL = (110.0, 115.0, 120.0)
TUNING = (0.06, 0.4, 0.0)
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
DEFAULT_OUT = Path("benchmarks/results")

Row = dict[str, Any]
Frame = Callable[[Image, Sequence[Window]], Any]


@dataclass(frozen=True)
class Case:
    """One cell of the table.

    Attributes:
        bundle: the model.
        precision: of its engines.
        size: width and height of the image.
        targets: windows a frame.
    """

    bundle: Bundle
    precision: str
    size: tuple[int, int]
    targets: int

    def row(self, way: str, stage: str, p50_ms: float, p99_ms: float, frames: int) -> Row:
        """As in the table."""
        width, height = self.size
        model = self.bundle.manifest.model
        case = {"model": model, "precision": self.precision, "width": width, "height": height, "targets": self.targets}
        return {**case, "way": way, "stage": stage, "p50_ms": p50_ms, "p99_ms": p99_ms, "frames": frames}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 without a GPU or with arguments that cannot be."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    gpu = gpu_info()
    if gpu is None:
        print("gpu_latency: needs an NVIDIA GPU with its driver and cuda-python; found none", file=sys.stderr)
        return 2
    try:
        rows = measure_all(options)
    except (OSError, ValueError) as error:
        print(f"gpu_latency: {error}", file=sys.stderr)
        return 2
    write_csv(options.out / f"gpu_latency_{slug(gpu.name)}.csv", rows, command("benchmarks.gpu_latency", arguments))
    print(format_totals(rows))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, as `measure_all` takes it."""
    return _parser().parse_args(arguments)


def measure_all(options: argparse.Namespace) -> list[Row]:
    """The rows for the parsed command line; what cannot run is left out, with a line on stderr.

    Raises:
        ValueError: an image size or a model that there is not.
    """
    sizes = [parse_size(size) for size in options.sizes]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            bundle = find_or_export(model, Path(scratch))
            for precision in options.precisions:
                with _tensorrt(bundle, precision, options, max(options.targets)) as runners:
                    for size in sizes:
                        for targets in options.targets:
                            case = Case(bundle, precision, size, targets)
                            rows += _engine_rows(case, runners, options)
            for size in sizes:
                for targets in options.targets:
                    with _left_out_if_it_fails(f"{model} on PyTorch, {targets} targets"):
                        rows += _torch_rows(Case(bundle, "fp16", size, targets), options)
            with _left_out_if_it_fails(f"the floor of {model}"):
                rows += _floor_rows(bundle, options, sizes)
    return rows


@contextlib.contextmanager
def _left_out_if_it_fails(what: str) -> Iterator[None]:
    """What is measured for comparison must not cost what was measured before."""
    try:
        yield
    except RuntimeError as error:  # of PyTorch and of the driver
        print(f"left out: {what}: {error}", file=sys.stderr)


def find_or_export(model: str, scratch: Path) -> Bundle:
    """A shipped model, a bundle folder, or a network with random weights (`export_random`).

    Raises:
        ValueError: there is no such model.
    """
    if model in shipped_models() or Path(model).is_dir():
        return load_bundle(model)
    return export_random(model, scratch)


def export_random(model: str, scratch: Path) -> Bundle:
    """A network with random weights, always the same, exported into a folder once.

    Raises:
        ValueError: there is no such network.
    """
    if (scratch / model / "manifest.json").is_file():
        return load_bundle(scratch / model)
    import torch

    from model_export.onnx_export import export_bundle
    from siamtrack.nets import MODELS as NETS

    if model not in NETS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(NETS)}, or a bundle folder")
    torch.manual_seed(0)
    return export_bundle(model, NETS[model](), scratch / model, licence="none: random weights")


def network(bundle: Bundle) -> Any:
    """The network of a bundle, with the weights of `export_random`: those that a bundle of it was exported with."""
    import torch

    from siamtrack.nets.build import build_model

    torch.manual_seed(0)
    return build_model(bundle.manifest.model, json.loads(bundle.manifest.provenance.get("model_config", "{}")))


def camera(size: tuple[int, int], count: int = IMAGES, seed: int = 0) -> list[Image]:
    """Images of noise, each in memory of its own."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(count)]


def moving_windows(
    size: tuple[int, int], targets: int, side_px: int, frames: int, seed: int = 0
) -> list[tuple[Window, ...]]:
    """Windows of targets that wander and change their size a little, some of them partly outside the image."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform((0, 0), size, (targets, 2))
    scale = np.ones(targets)
    result = []
    for _ in range(frames):
        centre = np.clip(centre + rng.normal(0, 5, centre.shape), 0, size)
        scale = np.clip(scale * rng.normal(1, 0.01, targets), 0.8, 1.25)
        sides = np.round(scale * side_px).astype(int)
        corners = np.round(centre - sides[:, None] / 2).astype(int)
        result.append(tuple(Window(int(x), int(y), int(s), int(s)) for (x, y), s in zip(corners, sides, strict=True)))
    return result


def time_frames(frame: Frame, case: Case, options: argparse.Namespace) -> NDArray[np.float64]:
    """Milliseconds of each timed frame."""
    images = camera(case.size)
    windows = moving_windows(case.size, case.targets, options.window, options.warmup + options.frames)
    times = []
    for turn, these in enumerate(windows):
        image = images[turn % len(images)]
        began = time.perf_counter()
        frame(image, these)
        if turn >= options.warmup:
            times.append(1000 * (time.perf_counter() - began))
    return np.array(times)


def runner_frame(runner: Runner, targets: int) -> Frame:
    """A search of several targets; each target has features of its own."""
    image = camera((256, 256), 1, seed=9)[0]
    features: list[Features] = [
        runner.template(image, Window(10 * (i % 8), 5 * i, 120, 120), FILL, (60, 50)) for i in range(targets)
    ]
    prev_size = np.full((targets, 2), 60, np.float32)
    return lambda image, windows: runner.search(image, windows, features, prev_size, TUNING)


def percentiles(times_ms: NDArray[np.float64]) -> tuple[float, float]:
    """Median and 99th percentile."""
    p50, p99 = np.percentile(times_ms, (50, 99))
    return float(p50), float(p99)


def format_totals(rows: Sequence[Row]) -> str:
    """Markdown: median and 99th percentile of the whole frame; a column for each image size and number of targets."""
    totals = [row for row in rows if row["stage"] == "total"]
    columns = list(dict.fromkeys((row["width"], row["height"], row["targets"]) for row in totals))
    lines = list(dict.fromkeys((row["model"], row["precision"], row["way"]) for row in totals))
    cells = {
        (row["model"], row["precision"], row["way"], row["width"], row["height"], row["targets"]): (
            f"{row['p50_ms']:.3f}" if row["way"] == "floor" else f"{row['p50_ms']:.3f} / {row['p99_ms']:.3f}"
        )
        for row in totals
    }
    titles = ["frame, ms median / p99", "precision", "way", *(f"{w} x {h}, {n}" for w, h, n in columns)]
    return markdown_table(
        titles, [[*line, *(cells.get((*line, *column), "-") for column in columns)] for line in lines]
    )


def slug(name: str) -> str:
    """A GPU's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@contextlib.contextmanager
def _tensorrt(bundle: Bundle, precision: str, options: argparse.Namespace, max_batch: int) -> Iterator[list[Any]]:
    """The runner with and without CUDA graphs; empty where TensorRT cannot run here."""
    from siamtrack.runners.cuda.device import CudaError
    from siamtrack.runners.tensorrt import TensorRTRunner

    with contextlib.ExitStack() as stack:
        runners: list[Any] = []
        try:
            for graphs in (True, False):
                runner = TensorRTRunner(
                    bundle, precision, options.flavour, build="auto", max_batch=max_batch, trial=False, graphs=graphs
                )
                runners.append(stack.enter_context(runner))
        except (EngineError, CudaError) as error:
            print(f"left out: {bundle.manifest.model} {precision} on TensorRT: {error}", file=sys.stderr)
            runners = []
        yield runners


def _engine_rows(case: Case, runners: Sequence[Any], options: argparse.Namespace) -> list[Row]:
    rows = []
    for way, runner in zip(("tensorrt", "tensorrt-queued"), runners, strict=False):
        rows += _runner_rows(way, runner, case, options)
    if runners:
        from benchmarks.gpu_naive import NaiveLoop

        with NaiveLoop(case.bundle, case.precision, case.targets, options.flavour) as naive:
            times = time_frames(partial(naive.frame, fill=FILL), case, options)
            p50, p99 = percentiles(times)
        rows.append(case.row("tensorrt-naive", "total", p50, p99, options.frames))
    return rows


def _runner_rows(way: str, runner: Any, case: Case, options: argparse.Namespace) -> list[Row]:
    """Whole frame, the host's part of it, and the GPU's stages."""
    frame = runner_frame(runner, case.targets)
    host: list[float] = []

    def timed(image: Image, windows: Sequence[Window]) -> None:
        frame(image, windows)
        host.append(1000 * runner.last_timing["crop"])

    p50, p99 = percentiles(time_frames(timed, case, options))
    rows = [case.row(way, "total", p50, p99, options.frames)]
    rows.append(case.row(way, "host", *percentiles(np.array(host[options.warmup :])), options.frames))
    if way != "tensorrt":  # within a replayed graph no stage can be told from the next
        images = camera(case.size, 2)
        features = [runner.template(images[0], Window(0, 0, 120, 120), FILL, (60, 50))] * case.targets
        prev_size = np.full((case.targets, 2), 60, np.float32)
        windows = moving_windows(case.size, case.targets, options.window, options.frames)
        found = [runner.profile(images[i % 2], these, features, prev_size, TUNING) for i, these in enumerate(windows)]
        for stage in found[0]:
            times = np.array([profile[stage] for profile in found])
            rows.append(case.row(way, stage, *percentiles(times), len(times)))
    return rows


def _torch_rows(case: Case, options: argparse.Namespace) -> list[Row]:
    from benchmarks.gpu_torch import TorchLoop, torch_engines
    from siamtrack.nets import MODELS as NETS
    from siamtrack.runners.cuda.driver import CudaDevice
    from siamtrack.runners.cuda.runner import CudaRunner

    if case.bundle.manifest.model not in NETS:
        print(f"left out: {case.bundle.manifest.model} on PyTorch: no such network", file=sys.stderr)
        return []
    rows = []
    for way, graph in (("torch-eager", False), ("torch-graphs", True)):
        loop = TorchLoop(case.bundle, network(case.bundle), case.targets, graph)
        times = time_frames(partial(loop.frame, fill=FILL), case, options)
        rows.append(case.row(way, "total", *percentiles(times), options.frames))
    device = CudaDevice()
    engines = torch_engines(case.bundle, network(case.bundle), device, half=True)
    with CudaRunner(case.bundle, device, engines, max_batch=case.targets, ready_for=(case.targets,)) as runner:
        rows += _runner_rows("torch-runner", runner, case, options)
    return rows


def _floor_rows(bundle: Bundle, options: argparse.Namespace, sizes: Sequence[tuple[int, int]]) -> list[Row]:
    from benchmarks.gpu_torch import count_work, floor_ms, measure_rates
    from benchmarks.model_size import measure
    from siamtrack.nets import MODELS as NETS

    if bundle.manifest.model not in NETS:
        return []
    counted = measure(bundle.manifest.model, partial(network, bundle))
    rows = []
    for precision in options.precisions:
        rates = measure_rates(half=precision != "fp32")  # INT8 against the FP16 rate: its floor may lie lower
        for size in sizes:
            for targets in options.targets:
                floor = floor_ms(count_work(bundle, counted, targets, BYTES[precision]), rates)
                rows.append(Case(bundle, precision, size, targets).row("floor", "total", floor, floor, 0))
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_latency", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME_OR_DIR", help="default: %(default)s")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(BYTES))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="WxH", help="default: %(default)s")
    parser.add_argument("--targets", nargs="+", type=_count, default=list(TARGETS), help="default: %(default)s")
    parser.add_argument("--window", type=_count, default=300, help="side of a search window, px (default: %(default)s)")
    parser.add_argument("--flavour", default="auto", help="TensorRT flavour (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=50, help="frames not timed (default: %(default)s)")
    parser.add_argument("--frames", type=_count, default=300, help="frames timed (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the table (default: %(default)s)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
