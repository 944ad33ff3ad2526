"""The annotated picture, painted off the tracking thread and only as often as asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import cv2
from sensor_msgs.msg import CompressedImage

from ros2_siamtrack.images import RosFrame
from ros2_siamtrack.messages import as_uint8_array, header_message
from siamtrack.drawing import draw_track
from siamtrack.session import Report
from siamtrack.state import State

JPEG_QUALITY = 80


class DebugPainter:
    """Draws the newest report it was offered and publishes it as JPEG.

    Args:
        publisher: of `sensor_msgs/CompressedImage`.
        rate_hz: current rate limit.
        on_error: called with what went wrong with a picture; the next one is tried all the same.
    """

    def __init__(
        self, publisher: Any, rate_hz: Callable[[], float], on_error: Callable[[Exception], None] = lambda error: None
    ) -> None:
        self._publisher, self._rate_hz, self._on_error = publisher, rate_hz, on_error
        self._changed = threading.Condition()
        self._newest: Report | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="siamtrack debug image", daemon=True)
        self._thread.start()

    def offer(self, report: Report) -> None:
        """Hand over a report; an older one not yet painted is dropped."""
        with self._changed:
            self._newest = report
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._stopping)
                if self._stopping:
                    return
                report, self._newest = self._newest, None
            began = time.monotonic()
            if report is not None and isinstance(report.frame, RosFrame):
                try:
                    self._paint(report, report.frame)
                except Exception as error:  # a picture that does not decode, or ROS has been shut down
                    self._on_error(error)
            pause_s = 1 / self._rate_hz() - (time.monotonic() - began)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, timeout=max(pause_s, 0.0))

    def _paint(self, report: Report, frame: RosFrame) -> None:
        track = report.track
        box, score = (track.box_xywh, track.score) if track is not None else (None, float("nan"))
        if report.state is State.IDLE:
            box = None
        image = report.image if report.image is not None else frame.bgr()
        drawn = draw_track(image, box, str(report.state), score, label=report.target_id)
        _, encoded = cv2.imencode(".jpg", drawn, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
        message = CompressedImage(header=header_message(frame.header), format="jpeg", data=as_uint8_array(encoded))
        self._publisher.publish(message)
