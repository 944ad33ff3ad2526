"""What this machine has, and the command that adds what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from siamtrack.bundle import Bundle, BundleError, load_bundle, shipped_models
from siamtrack.cpu import cpu_name, dot_products_here
from siamtrack.engine_files import engine_folders, read_engines
from siamtrack.engines import why_unfit
from siamtrack.gpu import FLAVOURS, EngineError, RuntimeInfo, runtime_info
from siamtrack.runners import cpu_precision
from siamtrack.version import __version__

CUDA_REMEDY = "pip install cuda-python (tells which GPU is here, and runs engines on it)"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked for.
        ok: it is there and usable; None where it is optional and absent.
        detail: version, or what is wrong.
        remedy: command or step that mends it; empty when there is nothing to do.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def print_report() -> int:
    """Print all findings; returns 0, or 1 when something the tracker cannot do without is missing."""
    findings = examine()
    for finding in findings:
        mark = {True: "ok", False: "MISSING", None: "-"}[finding.ok]
        print(f"{mark:<8}{finding.name:<18}{finding.detail}")
        if finding.remedy:
            print(f"{'':<8}{'':<18}-> {finding.remedy}")
    return 0 if all(f.ok is not False for f in findings) else 1


def examine() -> list[Finding]:
    """Look at interpreter, runtime packages, CPU, models, GPU, TensorRT and ROS."""
    return [
        Finding("siamtrack", True, f"{__version__}, Python {platform.python_version()}, {platform.machine()}"),
        _package("numpy", "numpy", "pip install numpy", needed=True),
        _opencv(),
        _package("onnxruntime", "onnxruntime", "pip install onnxruntime", needed=True),
        _cpu(),
        _models(),
        _gpu(),
        *_tensorrt(),
        _package("cuda-python", "cuda-python", CUDA_REMEDY, module="cuda"),
        *_engines(),
        _package("pycuda", "pycuda", "pip install 'siamtrack[tensorrt]' (needs an NVIDIA driver)"),
        _package("torch", "torch", "pip install 'siamtrack[train]' (only to train and export)"),
        _package("onnx", "onnx", "pip install 'siamtrack[export]' (only to export)"),
        _ros(),
        _ros_package("cv_bridge", "cv-bridge"),
        _ros_package("vision_msgs", "vision-msgs"),
    ]


def _package(name: str, distribution: str, remedy: str, needed: bool = False, module: str = "") -> Finding:
    if importlib.util.find_spec(module or name) is None:
        return Finding(name, False if needed else None, "not installed", remedy)
    return Finding(name, True, _version(distribution))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed (version unknown)"


def _opencv() -> Finding:
    try:
        import cv2
    except ImportError as error:
        return Finding("opencv", False, str(error), "pip install opencv-python (on a server: opencv-python-headless)")
    lines = {key.strip(): value.strip() for key, _, value in map(_split, cv2.getBuildInformation().splitlines())}
    windows = lines.get("GUI", "NONE")
    return Finding(
        "opencv", True, f"{cv2.__version__}, windows: {windows or 'yes'}, FFmpeg: {lines.get('FFMPEG', 'NO')}"
    )


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _cpu() -> Finding:
    fast = dot_products_here()
    return Finding("cpu", True, f"{cpu_name()}, {fast or 'no dot products of bytes, so that INT8 gains nothing'}")


def _models() -> Finding:
    names = shipped_models()
    try:
        found = [f"{name}: {cpu_precision(load_bundle(name))}" for name in names]
    except BundleError as error:
        return Finding("models", False, str(error), "reinstall: pip install --force-reinstall siamtrack")
    if not names:
        return Finding("models", False, "none in the package", "reinstall: pip install --force-reinstall siamtrack")
    return Finding("models", True, ", ".join(found))


def _gpu() -> Finding:
    jetson = Path("/etc/nv_tegra_release")
    if jetson.exists():
        return Finding("gpu", True, "Jetson: " + jetson.read_text(errors="replace").splitlines()[0])
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", None, "no NVIDIA driver found; the CPU backend is used")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("gpu", None, f"nvidia-smi does not answer: {error}", "check the driver: nvidia-smi")
    return Finding("gpu", True, "; ".join(run.stdout.strip().splitlines()))


def _tensorrt() -> list[Finding]:
    """Each flavour that is installed; one line saying so where none is."""
    findings = []
    for flavour, module in FLAVOURS.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            runtime = runtime_info(flavour)
        except EngineError as error:
            findings.append(Finding(flavour, None, str(error), f"pip install --force-reinstall 'siamtrack[{flavour}]'"))
            continue
        gpu = runtime.gpu
        where = f"{gpu.name}, compute capability {gpu.compute_capability}" if gpu else "no GPU to run on found"
        findings.append(Finding(flavour, True, f"{runtime.version}, {where}"))
    if findings:
        return findings
    remedy = "pip install 'siamtrack[tensorrt]' (data centre), 'siamtrack[tensorrt-rtx]' (RTX cards); Jetson: JetPack"
    return [Finding("tensorrt", None, "not installed", remedy)]


def _engines() -> list[Finding]:
    """Each engine folder of the shipped bundles, and whether it can run here."""
    runtimes = {}
    for flavour in FLAVOURS:
        with suppress(EngineError):
            runtimes[flavour] = runtime_info(flavour)
    findings = []
    for name in shipped_models():
        with suppress(BundleError):
            bundle = load_bundle(name)
            findings += [_engine(bundle, folder, runtimes) for folder in engine_folders(bundle)]
    return findings


def _engine(bundle: Bundle, folder: Path, runtimes: Mapping[str, RuntimeInfo]) -> Finding:
    title = f"{bundle.manifest.model}: {folder.name}"
    rebuild = f"siamtrack-export engine {bundle.manifest.model}"
    try:
        manifest = read_engines(folder, bundle).manifest
    except EngineError as error:
        return Finding("engine", None, f"{title}: {error}", f"{rebuild}, or remove {folder}")
    rebuild += f" --precision {manifest.precision}"
    runtime = runtimes.get(manifest.flavour)
    if runtime is None:
        return Finding("engine", None, f"{title}: {manifest.flavour} is not installed", rebuild)
    reason = why_unfit(manifest, runtime, manifest.precision)
    if reason:
        return Finding("engine", None, f"{title}: {reason}", rebuild)
    if runtime.gpu is None:
        return Finding("engine", None, f"{title}: sound, but there is no GPU to run it on")
    return Finding("engine", True, f"{title}: usable, up to {manifest.batches[-1]} windows")


def _ros() -> Finding:
    distribution = os.environ.get("ROS_DISTRO", "")
    if importlib.util.find_spec("rclpy") is not None:
        return Finding("ros2", True, f"rclpy found, ROS_DISTRO={distribution or 'unset'}")
    installed = sorted(p.name for p in Path("/opt/ros").glob("*")) if Path("/opt/ros").is_dir() else []
    if installed:
        return Finding(
            "ros2",
            None,
            f"{', '.join(installed)} installed, not sourced",
            f"source /opt/ros/{installed[-1]}/setup.bash",
        )
    if sys.version_info[:2] == (3, 11):
        return Finding("ros2", None, "not installed", "pip install 'siamtrack[ros]', or install ROS 2 Jazzy")
    return Finding(
        "ros2", None, "not installed", "install ROS 2 Jazzy or Humble: https://docs.ros.org/en/jazzy/Installation.html"
    )


def _ros_package(module: str, package: str) -> Finding:
    if importlib.util.find_spec(module) is not None:
        return Finding(module, True, "found")
    return Finding(module, None, "not found", f"sudo apt install ros-$ROS_DISTRO-{package}")
