"""Start a GPU script from a plain checkout: is there a GPU, is everything installed, and if not, are there wheels?

    python benchmarks/gpu_setup.py [--wheels DIR] [--module benchmarks.gpu_check] [arguments of the module]

Needs nothing but Python. Wheels that lie in DIR (default ``wheels/``) are installed into a scratch folder, without
internet and without touching the environment, where something is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {
    "numpy": "numpy",
    "cv2": "opencv-python",
    "onnxruntime": "onnxruntime",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "torch": "torch",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "cuda.bindings": "cuda-python",
}
"""Module: what to install for it."""
TENSORRT = ("tensorrt", "tensorrt_rtx")  # one of them; without, only what lies round the engines can be checked


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: that of the module, or 2 where it cannot run here."""
    parser = argparse.ArgumentParser(description="Run a GPU script from a plain checkout.")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="folder of wheels (default %(default)s)")
    parser.add_argument("--module", default="benchmarks.gpu_check", help="what to run (default %(default)s)")
    options, rest = parser.parse_known_args(arguments)
    problem = no_gpu()
    if problem:
        print(f"{options.module}: needs an NVIDIA GPU, and here {problem}", file=sys.stderr)
        return 2
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory(prefix="siamtrack-wheels-") as scratch:
        missing = missing_modules()
        wheels = sorted(options.wheels.glob("*.whl"))
        if wheels and (missing or not any(_is_there(name) for name in TENSORRT)):
            print(f"installing {len(wheels)} wheels of {options.wheels}", flush=True)
            install(wheels, scratch)
            sys.path.insert(0, scratch)
            importlib.invalidate_caches()
            environment["PYTHONPATH"] = os.pathsep.join([scratch, environment["PYTHONPATH"]])
            libraries = map(str, sorted(Path(scratch).glob("nvidia/*/lib")))  # such as NVRTC, found by the loader alone
            known = os.environ.get("LD_LIBRARY_PATH", "")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [*libraries, known]))
            missing = missing_modules()
        if missing:
            print(
                f"{options.module}: {', '.join(missing)} missing; pip install {' '.join(NEEDED[m] for m in missing)}, "
                f"or put their wheels into {options.wheels} (another folder: --wheels DIR, make gpu-check WHEELS=DIR)",
                file=sys.stderr,
            )
            return 2
        command = [sys.executable, "-m", options.module, *rest]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def no_gpu() -> str:
    """Why there is no GPU to use, or empty."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver finds none (CUDA error {status}); see nvidia-smi"
    return "" if count.value else "the NVIDIA driver sees none; CUDA_VISIBLE_DEVICES may hide it"


def missing_modules() -> list[str]:
    """Those of `NEEDED` that are not installed."""
    return [name for name in NEEDED if not _is_there(name)]


def install(wheels: Sequence[Path], folder: str) -> None:
    """Unpack wheels into a folder, with pip and without internet.

    Raises:
        subprocess.CalledProcessError: one does not fit this Python.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    target = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", folder]
    subprocess.run([*pip, *target, *map(str, wheels)], check=True)


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package it is in
        return False


if __name__ == "__main__":
    sys.exit(main())
