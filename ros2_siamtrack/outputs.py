"""What the tracker tells the world: its topics, and a report put on them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Vector3Stamped
from rclpy.lifecycle import LifecycleNode
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage, RegionOfInterest
from std_msgs.msg import String
from visualization_msgs.msg import ImageMarker

from ros2_siamtrack import messages
from ros2_siamtrack.cause_log import CauseLog
from ros2_siamtrack.debug_image import DebugPainter
from ros2_siamtrack.diagnostics import Health
from ros2_siamtrack.images import RosFrame
from ros2_siamtrack.qos import latched_qos
from siamtrack.camera import Camera
from siamtrack.session import Report
from siamtrack.state import State


class Outputs:
    """The publishers of a node, from `open` to `close`; between `start` and `stop` something goes out.

    `stop` and `close` may be called at any time.

    Args:
        node: whose publishers they are.
        log: for warnings.
        on_error: called with what went wrong with the annotated picture.

    Attributes:
        publishers: by name.
        active: whether it is started.
    """

    def __init__(self, node: LifecycleNode, log: CauseLog, on_error: Callable[[Exception], None]) -> None:
        self._node, self._log, self._on_error = node, log, on_error
        self.publishers: dict[str, Any] = {}
        self.active = False
        self._health = Health()
        self._painter: DebugPainter | None = None
        self._state_lock = threading.Lock()
        self._published_state: tuple[State, str] | None = None

    # ---- life cycle -------------------------------------------------------------------------------------------------

    def open(self, health: Health) -> None:
        """Create the publishers; what is published is noted in `health`."""
        self._health = health
        kinds: dict[str, tuple[Any, str, Any]] = {
            "roi": (RegionOfInterest, "~/roi", 10),
            "bearing": (Vector3Stamped, "~/bearing", 10),
            "overlay": (ImageMarker, "~/overlay", 10),
            "state": (String, "~/state", latched_qos()),
            "debug_image": (CompressedImage, "~/debug_image/compressed", 1),
            "diagnostics": (DiagnosticArray, "/diagnostics", 10),
        }
        if messages.Detection2D is not None:
            kinds["detection"] = (messages.Detection2D, "~/detection", 10)
        for name, (kind, topic, qos) in kinds.items():
            overrides = QoSOverridingOptions.with_default_policies()
            self.publishers[name] = self._node.create_lifecycle_publisher(
                kind, topic, qos, qos_overriding_options=overrides
            )

    def start(self) -> None:
        """Publish from here on."""
        self._painter = DebugPainter(
            self.publishers["debug_image"],
            lambda: float(self._node.get_parameter("debug_image_hz").value),
            self._on_error,
        )
        with self._state_lock:
            self._publish_state(State.IDLE, "")
            self.active = True

    def stop(self) -> None:
        """No report goes out from here on, and who joins late does not read the state of a target long gone."""
        with self._state_lock:
            if self.active and self._node.context.ok():
                self._publish_state(State.IDLE, "deactivated")
            self.active = False
        if self._painter is not None:
            self._painter.stop()
            self._painter = None

    def close(self) -> None:
        """Destroy the publishers."""
        for publisher in self.publishers.values():
            self._node.destroy_lifecycle_publisher(publisher)
        self.publishers, self._published_state = {}, None

    # ---- reports ----------------------------------------------------------------------------------------------------

    def publish(self, report: Report, camera: Camera | None) -> None:
        """Publish what is known, if somebody listens."""
        if not self.active:
            return
        if isinstance(report.frame, RosFrame) and report.state is not State.IDLE:
            self._publish_target(report, report.frame, camera)
            self._health.handled(report.frame, self._node.get_clock().now().nanoseconds)
        painter = self._painter
        if painter is not None and report.frame is not None and self._wanted("debug_image"):
            painter.offer(report)
        with self._state_lock:
            if self.active:
                self._publish_state(report.state, report.reason)
                self._health.score = report.track.score if report.track is not None else float("nan")

    def _publish_target(self, report: Report, frame: RosFrame, camera: Camera | None) -> None:
        track, publishers = report.track, self.publishers
        box = track.box_xywh if track is not None and report.state is not State.LOST else None
        if box is not None and report.image is not None:
            x, y, w, h = box
            height, width = report.image.shape[:2]
            if camera is not None and self._wanted("bearing"):
                try:
                    bearing = camera.bearing(x + w / 2, y + h / 2, width, height)
                    publishers["bearing"].publish(messages.bearing_message(frame.header, bearing))
                except ValueError as error:
                    self._log.warn(f"no bearing: {error}", cause="bearing")
            if self._wanted("roi"):
                publishers["roi"].publish(messages.roi_message(box, width, height))
        if self._wanted("detection"):
            score = track.score if track is not None else float("nan")
            publishers["detection"].publish(messages.detection_message(frame.header, box, score, report.target_id))
        if self._wanted("overlay"):
            publishers["overlay"].publish(messages.overlay_message(frame.header, box, report.state))

    def _publish_state(self, state: State, reason: str) -> None:
        """Say it when it changed; the caller holds the lock."""
        self._health.state, self._health.reason = state, reason
        if (state, reason) != self._published_state:
            self._published_state = (state, reason)
            self.publishers["state"].publish(String(data=str(state)))
            self._node.get_logger().info(f"{state}: {reason}" if reason else str(state))

    def _wanted(self, name: str) -> bool:
        """Whether somebody listens; building messages nobody takes costs frame time."""
        return name in self.publishers and self.publishers[name].get_subscription_count() > 0
