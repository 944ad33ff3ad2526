"""The lifecycle node: camera images and a box in, tracked boxes out.

*configure* loads the model and warms it up, *activate* subscribes and publishes, *deactivate*, *cleanup* and *shutdown*
give everything back in that order. The image callback only puts the newest frame aside; the worker thread tracks and
publishes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from geometry_msgs.msg import Point, PointStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter as RosParameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, RegionOfInterest
from std_srvs.srv import SetBool, Trigger

from ros2_siamtrack import messages
from ros2_siamtrack.cause_log import CauseLog
from ros2_siamtrack.diagnostics import Health
from ros2_siamtrack.image_input import ImageInput
from ros2_siamtrack.images import RosFrame
from ros2_siamtrack.log_bridge import LogBridge
from ros2_siamtrack.outputs import Outputs
from ros2_siamtrack.parameters import PARAMETERS, TRACKING_PARAMETERS, engine_options, refusal, tune
from ros2_siamtrack.running import refuse_invalid_transitions, run_node, spin
from siamtrack.bundle import load_bundle
from siamtrack.camera import Camera
from siamtrack.runners import facts_of, open_runner
from siamtrack.session import FrameRing, InitRequest, Report
from siamtrack.tracker import SiamTracker
from siamtrack.worker import Worker

WATCHDOG_PERIOD_S = 0.1
DIAGNOSTICS_PERIOD_S = 1.0


class TrackerNode(LifecycleNode):
    """Follows one target in one camera stream; topics and parameters are in ``docs/ros.md``."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__("siamtrack", **arguments)
        refuse_invalid_transitions(self)
        for parameter in PARAMETERS:
            self.declare_parameter(parameter.name, parameter.default, parameter.descriptor())
        self.add_on_set_parameters_callback(self._on_parameters)
        self._log = CauseLog(self.get_logger())
        self._outputs = Outputs(self, self._log, self._on_worker_error)
        self._health = Health()
        self._log_bridge = LogBridge(lambda: self.get_logger())
        self._worker: Worker | None = None
        self._images: ImageInput | None = None
        self._camera: Camera | None = None
        self._held_services: list[Any] = []
        self._held_subscriptions: list[Any] = []
        self._held_timers: list[Any] = []
        self._said_what_is_missing = False

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
            self._outputs.open(self._health)
            self._held_services = [
                self.create_service(Trigger, "~/reset", self._on_reset),
                self.create_service(SetBool, "~/pause", self._on_pause),
            ]
        except Exception as error:  # a missing or damaged model or a bad QoS override must not end the process
            self.get_logger().error(f"cannot configure: {error}")
            self._give_back()
            return TransitionCallbackReturn.FAILURE
        self._say_what_is_missing()
        facts = ", ".join(value if key == "backend" else f"{key} {value}" for key, value in self._health.facts.items())
        self.get_logger().info(f"configured: {self._health.model} on {facts}")
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe and publish."""
        result = super().on_activate(state)
        try:
            self._create_inputs()
            self._held_timers = [
                self.create_timer(WATCHDOG_PERIOD_S, self._watch, clock=_steady_clock()),
                self.create_timer(DIAGNOSTICS_PERIOD_S, self._publish_diagnostics, clock=_steady_clock()),
            ]
            self._outputs.start()
        except Exception as error:  # rclpy would swallow it
            self.get_logger().error(f"cannot activate: {error}")
            self._outputs.stop()
            self._drop_inputs()
            super().on_deactivate(state)
            return TransitionCallbackReturn.FAILURE
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the target is forgotten."""
        self._outputs.stop()
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

    def _give_back(self) -> None:
        self._outputs.stop()
        self._drop_inputs()
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        self._log_bridge.close()
        for service in self._held_services:
            self.destroy_service(service)
        self._outputs.close()
        self._held_services, self._camera = [], None

    def _drop_inputs(self) -> None:
        for timer in self._held_timers:
            self.destroy_timer(timer)
        for subscription in self._held_subscriptions:
            self.destroy_subscription(subscription)
        self._held_timers, self._held_subscriptions, self._images = [], [], None

    # ---- creation ---------------------------------------------------------------------------------------------------

    def _open_tracker(self) -> SiamTracker:
        """Runs on the worker's thread, which owns what it returns."""
        self._log_bridge.open()
        bundle = load_bundle(self._value("model") or None)
        engines = engine_options(**{n: self._value(n) for n in ("build_engines", "engine_key_file")})
        backend, threads, precision = (self._value(name) for name in ("backend", "threads", "precision"))
        tracker = SiamTracker(open_runner(bundle, backend, threads, engines, precision))
        tune(tracker, {name: self._value(name) for name in TRACKING_PARAMETERS})
        self._health.model, self._health.facts = bundle.manifest.model, facts_of(tracker.runner)
        return tracker

    def _create_inputs(self) -> None:
        base = self.resolve_topic_name("image")
        self._images = ImageInput(
            self,
            base,
            compressed=self._value("image_transport") == "compressed",
            every=self._value("processing") == "every",
            on_frame=self._on_frame,
            on_lost=self._on_lost,
            log=self._log,
        )
        self._held_subscriptions.append(self._images.subscription)
        inputs: list[tuple[Any, str, Callable[[Any], None], Any]] = [
            (CameraInfo, "camera_info", self._on_camera_info, qos_profile_sensor_data),
            (RegionOfInterest, "~/init_box", self._on_init_box, 10),
            (PointStamped, "~/init_point", self._on_init_point, 10),
            # Remapping `image` moves the clicks along, as it does the compressed topic.
            (Point, f"{base}_mouse_left", self._on_click, 10),
        ]
        if messages.Detection2D is not None:
            inputs.append((messages.Detection2D, "~/init_detection", self._on_init_detection, 10))
        for kind, topic, callback, qos in inputs:
            self._held_subscriptions.append(self.create_subscription(kind, topic, callback, qos))

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

    def _on_frame(self, frame: RosFrame) -> None:
        if self._worker is not None and self._worker.submit(frame):
            self._log.warn("time jumped back: buffered frames dropped")

    def _on_lost(self, total: int) -> None:
        self._health.lost_in_transport = total

    def _on_camera_info(self, info: CameraInfo) -> None:
        try:
            self._camera = messages.camera_from_info(info)
        except ValueError as error:
            self._camera = None
            self._log.warn(f"no bearing: {error}", cause="camera_info")

    def _on_init_box(self, message: RegionOfInterest) -> None:
        self._start(messages.init_from_roi(message))

    def _on_init_detection(self, message: Any) -> None:
        self._start(messages.init_from_detection(message))

    def _on_init_point(self, message: PointStamped) -> None:
        self._start(messages.init_from_point(message.point, self._value("init_point_size_px"), message.header.stamp))

    def _on_click(self, point: Point) -> None:
        self._start(messages.init_from_point(point, self._value("init_point_size_px")))

    def _start(self, init: InitRequest) -> None:
        if self._worker is None or not self._outputs.active:
            return
        if self._worker.received == 0:
            self._log.warn("box received before the first image: it starts on that", cause="early box")
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

    def _on_parameters(self, parameters: list[RosParameter]) -> SetParametersResult:
        for parameter in parameters:
            problem = refusal(parameter.name, parameter.value)
            if problem:
                return SetParametersResult(successful=False, reason=problem)
        changes = {p.name: p.value for p in parameters if p.name in TRACKING_PARAMETERS}
        if changes and self._worker is not None:
            self._worker.configure(lambda tracker: tune(tracker, changes))
        return SetParametersResult(successful=True)

    # ---- out --------------------------------------------------------------------------------------------------------

    def _on_report(self, report: Report) -> None:
        """Runs on the worker's thread."""
        if report.warning:
            self._log.warn(report.warning)
        self._outputs.publish(report, self._camera)

    def _on_worker_error(self, error: Exception) -> None:
        if self.context.ok():  # after a shutdown nothing can be published, and nobody needs to hear it
            self._log.warn(f"while tracking: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        """The target is lost when images stop."""
        timeout_s = self._value("timeout_s")
        if self._worker is not None and self._images is not None and self._images.has_stopped(timeout_s):
            self._worker.lose(f"no image for {timeout_s:g} s")

    def _publish_diagnostics(self) -> None:
        if self._worker is not None and self._images is not None:
            stamp = self.get_clock().now().to_msg()
            name = self.get_fully_qualified_name().lstrip("/")
            message = self._health.message(stamp, name, self._worker, self._images.silent)
            self._outputs.publishers["diagnostics"].publish(message)

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value


def _steady_clock() -> Clock:
    """Timers must fire while simulated time stands still."""
    return Clock(clock_type=ClockType.STEADY_TIME)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``ros2 run siamtrack tracker_node``; runs until it is stopped."""
    return run_node("tracker_node", TrackerNode, _serve, arguments)


def _serve(node: TrackerNode) -> None:
    if node.get_parameter("autostart").value and node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
        node.trigger_activate()
    spin(node)


if __name__ == "__main__":
    sys.exit(main())
