"""The camera's topic: its images as frames, in the order of their stamps, and what to say when none come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage, Image

from ros2_siamtrack import messages
from ros2_siamtrack.cause_log import CauseLog
from ros2_siamtrack.images import RosFrame, parse_compressed_image, parse_image
from ros2_siamtrack.qos import every_message_qos, newest_frame_qos
from siamtrack.session import FrameRing

try:
    from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks, UnsupportedEventTypeError

SILENCE_WARNING_S = 5.0


class ImageInput:
    """Subscribes to images; the node destroys `subscription` when it is done.

    Args:
        node: whose subscription it is.
        base_topic: of raw images; compressed ones are below it, as image_transport has it.
        compressed: which of the two.
        every: ask for all images, delivered reliably, instead of the newest.
        on_frame: called with every frame but those that cannot be read or come out of order.
        on_lost: called with how many images were lost on the way, all in all.
        log: for warnings.

    Attributes:
        silent: whether images have stopped, as `has_stopped` found last.
    """

    def __init__(
        self,
        node: Node,
        base_topic: str,
        compressed: bool,
        every: bool,
        on_frame: Callable[[RosFrame], None],
        on_lost: Callable[[int], None],
        log: CauseLog,
    ) -> None:
        self._node, self._on_frame, self._on_lost, self._log = node, on_frame, on_lost, log
        self._topic = f"{base_topic}/compressed" if compressed else base_topic
        self._parse: Callable[[bytes, int], RosFrame] = parse_compressed_image if compressed else _parse_raw
        self._last_arrival_s, self._last_stamp_ns = time.monotonic(), 0
        self.silent = False
        self.subscription = self._subscribe(CompressedImage if compressed else Image, every)

    def has_stopped(self, timeout_s: float) -> bool:
        """To be asked often: True once in a silence, when there was no image for so long."""
        silent_s = time.monotonic() - self._last_arrival_s
        if silent_s >= SILENCE_WARNING_S and self._log.is_news("silence"):
            self._node.get_logger().warning(f"no image on {self._topic} for {silent_s:.0f} s: {self._offers()}")
        if silent_s < timeout_s or self.silent:
            return False
        self.silent = True
        return True

    def _subscribe(self, kind: Any, every: bool) -> Any:
        events: dict[str, Callable[[Any], None]] = {
            "incompatible_qos": self._on_incompatible_qos,
            "message_lost": self._on_message_lost,
        }
        while True:
            try:
                return self._node.create_subscription(
                    kind,
                    self._topic,
                    self._on_image,
                    every_message_qos() if every else newest_frame_qos(),
                    raw=True,
                    event_callbacks=SubscriptionEventCallbacks(**events),
                    qos_overriding_options=QoSOverridingOptions.with_default_policies(),
                )
            except UnsupportedEventTypeError:  # not every middleware has both
                if not events:
                    raise
                events.popitem()

    def _on_image(self, serialised: bytes) -> None:
        try:
            frame = self._parse(serialised, self._node.get_clock().now().nanoseconds)
        except ValueError as error:
            self._log.warn(f"image ignored: {error}")
            return
        self._last_arrival_s, self.silent = time.monotonic(), False
        if frame.stamp_ns > 0:
            back_ns = self._last_stamp_ns - frame.stamp_ns
            if 0 < back_ns <= FrameRing.JUMP_NS:
                self._log.warn(f"image ignored: its stamp is {back_ns / 1e6:.0f} ms before that of the one before")
                return
            self._last_stamp_ns = frame.stamp_ns
        self._on_frame(frame)
        self._last_arrival_s = time.monotonic()  # `every` may have held it up; that is no silence

    def _on_incompatible_qos(self, event: Any) -> None:
        self._log.warn(
            f"a publisher of {self._topic} offers a QoS that cannot be taken: {self._offers()}; to take it, "
            f"start with -p qos_overrides.{self._topic}.subscription.reliability:=best_effort",
            cause="incompatible qos",
        )

    def _on_message_lost(self, event: Any) -> None:
        self._on_lost(event.total_count)
        self._log.warn(f"{event.total_count_change} images lost on the way here", cause="message lost")

    def _offers(self) -> str:
        """Who publishes images, and how."""
        found = self._node.get_publishers_info_by_topic(self._topic)
        if not found:
            return "nobody publishes it (check the topic name and ROS_DOMAIN_ID)"
        return "; ".join(
            f"{i.node_name} offers {i.qos_profile.reliability.name}, {i.qos_profile.durability.name}" for i in found
        )


def _parse_raw(serialised: bytes, arrival_ns: int) -> RosFrame:
    return parse_image(serialised, arrival_ns, messages.convert_with_cv_bridge if messages.CvBridge else None)
