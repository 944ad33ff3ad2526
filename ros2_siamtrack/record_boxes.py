"""Records what a tracker publishes as CSV, one row a frame, for plots and comparisons."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from geometry_msgs.msg import PolygonStamped
from rclpy.node import Node
from visualization_msgs.msg import ImageMarker

from ros2_siamtrack import messages
from ros2_siamtrack.init_publisher import TRACKER
from ros2_siamtrack.parameters import Parameter
from ros2_siamtrack.qos import every_message_qos
from ros2_siamtrack.running import run_node, spin
from siamtrack.tracker import Box

HEADER = ("stamp_ns", "frame_id", "x", "y", "w", "h", "score", "state", "received_ns")
TRUTH_HEADER = ("truth_x", "truth_y", "truth_w", "truth_h", "visible")
WAIT_ROWS = 300  # newer frames after which a row's missing parts are given up

PARAMETERS = (
    Parameter("file", "boxes.csv", "what to write; the folder must be there"),
    Parameter("tracker", TRACKER, "node name of the tracker that is recorded"),
    Parameter(
        "truth", "", "topic of the true boxes, as clip_player publishes them (clip_player/truth); empty: not recorded"
    ),
)


class BoxLog:
    """A CSV file whose rows come together from several topics; a context manager.

    Rows stand in the order in which frames were first heard of. A row waits for its missing parts until it is complete
    or `WAIT_ROWS` newer ones have come.

    Args:
        path: of the file; overwritten.
        parts: names of what makes a row complete, such as "overlay" and "truth".
    """

    def __init__(self, path: Path, parts: set[str]) -> None:
        self._parts = parts
        self._columns = (*HEADER, *(TRUTH_HEADER if "truth" in parts else ()))
        self._file = path.open("w", newline="")
        self._rows = csv.DictWriter(self._file, self._columns, restval="", extrasaction="ignore")
        self._rows.writeheader()
        self._file.flush()
        self._waiting: dict[int, dict[str, Any]] = {}
        self._seen: dict[int, set[str]] = {}
        self.written = 0

    def add(self, stamp_ns: int, part: str, values: dict[str, Any]) -> None:
        """Add one topic's say on a frame; what was said first stands."""
        if part in self._seen.get(stamp_ns, ()):  # frames without a stamp of their own
            self._write(stamp_ns)
        row = self._waiting.setdefault(stamp_ns, {"stamp_ns": stamp_ns})
        self._seen.setdefault(stamp_ns, set()).add(part)
        for name, value in values.items():
            row.setdefault(name, value)
        while self._waiting:
            oldest = next(iter(self._waiting))
            if self._seen[oldest] < self._parts and len(self._waiting) <= WAIT_ROWS:
                break
            self._write(oldest)
        self._file.flush()  # a recorder may be killed

    def close(self) -> None:
        """Write what waits, complete or not."""
        for stamp_ns in list(self._waiting):
            self._write(stamp_ns)
        self._file.close()

    def __enter__(self) -> BoxLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, stamp_ns: int) -> None:
        self._rows.writerow(self._waiting.pop(stamp_ns))
        del self._seen[stamp_ns]
        self.written += 1


class BoxRecorder(Node):
    """Writes a tracker's ``~/overlay`` (box and state), ``~/detection`` (score), and the truth where there is one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__("record_boxes", **arguments)
        for parameter in PARAMETERS:
            self.declare_parameter(parameter.name, parameter.default, parameter.descriptor())
        tracker, truth = self.get_parameter("tracker").value, self.get_parameter("truth").value
        self.path = Path(self.get_parameter("file").value).expanduser()
        parts = {"overlay"} | ({"truth"} if truth else set()) | ({"detection"} if messages.Detection2D else set())
        try:
            self.log = BoxLog(self.path, parts)
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}; set the parameter file") from error
        every = every_message_qos()
        self.create_subscription(ImageMarker, f"{tracker}/overlay", self._on_overlay, every)
        if messages.Detection2D is not None:
            self.create_subscription(messages.Detection2D, f"{tracker}/detection", self._on_detection, every)
        else:
            self.get_logger().info("vision_msgs is not installed: the score column stays empty")
        if truth:
            self.create_subscription(PolygonStamped, truth, self._on_truth, every)
        self.get_logger().info(f"recording {self.resolve_topic_name(tracker)} to {self.path}")

    def destroy_node(self) -> None:
        """Also finishes the file."""
        self.log.close()
        print(f"{self.log.written} rows in {self.path}")
        super().destroy_node()

    def _on_overlay(self, message: ImageMarker) -> None:
        box, state = messages.box_from_overlay(message)
        self._add(message, "overlay", {**_named(box), "state": state})

    def _on_detection(self, message: Any) -> None:
        box, score = messages.box_from_detection(message)
        self._add(message, "detection", {**_named(box), "score": f"{score:.4f}" if math.isfinite(score) else ""})

    def _on_truth(self, message: PolygonStamped) -> None:
        points = message.polygon.points
        if len(points) < 3:
            return
        left, top = min(p.x for p in points), min(p.y for p in points)
        size = (max(p.x for p in points) - left, max(p.y for p in points) - top)
        values = zip(TRUTH_HEADER, (left, top, *size, points[0].z), strict=True)
        self._add(message, "truth", {name: f"{value:.3f}" for name, value in values})

    def _add(self, message: Any, part: str, values: dict[str, Any]) -> None:
        if part != "truth":
            values["received_ns"] = self.get_clock().now().nanoseconds
        values["frame_id"] = message.header.frame_id
        self.log.add(messages.stamp_ns(message.header.stamp), part, values)


def _named(box_xywh: Box | None) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in zip("xywh", box_xywh or (), strict=False)}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``ros2 run siamtrack record_boxes``; runs until it is stopped."""
    return run_node("record_boxes", BoxRecorder, spin, arguments)


if __name__ == "__main__":
    sys.exit(main())
