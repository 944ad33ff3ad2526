"""Values to messages and back."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from geometry_msgs.msg import Point
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import RegionOfInterest
from visualization_msgs.msg import ImageMarker

from ros2_siamtrack import messages
from ros2_siamtrack.images import Header, parse_image
from siamtrack import State
from siamtrack.session import InitRequest
from tests.ros.conftest import camera_info, image_message, time_message

HEADER = Header(12, 345, "camera")


def round_trip(message: object) -> object:
    """What arrives: also a check that every field has its type."""
    return deserialize_message(serialize_message(message), type(message))


def test_header() -> None:
    header = round_trip(messages.header_message(HEADER))
    assert (header.stamp.sec, header.stamp.nanosec, header.frame_id) == (12, 345, "camera")


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10.0, 20.0, 30.0, 40.0), (10, 20, 30, 40)),
        ((10.2, 20.9, 30.0, 40.0), (10, 20, 31, 41)),  # every pixel it touches
        ((-5.5, -5.5, 20.0, 20.0), (0, 0, 15, 15)),
        ((90.0, 70.0, 30.0, 30.0), (90, 70, 10, 10)),
        ((99.5, 79.5, 30.0, 30.0), (99, 79, 1, 1)),
        ((100.0, 80.0, 30.0, 30.0), (99, 79, 1, 1)),
        ((50.0, 50.0, 0.3, 0.3), (50, 50, 1, 1)),
        ((-10.0, -10.0, 500.0, 500.0), (0, 0, 100, 80)),
    ],
)
def test_roi(box: tuple, expected: tuple) -> None:
    roi = round_trip(messages.roi_message(box, 100, 80))
    assert (roi.x_offset, roi.y_offset, roi.width, roi.height) == expected


def test_bearing() -> None:
    message = round_trip(messages.bearing_message(HEADER, (0.0, 0.6, 0.8)))
    assert (message.vector.x, message.vector.y, message.vector.z) == (0.0, 0.6, 0.8)
    assert message.header == messages.header_message(HEADER)


def test_overlay() -> None:
    message = round_trip(messages.overlay_message(HEADER, (10.0, 20.0, 30.0, 40.0), State.UNCERTAIN))
    assert (message.type, message.action) == (ImageMarker.LINE_STRIP, ImageMarker.ADD)
    assert [(p.x, p.y) for p in message.points] == [(9.5, 19.5), (39.5, 19.5), (39.5, 59.5), (9.5, 59.5), (9.5, 19.5)]
    assert message.outline_color.r == pytest.approx(1.0)
    assert message.lifetime.sec == 1  # should nothing follow it
    gone = round_trip(messages.overlay_message(HEADER, None, State.LOST))
    assert (gone.action, list(gone.points), gone.id, gone.ns) == (ImageMarker.REMOVE, [], message.id, message.ns)


class Loose(SimpleNamespace):
    """Stands in for a message of vision_msgs: has every field it is asked for."""

    def __getattr__(self, name: str) -> Loose:
        setattr(self, name, Loose())
        return getattr(self, name)


@pytest.mark.parametrize("kind", ["real", "stand-in"])
def test_detection(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "stand-in":
        for name in ("Detection2D", "ObjectHypothesisWithPose"):
            monkeypatch.setattr(messages, name, Loose)
        monkeypatch.setitem(globals(), "round_trip", lambda message: message)
        monkeypatch.setattr(Loose, "results", [], raising=False)
    elif messages.Detection2D is None:
        pytest.skip("vision_msgs is not installed")
    message = round_trip(messages.detection_message(HEADER, (10.0, 20.0, 30.0, 40.0), 0.75, "rover"))
    assert (message.bbox.center.position.x, message.bbox.center.position.y) == (25.0, 40.0)
    assert (message.bbox.size_x, message.bbox.size_y, message.id) == (30.0, 40.0, "rover")
    assert message.results[0].hypothesis.score == 0.75
    assert not round_trip(messages.detection_message(HEADER, None, math.nan, "rover")).results
    assert messages.init_from_detection(message) == InitRequest((10.0, 20.0, 30.0, 40.0), 12 * 10**9 + 345, "rover")


def test_camera_info() -> None:
    info = camera_info(640, 480, d=[0.1, -0.2, 0.0, 0.0, 0.05])
    camera = messages.camera_from_info(round_trip(info))
    assert (camera.width, camera.height, camera.k[0], camera.d[1], camera.model) == (640, 480, 400.0, -0.2, "plumb_bob")
    with pytest.raises(ValueError, match="not calibrated"):
        messages.camera_from_info(camera_info(640, 480, k=[0.0] * 9))


def test_camera_info_with_region_of_interest_and_binning() -> None:
    whole = messages.camera_from_info(camera_info(640, 480))
    roi = RegionOfInterest(x_offset=100, y_offset=50, width=200, height=100)
    part = messages.camera_from_info(camera_info(640, 480, roi=roi, binning_x=2, binning_y=2))
    expected = whole.bearing(100 + 60, 50 + 30, 640, 480)
    assert part.bearing(60, 30, 200, 100) == pytest.approx(expected)
    assert part.bearing(30, 15, 100, 50) == pytest.approx(expected)  # binned by two


def test_boxes_to_start_on() -> None:
    roi = RegionOfInterest(x_offset=1, y_offset=2, width=3, height=4)
    assert messages.init_from_roi(roi) == InitRequest((1.0, 2.0, 3.0, 4.0))
    point = Point(x=10.0, y=20.0)  # the middle of pixel 10, 20
    assert messages.init_from_point(point, 8.0) == InitRequest((6.5, 16.5, 8.0, 8.0))
    stamped = messages.init_from_point(point, 8.0, time_message(5_000_000_123))
    assert stamped.stamp_ns == 5_000_000_123


def test_bytes_without_checking_each() -> None:
    for data in (np.arange(6, dtype=np.uint8), np.arange(6, dtype=np.uint8).reshape(2, 3)[:, :2]):
        values = messages.as_uint8_array(data)
        assert (values.typecode, values.tobytes()) == ("B", data.tobytes())


@pytest.mark.skipif(messages.CvBridge is None, reason="cv_bridge is not installed")
def test_cv_bridge_takes_what_is_not_known_here() -> None:
    depth = np.linspace(0, 255, 48, dtype=np.float32).reshape(6, 8)
    message = image_message(depth, 1, "32FC1")
    with pytest.raises(ValueError, match="cv_bridge cannot convert"):
        parse_image(serialize_message(message), 1, messages.convert_with_cv_bridge).bgr()
