"""Which TensorRT engines of a bundle may be loaded here; building them when none may; trying them in a child process.

What an engine is and how it is checked: `siamtrack.engine_files`. ``siamtrack-export engine`` builds them.
"""

from __future__ import annotations

import json
import logging
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from siamtrack.bundle import PRECISIONS, Bundle
from siamtrack.engine_files import (
    DEFAULT_BATCHES,
    DEFAULT_PRECISION,
    EngineGraph,
    EngineManifest,
    EngineSet,
    engine_folders,
    read_engine_manifest,
    read_engines,
)
from siamtrack.gpu import FLAVOURS, EngineError, RuntimeInfo, runtime_info

__all__ = [
    "EngineError",
    "EngineGraph",
    "EngineManifest",
    "EngineSet",
    "RuntimeInfo",
    "open_engines",
    "runtime_info",
    "trial_load",
]

BUILD_POLICIES = ("never", "auto")
STANDARD_ERROR = 2
PACKAGE_PARENT = Path(__file__).resolve().parent.parent
"""Where child processes start, so that they import this installation and nothing from the caller's folder."""


def open_engines(
    bundle: Bundle,
    runtime: RuntimeInfo,
    precision: str = DEFAULT_PRECISION,
    key_file: Path | None = None,
    build: str = "never",
    max_batch: int = 1,
) -> EngineSet:
    """The bundle's engines for this TensorRT, GPU and precision, checked and ready to be read.

    Checked before any byte reaches TensorRT: the signature (where there is a key), flavour, version, GPU, compute
    capability, precision, batch, hash of the ONNX graph each was made from, and hash of each file.

    Args:
        bundle: a verified bundle.
        runtime: from `runtime_info`.
        precision: one of `siamtrack.bundle.PRECISIONS`.
        key_file: the key that the engines were signed with; None takes unsigned ones too.
        build: "never" refuses what is missing or unfit; "auto" builds it at once, in a child process.
        max_batch: windows of the largest batch that will be run.

    Raises:
        EngineError: none fits, one is damaged, or the build failed. The message holds the command that builds it.
    """
    if build not in BUILD_POLICIES:
        raise ValueError(f"build must be one of {', '.join(BUILD_POLICIES)}, got {build!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if runtime.gpu is None:
        raise EngineError(
            "no NVIDIA GPU was found, so no engine can run: check the driver with nvidia-smi (Jetson: tegrastats) and "
            "that cuda-python is installed (pip install cuda-python), or use the onnxruntime backend"
        )
    arguments = build_arguments(bundle, runtime.flavour, precision, key_file, max_batch)
    command = shlex.join(["siamtrack-export", *arguments])
    try:
        return _find(bundle, runtime, precision, key_file, max_batch)
    except EngineError as error:
        if build == "never":
            raise EngineError(f"{error}; build it: {command}") from error
        logging.getLogger(__name__).warning("%s; building it now, which can take minutes: %s", error, command)
    _build(arguments, command)
    try:
        return _find(bundle, runtime, precision, key_file, max_batch)
    except EngineError as error:
        raise EngineError(f"{command} ran without an error, and yet: {error}") from error


def build_arguments(
    bundle: Bundle, flavour: str, precision: str, key_file: Path | None = None, max_batch: int = 1
) -> list[str]:
    """Arguments of ``siamtrack-export`` that build a bundle's engines."""
    batches = [b for b in DEFAULT_BATCHES if b < max_batch] + [max_batch] if max_batch > 1 else list(DEFAULT_BATCHES)
    arguments = ["engine", str(bundle.path.resolve()), "--runtime", flavour, "--precision", precision]
    arguments += ["--batch", ",".join(map(str, batches))]
    return arguments + (["--sign-key", str(key_file.resolve())] if key_file else [])


def why_unfit(manifest: EngineManifest, runtime: RuntimeInfo, precision: str, max_batch: int = 1) -> str:
    """Why engines cannot run here, or empty: flavour, version, GPU, compute capability, precision, batch."""
    gpu = runtime.gpu
    for what, built, here in (
        ("TensorRT flavour", manifest.flavour, runtime.flavour),
        ("TensorRT version", manifest.version, runtime.version),
        ("precision", manifest.precision, precision),
        ("GPU", manifest.gpu, gpu.name if gpu and manifest.gpu else manifest.gpu),
    ):
        if built != here:
            return f"foreign: it was built for {what} {built}, and this is {here}"
    if gpu and manifest.compute_capabilities and gpu.compute_capability not in manifest.compute_capabilities:
        built = ", ".join(manifest.compute_capabilities)
        return f"foreign: it was built for compute capability {built}; the {gpu.name} has {gpu.compute_capability}"
    if max_batch > manifest.batches[-1]:
        return f"too small: it takes up to {manifest.batches[-1]} windows at once, and {max_batch} are wanted"
    return ""


def trial_load(engines: EngineSet, timeout_s: float = 300.0) -> None:
    """Deserialise every engine in a child process, which a corrupt one may end, and make an execution context of each.

    Raises:
        EngineError: it did not load; the message holds what TensorRT said, or the signal that ended the child.
    """
    files = {str(engines.folder / graph.file): graph.sha256 for graph in engines.manifest.graphs.values()}
    order = json.dumps({"module": FLAVOURS[engines.manifest.flavour], "files": files})
    command = [sys.executable, "-m", "siamtrack.trial"]
    try:
        child = subprocess.run(
            command, input=order, capture_output=True, text=True, cwd=PACKAGE_PARENT, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{engines.folder}: the engines did not load within {timeout_s:.0f} s") from error
    if child.returncode == 0:
        return
    said = (child.stderr.strip() or child.stdout.strip())[-2000:]
    if child.returncode < 0:
        said = f"the process that tried was ended by {signal.Signals(-child.returncode).name}: {said}"
    raise EngineError(f"{engines.folder}: the engines do not load here, build them again: {said}")


def _find(bundle: Bundle, runtime: RuntimeInfo, precision: str, key_file: Path | None, max_batch: int) -> EngineSet:
    """The first engines that fit and are sound; those built for this very GPU before those for several."""
    unfit: list[str] = []
    fitting = []
    for folder in engine_folders(bundle):
        try:
            manifest = read_engine_manifest(folder)
        except EngineError as error:
            unfit.append(str(error))
            continue
        reason = why_unfit(manifest, runtime, precision, max_batch)
        if reason:
            unfit.append(f"{folder.name}: {reason}")
        else:
            fitting.append((not manifest.gpu, folder))
    for _, folder in sorted(fitting):
        try:
            found = read_engines(folder, bundle, key_file)
            # Again, of what was read now: with a key only this is known to be signed.
            reason = why_unfit(found.manifest, runtime, precision, max_batch)
            if not reason:
                return found
            unfit.append(f"{folder.name}: {reason}")
        except EngineError as error:
            unfit.append(str(error))
    gpu = runtime.gpu.name if runtime.gpu else "any GPU"
    wanted = f"{precision} engines for {runtime.flavour} {runtime.version} on {gpu}"
    if unfit:
        raise EngineError(f"{bundle.path}: no usable {wanted}: " + "; ".join(unfit))
    raise EngineError(f"{bundle.path}: no {wanted} have been built")


def _build(arguments: list[str], command: str) -> None:
    """Run ``siamtrack-export`` of this installation; its output goes to standard error."""
    child = [sys.executable, "-m", "model_export.cli", *arguments]
    try:
        status = subprocess.run(child, cwd=PACKAGE_PARENT, stdout=STANDARD_ERROR, check=False).returncode
    except OSError as error:
        raise EngineError(f"{command} could not be started: {error}") from error
    if status != 0:
        raise EngineError(f"{command} ended with status {status}; what went wrong is printed above")
