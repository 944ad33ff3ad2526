"""The lifecycle node: camera images and a box in, tracked boxes out.

*configure* loads the model and warms it up, *activate* subscribes and publishes, *deactivate*, *cleanup* and *shutdown*
give everything back in that order. The image callback only puts the newest frame aside; the worker thread tracks and
publishes.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Point, PointStamped, Vector3Stamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter as RosParameter
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger
from visualization_msgs.msg import ImageMarker

from ros2_siamtrack import messages
from ros2_siamtrack.debug_image import DebugPainter
from ros2_siamtrack.diagnostics import Health
from ros2_siamtrack.images import RosFrame, parse_compressed_image, parse_image
from ros2_siamtrack.parameters import FROM_MODEL, PARAMETERS, TRACKING_PARAMETERS, refusal
from siamtrack.bundle import load_bundle
from siamtrack.camera import Camera
from siamtrack.runners import open_runner
from siamtrack.session import FrameRing, InitRequest, Report
from siamtrack.state import State
from siamtrack.tracker import SiamTracker
from siamtrack.worker import Worker

try:
    from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks, UnsupportedEventTypeError

WATCHDOG_PERIOD_S = 0.1
SILENCE_WARNING_S = 5.0
QUIET_S = 5.0  # a cause of warnings that was quiet for so long is logged again
CAUSES_KEPT = 100


class TrackerNode(LifecycleNode):
    """Follows one target in one camera stream; topics and parameters are in ``docs/ros.md``."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__("siamtrack", **arguments)
        for parameter in PARAMETERS:
            self.declare_parameter(parameter.name, parameter.default, parameter.descriptor())
        self.add_on_set_parameters_callback(self._on_parameters)
        self._worker: Worker | None = None
        self._inputs: list[Any] = []
        self._outputs: dict[str, Any] = {}
        self._held_services: list[Any] = []
        self._held_timers: list[Any] = []
        self._camera: Camera | None = None
        self._painter: DebugPainter | None = None
        self._health = Health()
        self._warned: dict[str, float] = {}  # cause -> when it last occurred, oldest first
        self._warned_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._said_what_is_missing = False
        self._image_topic = ""
        self._last_arrival_s = 0.0
        self._last_stamp_ns = 0
        self._silent = False
        self._active = False
        self._published_state: tuple[State, str] | None = None

    # ---- life cycle -------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and verify the model, allocate, warm up."""
        problem = next((r for p in PARAMETERS if (r := refusal(p.name, self._value(p.name)))), "")
        if problem:
            self.get_logger().error(problem)
            return TransitionCallbackReturn.FAILURE
        self._health = Health()
        worker = Worker(
            self._open_tracker,
            self._on_report,
            self._on_worker_error,
            FrameRing(self._value("buffer_s"), self._value("buffer_mb")),
            every=self._value("processing") == "every",
        )
        try:
            worker.start()
            self._worker = worker
            self._create_outputs()
            self._held_services = [
                self.create_service(Trigger, "~/reset", self._on_reset),
                self.create_service(SetBool, "~/pause", self._on_pause),
            ]
        except Exception as error:  # a missing or damaged model or a bad QoS override must not end the process
            self.get_logger().error(f"cannot configure: {error}")
            self._give_back()
            return TransitionCallbackReturn.FAILURE
        self._say_what_is_missing()
        self.get_logger().info(f"configured: {self._health.model} on {self._value('backend')}")
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe and publish."""
        self._last_arrival_s, self._last_stamp_ns, self._silent = time.monotonic(), 0, False
        self._health.state, self._health.reason = State.IDLE, ""
        result = super().on_activate(state)
        try:
            self._painter = DebugPainter(
                self._outputs["debug_image"], lambda: self._value("debug_image_hz"), self._on_worker_error
            )
            self._create_inputs()
            self._held_timers = [
                self.create_timer(WATCHDOG_PERIOD_S, self._watch, clock=_steady_clock()),
                self.create_timer(1.0, self._publish_diagnostics, clock=_steady_clock()),
            ]
        except Exception as error:  # rclpy would swallow it
            self.get_logger().error(f"cannot activate: {error}")
            self._drop_inputs()
            super().on_deactivate(state)
            return TransitionCallbackReturn.FAILURE
        with self._state_lock:
            self._active = True
            self._publish_state(State.IDLE, "")
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the target is forgotten."""
        self._fall_silent()
        self._drop_inputs()
        if self._worker is not None:
            self._worker.clear()
            self._worker.reset()
            self._worker.pause(False)
            self._worker.settle()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give the model and all publishers back."""
        self._give_back()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give everything back, from any state."""
        self._give_back()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured, with nothing held."""
        self._give_back()
        return TransitionCallbackReturn.SUCCESS

    def destroy_node(self) -> None:
        """Also ends the worker."""
        self._give_back()
        super().destroy_node()

    def _fall_silent(self) -> None:
        """No report goes out from here on, and who joins late does not read the state of a target long gone."""
        with self._state_lock:
            if self._active and self.context.ok():
                self._publish_state(State.IDLE, "deactivated")
            self._active = False

    def _give_back(self) -> None:
        self._fall_silent()
        self._drop_inputs()
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        for service in self._held_services:
            self.destroy_service(service)
        for publisher in self._outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        self._held_services, self._outputs, self._camera, self._published_state = [], {}, None, None

    def _drop_inputs(self) -> None:
        for timer in self._held_timers:
            self.destroy_timer(timer)
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._held_timers, self._inputs = [], []
        if self._painter is not None:
            self._painter.stop()
            self._painter = None

    # ---- creation ---------------------------------------------------------------------------------------------------

    def _open_tracker(self) -> SiamTracker:
        """Runs on the worker's thread, which owns what it returns."""
        bundle = load_bundle(self._value("model") or None)
        tracker = SiamTracker(open_runner(bundle, self._value("backend"), self._value("threads")))
        self._tune(tracker, {name: self._value(name) for name in TRACKING_PARAMETERS})
        self._health.model = bundle.manifest.model
        return tracker

    def _create_outputs(self) -> None:
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
        overrides = QoSOverridingOptions.with_default_policies()
        for name, (kind, topic, qos) in kinds.items():
            self._outputs[name] = self.create_lifecycle_publisher(kind, topic, qos, qos_overriding_options=overrides)

    def _create_inputs(self) -> None:
        # As image_transport does it: remapping `image` moves the compressed topic and the clicks along.
        base = self.resolve_topic_name("image")
        compressed = self._value("image_transport") == "compressed"
        self._image_topic = f"{base}/compressed" if compressed else base
        parse: Callable[[bytes, int], RosFrame] = parse_compressed_image if compressed else self._parse_raw
        self._inputs.append(self._subscribe_images(CompressedImage if compressed else Image, parse))
        inputs: list[tuple[Any, str, Callable[[Any], None], Any]] = [
            (CameraInfo, "camera_info", self._on_camera_info, qos_profile_sensor_data),
            (RegionOfInterest, "~/init_box", self._on_init_box, 10),
            (PointStamped, "~/init_point", self._on_init_point, 10),
            (Point, f"{base}_mouse_left", self._on_click, 10),
        ]
        if messages.Detection2D is not None:
            inputs.append((messages.Detection2D, "~/init_detection", self._on_init_detection, 10))
        for kind, topic, callback, qos in inputs:
            self._inputs.append(self.create_subscription(kind, topic, callback, qos))

    def _subscribe_images(self, kind: Any, parse: Callable[[bytes, int], RosFrame]) -> Any:
        every = self._value("processing") == "every"
        events: dict[str, Callable[[Any], None]] = {
            "incompatible_qos": self._on_incompatible_qos,
            "message_lost": self._on_message_lost,
        }
        while True:
            try:
                return self.create_subscription(
                    kind,
                    self._image_topic,
                    lambda serialised: self._on_image(serialised, parse),
                    every_frame_qos() if every else newest_frame_qos(),
                    raw=True,
                    event_callbacks=SubscriptionEventCallbacks(**events),
                    qos_overriding_options=QoSOverridingOptions.with_default_policies(),
                )
            except UnsupportedEventTypeError:  # not every middleware has both
                if not events:
                    raise
                events.popitem()

    def _parse_raw(self, serialised: bytes, arrival_ns: int) -> RosFrame:
        return parse_image(serialised, arrival_ns, messages.convert_with_cv_bridge if messages.CvBridge else None)

    def _say_what_is_missing(self) -> None:
        if self._said_what_is_missing:
            return
        self._said_what_is_missing = True
        if messages.Detection2D is None:
            self.get_logger().warning(
                "vision_msgs is not installed: ~/detection and ~/init_detection are off, the rest works "
                "(sudo apt install ros-$ROS_DISTRO-vision-msgs)",
            )
        if messages.CvBridge is None:
            self.get_logger().warning(
                "cv_bridge is not installed: usual image encodings work without it, rare ones will not "
                "(sudo apt install ros-$ROS_DISTRO-cv-bridge)",
            )

    # ---- in ---------------------------------------------------------------------------------------------------------

    def _on_image(self, serialised: bytes, parse: Callable[[bytes, int], RosFrame]) -> None:
        worker = self._worker
        if worker is None:
            return
        try:
            frame = parse(serialised, self.get_clock().now().nanoseconds)
        except ValueError as error:
            self._warn(f"image ignored: {error}")
            return
        self._last_arrival_s, self._silent = time.monotonic(), False
        if frame.stamp_ns > 0:
            back_ns = self._last_stamp_ns - frame.stamp_ns
            if 0 < back_ns <= FrameRing.JUMP_NS:
                self._warn(f"image ignored: its stamp is {back_ns / 1e6:.0f} ms before that of the one before")
                return
            self._last_stamp_ns = frame.stamp_ns
        if worker.submit(frame):
            self._warn("time jumped back: buffered frames dropped")
        self._last_arrival_s = time.monotonic()  # `every` may have held it up; that is no silence

    def _on_camera_info(self, info: CameraInfo) -> None:
        try:
            self._camera = messages.camera_from_info(info)
        except ValueError as error:
            self._camera = None
            self._warn(f"no bearing: {error}", cause="camera_info")

    def _on_init_box(self, message: RegionOfInterest) -> None:
        self._start(messages.init_from_roi(message))

    def _on_init_detection(self, message: Any) -> None:
        self._start(messages.init_from_detection(message))

    def _on_init_point(self, message: PointStamped) -> None:
        self._start(messages.init_from_point(message.point, self._value("init_point_size_px"), message.header.stamp))

    def _on_click(self, point: Point) -> None:
        self._start(messages.init_from_point(point, self._value("init_point_size_px")))

    def _start(self, init: InitRequest) -> None:
        if self._worker is None or not self._active:
            return
        if self._worker.received == 0:
            self._warn("box received before the first image: it starts on that", cause="early box")
        self._worker.request(init)

    def _on_reset(self, request: Any, response: Any) -> Any:
        if self._worker is not None:
            self._worker.reset()
        response.success, response.message = True, "target forgotten"
        return response

    def _on_pause(self, request: Any, response: Any) -> Any:
        if self._worker is not None:
            self._worker.pause(request.data)
        response.success, response.message = True, "paused" if request.data else "running"
        return response

    def _on_incompatible_qos(self, event: Any) -> None:
        if self._is_news("incompatible qos"):
            self.get_logger().warning(
                f"a publisher of {self._image_topic} offers a QoS that cannot be taken: {self._offers()}; to take it, "
                f"start with -p qos_overrides.{self._image_topic}.subscription.reliability:=best_effort"
            )

    def _on_message_lost(self, event: Any) -> None:
        self._health.lost_in_transport = event.total_count
        self._warn(f"{event.total_count_change} images lost on the way here", cause="message lost")

    def _on_parameters(self, parameters: list[RosParameter]) -> SetParametersResult:
        for parameter in parameters:
            problem = refusal(parameter.name, parameter.value)
            if problem:
                return SetParametersResult(successful=False, reason=problem)
        changes = {p.name: p.value for p in parameters if p.name in TRACKING_PARAMETERS}
        if changes and self._worker is not None:
            self._worker.configure(lambda tracker: self._tune(tracker, changes))
        return SetParametersResult(successful=True)

    @staticmethod
    def _tune(tracker: SiamTracker, values: dict[str, float]) -> None:
        own = tracker.runner.bundle.manifest.tracking
        chosen: dict[str, Any] = {n: getattr(own, n) if v == FROM_MODEL else v for n, v in values.items()}
        tracker.tracking = dataclasses.replace(tracker.tracking, **chosen)

    # ---- out --------------------------------------------------------------------------------------------------------

    def _on_report(self, report: Report) -> None:
        """Publish what is known; runs on the worker's thread."""
        if report.warning:
            self._warn(report.warning)
        if not self._active:
            return
        if isinstance(report.frame, RosFrame) and report.state is not State.IDLE:
            self._publish_target(report, report.frame)
            self._health.handled(report.frame, self.get_clock().now().nanoseconds)
        painter = self._painter
        if painter is not None and report.frame is not None and _wanted(self._outputs["debug_image"]):
            painter.offer(report)
        with self._state_lock:
            if self._active:
                self._publish_state(report.state, report.reason)
                self._health.score = report.track.score if report.track is not None else float("nan")

    def _publish_target(self, report: Report, frame: RosFrame) -> None:
        outputs, track, camera = self._outputs, report.track, self._camera
        seen = track is not None and report.state is not State.LOST
        box = track.box_xywh if track is not None and seen else None
        if box is not None and report.image is not None:
            x, y, w, h = box
            height, width = report.image.shape[:2]
            if camera is not None and _wanted(outputs["bearing"]):
                try:
                    bearing = camera.bearing(x + w / 2, y + h / 2, width, height)
                    outputs["bearing"].publish(messages.bearing_message(frame.header, bearing))
                except ValueError as error:
                    self._warn(f"no bearing: {error}", cause="bearing")
            if _wanted(outputs["roi"]):
                outputs["roi"].publish(messages.roi_message(box, width, height))
        if "detection" in outputs and _wanted(outputs["detection"]):
            score = track.score if track is not None else float("nan")
            outputs["detection"].publish(messages.detection_message(frame.header, box, score, report.target_id))
        if _wanted(outputs["overlay"]):
            outputs["overlay"].publish(messages.overlay_message(frame.header, box, report.state))

    def _publish_state(self, state: State, reason: str) -> None:
        """Say it when it changed; the caller holds the lock."""
        self._health.state, self._health.reason = state, reason
        if (state, reason) != self._published_state:
            self._published_state = (state, reason)
            self._outputs["state"].publish(String(data=str(state)))
            self.get_logger().info(f"{state}: {reason}" if reason else str(state))

    def _watch(self) -> None:
        """Say so when images stop."""
        silent_s, timeout_s = time.monotonic() - self._last_arrival_s, self._value("timeout_s")
        if silent_s >= timeout_s and not self._silent and self._worker is not None:
            self._silent = True
            self._worker.lose(f"no image for {timeout_s:g} s")
        if silent_s >= SILENCE_WARNING_S and self._is_news("silence"):
            self.get_logger().warning(f"no image on {self._image_topic} for {silent_s:.0f} s: {self._offers()}")

    def _publish_diagnostics(self) -> None:
        if self._worker is not None and "diagnostics" in self._outputs:
            stamp = self.get_clock().now().to_msg()
            name = self.get_fully_qualified_name().lstrip("/")
            message = self._health.message(stamp, name, self._worker, self._value("backend"), self._silent)
            self._outputs["diagnostics"].publish(message)

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _on_worker_error(self, error: Exception) -> None:
        if self.context.ok():  # after a shutdown nothing can be published, and nobody needs to hear it
            self._warn(f"while tracking: {type(error).__name__}: {error}")

    def _warn(self, text: str, cause: str = "") -> None:
        """Log a warning once for as long as its cause goes on; its cause is its text, numbers and names aside."""
        if self._is_news(cause or re.sub(r"'[^']*'|\d+", "#", text)):
            self.get_logger().warning(text)

    def _is_news(self, cause: str) -> bool:
        """Whether a cause of warnings is new, or comes back after it was quiet for a while. Any thread may ask."""
        now = time.monotonic()
        with self._warned_lock:
            before = self._warned.pop(cause, -QUIET_S)
            self._warned[cause] = now
            if len(self._warned) > CAUSES_KEPT:
                del self._warned[next(iter(self._warned))]
        return now - before >= QUIET_S

    def _offers(self) -> str:
        """Who publishes images, and how."""
        found = self.get_publishers_info_by_topic(self._image_topic)
        if not found:
            return "nobody publishes it (check the topic name and ROS_DOMAIN_ID)"
        return "; ".join(
            f"{i.node_name} offers {i.qos_profile.reliability.name}, {i.qos_profile.durability.name}" for i in found
        )


# Functions, since rclpy writes overrides into the profile it is given.
def newest_frame_qos() -> QoSProfile:
    """Sensor data, of which only the newest counts."""
    return QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


def every_frame_qos() -> QoSProfile:
    """Nothing is lost on the way; the publisher has to offer that."""
    return QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)


def latched_qos() -> QoSProfile:
    """Who joins late gets the last message."""
    return QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def _steady_clock() -> Clock:
    """Timers must fire while simulated time stands still."""
    return Clock(clock_type=ClockType.STEADY_TIME)


def _wanted(publisher: Any) -> bool:
    return bool(publisher.get_subscription_count())


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``ros2 run siamtrack tracker_node``."""
    rclpy.init(args=arguments)
    node: TrackerNode | None = None
    try:
        node = TrackerNode()
        if node.get_parameter("autostart").value and node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            node.trigger_activate()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except ParameterException as error:  # a value given at start that cannot be
        print(f"tracker_node: {error}", file=sys.stderr)
        return 1
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
