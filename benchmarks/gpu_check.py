"""Everything that only a GPU can show, as one table: `make gpu-check`.

    python benchmarks/gpu_setup.py --sequence FOLDER      # installs wheels/ where something is missing, runs this

Parity (crop, tensors, boxes, closed loop), replayed CUDA graphs against queued calls, memory over many frames, threads
and foreign contexts, running out of memory, interruption, and the latency benchmark. With TensorRT all of it runs on
engines, which are built here; without, PyTorch networks take the engines' place, which proves the rest.

Writes ``gpu_<GPU>.csv`` (the checks) and ``gpu_latency_<GPU>.csv``; exit status 1 when a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, gpu_latency, write_csv
from benchmarks.gpu_checks import check_crop, check_interrupt, check_runner
from benchmarks.gpu_latency import Row, export_random, find_or_export, network, slug
from benchmarks.gpu_table import Check, Table
from siamtrack.bundle import Bundle
from siamtrack.gpu import EngineError, GpuInfo, gpu_info, runtime_info
from siamtrack.runners.cuda.driver import CudaDevice
from siamtrack.runners.cuda.runner import CudaRunner
from siamtrack.runners.tensorrt import TensorRTRunner

DEFAULT_OUT = Path("benchmarks/results")

# What the latency must be (issue: how good). Frame rates of the papers are 29 to 35 a second; ten times the best.
R50_MS = 1000 / 350
EDGE_MS = 0.5
RATIOS = {"torch-eager": 3.0, "tensorrt-naive": 1.5}
LARGE_IMAGE_RATIO = 1.1
EIGHT_TARGETS_RATIO = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 when a check failed, 2 without a GPU."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    gpu = gpu_info()
    if gpu is None:
        print("gpu_check: needs an NVIDIA GPU with its driver and cuda-python; found none", file=sys.stderr)
        return 2
    table = Table()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        check_all(table, options, Path(scratch))
    text = command("benchmarks.gpu_check", arguments)
    write_csv(options.out / f"gpu_{slug(gpu.name)}.csv", [facts(gpu), *(vars(check) for check in table.checks)], text)
    print(f"\n{table.text()}\n\n{gpu.name}: {'passed' if table.ok else 'FAILED'} in {time.monotonic() - began:.0f} s")
    return 0 if table.ok else 1


def check_all(table: Table, options: argparse.Namespace, scratch: Path) -> None:
    """Run every check there is for this machine."""
    with table.attempt("crop", "kernel"):
        check_crop(table)
    for model in options.models:
        if options.tensorrt:
            check_engines(table, model, options, scratch)
        with table.attempt("PyTorch in the engine's place", model):
            check_torch(table, model, options, scratch)
    with table.attempt("Ctrl-C", "PyTorch in the engine's place"):
        check_interrupt(table, scratch)
    if options.latency:
        with table.attempt("latency", "all"):
            check_latency(table, options)


def check_engines(table: Table, model: str, options: argparse.Namespace, scratch: Path) -> None:
    """A model's engines in every precision, built here."""
    try:
        runtime_info(options.flavour)
    except EngineError as error:
        table.skip("engines", model, str(error))
        return
    for precision in options.precisions:
        subject = f"{model} {precision} TensorRT"
        with table.attempt("engines", subject):
            bundle = find_or_export(model, scratch)

            def open_one(bundle: Bundle = bundle, precision: str = precision, **settings: Any) -> Any:
                return TensorRTRunner(bundle, precision, options.flavour, build="auto", **{"trial": False, **settings})

            began = time.monotonic()
            with open_one(trial=True) as runner:
                key = runner.engines.folder.name
            table.add(
                "engines", subject, f"{key}, open after {time.monotonic() - began:.0f} s", "built and loaded", True
            )
            check_runner(table, subject, precision, bundle, open_one, options)


def check_torch(table: Table, model: str, options: argparse.Namespace, scratch: Path) -> None:
    """The same runner with a PyTorch network in the engine's place, FP32, random weights."""
    import torch

    from benchmarks.gpu_torch import torch_engines
    from siamtrack.nets import MODELS as NETS

    if model not in NETS:
        table.skip("PyTorch in the engine's place", model, "no such network")
        return
    bundle = export_random(model, scratch)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as exact as the CPU

    def open_one(**settings: Any) -> Any:
        device = CudaDevice()
        try:
            engines = torch_engines(bundle, network(bundle), device)
        except BaseException:
            device.close()
            raise
        return CudaRunner(bundle, device, engines, **settings)

    check_runner(table, f"{model} fp32 PyTorch", "fp32", bundle, open_one, options, random_weights=True)


def check_latency(table: Table, options: argparse.Namespace) -> None:
    """Run the latency benchmark and hold it to what was promised."""
    arguments = ["--models", *options.models, "--precisions", *options.precisions, "--flavour", options.flavour]
    arguments += ["--out", str(options.out), *options.latency_arguments.split()]
    rows = gpu_latency.measure_all(gpu_latency.parse(arguments))
    gpu = gpu_info()
    name = slug(gpu.name) if gpu else "gpu"
    write_csv(options.out / f"gpu_latency_{name}.csv", rows, command("benchmarks.gpu_latency", arguments))
    print("\n" + gpu_latency.format_totals(rows))
    table.checks += judge(rows)


def judge(rows: Sequence[Row]) -> list[Check]:
    """The latency benchmark against what was promised.

    What is judged is the runner on TensorRT; where that did not run, the PyTorch network in the same runner, for which
    the promises that depend on engines are left out.
    """
    totals = [row for row in rows if row["stage"] == "total"]
    checks: list[Check] = []
    for model, precision in dict.fromkeys((row["model"], row["precision"]) for row in totals):
        # PyTorch runs in FP16 alone: it stands beside the engines of every precision.
        ms = {
            (row["way"], row["width"], row["height"], row["targets"]): row["p50_ms"]
            for row in totals
            if row["model"] == model
            and (row["precision"] == precision or row["way"] in ("torch-eager", "torch-graphs"))
        }
        ways = {key[0] for key in ms}
        way = next((name for name in ("tensorrt", "torch-runner") if name in ways), "")
        sizes = sorted({key[1:3] for key in ms if key[0] == way})
        if not sizes or (way, *sizes[0], 1) not in ms:
            continue
        (width, height), (wide, high) = sizes[0], sizes[-1]
        one = ms[(way, width, height, 1)]
        claims: list[tuple[str, float, str, float]] = []
        if sizes[0] != sizes[-1]:
            claims.append(
                (
                    f"{wide} x {high} against {width} x {height}",
                    ms[(way, wide, high, 1)] / one,
                    "at most",
                    LARGE_IMAGE_RATIO,
                )
            )
        if way == "tensorrt":
            if (way, width, height, 8) in ms:
                claims.append(
                    ("8 targets against one", ms[(way, width, height, 8)] / one, "at most", EIGHT_TARGETS_RATIO)
                )
            if precision == "fp16":
                claims.append(("frame, ms", one, "at most", R50_MS if "r50" in model else EDGE_MS))
                for other, ratio in RATIOS.items():
                    if (other, width, height, 1) in ms:
                        claims.append((f"{other} against it", ms[(other, width, height, 1)] / one, "at least", ratio))
        for what, value, sense, limit in claims:
            passed = value >= limit if sense == "at least" else value <= limit
            wanted = f"{sense} {limit:.3g}"
            result = "pass" if passed else "FAIL"
            checks.append(Check(f"latency: {what}", f"{model} {precision} {way}", f"{value:.3f}", wanted, result))
    return checks


def facts(gpu: GpuInfo) -> Row:
    """What the results depend on, as the first line of the table."""
    import torch

    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    for module in ("tensorrt", "tensorrt_rtx"):
        with contextlib.suppress(ImportError):
            versions.append(f"{module} {__import__(module).__version__}")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions.append("driver " + subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    about = f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.0f} GiB"
    return vars(Check("machine", about, ", ".join(versions), f"{os.cpu_count()} CPU cores", ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=["siamcan-mobilenetv2", "siamcan-r50"], help="default: %(default)s"
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16"], choices=["fp32", "fp16", "int8"])
    parser.add_argument("--flavour", default="auto", help="TensorRT flavour (default: %(default)s)")
    parser.add_argument(
        "--sequence", nargs="*", type=Path, default=[], metavar="FOLDER", help="real sequences, OTB style"
    )
    parser.add_argument("--clip-frames", type=int, default=200, help="frames of the closed loop (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=10_000, help="frames of the memory check (default: %(default)s)")
    parser.add_argument(
        "--no-tensorrt",
        dest="tensorrt",
        action="store_false",
        help="on a GPU that the installed TensorRT does not run on",
    )
    parser.add_argument("--no-latency", dest="latency", action="store_false", help="leave the latency benchmark out")
    parser.add_argument(
        "--latency-arguments", default="", metavar="TEXT", help="further ones for benchmarks.gpu_latency"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the tables (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
