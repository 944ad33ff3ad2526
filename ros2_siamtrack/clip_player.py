"""A node that plays a clip as a camera: a video, a folder of images, or the rendered scene with its exact truth."""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import rclpy
from geometry_msgs.msg import PolygonStamped
from numpy.typing import NDArray
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.task import Future
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from ros2_siamtrack import messages
from ros2_siamtrack.images import Header
from ros2_siamtrack.init_publisher import TRACKER, InitPublisher, parse_box
from ros2_siamtrack.parameters import Parameter
from ros2_siamtrack.qos import every_message_qos, reliable_qos
from ros2_siamtrack.running import run_node
from siamtrack.crop import Image as Pixels
from siamtrack.scene import Scene
from siamtrack.sources import FrameSource, open_source
from siamtrack.tracker import Box

SCENE = "scene"
TRUTH = "truth"
FALLBACK_HZ = 30.0
READ_AHEAD = 4  # frames decoded or rendered before their turn

PARAMETERS = (
    Parameter("source", SCENE, f"video file, image folder, glob, camera index, stream URL; {SCENE}: the rendered clip"),
    Parameter("rate_hz", 0.0, "frames a second; 0: what the source says, else 30", bounds=(0.0, 1000.0)),
    Parameter("loop", False, "start over at the end instead of ending the process"),
    Parameter("frame_id", "camera", "of the images' headers"),
    Parameter("wait_for", 0, "hold the first frame until so many subscribe to the images", bounds=(0, 100)),
    Parameter("start_delay_s", 0.5, "and then so much longer, seconds", bounds=(0.0, 3600.0)),
    Parameter(
        "transport", "raw", "raw: topic image; compressed: topic image/compressed", choices=("raw", "compressed")
    ),
    Parameter("jpeg_quality", 90, "of compressed images", bounds=(1, 100)),
    Parameter("fov_deg", 60.0, "horizontal field of view that camera_info tells of", bounds=(1.0, 170.0)),
    Parameter(
        "init", "", f"box X,Y,W,H in the first frame, handed to the tracker; {TRUTH}: the scene's own; empty: none"
    ),
    Parameter("tracker", TRACKER, "node name of the tracker that gets the box"),
    Parameter("width", 1280, "of the rendered scene, pixels", bounds=(96, 7680)),
    Parameter("height", 720, "of the rendered scene, pixels", bounds=(96, 7680)),
    Parameter("frames", 300, "length of the rendered scene", bounds=(1, 1_000_000)),
    Parameter("seed", 0, "which rendered scene", bounds=(0, 2**31 - 1)),
)


class ClipFrame(NamedTuple):
    """A frame of a clip.

    Attributes:
        image: uint8 ``[H, W, 3]`` BGR.
        truth_xywh: where the target is; None where nobody knows.
        visible: how much of it is to be seen, in ``[0, 1]``.
        first: whether the clip starts (again) here.
    """

    image: Pixels
    truth_xywh: Box | None
    visible: float
    first: bool


class ClipPlayer(Node):
    """Publishes ``image`` or ``image/compressed``, ``camera_info``, and for the rendered scene ``~/truth``.

    Attributes:
        done: completes after the last frame; holds the exception when the source broke.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__("clip_player", **arguments)
        for parameter in PARAMETERS:
            self.declare_parameter(parameter.name, parameter.default, parameter.descriptor())
        self.done: Future = Future()
        self.published = 0
        self._stopping = False
        self._box = self._check()
        self._source: FrameSource | None = None
        self._scene, self._rate_hz = self._open()
        compressed = self._value("transport") == "compressed"
        overrides = QoSOverridingOptions.with_default_policies()
        topic, kind = ("image/compressed", CompressedImage) if compressed else ("image", Image)
        self._images = self.create_publisher(kind, topic, reliable_qos(), qos_overriding_options=overrides)
        self._infos = self.create_publisher(CameraInfo, "camera_info", reliable_qos())
        self._truths = self.create_publisher(PolygonStamped, "~/truth", every_message_qos()) if self._scene else None
        self._detections = None
        if self._scene and messages.Detection2D is not None:
            self._detections = self.create_publisher(messages.Detection2D, "~/truth_detection", every_message_qos())
        self._inits = InitPublisher(self, self._value("tracker")) if self._value("init") else None
        self._ahead: queue.Queue[ClipFrame | Exception | None] = queue.Queue(READ_AHEAD)
        self._feeder = threading.Thread(target=self._feed, name="clip player", daemon=True)
        self._feeder.start()
        self._said_waiting_s = self._created_s = time.monotonic()
        self._ready_s: float | None = None
        self._timer = self.create_timer(1 / self._rate_hz, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def destroy_node(self) -> None:
        """Also ends reading."""
        self._stopping = True
        while not self._ahead.empty():  # the feeder may wait for room
            self._ahead.get_nowait()
        self._feeder.join()
        super().destroy_node()

    def wait_until_delivered(self, timeout_s: float = 2.0) -> None:
        """Give reliable subscribers time to take the last messages."""
        for publisher in (self._images, self._infos, self._truths, self._detections):
            if publisher is not None:
                publisher.wait_for_all_acked(Duration(seconds=timeout_s))

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _check(self) -> Box | None:
        for parameter in PARAMETERS:
            if parameter.choices and self._value(parameter.name) not in parameter.choices:
                wanted = ", ".join(parameter.choices)
                raise ValueError(f"{parameter.name} must be one of {wanted}, got {self._value(parameter.name)!r}")
        init = self._value("init")
        if init == TRUTH and self._value("source") != SCENE:
            raise ValueError(f"init is {TRUTH!r}, but only the rendered scene has a truth: give X,Y,W,H")
        return parse_box(init) if init not in ("", TRUTH) else None

    def _open(self) -> tuple[Scene | None, float]:
        """The scene, if that is played, and the frame rate. A source that is not there shows here."""
        rate_hz = self._value("rate_hz")
        if self._value("source") == SCENE:
            size = (self._value("width"), self._value("height"))
            rate_hz = rate_hz or FALLBACK_HZ
            return Scene(*size, self._value("frames"), self._value("seed"), rate_hz), rate_hz
        self._source = open_source(self._value("source"))
        return None, rate_hz or self._source.fps or FALLBACK_HZ

    def _feed(self) -> None:
        """Keep the queue full; on its own thread."""
        try:
            going = True
            while going and not self._stopping:
                for frame in self._frames():
                    self._ahead.put(frame)
                    if self._stopping:
                        return
                going = self._value("loop")
            self._ahead.put(None)
        except Exception as error:  # for the main thread
            self._ahead.put(error)

    def _frames(self) -> Iterator[ClipFrame]:
        if self._scene is not None:
            for index, rendered in enumerate(self._scene):
                yield ClipFrame(rendered.image, rendered.box_xywh, rendered.visible, index == 0)
            return
        opened, self._source = self._source, None  # from the start, once
        with opened or open_source(self._value("source")) as source:
            for index, image in source:
                yield ClipFrame(image, None, math.nan, index == 0)

    # ---- playing ----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self.done.done() or not self._may_start():
            return
        try:
            # Late frames are late, not skipped: a clip has the same frames on a slow machine.
            frame = self._ahead.get(timeout=1.0)
        except queue.Empty:
            return
        if isinstance(frame, ClipFrame):
            self._publish(frame)
        elif frame is None:
            self.done.set_result(self.published)
        else:
            self.done.set_exception(frame)

    def _may_start(self) -> bool:
        now_s, missing = time.monotonic(), ""
        if self._ready_s is None:
            if self._images.get_subscription_count() < self._value("wait_for"):
                missing = f"{self._value('wait_for')} subscribers of {self._images.topic_name}"
            elif self._inits is not None and not self._inits.listeners:
                missing = f"a tracker that listens to {self._inits.topic}"
            else:
                self._ready_s = now_s
        if missing and now_s - self._said_waiting_s > 5:
            self._said_waiting_s = now_s
            self.get_logger().info(f"waiting for {missing} since {now_s - self._created_s:.0f} s")
        return self._ready_s is not None and now_s - self._ready_s >= self._value("start_delay_s")

    def _publish(self, frame: ClipFrame) -> None:
        height, width = frame.image.shape[:2]
        compressed = self._value("transport") == "compressed"
        payload = (
            _jpeg(frame.image, self._value("jpeg_quality")) if compressed else messages.as_uint8_array(frame.image)
        )
        plain = self._header()
        if frame.first and not self._hand_over_box(frame, plain):
            plain = self._header()
            self._timer.reset()  # or the next frames would make up for that time
        header = messages.header_message(plain)
        self._infos.publish(messages.camera_info_message(plain, width, height, self._value("fov_deg")))
        if compressed:
            message: Any = CompressedImage(header=header, format="jpeg")
        else:
            message = Image(header=header, height=height, width=width, encoding="bgr8", step=3 * width)
        message.data = payload
        self._images.publish(message)
        if self._truths is not None and frame.truth_xywh is not None:
            self._truths.publish(messages.truth_message(plain, frame.truth_xywh, frame.visible))
            if self._detections is not None:
                self._detections.publish(messages.detection_message(plain, frame.truth_xywh, frame.visible, TRUTH))
        self.published += 1

    def _header(self) -> Header:
        stamp = self.get_clock().now().to_msg()
        return Header(stamp.sec, stamp.nanosec, self._value("frame_id"))

    def _hand_over_box(self, frame: ClipFrame, header: Header) -> bool:
        """Publish the first frame's box ahead of it; False when that took time, because it bears no stamp.

        A box without a stamp starts the tracker on the frame that comes next, so it has to be there first.
        """
        box = self._box or frame.truth_xywh
        if self._inits is None or box is None or self._inits.publish(box, header):
            return True
        self._inits.wait(0.3)
        time.sleep(0.05)  # what is received is not handled yet
        return False


def _jpeg(image: Pixels, quality: int) -> NDArray[np.uint8]:
    encoded: NDArray[np.uint8] = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    return encoded


def make_room_for_images() -> None:
    """Before ROS starts: give Fast DDS enough shared memory for images, unless the user has said something else."""
    names = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")  # up to Jazzy, from Kilted on
    if not any(name in os.environ for name in names):
        os.environ.update(dict.fromkeys(names, str(Path(__file__).with_name("fastdds.xml"))))


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``ros2 run siamtrack clip_player``; returns 0 at the clip's end, 2 when it cannot be played."""
    make_room_for_images()
    return run_node("clip_player", ClipPlayer, _play, arguments)


def _play(node: ClipPlayer) -> None:
    rclpy.spin_until_future_complete(node, node.done)
    if node.done.done():
        node.get_logger().info(f"played {node.done.result()} frames")
        node.wait_until_delivered()


if __name__ == "__main__":
    sys.exit(main())
