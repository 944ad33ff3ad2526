"""The lifecycle node: camera images and a box in, tracked boxes out.

*configure* loads the model and warms it up, *activate* subscribes and publishes, *deactivate*, *cleanup* and *shutdown*
give everything back in that order. The image callback only puts the newest frame aside; the worker thread tracks and
publishes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Point, PointStamped, Vector3Stamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.event_handler import SubscriptionEventCallbacks
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

LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
EVERY_FRAME = QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)
WATCHDOG_PERIOD_S = 0.1
SILENCE_WARNING_S = 5.0


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
        self._logged: set[str] = set()
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
        worker = Worker(
            self._open_tracker,
            self._on_report,
            lambda error: self._warn_once(f"worker:{error}", f"while tracking: {type(error).__name__}: {error}"),
            FrameRing(self._value("buffer_s"), self._value("buffer_mb")),
            every=self._value("processing") == "every",
        )
        try:
            worker.start()
        except Exception as error:  # a missing or damaged model must not end the process
            self.get_logger().error(f"cannot configure: {error}")
            return TransitionCallbackReturn.FAILURE
        self._worker = worker
        self._create_outputs()
        self._held_services = [
            self.create_service(Trigger, "~/reset", self._on_reset),
            self.create_service(SetBool, "~/pause", self._on_pause),
        ]
        self._say_what_is_missing()
        self.get_logger().info(f"configured: {self._health.model} on {self._value('backend')}")
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe and publish."""
        result = super().on_activate(state)
        self._last_arrival_s, self._last_stamp_ns, self._silent = time.monotonic(), 0, False
        self._active = True
        self._painter = DebugPainter(self._outputs["debug_image"], lambda: self._value("debug_image_hz"))
        self._create_inputs()
        self._held_timers = [
            self.create_timer(WATCHDOG_PERIOD_S, self._watch, clock=self._steady_clock()),
            self.create_timer(1.0, self._publish_diagnostics, clock=self._steady_clock()),
        ]
        self._publish_state(State.IDLE, "", force=True)
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the target is forgotten."""
        self._active = False
        self._drop_inputs()
        if self._worker is not None:
            self._worker.reset("deactivated")
            self._worker.ring.clear()
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

    def _give_back(self) -> None:
        self._active = False
        self._drop_inputs()
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        for service in self._held_services:
            self.destroy_service(service)
        for publisher in self._outputs.values():
            self.destroy_publisher(publisher)
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
            "state": (String, "~/state", LATCHED),
            "debug_image": (CompressedImage, "~/debug_image/compressed", 1),
            "diagnostics": (DiagnosticArray, "/diagnostics", 10),
        }
        if messages.Detection2D is not None:
            kinds["detection"] = (messages.Detection2D, "~/detection", 10)
        overrides = QoSOverridingOptions.with_default_policies()
        for name, (kind, topic, qos) in kinds.items():
            self._outputs[name] = self.create_lifecycle_publisher(kind, topic, qos, qos_overriding_options=overrides)

    def _create_inputs(self) -> None:
        compressed = self._value("image_transport") == "compressed"
        topic, kind = ("image/compressed", CompressedImage) if compressed else ("image", Image)
        every = self._value("processing") == "every"
        depth_one = with_depth(qos_profile_sensor_data, depth=1)
        self._image_topic = self.resolve_topic_name(topic)
        parse: Callable[[bytes, int], RosFrame] = parse_compressed_image if compressed else self._parse_raw
        clicks = self.resolve_topic_name("image") + "_mouse_left"
        self._inputs = [
            self.create_subscription(
                kind,
                topic,
                lambda serialised: self._on_image(serialised, parse),
                EVERY_FRAME if every else depth_one,
                raw=True,
                event_callbacks=SubscriptionEventCallbacks(
                    incompatible_qos=self._on_incompatible_qos, message_lost=self._on_message_lost
                ),
                qos_overriding_options=QoSOverridingOptions.with_default_policies(),
            ),
            self.create_subscription(CameraInfo, "camera_info", self._on_camera_info, qos_profile_sensor_data),
            self.create_subscription(RegionOfInterest, "~/init_box", self._on_init_box, 10),
            self.create_subscription(PointStamped, "~/init_point", self._on_init_point, 10),
            self.create_subscription(Point, clicks, self._on_click, 10),
        ]
        if messages.Detection2D is not None:
            self._inputs.append(
                self.create_subscription(messages.Detection2D, "~/init_detection", self._on_init_detection, 10)
            )

    def _parse_raw(self, serialised: bytes, arrival_ns: int) -> RosFrame:
        return parse_image(serialised, arrival_ns, messages.convert_with_cv_bridge if messages.CvBridge else None)

    def _say_what_is_missing(self) -> None:
        if messages.Detection2D is None:
            self._warn_once(
                "vision_msgs",
                "vision_msgs is not installed: ~/detection and ~/init_detection are off, the rest works "
                "(sudo apt install ros-$ROS_DISTRO-vision-msgs)",
            )
        if messages.CvBridge is None:
            self._warn_once(
                "cv_bridge",
                "cv_bridge is not installed: usual image encodings work without it, rare ones will not "
                "(sudo apt install ros-$ROS_DISTRO-cv-bridge)",
            )

    # ---- in ---------------------------------------------------------------------------------------------------------

    def _on_image(self, serialised: bytes, parse: Callable[[bytes, int], RosFrame]) -> None:
        worker = self._worker
        if worker is None:
            return
        arrival_ns = self.get_clock().now().nanoseconds
        try:
            frame = parse(serialised, arrival_ns)
        except ValueError as error:
            self._warn_once(f"image:{error}", f"image ignored: {error}")
            return
        self._last_arrival_s, self._silent = time.monotonic(), False
        back_ns = self._last_stamp_ns - frame.stamp_ns
        if frame.stamp_ns and 0 < back_ns <= FrameRing.JUMP_NS:
            self._warn_once("order", f"image ignored: its stamp is {back_ns / 1e6:.0f} ms before the previous one's")
            return
        self._last_stamp_ns = frame.stamp_ns
        if worker.submit(frame):
            self.get_logger().warning("time jumped back: buffered frames dropped, searching for the target anew")
            worker.lose("time jumped back")

    def _on_camera_info(self, info: CameraInfo) -> None:
        try:
            self._camera = messages.camera_from_info(info)
        except ValueError as error:
            self._camera = None
            self._warn_once(f"camera:{error}", f"no bearing: {error}")

    def _on_init_box(self, message: RegionOfInterest) -> None:
        self._start(messages.init_from_roi(message))

    def _on_init_detection(self, message: Any) -> None:
        self._start(messages.init_from_detection(message))

    def _on_init_point(self, message: PointStamped) -> None:
        self._start(messages.init_from_point(message.point, self._value("init_point_size_px"), message.header.stamp))

    def _on_click(self, point: Point) -> None:
        self._start(messages.init_from_point(point, self._value("init_point_size_px")))

    def _start(self, init: InitRequest) -> None:
        if self._worker is None:
            return
        if self._worker.received == 0:
            self.get_logger().info("box received before the first image: it will start on that")
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
        self._warn_once("qos", f"a publisher of {self._image_topic} offers an incompatible QoS: {self._offers()}")

    def _on_message_lost(self, event: Any) -> None:
        self._health.lost_in_transport = event.total_count

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
        chosen = {n: getattr(own, n) if v == FROM_MODEL else v for n, v in values.items()}
        tracker.tracking = dataclasses.replace(tracker.tracking, **chosen)

    # ---- out --------------------------------------------------------------------------------------------------------

    def _on_report(self, report: Report) -> None:
        """Publish what is known; runs on the worker's thread."""
        if report.warning:
            self._warn_once(f"report:{report.warning}", report.warning)
        if not self._active:
            return
        outputs = self._outputs
        frame = report.frame
        if isinstance(frame, RosFrame):
            seen = report.track is not None and report.state in (State.TRACKING, State.UNCERTAIN)
            box = report.track.box_xywh if report.track is not None and seen else None
            score = report.track.score if report.track is not None else float("nan")
            if report.state is not State.IDLE:
                if "detection" in outputs and _wanted(outputs["detection"]):
                    detection = messages.detection_message(frame.header, box, score, report.target_id)
                    outputs["detection"].publish(detection)
                if _wanted(outputs["overlay"]):
                    outputs["overlay"].publish(messages.overlay_message(frame.header, box, report.state))
            if box is not None:
                height, width = frame.bgr().shape[:2]
                if _wanted(outputs["roi"]):
                    outputs["roi"].publish(messages.roi_message(box, width, height))
                if self._camera is not None and _wanted(outputs["bearing"]):
                    x, y, w, h = box
                    bearing = self._camera.bearing(x + w / 2, y + h / 2, width, height)
                    outputs["bearing"].publish(messages.bearing_message(frame.header, bearing))
            self._health.handled(frame, self.get_clock().now().nanoseconds)
            if self._painter is not None and _wanted(outputs["debug_image"]):
                self._painter.offer(report)
        self._health.state, self._health.reason, self._health.score = report.state, report.reason, _score(report)
        self._publish_state(report.state, report.reason)

    def _publish_state(self, state: State, reason: str, force: bool = False) -> None:
        if "state" in self._outputs and (force or (state, reason) != self._published_state):
            self._published_state = (state, reason)
            self._outputs["state"].publish(String(data=str(state)))
            if reason:
                self.get_logger().info(f"{state}: {reason}")

    def _watch(self) -> None:
        """Say so when images stop."""
        silent_s = time.monotonic() - self._last_arrival_s
        if self._worker is None or self._silent or silent_s < self._value("timeout_s"):
            if silent_s > SILENCE_WARNING_S:
                self._warn_once("silence", f"no image on {self._image_topic} for {silent_s:.0f} s: {self._offers()}")
            return
        self._silent = True
        self._worker.lose(f"no image for {self._value('timeout_s'):g} s")

    def _publish_diagnostics(self) -> None:
        if self._worker is not None and "diagnostics" in self._outputs:
            stamp = self.get_clock().now().to_msg()
            name = self.get_fully_qualified_name().lstrip("/")
            message = self._health.message(stamp, name, self._worker, self._value("backend"), self._silent)
            self._outputs["diagnostics"].publish(message)

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _steady_clock(self) -> Any:
        """Timers must fire while simulated time stands still."""
        return rclpy.clock.Clock(clock_type=rclpy.clock.ClockType.STEADY_TIME)

    def _warn_once(self, cause: str, text: str) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            self.get_logger().warning(text)

    def _offers(self) -> str:
        """Who publishes images, and how."""
        found = self.get_publishers_info_by_topic(self._image_topic)
        if not found:
            return "nobody publishes it (check the topic name and ROS_DOMAIN_ID)"
        return "; ".join(
            f"{i.node_name} offers {i.qos_profile.reliability.name}, {i.qos_profile.durability.name}" for i in found
        )


def with_depth(profile: QoSProfile, depth: int) -> QoSProfile:
    """A QoS profile with another depth."""
    return QoSProfile(depth=depth, reliability=profile.reliability, durability=profile.durability)


def _wanted(publisher: Any) -> bool:
    return bool(publisher.get_subscription_count())


def _score(report: Report) -> float:
    return report.track.score if report.track is not None else float("nan")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``ros2 run siamtrack tracker_node``."""
    rclpy.init(args=arguments)
    node = TrackerNode()
    try:
        if node.get_parameter("autostart").value:
            if node.trigger_configure() != TransitionCallbackReturn.SUCCESS:
                return 1
            node.trigger_activate()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
