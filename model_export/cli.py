"""The ``siamtrack-export`` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 outside tolerance, 2 unusable input."""
    parser = argparse.ArgumentParser(prog="siamtrack-export", description="Make runnable bundles from checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    onnx = commands.add_parser(
        "onnx", help="write template.onnx, search.onnx and manifest.json, and verify them against PyTorch"
    )
    onnx.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of training.train, or a state dict")
    onnx.add_argument("--out", type=Path, required=True, help="bundle folder to write")
    onnx.add_argument("--model", help="model name, for a state dict that does not say")
    onnx.add_argument("--licence", default="unspecified", help="licence of the weights, an SPDX id where there is one")
    onnx.add_argument("--note", action="append", default=[], metavar="KEY=TEXT", help="add a provenance entry")
    onnx.add_argument("--crops", type=int, default=100, help="random and real crops to verify on, each (default 100)")
    onnx.add_argument("--images", type=Path, help="folder of photos for the real crops (default: the rendered scene)")
    options = parser.parse_args(arguments)
    try:
        return _onnx(options)
    except ImportError as error:
        print(f"error: {error}\nexport needs PyTorch and onnx: pip install 'siamtrack[export]'", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def _onnx(options: argparse.Namespace) -> int:
    from model_export.checkpoint import load_checkpoint
    from model_export.onnx_export import export_bundle
    from model_export.verify import compare_with_onnxruntime, random_pairs, real_pairs

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


if __name__ == "__main__":
    sys.exit(main())
