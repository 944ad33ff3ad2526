"""The ``siamtrack-export`` command: checkpoints to bundles, bundles to other precisions and to TensorRT engines."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

from siamtrack.bundle import PRECISIONS, Bundle
from siamtrack.engine_files import DEFAULT_BATCHES, DEFAULT_PRECISION
from siamtrack.gpu import FLAVOURS

COMPARED_CROPS, COMPARED_FRAMES = 50, 150


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 outside tolerance, 2 unusable input or failed, 130 stopped."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ImportError as error:
        print(f"error: {error}\nmissing packages: pip install 'siamtrack[{options.extra}]'", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siamtrack-export", description="Make bundles from checkpoints, and engines from bundles."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    onnx = commands.add_parser("onnx", help="checkpoint to bundle: graphs and manifest, verified against PyTorch")
    onnx.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of training.train, or a state dict")
    onnx.add_argument("--out", type=Path, required=True, help="bundle folder to write")
    onnx.add_argument("--model", help="model name, for a state dict that does not say")
    onnx.add_argument("--licence", default="unspecified", help="licence of the weights, an SPDX id where there is one")
    onnx.add_argument("--note", action="append", default=[], metavar="KEY=TEXT", help="add a provenance entry")
    onnx.add_argument("--crops", type=int, default=100, help="random and real crops to verify on, each (default 100)")
    onnx.add_argument("--images", type=Path, help="folder of photos for the real crops (default: the rendered scene)")
    onnx.set_defaults(run=_onnx, extra="export")

    engine = commands.add_parser("engine", help="build TensorRT engines into BUNDLE/engines/")
    engine.add_argument("bundle", help="bundle folder, or a shipped model's name")
    engine.add_argument("--runtime", choices=("auto", *FLAVOURS), default="auto", help="default: what is installed")
    engine.add_argument(
        "--precision", choices=PRECISIONS, default=DEFAULT_PRECISION, help=f"default: {DEFAULT_PRECISION}"
    )
    engine.add_argument(
        "--batch",
        type=_batches,
        default=DEFAULT_BATCHES,
        metavar="N,N",
        help="numbers of windows to tune for; every number up to the largest runs (default: 1,4,8)",
    )
    engine.add_argument("--timing-cache", type=Path, metavar="FILE", help="keep kernels' times here between builds")
    engine.add_argument(
        "--compute-capability",
        type=_capabilities,
        default=(),
        metavar="X.Y,X.Y",
        help="build ahead for these GPUs, such as 8.6,8.9 (TensorRT-RTX only; default: Ampere and later)",
    )
    _calibration_options(engine)
    engine.add_argument("--sign-key", type=Path, metavar="FILE", help="sign with this key (at least 16 random bytes)")
    engine.set_defaults(run=_engine, extra="tensorrt")

    precision = commands.add_parser("precision", help="a bundle in another precision, for ONNX Runtime")
    precision.add_argument("bundle", help="FP32 bundle folder, or a shipped model's name")
    precision.add_argument("--precision", choices=[p for p in PRECISIONS if p != "fp32"], required=True)
    place = precision.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, help="bundle folder to write")
    place.add_argument(
        "--add", action="store_true", help="int8 only: put the graphs into the bundle, beside the FP32 ones"
    )
    _calibration_options(precision)
    precision.set_defaults(run=_precision, extra="export")

    verify = commands.add_parser("verify", help="compare runtimes and precisions: tensors, boxes and closed loop")
    verify.add_argument("bundle", help="FP32 bundle folder, or a shipped model's name")
    verify.add_argument("--checkpoint", type=Path, help="compare PyTorch too")
    verify.add_argument("--model", help="model name, for a state dict that does not say")
    verify.add_argument("--precision", default="fp16,int8", help="precisions to compare (default: fp16,int8)")
    verify.add_argument("--runtime", choices=("auto", *FLAVOURS), default="auto", help="whose engines to compare")
    verify.add_argument("--crops", type=int, default=COMPARED_CROPS, help="crops to compare on (default %(default)s)")
    verify.add_argument(
        "--frames", type=int, default=COMPARED_FRAMES, help="frames of the closed loop (default %(default)s)"
    )
    verify.add_argument("--sequence", type=Path, metavar="DIR", help="image sequence (default: the rendered scene)")
    verify.add_argument("--init", type=_box, metavar="X,Y,W,H", help="first box, where groundtruth_rect.txt is missing")
    _calibration_options(verify)
    verify.set_defaults(run=_verify, extra="export")
    return parser


def _calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration-images", type=Path, metavar="DIR", help="photos for INT8 (default: the rendered scene)"
    )
    parser.add_argument("--calibration-crops", type=_count, default=128, help="crops for INT8 (default 128)")


def _onnx(options: argparse.Namespace) -> int:
    from model_export.onnx_export import export_bundle
    from model_export.verify import compare_with_onnxruntime, random_pairs, real_pairs
    from siamtrack.nets.checkpoint import load_checkpoint

    notes = {}
    for note in options.note:
        key, separator, text = note.partition("=")
        if not separator or not key:
            raise ValueError(f"--note expects KEY=TEXT, got {note!r}")
        notes[key] = text
    checkpoint = load_checkpoint(options.checkpoint, options.model)
    bundle = export_bundle(
        checkpoint.model, checkpoint.net, options.out, options.licence, {**checkpoint.provenance, **notes}
    )
    print(f"{checkpoint.model} -> {options.out} ({bundle.size_bytes() / 1e6:.1f} MB)")
    random = compare_with_onnxruntime(checkpoint.net, bundle, random_pairs(bundle, options.crops))
    real = compare_with_onnxruntime(checkpoint.net, bundle, real_pairs(bundle, options.crops, options.images))
    print(f"  PyTorch / ONNX Runtime, random: {random}")
    print(f"  PyTorch / ONNX Runtime, real:   {real}")
    return 0 if random.ok and real.ok else 1


def _engine(options: argparse.Namespace) -> int:
    from model_export.engine_build import BuildSettings, build_engines, summary
    from siamtrack.bundle import load_bundle
    from siamtrack.gpu import runtime_info

    bundle = load_bundle(options.bundle)
    runtime = runtime_info(options.runtime)
    settings = BuildSettings(
        precision=options.precision,
        batches=options.batch,
        compute_capabilities=options.compute_capability,
        timing_cache=options.timing_cache,
        calibration_images=options.calibration_images,
        calibration_crops=options.calibration_crops,
        key_file=options.sign_key,
    )
    gpu = f" on {runtime.gpu.name}" if runtime.gpu else ", no GPU here"
    print(f"{bundle.manifest.model}, {options.precision}: {runtime.flavour} {runtime.version}{gpu}")
    if options.timing_cache and runtime.flavour == "tensorrt-rtx":
        print("TensorRT-RTX measures nothing while building: --timing-cache is not used")
    engines, built = build_engines(bundle, runtime, settings)
    print(summary(built))
    manifest = engines.manifest
    target = manifest.gpu or "compute capability " + ", ".join(manifest.compute_capabilities)
    batches = ", ".join(map(str, manifest.batches))
    print(f"for {target}; 1 to {manifest.batches[-1]} windows, tuned for {batches}: {engines.folder}")
    return 0


def _precision(options: argparse.Namespace) -> int:
    from model_export.convert import convert_bundle
    from siamtrack.bundle import load_bundle

    bundle = load_bundle(options.bundle)
    if options.add:
        return _add_int8(bundle, options)
    out = convert_bundle(bundle, options.precision, options.out, options.calibration_images, options.calibration_crops)
    sizes = f"{bundle.size_bytes() / 1e6:.1f} MB -> {out.size_bytes() / 1e6:.1f} MB"
    print(f"{bundle.manifest.model} {options.precision} -> {options.out} ({sizes})")
    return 0


def _add_int8(bundle: Bundle, options: argparse.Namespace) -> int:
    """Make the INT8 graphs elsewhere, and put them into the bundle if they do what the FP32 graphs do."""
    from model_export.compare import compare, report, scene_clip
    from model_export.convert import add_int8, convert_bundle
    from model_export.crops import real_pairs
    from siamtrack.runners.onnxruntime import OnnxRuntimeRunner

    if options.precision != "int8":
        raise ValueError(f"--add is for int8, got {options.precision}; write a bundle of its own with --out")
    if not os.access(bundle.path, os.W_OK):
        raise PermissionError(
            f"{bundle.path} cannot be written to; copy it to a folder of yours (cp -r), and name that"
        )
    images, clip = options.calibration_images, scene_clip(COMPARED_FRAMES)
    unseen = list(real_pairs(bundle, COMPARED_CROPS, images, seed=1))  # by the calibration, which has another seed
    with tempfile.TemporaryDirectory() as scratch:
        converted = convert_bundle(bundle, "int8", Path(scratch), images, options.calibration_crops)
        with OnnxRuntimeRunner(bundle) as fp32, OnnxRuntimeRunner(converted) as int8:
            comparisons = list(compare(fp32, [("ONNX Runtime int8", "int8", int8)], unseen, clip))
        print(report(bundle, comparisons, unseen, clip))
        if not all(comparison.ok for comparison in comparisons):
            print(f"{bundle.path} stays as it is: calibrate on other photos, with --calibration-images DIR")
            return 1
        sizes = bundle.size_bytes(), add_int8(bundle, converted).size_bytes()
    print(f"{bundle.manifest.model} int8 -> {bundle.path} ({sizes[0] / 1e6:.1f} MB -> {sizes[1] / 1e6:.1f} MB)")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from model_export.compare import folder_clip, report, scene_clip
    from model_export.crops import real_pairs
    from model_export.verify import compare_runtimes
    from siamtrack.bundle import load_bundle

    precisions = tuple(options.precision.split(","))
    unknown = [p for p in precisions if p not in PRECISIONS]
    if unknown:
        raise ValueError(f"--precision: {', '.join(unknown)} is none of {', '.join(PRECISIONS)}")
    bundle = load_bundle(options.bundle)
    clip = (
        folder_clip(options.sequence, options.frames, options.init) if options.sequence else scene_clip(options.frames)
    )
    pairs = list(real_pairs(bundle, options.crops, options.calibration_images))
    comparisons = compare_runtimes(
        bundle,
        pairs,
        clip,
        precisions,
        runtime=options.runtime,
        checkpoint=options.checkpoint,
        model=options.model,
        images=options.calibration_images,
        calibration_crops=options.calibration_crops,
    )
    print(report(bundle, comparisons, pairs, clip))
    return 0 if all(comparison.ok for comparison in comparisons) else 1


def _batches(text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(v) for v in text.split(",")}))
    except ValueError:
        values = ()
    if not values or values[0] < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers above 0 such as 1,4,8, got {text!r}")
    return values


def _capabilities(text: str) -> tuple[str, ...]:
    values = tuple(text.split(","))
    if not all(re.fullmatch(r"\d+\.\d", value) for value in values):
        raise argparse.ArgumentTypeError(f"expected compute capabilities such as 8.6,8.9, got {text!r}")
    return values


def _box(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 4:
        raise argparse.ArgumentTypeError(f"expected four numbers X,Y,W,H, got {text!r}")
    return values


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
