"""The arrows between the packages, as `docs/architecture.md` draws them: who may import whom."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import siamtrack

ROOT = Path(siamtrack.__file__).parent
REPOSITORY = ROOT.parent
ROS = {"ament_index_python", "cv_bridge", "geometry_msgs", "rclpy", "sensor_msgs", "std_msgs", "vision_msgs"}
GPU = {"cuda", "pycuda", "tensorrt", "tensorrt_rtx", "cupy"}
TRAINING = {"lightning", "onnx", "onnxscript", "pytorch_lightning", "torch", "torchvision"}
OURS_ABOVE = {"benchmarks", "evaluation", "model_export", "ros2_siamtrack", "training"}

NEEDS_GPU = {"siamtrack.runners.tensorrt", "siamtrack.runners.torch"}
# Modules outside nets/ that may import torch inside a function; each needs a reason here.
LAZY_TORCH: set[str] = set()
# Modules outside nets/ that may import nets inside a function: the command that imports public weights.
LAZY_NETS = {"siamtrack.cli"}

BLOCK_AND_IMPORT = """
import importlib, sys

blocked, modules = (set(names.split(",")) for names in sys.argv[1:])

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked by this test", name=name)

sys.meta_path.insert(0, Block())
for name in sorted(blocked):  # a hook that does not bite would let everything pass
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} was not blocked")
for name in sorted(modules):
    importlib.import_module(name)
print(len(modules), "imported")
"""


def module_name(file: Path, root: Path = REPOSITORY) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}
NETS = {name for name in MODULES if name.startswith("siamtrack.nets")}


def import_all(modules: set[str], blocked: set[str]) -> None:
    command = [sys.executable, "-c", BLOCK_AND_IMPORT, ",".join(sorted(blocked)), ",".join(sorted(modules))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(modules)} imported"


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Dotted names a module imports, each with whether that happens inside a function."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                yield from ((f"{child.module}.{alias.name}", lazy) for alias in child.names)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, lazy or inside)

    yield from walk(ast.parse(source), False)


def imported_packages(file: Path) -> dict[str, bool]:
    """Top packages a file imports; True where every import of it is inside a function."""
    packages: dict[str, bool] = {}
    for name, lazy in imports(file.read_text()):
        package = name.partition(".")[0]
        packages[package] = packages.get(package, True) and lazy
    return packages


def test_the_scan_sees_every_form_of_import() -> None:
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\n"
    source += "def h():\n  import i\n  try:\n    from j import k\n  except E: ..."
    assert list(imports(source)) == [("a.b", False), ("c", False), ("d.e.f", False), ("i", True), ("j.k", True)]


def test_every_module_is_found() -> None:
    assert {"siamtrack", "siamtrack.tracker", "siamtrack.runners.onnxruntime", "siamtrack.nets"} <= set(MODULES)


def test_library_imports_without_ros_gpu_and_training_packages() -> None:
    import_all(set(MODULES) - NETS - NEEDS_GPU, blocked=ROS | GPU | TRAINING | OURS_ABOVE)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="networks need torch: pip install siamtrack[train]"
)
def test_networks_import_without_ros_gpu_and_training_loop() -> None:
    import_all(NETS, blocked=ROS | GPU | OURS_ABOVE | {"lightning", "pytorch_lightning", "onnx", "onnxscript"})


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_nothing_above_it(name: str) -> None:
    packages = imported_packages(MODULES[name])
    # Lazily neither: an arrow in a function is an arrow.
    assert not set(packages) & (ROS | OURS_ABOVE)
    if name in NETS or name in NEEDS_GPU:
        return
    assert not {p for p, lazy in packages.items() if p in TRAINING and not (lazy and name in LAZY_TORCH)}
    nets = [lazy for full, lazy in imports(MODULES[name].read_text()) if full.startswith("siamtrack.nets")]
    assert not nets or (all(nets) and name in LAZY_NETS)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("training", ROS | {"ros2_siamtrack", "model_export"}),
        ("model_export", ROS | {"ros2_siamtrack"}),
        ("evaluation", ROS | {"ros2_siamtrack", "training"}),
        ("benchmarks", {"training"}),
        ("ros2_siamtrack", TRAINING | {"training", "model_export", "evaluation"}),
    ],
)
def test_tools_import_nothing_above_them(folder: str, forbidden: set[str]) -> None:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    if not files:
        pytest.skip(f"no {folder} in this checkout")
    found = {f"{module_name(f)} imports {p}" for f in files for p in set(imported_packages(f)) & forbidden}
    if folder == "benchmarks":  # two of these measure the node, one the trainer; the others must run without
        with_ros = {f.stem for f in files if set(imported_packages(f)) & (ROS | {"ros2_siamtrack"})}
        found |= with_ros - {"ros_latency", "ros_soak"}
        found -= {"benchmarks.training_throughput imports training"}
    assert not found
