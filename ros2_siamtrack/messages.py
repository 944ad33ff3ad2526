"""Between `siamtrack` values and ROS messages."""

from __future__ import annotations

import math
from typing import Any

from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, Vector3Stamped
from sensor_msgs.msg import CameraInfo, Image, RegionOfInterest
from std_msgs.msg import ColorRGBA
from std_msgs.msg import Header as HeaderMessage
from visualization_msgs.msg import ImageMarker

from ros2_siamtrack.images import Header, RosFrame
from siamtrack.boxes import clip_xywh
from siamtrack.camera import Camera
from siamtrack.session import InitRequest
from siamtrack.state import State
from siamtrack.tracker import Box

try:
    from vision_msgs.msg import Detection2D, ObjectHypothesisWithPose
except ImportError:  # not on every machine; the node says so once
    Detection2D = ObjectHypothesisWithPose = None

try:
    from cv_bridge import CvBridge
except ImportError:
    CvBridge = None

CLASS_ID = "target"
STATE_RGB = {State.TRACKING: (0.3, 0.85, 0.35), State.UNCERTAIN: (1.0, 0.7, 0.15), State.LOST: (0.95, 0.25, 0.25)}


def header_message(header: Header) -> HeaderMessage:
    """The input image's header, unchanged."""
    return HeaderMessage(stamp=Time(sec=header.sec, nanosec=header.nanosec), frame_id=header.frame_id)


def detection_message(header: Header, box_xywh: Box | None, score: float, target_id: str) -> Any:
    """``vision_msgs/Detection2D``; without box and hypothesis when the target is not seen."""
    message = Detection2D(header=header_message(header), id=target_id)
    if box_xywh is not None:
        x, y, w, h = box_xywh
        message.bbox.center.position.x, message.bbox.center.position.y = x + w / 2, y + h / 2
        message.bbox.size_x, message.bbox.size_y = w, h
        hypothesis = ObjectHypothesisWithPose()
        hypothesis.hypothesis.class_id, hypothesis.hypothesis.score = CLASS_ID, score
        message.results = [hypothesis]
    return message


def roi_message(box_xywh: Box, width: int, height: int) -> RegionOfInterest:
    """The whole pixels a box touches, inside the image."""
    x, y, w, h = clip_xywh(box_xywh, width, height).tolist()
    left, top = min(int(x), width - 1), min(int(y), height - 1)
    right, bottom = max(math.ceil(x + w), left + 1), max(math.ceil(y + h), top + 1)
    return RegionOfInterest(x_offset=left, y_offset=top, width=right - left, height=bottom - top)


def bearing_message(header: Header, bearing: tuple[float, float, float]) -> Vector3Stamped:
    """Unit vector to the target in the camera's optical frame."""
    message = Vector3Stamped(header=header_message(header))
    message.vector.x, message.vector.y, message.vector.z = bearing
    return message


def overlay_message(header: Header, box_xywh: Box | None, state: State) -> ImageMarker:
    """The box as lines; a removal when the target is not seen."""
    message = ImageMarker(header=header_message(header), ns="siamtrack", id=0, type=ImageMarker.LINE_STRIP)
    if box_xywh is None:
        message.action = ImageMarker.REMOVE
        return message
    x, y, w, h = box_xywh
    corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))
    # Markers count pixel centres from 0: half a pixel less than continuous coordinates.
    message.points = [Point(x=px - 0.5, y=py - 0.5) for px, py in corners]
    red, green, blue = STATE_RGB[state]
    message.outline_color, message.scale = ColorRGBA(r=red, g=green, b=blue, a=1.0), 2.0
    return message


def camera_from_info(info: CameraInfo) -> Camera:
    """The camera of a CameraInfo.

    Raises:
        ValueError: it is not calibrated, or of an unknown distortion model.
    """
    return Camera(info.width, info.height, tuple(info.k), tuple(info.d), info.distortion_model)


def init_from_roi(message: RegionOfInterest) -> InitRequest:
    """A box drawn on the newest frame."""
    return InitRequest((float(message.x_offset), float(message.y_offset), float(message.width), float(message.height)))


def init_from_detection(message: Any) -> InitRequest:
    """A detector's box on the frame it is stamped with."""
    centre, w, h = message.bbox.center.position, message.bbox.size_x, message.bbox.size_y
    return InitRequest((centre.x - w / 2, centre.y - h / 2, w, h), stamp_ns(message.header.stamp), message.id)


def init_from_point(point: Point, size_px: float, stamp: Time | None = None) -> InitRequest:
    """A square box round a clicked pixel."""
    box = (point.x + 0.5 - size_px / 2, point.y + 0.5 - size_px / 2, size_px, size_px)
    return InitRequest(box, stamp_ns(stamp) if stamp is not None else 0)


def stamp_ns(stamp: Time) -> int:
    """A stamp as nanoseconds."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def convert_with_cv_bridge(frame: RosFrame) -> Any:
    """A picture in an encoding that only cv_bridge knows, as uint8 ``[H, W, 3]``.

    Raises:
        ValueError: cv_bridge does not know it either.
    """
    message = Image(
        height=frame.height,
        width=frame.width,
        encoding=frame.encoding,
        is_bigendian=int(frame.big_endian),
        step=frame.step,
        data=frame.data.tobytes(),
    )
    try:
        return CvBridge().imgmsg_to_cv2(message, "bgr8")
    except Exception as error:  # CvBridgeError and whatever OpenCV raises
        raise ValueError(f"cv_bridge cannot convert a {frame.encoding!r} image: {error}") from error
