"""All packaging metadata, for pip and for colcon (ament_python).

It has to run on the setuptools of every supported ROS distribution (59.6 on Ubuntu 22.04), which reads no `[project]`
table, so the metadata stands here and not in `pyproject.toml`.
"""

import re
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
NAME = "siamtrack"


def read_version() -> str:
    """The version in `siamtrack/version.py`; an error when `package.xml` says another."""
    patterns = {
        "siamtrack/version.py": r'^__version__ = "([^"]+)"',
        "package.xml": r"<version>([^<]+)</version>",
    }
    found = {}
    for file, pattern in patterns.items():
        match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        if match is None:
            raise SystemExit(f"{file} holds no version: expected a match for {pattern}")
        found[file] = match.group(1)
    if len(set(found.values())) > 1:
        raise SystemExit(f"the version must be the same in {' and '.join(found)}, but they say {found}")
    return found["package.xml"]


def read_readme() -> str:
    """The project page, empty while there is none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


TORCH = "torch>=2.4,<3"
# The run-time compiler of CUDA 13, which the newest cuda-python takes; for CUDA 12, add "cuda-python<13" and
# nvidia-cuda-nvrtc-cu12, or have the toolkit's. Wheels for Linux (x86-64 and Arm) and Windows.
NVRTC = "nvidia-cuda-nvrtc>=13,<14; sys_platform != 'darwin'"
# pycuda is compiled on installation, against the CUDA toolkit. Where it is missing, cuda-python does its work too.
CUDA = ["pycuda>=2024.1.2", "cuda-python>=12.6.2,<14", NVRTC]
# What tests of the CUDA side need: 67 MB, no driver, no GPU. cuda-python is this and packages that nothing here uses.
CUDA_TESTS = ["cuda-bindings>=12.8,<14; sys_platform != 'darwin'", NVRTC]
ENGINES = ["onnx>=1.16,<2"]
# There are wheels for Linux (x86-64 and Arm) and Windows.
TENSORRT_RTX = ["tensorrt-rtx-cu13>=1.4,<2; sys_platform != 'darwin'"]
TEST = ["pytest>=8,<10"]
# There is a wheel for Linux on x86-64; elsewhere it is compiled.
VOT = ["vot-trax>=4.0.2,<5"]
# What our numbers and our TraX server are held against, by tests that skip without them. vot-toolkit 0.9 breaks with
# newer versions of attributee.
TOOLKITS = [
    f"{requirement}; sys_platform == 'linux' and platform_machine == 'x86_64'"
    for requirement in (*VOT, "got10k>=0.1.3,<0.2", "vot-toolkit>=0.9,<0.10", "attributee<0.1.10")
]

# The ROS wheels are for CPython 3.11 on Linux, and their message packages load only what they were built against.
ROS_WHEELS = [
    "ros-jazzy-rclpy==7.1.6",
    "ros-rmw-fastrtps-cpp==8.4.3",
    "ros-sensor-msgs==5.3.6",
    "ros-geometry-msgs==5.3.6",
    "ros-std-msgs==5.3.6",
    "ros-std-srvs==5.3.6",
    "ros-diagnostic-msgs==5.3.6",
    "ros-visualization-msgs==5.3.6",
]

EXTRAS = {
    "train": [
        TORCH,
        "lightning>=2.6,<3",
        "tensorboard>=2.17",
        "tqdm>=4.65",
        "safetensors>=0.4.5",
        "pyyaml>=6",
    ],
    "export": [TORCH, "onnx>=1.16,<2", "onnxscript>=0.5.4"],
    "eval": ["tqdm>=4.65", "optuna>=4,<6"],
    "vot": VOT,
    "cluster": ["ray[client]>=2.40"],
    # For a machine without a ROS installation; with one, source its setup file instead.
    "ros": [f"{wheel}; python_version == '3.11' and sys_platform == 'linux'" for wheel in ROS_WHEELS],
    # 10.3 is JetPack 6's.
    "tensorrt": ["tensorrt>=10.3,<12", *ENGINES, *CUDA],
    "tensorrt-rtx": [*TENSORRT_RTX, *ENGINES, *CUDA],
    # Building engines ahead of time needs neither GPU nor CUDA: for build machines and CI.
    "engines": [*TENSORRT_RTX, *ENGINES],
    "test": TEST,
    "dev": [*TEST, *TOOLKITS, *CUDA_TESTS, "ruff>=0.12", "mypy>=1.15", "types-PyYAML"],
}

CONSOLE_SCRIPTS = [
    "siamtrack = siamtrack.cli:main",
    "siamtrack-export = model_export.cli:main",
    "siamtrack-trax = siamtrack.trax:main",
    "siamtrack-ros-demo = ros2_siamtrack.demo:main",
    # Without a prefix: `ros2 run siamtrack tracker_node` says whose they are.
    "tracker_node = ros2_siamtrack.tracker_node:main",
    "clip_player = ros2_siamtrack.clip_player:main",
    "select_target = ros2_siamtrack.select_target:main",
    "record_boxes = ros2_siamtrack.record_boxes:main",
]


def ros_executables() -> list[str]:
    """Files for ``lib/siamtrack`` of a wheel, where `ros2 run` and `ros2 launch` look; written into ``build/``.

    colcon puts the console scripts there itself (``setup.cfg``), while pip puts them into ``bin/``.
    """
    if "bdist_wheel" not in sys.argv:
        return []
    folder = Path("build/ros_executables")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, module in re.findall(r"^(\w+) = (ros2_siamtrack\.\w+):main$", "\n".join(CONSOLE_SCRIPTS), re.MULTILINE):
        file = folder / name
        file.write_text(f"#!/usr/bin/env python3\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n")
        file.chmod(0o755)
        files.append(file.as_posix())
    return files


setup(
    name=NAME,
    version=read_version(),
    description="Siamese single-object tracking in Python and ROS 2, on ONNX Runtime",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    maintainer="siamtrack maintainers",
    maintainer_email="maintainers@siamtrack.invalid",
    python_requires=">=3.10",
    # training/, evaluation/ and benchmarks/ run from the checkout and are not installed.
    packages=find_packages(
        include=[f"{top}{sub}" for top in (NAME, "ros2_siamtrack", "model_export") for sub in ("", ".*")]
    ),
    # Engines lie one folder deeper and fit one GPU: they are not shipped.
    package_data={NAME: ["py.typed", "models/*/*", "runners/cuda/*.cu"], "ros2_siamtrack": ["fastdds.xml"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", sorted(glob("launch/*.launch.py"))),
        (f"lib/{NAME}", ros_executables()),
        (f"share/{NAME}/config", [*sorted(glob("configs/*.yaml")), "ros2_siamtrack/fastdds.xml"]),
    ],
    zip_safe=False,
    install_requires=["numpy>=1.23", "opencv-python>=4.8", "onnxruntime>=1.17", "pyyaml>=6", "tqdm>=4.65"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": CONSOLE_SCRIPTS},
)
