"""Hands a target's box to a tracker node."""

from __future__ import annotations

import math
from typing import Any

from rclpy.duration import Duration
from rclpy.node import Node
from sensor_msgs.msg import RegionOfInterest

from ros2_siamtrack import messages
from ros2_siamtrack.images import Header
from siamtrack.tracker import Box

TRACKER = "siamtrack"  # the tracker node's name; a tool in the same namespace finds it by that
NEWEST = Header(0, 0, "")


class InitPublisher:
    """Publishes boxes as stamped detections, or as regions where no tracker listens to those.

    Args:
        node: that publishes.
        tracker: the tracker node's name, relative to the node's namespace or absolute.
    """

    def __init__(self, node: Node, tracker: str) -> None:
        self._regions = node.create_publisher(RegionOfInterest, f"{tracker}/init_box", 10)
        self._detections: Any = None
        if messages.Detection2D is not None:
            self._detections = node.create_publisher(messages.Detection2D, f"{tracker}/init_detection", 10)

    @property
    def listeners(self) -> int:
        """How many trackers would get a box."""
        detections = self._detections.get_subscription_count() if self._detections is not None else 0
        return int(detections or self._regions.get_subscription_count())

    @property
    def topic(self) -> str:
        """Where boxes go if nothing else is known."""
        return str((self._detections or self._regions).topic_name)

    def publish(self, box_xywh: Box, header: Header = NEWEST) -> bool:
        """Publish a box; returns whether it carries the stamp of the frame it was drawn on.

        A region holds whole pixels only: those the box touches.

        Raises:
            ValueError: not four finite numbers with width and height above 0.
        """
        x, y, w, h = checked_box(box_xywh)
        if self._detections is not None and self._detections.get_subscription_count():
            self._detections.publish(messages.detection_message(header, box_xywh, 1.0, ""))
            return True
        left, top = max(math.floor(x), 0), max(math.floor(y), 0)
        width, height = max(math.ceil(x + w) - left, 0), max(math.ceil(y + h) - top, 0)
        self._regions.publish(RegionOfInterest(x_offset=left, y_offset=top, width=width, height=height))
        return False

    def wait(self, timeout_s: float) -> bool:
        """Wait until all trackers have what was published; False when that takes longer."""
        return all(p.wait_for_all_acked(Duration(seconds=timeout_s)) for p in (self._regions, self._detections) if p)


def checked_box(values: Any) -> Box:
    """Four numbers as a box.

    Raises:
        ValueError: not four finite numbers with width and height above 0.
    """
    numbers = tuple(float(v) for v in values)
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or min(numbers[2:]) <= 0:
        raise ValueError(f"expected four numbers X,Y,W,H with W and H above 0, got {','.join(map(str, values))}")
    return numbers


def parse_box(text: str) -> Box:
    """A box written as ``X,Y,W,H``.

    Raises:
        ValueError: it is not.
    """
    try:
        return checked_box([float(part) for part in text.split(",")])
    except ValueError as error:
        raise ValueError(f"expected four numbers X,Y,W,H with W and H above 0, got {text!r}") from error
