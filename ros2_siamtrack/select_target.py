"""Choose the target: drag a box on the live image, or name one with ``--box``.

The box is published with the header of the frame it was drawn on. While it is being drawn the picture stands still.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import cv2
import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import CompressedImage, Image

from ros2_siamtrack.images import RosFrame, parse_compressed_image, parse_image
from ros2_siamtrack.init_publisher import TRACKER, InitPublisher, parse_box
from ros2_siamtrack.qos import newest_frame_qos
from ros2_siamtrack.running import run_node
from siamtrack.crop import Image as Pixels
from siamtrack.tracker import Box

TITLE = "siamtrack: drag a box round the target (q or Esc ends)"
END_KEYS = (ord("q"), 27)
SMALLEST_PX = 4.0
LINE_BGR = (90, 210, 80)


class Drag:
    """What the mouse has done, in image pixels."""

    def __init__(self) -> None:
        self.start: tuple[int, int] | None = None
        self.end = (0, 0)
        self.finished: Box | None = None

    def on_mouse(self, event: int, x: int, y: int, *_: Any) -> None:
        """As OpenCV calls it; a new press throws an unfinished box away."""
        if event == cv2.EVENT_LBUTTONDOWN:
            self.start, self.end, self.finished = (x, y), (x, y), None
        elif self.start is not None:
            self.end = (x, y)
            if event == cv2.EVENT_LBUTTONUP:
                self.finished, self.start = self.box_xywh(), None

    def box_xywh(self) -> Box | None:
        """The box between the two corners, both pixels included; None while it is too small to be meant."""
        (x0, y0), (x1, y1) = self.start or self.end, self.end
        box = (float(min(x0, x1)), float(min(y0, y1)), abs(x1 - x0) + 1.0, abs(y1 - y0) + 1.0)
        return box if min(box[2:]) >= SMALLEST_PX else None


class TargetSelector(Node):
    """Shows the newest image and publishes boxes drawn on it."""

    def __init__(self, options: argparse.Namespace, **arguments: Any) -> None:
        super().__init__("select_target", **arguments)
        self.inits = InitPublisher(self, options.tracker)
        self.frame: RosFrame | None = None
        if options.box is None:
            compressed = options.transport == "compressed"
            kind, topic = (CompressedImage, "image/compressed") if compressed else (Image, "image")
            self._parse = parse_compressed_image if compressed else parse_image
            self.subscription = self.create_subscription(kind, topic, self._on_image, newest_frame_qos(), raw=True)

    def _on_image(self, serialised: bytes) -> None:
        try:
            frame = self._parse(serialised, 0)
            frame.bgr()
        except ValueError as error:
            self.get_logger().warning(f"image ignored: {error}", throttle_duration_sec=5.0)
            return
        self.frame = frame

    def send(self, box_xywh: Box, frame: RosFrame | None = None) -> None:
        """Publish a box, with the header of the frame it was drawn on."""
        stamped = self.inits.publish(box_xywh, *([frame.header] if frame is not None else []))
        late = "" if stamped or frame is None else " (without its frame's stamp: no tracker takes init_detection)"
        self.get_logger().info(f"target {','.join(f'{v:g}' for v in box_xywh)} sent{late}")


def send_box(node: TargetSelector, box_xywh: Box, timeout_s: float) -> None:
    """Publish a box as soon as somebody listens, and wait until it is there.

    Raises:
        ValueError: nobody listens, or the box did not arrive, within the time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not node.inits.listeners:
        if time.monotonic() > deadline_s:
            raise ValueError(
                f"nobody listens to {node.inits.topic} after {timeout_s:g} s: is the tracker active, in this namespace "
                "(-r __ns:=/name) and ROS_DOMAIN_ID, and is its node name the one of --tracker?"
            )
        rclpy.spin_once(node, timeout_sec=0.05)
    node.send(box_xywh)
    if not node.inits.wait(max(deadline_s - time.monotonic(), 1.0)):
        raise ValueError(f"the box was published on {node.inits.topic}, but no tracker has taken it")


def run_window(node: TargetSelector) -> None:
    """Show images until the window is closed.

    Raises:
        ValueError: no screen, or an OpenCV without windows.
    """
    # Qt ends the whole process where there is no screen, so that has to be known before.
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError("there is no screen (DISPLAY is not set): give the box with --box X,Y,W,H")
    drag = Drag()
    still: RosFrame | None = None
    try:
        cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL)
        cv2.setMouseCallback(TITLE, drag.on_mouse)
        while (cv2.waitKey(10) & 0xFF) not in (ord("q"), 27) and cv2.getWindowProperty(
            TITLE, cv2.WND_PROP_FULLSCREEN
        ) >= 0:
            rclpy.spin_once(node, timeout_sec=0.02)
            if drag.finished is not None and still is not None:
                node.send(drag.finished, still)
            if drag.start is None:
                still, drag.finished = node.frame, None
            cv2.imshow(TITLE, _picture(still, drag, node))
    except cv2.error as error:
        raise ValueError(
            f"this OpenCV has no windows (opencv-python has, opencv-python-headless not): give --box X,Y,W,H ({error})"
        ) from error
    finally:
        if node.context.ok():
            node.get_logger().info("window closed")


def _picture(frame: RosFrame | None, drag: Drag, node: TargetSelector) -> Pixels:
    if frame is None:
        waiting = np.zeros((240, 640, 3), np.uint8)
        text = f"waiting for {node.subscription.topic_name}"
        cv2.putText(waiting, text, (20, 125), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 1, cv2.LINE_AA)
        return waiting
    image = frame.bgr().copy()
    box = drag.box_xywh() if drag.start is not None else None
    if box is not None:
        x, y, w, h = (round(v) for v in box)
        cv2.rectangle(image, (x, y), (x + w - 1, y + h - 1), LINE_BGR, max(round(min(image.shape[:2]) / 360), 1))
    return image


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="select_target", description="Tell a tracker which target to follow.")
    parser.add_argument("--box", metavar="X,Y,W,H", help="send this box (on the newest frame) and end; no window")
    parser.add_argument("--tracker", default=TRACKER, help=f"node name of the tracker (default {TRACKER})")
    parser.add_argument("--transport", choices=("raw", "compressed"), default="raw", help="of the images shown")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="with --box: wait so long (10)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``ros2 run siamtrack select_target``; returns 2 when the box could not be sent."""
    given = sys.argv if arguments is None else ["select_target", *arguments]
    options = _parser().parse_args(remove_ros_args(given)[1:])

    def work(node: TargetSelector) -> None:
        if options.box is not None:
            send_box(node, parse_box(options.box), options.timeout)
        else:
            run_window(node)

    return run_node("select_target", lambda: TargetSelector(options), work, given)


if __name__ == "__main__":
    sys.exit(main())
