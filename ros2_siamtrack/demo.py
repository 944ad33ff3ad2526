"""The demo over ROS: clip player, tracker and recorder as processes of their own, judged by the scene's exact truth.

This process only starts the others and reads what the recorder wrote, so what it measures is what a program of the
user's own would see. The graph lives in a namespace of its own and stays on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from siamtrack.bundle import load_bundle
from siamtrack.cli import demo_options
from siamtrack.demo import DemoFiles, Outcome
from siamtrack.scene import Scene
from siamtrack.state import State

START_TIMEOUT_S = 90.0  # for loading the model, painting the scene and finding each other
SLOWDOWN = 4.0  # how many times longer than its frame rate says a clip may take on a busy machine
SETTLE_S = 1.0  # for the last frame's box to be written
STOP_TIMEOUT_S = 5.0
RECORDING = "boxes.csv"


@dataclass(frozen=True)
class Running:
    """A started node."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        """The end of what it said."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``siamtrack-ros-demo``; returns 0 done, 2 when a node failed, 130 stopped by Ctrl-C."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that the nodes end with us, whatever ends us
    try:
        width, height = options.size
        scene = Scene(width, height, options.frames, options.seed, options.rate)
        load_bundle(options.model)  # a node without its model waits for somebody to mend that; here nobody will
        options.out.mkdir(parents=True, exist_ok=True)
        play(scene, options)
        print(judge(scene, options.out))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"siamtrack-ros-demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("siamtrack-ros-demo: stopped", file=sys.stderr)
        return 130
    return 0


def play(scene: Scene, options: argparse.Namespace) -> None:
    """Run the graph until the clip has been played; leaves the recording in `options.out`.

    Raises:
        RuntimeError: a node ended or stood still.
    """
    out: Path = options.out
    tracker = {
        "model": options.model or "",
        "backend": options.backend,
        "threads": options.threads,
        "precision": options.precision,
        "build_engines": options.build_engines,
        "engine_key_file": str(options.engine_key or ""),
    }
    recorder = {"file": str(out / RECORDING), "truth": "clip_player/truth"}
    clip = {"width": scene.width, "height": scene.height, "frames": scene.frames, "seed": scene.seed}
    player = {**clip, "rate_hz": scene.fps, "init": "truth", "wait_for": 1, "start_delay_s": 1.0}
    (out / RECORDING).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        # The recorder first: a topic that is announced late is heard late.
        nodes = [
            stack.enter_context(_node(name, parameters, out))
            for name, parameters in (("record_boxes", recorder), ("tracker_node", tracker), ("clip_player", player))
        ]
        _wait_for_end(nodes, out / RECORDING, scene)


def judge(scene: Scene, out: Path) -> str:
    """Compare the recording with the scene; writes the files of `DemoFiles` and returns the table.

    Raises:
        RuntimeError: nothing was recorded.
    """
    with (out / RECORDING).open(newline="") as file:
        # In the order in which the player published them: what was never tracked still has a truth.
        rows = sorted((row for row in csv.DictReader(file) if row["truth_x"]), key=lambda row: int(row["stamp_ns"]))
    tracked = sum(bool(row["state"]) for row in rows)
    if not tracked:
        raise RuntimeError(f"the tracker published nothing in {len(rows)} frames; its log: {out / 'tracker_node.log'}")
    last = Outcome(None, math.nan, State.IDLE, math.nan)
    with DemoFiles(out, scene) as files:
        for index, row in enumerate(tqdm(rows, desc="drawing", unit="frame", disable=None)):
            fresh = bool(row["state"])
            last = _outcome(row) if fresh else last
            files.add(index, scene.render(index), last, fresh)
        heading = f"frames: {len(rows)} in, {tracked} tracked, {len(rows) - tracked} dropped"
        return files.finish("latency, image stamp to box received by another process", (50, 99), heading)


def _outcome(row: dict[str, str]) -> Outcome:
    box = (float(row["x"]), float(row["y"]), float(row["w"]), float(row["h"])) if row["x"] else None
    seconds = (int(row["received_ns"]) - int(row["stamp_ns"])) / 1e9
    return Outcome(box, float(row["score"] or "nan"), State(row["state"]), seconds)


@contextlib.contextmanager
def _node(name: str, parameters: dict[str, Any], out: Path) -> Iterator[Running]:
    """A node of this package as a process, ended when the block is left, however that happens."""
    command = [
        sys.executable,
        "-m",
        f"ros2_siamtrack.{name}",
        "--ros-args",
        "-r",
        f"__ns:=/siamtrack_demo_{os.getpid()}",
    ]
    for key, value in parameters.items():
        command += ["-p", f"{key}:={json.dumps(value, ensure_ascii=False)}"]  # JSON is YAML; texts stay texts
    log = out / f"{name}.log"
    process: subprocess.Popen[bytes] | None = None
    try:
        with _uninterrupted(), log.open("wb") as file:
            # A session of its own: Ctrl-C reaches us alone, and we end the nodes in order.
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
            )
        yield Running(name, process, log)
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back: one in the middle of a start would leave a process nobody knows of."""
    held: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: held.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def _environment() -> dict[str, str]:
    """For a graph that neither hears nor disturbs any other."""
    environment = {k: v for k, v in os.environ.items() if k not in ("ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS")}
    environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    if environment.get("ROS_DISTRO") == "humble":  # which does not know that yet
        environment["ROS_LOCALHOST_ONLY"] = "1"
    environment.setdefault("AMENT_PREFIX_PATH", sys.prefix)  # where the wheels put what ROS looks for
    return environment


def _wait_for_end(nodes: list[Running], recording: Path, scene: Scene) -> None:
    began_s, deadline_s = time.monotonic(), START_TIMEOUT_S + SLOWDOWN * scene.frames / scene.fps
    player = nodes[-1]
    with tqdm(total=scene.frames, desc="playing", unit="frame", disable=None) as bar:
        while player.process.poll() is None:
            for node in nodes[:-1]:
                if node.process.poll() is not None:
                    raise RuntimeError(f"{node.name} ended with status {node.process.returncode}:\n{node.tail()}")
            rows = _rows(recording)
            bar.update(rows - bar.n)
            waited_s = time.monotonic() - began_s
            if waited_s > START_TIMEOUT_S and not rows:
                said = "\n".join(f"--- {node.name}\n{node.tail()}" for node in nodes)
                raise RuntimeError(f"no frame was tracked in {waited_s:.0f} s; the nodes said:\n{said}")
            if waited_s > deadline_s:
                raise RuntimeError(
                    f"{rows} of {scene.frames} frames in {waited_s:.0f} s: this machine is too slow or too busy; "
                    "try --rate 10, a smaller --size or fewer --frames"
                )
            time.sleep(0.1)
        if player.process.returncode:
            raise RuntimeError(f"clip_player ended with status {player.process.returncode}:\n{player.tail()}")
        time.sleep(SETTLE_S)
        bar.update(_rows(recording) - bar.n)


def _rows(recording: Path) -> int:
    return max(recording.read_bytes().count(b"\n") - 1, 0) if recording.exists() else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siamtrack-ros-demo",
        description="Play a rendered scene over ROS 2 topics, track it, and measure against its exact ground truth.",
    )
    parser.add_argument("--rate", type=float, default=30.0, metavar="HZ", help="frames a second (default 30)")
    demo_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
