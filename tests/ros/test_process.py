"""The node as a process of its own, the way `ros2 run` starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import rclpy
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import Image, RegionOfInterest
from std_msgs.msg import String

from siamtrack.scene import SceneFrame
from tests.ros.conftest import PATIENCE_S, Spinner, image_message, stamp_ns, until


class Outside:
    """A camera and an operator in this process, for a tracker in another."""

    def __init__(self, scene: list[SceneFrame], namespace: str, folder: Path) -> None:
        self.scene, self.namespace, self.folder = scene, namespace, folder
        # A context is what a process is to the middleware.
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = Node("outside", namespace=namespace, context=self.context)
        self.states: list[str] = []
        qos = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.node.create_subscription(String, "siamtrack/state", lambda m: self.states.append(m.data), qos)
        self.images = self.node.create_publisher(Image, "image", 1)
        self.boxes = self.node.create_publisher(RegionOfInterest, "siamtrack/init_box", 1)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._spinner = Spinner(self.node)
        self._over = threading.Event()
        self._camera = threading.Thread(target=self._film, daemon=True)
        self._camera.start()

    def _film(self) -> None:
        number = 0
        while not self._over.wait(0.03):
            index = number % 100
            frame = self.scene[index if index < 50 else 99 - index]  # forth and back, so that the target never jumps
            self.images.publish(image_message(frame.image, stamp_ns(number)))
            number += 1

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ros2_siamtrack.tracker_node", "--ros-args", "-r", f"__ns:={self.namespace}"]
        for value in ("threads:=1", "timeout_s:=60.0", *arguments):
            command += ["-p", value]
        log = (self.folder / f"{len(self.processes)}.txt").open("wb")
        with log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ.copy())
        self.processes.append(process)
        return process

    def log(self) -> str:
        return (self.folder / f"{len(self.processes) - 1}.txt").read_text()

    def track(self) -> None:
        """Send boxes until one is taken; images go on all the time."""
        x, y, w, h = (round(v) for v in self.scene[25].box_xywh)
        until(self.boxes.get_subscription_count, self.log)
        del self.states[:]

        def tracking() -> bool:
            self.boxes.publish(RegionOfInterest(x_offset=x, y_offset=y, width=w, height=h))
            return "TRACKING" in self.states

        try:
            until(tracking)
        except AssertionError:
            raise AssertionError(f"no track; states {self.states}, log:\n{self.log()}") from None

    def close(self) -> None:
        self._over.set()
        self._camera.join()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._spinner.close()
        self.context.try_shutdown()


@pytest.fixture
def outside(scene: list[SceneFrame], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Outside]:
    it = Outside(scene, "/" + request.node.originalname, tmp_path)
    yield it
    it.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly_while_it_tracks(outside: Outside, number: int) -> None:
    process = outside.start()
    outside.track()
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 0, outside.log()
    for word in ("Traceback", "Error", "terminate called", "while tracking"):
        assert word not in outside.log(), outside.log()


STOPPED_MID_SPIN = """
import sys
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from ros2_siamtrack.running import run_node

def work(node):
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    if "stop" in sys.argv:
        rclpy.shutdown()
        executor.spin_once()
        sys.exit("rclpy let it pass")
    raise RuntimeError("a fault")

sys.exit(run_node("stopped", lambda: Node("stopped"), work))
"""


def test_a_signal_between_two_steps_of_spinning_is_a_clean_end() -> None:
    """rclpy raises its own error where the context ends after it looked; other errors remain errors."""

    def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", STOPPED_MID_SPIN, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    stopped, broken = ended("stop"), ended()
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert broken.returncode == 1 and "RuntimeError: a fault" in broken.stderr


def test_kill_9_leaves_nothing_that_hinders_the_next(outside: Outside, scene: list[SceneFrame], tmp_path: Path) -> None:
    process = outside.start()
    outside.track()
    process.kill()
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    # A camera of its own: the old one goes on sending to the dead reader for as long as its middleware's lease runs.
    (tmp_path / "again").mkdir()
    again = Outside(scene, outside.namespace, tmp_path / "again")
    try:
        again.start()
        again.track()
    finally:
        again.close()


def call(outside: Outside, kind: type, name: str, request: object) -> object:
    client = outside.node.create_client(kind, f"siamtrack/{name}")
    assert client.wait_for_service(PATIENCE_S), outside.log()
    future = client.call_async(request)
    until(future.done, outside.log())
    return future.result()


def test_without_autostart_a_manager_leads_it(outside: Outside) -> None:
    process = outside.start("autostart:=false")

    def state() -> str:
        return call(outside, GetState, "get_state", GetState.Request()).current_state.label

    def change(transition: int) -> bool:
        request = ChangeState.Request()
        request.transition.id = transition
        return call(outside, ChangeState, "change_state", request).success

    assert state() == "unconfigured"
    assert change(1) and state() == "inactive"
    assert change(3) and state() == "active"
    outside.track()
    assert change(4) and state() == "inactive"
    until(lambda: outside.states[-1:] == ["IDLE"])
    assert change(2) and state() == "unconfigured"
    assert change(5) and state() == "finalized"
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0, outside.log()


def test_a_bad_model_leaves_it_alive_and_unconfigured(outside: Outside) -> None:
    process = outside.start("model:=/nowhere/at/all")
    reply = call(outside, GetState, "get_state", GetState.Request())
    assert reply.current_state.label == "unconfigured"
    assert "cannot configure" in outside.log() and "/nowhere/at/all" in outside.log()
    assert "Traceback" not in outside.log() and process.poll() is None


@pytest.mark.parametrize("argument", ["timeout_s:=-3.0", "debug_image_hz:=many", "buffer_s:=2"])
def test_a_bad_value_at_start_is_told_without_a_traceback(outside: Outside, argument: str) -> None:
    process = outside.start(argument)
    assert process.wait(PATIENCE_S) == 2
    assert argument.partition(":")[0] in outside.log() and "Traceback" not in outside.log()


def test_importing_the_node_needs_no_display_and_no_arguments() -> None:
    code = "import ros2_siamtrack.tracker_node as t; assert callable(t.main)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
