"""Launch and parameter files, read as text: this needs neither ROS nor its launch packages."""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ARGUMENTS = {
    "tracker": {
        "namespace",
        "image",
        "camera_info",
        "model",
        "backend",
        "precision",
        "build_engines",
        "engine_key_file",
        "params_file",
        "use_sim_time",
        "autostart",
        "respawn",
        "log_level",
    },
    "demo": {"namespace", "source", "init", "rate_hz", "loop", "record", "view"},
}


def launch_file(name: str) -> Path:
    return ROOT / "launch" / f"{name}.launch.py"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_launch_file_compiles_and_declares_its_arguments(name: str) -> None:
    tree = ast.parse(launch_file(name).read_text())
    compile(tree, str(launch_file(name)), "exec")
    declared = calls(tree, "DeclareLaunchArgument")
    assert {ast.literal_eval(c.args[0]) for c in declared} == ARGUMENTS[name]
    assert all({"default_value", "description"} <= {k.arg for k in c.keywords} for c in declared)
    used = [c.args[0] for c in [*calls(tree, "LaunchConfiguration"), *calls(tree, "text"), *calls(tree, "value")]]
    assert {c.value for c in used if isinstance(c, ast.Constant)} <= ARGUMENTS[name]


def test_a_wheel_brings_the_nodes_where_ros2_run_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(tmp_path)

    def executables(command: str) -> list[Path]:
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        runpy.run_path(str(ROOT / "setup.py"))
        return [Path(file) for file in dict(given["data_files"])["lib/siamtrack"]]

    files = executables("bdist_wheel")
    assert {f.name for f in files} == {"tracker_node", "clip_player", "select_target", "record_boxes"}
    for file in files:
        assert os.access(file, os.X_OK)
        assert file.read_text().startswith("#!/usr/bin/env python3\n")
        assert f"from ros2_siamtrack.{file.name} import main" in file.read_text()
    assert executables("install") == []  # colcon, which puts the console scripts there


def calls(tree: ast.AST, function: str) -> list[ast.Call]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call for call in found if isinstance(call.func, ast.Name) and call.func.id == function]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_is_started_is_installed(name: str) -> None:
    source = launch_file(name).read_text()
    scripts = set(re.findall(r'"(\w+) = ros2_siamtrack\.\w+:main"', (ROOT / "setup.py").read_text()))
    started = set(re.findall(r'package="siamtrack",\s+executable="(\w+)"', source))
    assert started
    assert started <= scripts
    for script in scripts:
        assert "def main(" in (ROOT / "ros2_siamtrack" / f"{script}.py").read_text()


def test_parameter_file_is_the_table() -> None:
    parameters = pytest.importorskip("ros2_siamtrack.parameters", exc_type=ImportError)
    written = yaml.safe_load((ROOT / "configs" / "tracker.yaml").read_text())
    assert list(written) == ["/**"]
    values = written["/**"]["ros__parameters"]
    assert values == {p.name: p.default for p in parameters.PARAMETERS}
    assert {k: type(v) for k, v in values.items()} == {p.name: type(p.default) for p in parameters.PARAMETERS}
