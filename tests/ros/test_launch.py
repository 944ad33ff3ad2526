"""Launch files run by the launch packages, with stand-ins for the nodes; skipped where those are not installed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_launch_files import ARGUMENTS, ROOT

pytest.importorskip("launch_ros.actions", exc_type=ImportError)

from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

from launch import LaunchContext, LaunchService

# Stands in for a node: keeps its arguments and parameter files. The clip player ends last, since that ends the launch.
STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > "$0.arguments"
for argument in "$@"; do case "$argument" in *launch_params*) cat "$argument" > "$0.parameters";; esac; done
case "$0" in *clip_player) sleep 1;; esac
"""


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation as colcon makes it, with stand-ins for the nodes."""
    share = tmp_path / "share" / "siamtrack"
    shutil.copytree(ROOT / "launch", share / "launch")
    shutil.copytree(ROOT / "configs", share / "config")
    index = tmp_path / "share" / "ament_index" / "resource_index" / "packages"
    index.mkdir(parents=True)
    (index / "siamtrack").touch()
    programs = tmp_path / "lib" / "siamtrack"
    programs.mkdir(parents=True)
    for name in ("tracker_node", "clip_player", "record_boxes"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path / "log"))
    return tmp_path


@dataclass(frozen=True)
class Started:
    """What a node was started with; `node` is whom its parameters are for."""

    arguments: list[str]
    parameters: dict[str, Any]
    node: str


def run_launch(prefix: Path, name: str, **arguments: str) -> dict[str, Started]:
    """Launch a file with stand-ins; executable -> what it was given."""

    source = PythonLaunchDescriptionSource(str(prefix / "share" / "siamtrack" / "launch" / f"{name}.launch.py"))
    service = LaunchService(noninteractive=True)
    service.include_launch_description(IncludeLaunchDescription(source, launch_arguments=list(arguments.items())))
    assert service.run() == 0
    started = {}
    for file in (prefix / "lib" / "siamtrack").glob("*.arguments"):
        written = file.with_suffix(".parameters")
        chosen = yaml.safe_load(written.read_text()) if written.exists() else {"": {"ros__parameters": {}}}
        ((node, parameters),) = chosen.items()
        started[file.stem] = Started(file.read_text().splitlines(), parameters["ros__parameters"], node)
    return started


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_exist(name: str, prefix: Path) -> None:

    source = PythonLaunchDescriptionSource(str(prefix / "share" / "siamtrack" / "launch" / f"{name}.launch.py"))

    description = source.get_launch_description(LaunchContext())
    assert {argument.name for argument in description.get_launch_arguments()} >= ARGUMENTS[name]


def test_tracker_at_its_defaults(prefix: Path) -> None:
    started = run_launch(prefix, "tracker")
    assert set(started) == {"tracker_node"}
    assert str(prefix / "share" / "siamtrack" / "config" / "tracker.yaml") in started["tracker_node"].arguments
    assert started["tracker_node"].parameters == {}  # all is left to the file


def test_tracker_with_arguments(prefix: Path) -> None:
    topics = {"namespace": "left", "image": "/cam/image_raw", "camera_info": "/cam/info"}
    settings = {"model": "2026", "backend": "auto", "autostart": "false", "use_sim_time": "true"}
    settings |= {"precision": "int8", "build_engines": "auto", "engine_key_file": "/etc/siamtrack/engine.key"}
    tracker = run_launch(prefix, "tracker", **topics, **settings, log_level="debug")["tracker_node"]
    assert tracker.node == "/left/siamtrack"  # not /**, before which a section of the file for the node would go
    wanted = {"__ns:=/left", "image:=/cam/image_raw", "image/compressed:=/cam/image_raw/compressed", "debug"}
    assert wanted | {"camera_info:=/cam/info"} <= set(tracker.arguments)
    assert tracker.parameters == {
        "use_sim_time": True,
        "autostart": False,
        "model": "2026",
        "backend": "auto",
        "precision": "int8",
        "build_engines": "auto",
        "engine_key_file": "/etc/siamtrack/engine.key",
    }


@pytest.mark.parametrize(("source", "truth"), [("scene", "clip_player/truth"), ("clip.mp4", "")])
def test_demo_starts_player_tracker_and_recorder(prefix: Path, source: str, truth: str) -> None:
    started = run_launch(prefix, "demo", source=source, record="a.csv", init="1,2,3,4", model="other")
    assert set(started) == {"tracker_node", "record_boxes", "clip_player"}
    assert all("__ns:=/demo" in node.arguments for node in started.values())
    assert started["record_boxes"].parameters == {"file": "a.csv", "truth": truth}
    assert started["clip_player"].parameters == {
        "source": source,
        "init": "1,2,3,4",
        "rate_hz": 30.0,
        "loop": False,
        "wait_for": 1,
    }
    assert started["tracker_node"].parameters["model"] == "other"


def test_demo_without_recording(prefix: Path) -> None:
    assert set(run_launch(prefix, "demo")) == {"tracker_node", "clip_player"}
