"""Real ROS 2 in the tests' own domain; skipped as a whole where there is no rclpy.

A `Rig` is one tracker node and the world around it: a camera that shows frames of the rendered scene, an operator, and
listeners on every output. Both run in threads of their own and are taken down after each test.
"""

from __future__ import annotations

import array
import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

PATIENCE_S = 30.0
SILENCE = 60.0  # a watchdog that does not bite while a test is held up by a busy machine

if importlib.util.find_spec("rclpy") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Before rclpy is imported: the wheels look for their middleware under AMENT_PREFIX_PATH.
    os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_LOG_DIR"] = tempfile.mkdtemp(prefix="siamtrack_ros_log_")

    import rclpy
    from builtin_interfaces.msg import Time
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
    from geometry_msgs.msg import Vector3Stamped
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node
    from rclpy.parameter import Parameter
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
    from std_msgs.msg import Header, String
    from visualization_msgs.msg import ImageMarker

    from ros2_siamtrack.tracker_node import TrackerNode
    from siamtrack.scene import SceneFrame

PERIOD_NS = 33_000_000
T0_NS = 1_700_000_000_000_000_000
FRAME_ID = "camera_optical"


def until(condition: Callable[[], Any], what: str = "", patience_s: float = PATIENCE_S) -> None:
    """Wait for something another thread or process does; how long it takes is not tested."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain {what}"
        time.sleep(0.005)


def stamp_ns(index: int) -> int:
    return T0_NS + index * PERIOD_NS


def time_message(nanoseconds: int) -> Time:
    return Time(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)


def header_message(nanoseconds: int) -> Header:
    return Header(stamp=time_message(nanoseconds), frame_id=FRAME_ID)


def image_message(picture: np.ndarray, nanoseconds: int, encoding: str = "bgr8", **fields: Any) -> Image:
    """Of a uint8 array ``[H, W]`` or ``[H, W, C]``; `fields` replace what follows from it."""
    height, width = picture.shape[:2]
    values = {"height": height, "width": width, "step": picture[0].nbytes, "encoding": encoding, **fields}
    return Image(header=header_message(nanoseconds), data=array.array("B", picture.tobytes()), **values)


def camera_info(width: int, height: int, **fields: Any) -> CameraInfo:
    values = {"k": [400.0, 0.0, width / 2, 0.0, 400.0, height / 2, 0.0, 0.0, 1.0], "distortion_model": "plumb_bob"}
    return CameraInfo(width=width, height=height, **{**values, **fields})


class Log:
    """Takes the place of a node's logger and keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __getattr__(self, level: str) -> Callable[[str], None]:
        return lambda text: self.lines.append((level, text))

    def count(self, part: str) -> int:
        return sum(part in text for _, text in self.lines)


class ListeningTracker(TrackerNode if importlib.util.find_spec("rclpy") else object):  # type: ignore[misc]
    """The node with its log kept and its images counted."""

    def __init__(self, **arguments: Any) -> None:
        self.log = Log()
        self.arrivals = 0  # of images, good or bad
        super().__init__(**arguments)

    def _create_inputs(self) -> None:
        super()._create_inputs()
        take = self._images.subscription.callback

        def count(serialised: bytes) -> None:
            take(serialised)
            self.arrivals += 1

        self._images.subscription.callback = count

    def get_logger(self) -> Any:
        return self.log


class Spinner:
    """Nodes spun by one thread, and calls made on it."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = nodes
        self.executor = SingleThreadedExecutor(context=nodes[0].context)
        for node in nodes:
            self.executor.add_node(node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run it where callbacks run, as a life cycle manager's request does."""
        future = self.executor.create_task(function)
        until(future.done, f"for {function}")
        return future.result()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self.executor.shutdown()
        for node in self.nodes:
            node.destroy_node()


class Rig:
    """One tracker under test; see the module's text.

    Args:
        scene: what its camera sees.
        namespace: of the tracker and all its topics.
        start: configure and activate at once.
        reliable: of the camera's images.
        listen: outputs to listen to; "state" and "diagnostics" are always heard.
        parameters: of the tracker node.
    """

    def __init__(
        self,
        scene: list[SceneFrame],
        namespace: str,
        start: bool = True,
        reliable: bool = True,
        listen: tuple[str, ...] = ("roi", "bearing", "overlay"),
        **parameters: Any,
    ) -> None:
        self.scene, self.namespace = scene, namespace
        values = {"threads": 1, "timeout_s": SILENCE, **parameters}
        overrides = [Parameter(name.replace("__", "."), value=value) for name, value in values.items()]
        self.tracker = ListeningTracker(namespace=namespace, parameter_overrides=overrides)
        self.world = Node("world", namespace=namespace)
        self.spinner, self._world_spinner = Spinner(self.tracker), Spinner(self.world)
        self.received: dict[str, list[Any]] = {"state": [], "diagnostics": []}
        self._publishers: dict[str, Any] = {}
        self._listen = listen
        self.closed = False
        self.reliability = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.world.create_subscription(
            String, "siamtrack/state", lambda m: self.received["state"].append(m.data), latched
        )
        self.world.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        kinds = {
            "roi": RegionOfInterest,
            "bearing": Vector3Stamped,
            "overlay": ImageMarker,
            "debug_image/compressed": CompressedImage,
        }
        for name in listen:
            self.received[name] = []
            self.world.create_subscription(kinds[name], f"siamtrack/{name}", self.received[name].append, 100)
        if start:
            self.start()

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.hardware_id == self.tracker.get_fully_qualified_name().lstrip("/"):
                self.received["diagnostics"].append(status)

    def start(self) -> None:
        assert str(self.spinner.call(self.tracker.trigger_configure)).endswith("SUCCESS"), self.tracker.log.lines
        assert str(self.spinner.call(self.tracker.trigger_activate)).endswith("SUCCESS"), self.tracker.log.lines
        outputs = self.tracker._outputs.publishers
        for name in (*(n.removesuffix("/compressed") for n in self._listen), "state"):
            until(lambda name=name: outputs[name].get_subscription_count(), f"for a listener on {name}")

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            assert self.spinner.alive, "the tracker's thread died"
            self.spinner.close()
            self._world_spinner.close()

    @property
    def worker(self) -> Any:
        return self.tracker._worker

    def publisher(self, kind: Any, topic: str) -> Any:
        """Made when first asked for, and ready: it has its listener."""
        if topic not in self._publishers:
            qos = QoSProfile(depth=100, reliability=self.reliability)
            self._publishers[topic] = self.world.create_publisher(kind, topic, qos)
            until(self._publishers[topic].get_subscription_count, f"for a listener on {topic}")
        return self._publishers[topic]

    def publish(self, message: Any, topic: str) -> None:
        self.publisher(type(message), topic).publish(message)

    def send(self, message: Any, topic: str = "image") -> None:
        """An image, and wait until it was refused, or tracked and told of."""
        before = self.tracker.arrivals
        self.publish(message, topic)
        until(lambda: self.tracker.arrivals > before, "for an image to arrive")
        until(lambda: not self.worker._frames, "for an image to be taken")
        assert self.worker.settle(PATIENCE_S)

    def show(self, *indices: int, **options: Any) -> None:
        """Frames of the scene, one after the other."""
        for index in indices:
            self.send(image_message(self.scene[index].image, options.get("stamp", stamp_ns(index))))

    def ask(self, message: Any, topic: str) -> None:
        """Send a box or a point and wait until the tracker knows of it."""
        seen = len(self.asked)
        self.publish(message, topic)
        until(lambda: len(self.asked) > seen, f"for {topic} to arrive")
        assert self.worker.settle(PATIENCE_S)

    @property
    def asked(self) -> list[Any]:
        """Every request so far; from the first use on."""
        if not hasattr(self, "_asked"):
            self._asked: list[Any] = []
            start = self.tracker._start

            def note(init: Any) -> None:
                start(init)
                self._asked.append(init)

            self.tracker._start = note
        return self._asked

    def box(self, index: int) -> None:
        """The operator's box: the target of a frame, in whole pixels."""
        x, y, w, h = (round(value) for value in self.scene[index].box_xywh)
        self.ask(RegionOfInterest(x_offset=x, y_offset=y, width=w, height=h), "siamtrack/init_box")

    def follow(self, *indices: int) -> None:
        """Start on the first of these frames and go through all."""
        self.box(indices[0])
        self.show(*indices)

    def state(self, expected: str) -> None:
        """Wait until this is the last state heard of."""
        until(lambda: self.received["state"][-1:] == [expected], f"for {expected}: {self.received['state']}")

    def diagnosis(self, **expected: Any) -> DiagnosticStatus:
        """Wait for a diagnostic status with these fields or values."""

        def fits() -> bool:
            if not self.received["diagnostics"]:
                return False
            status = self.received["diagnostics"][-1]
            values = {v.key.replace(" ", "_"): v.value for v in status.values}
            values |= {"level": status.level, "message": status.message}
            return all(values[key] == value for key, value in expected.items())

        until(fits, f"for diagnostics {expected}: {self.received['diagnostics'][-1:]}")
        return self.received["diagnostics"][-1]


@pytest.fixture(scope="session", autouse=True)
def _ros() -> Iterator[None]:
    rclpy.init()
    yield
    rclpy.try_shutdown()
    shutil.rmtree(os.environ["ROS_LOG_DIR"], ignore_errors=True)


_numbers = itertools.count(1)


@pytest.fixture
def make_rig(scene: list[SceneFrame]) -> Iterator[Callable[..., Rig]]:
    """Makes rigs, each in its own namespace, and takes them down."""
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(options.pop("scene", scene), options.pop("namespace", f"/t{next(_numbers)}"), **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    """A tracker that is active, with the parameters' defaults."""
    return make_rig()
