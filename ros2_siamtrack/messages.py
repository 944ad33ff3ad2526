"""Between `siamtrack` values and ROS messages."""

from __future__ import annotations

import array
import math
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Point, Point32, Polygon, PolygonStamped, Vector3Stamped
from numpy.typing import NDArray
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
    from vision_msgs.msg import Detection2D as Detection2D
    from vision_msgs.msg import ObjectHypothesisWithPose
except ImportError:  # not on every machine; the node says so once
    Detection2D = ObjectHypothesisWithPose = None

try:
    from cv_bridge import CvBridge as CvBridge
except ImportError:
    CvBridge = None

CLASS_ID = "target"
OVERLAY_LIFETIME = Duration(sec=1)
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
    """The box as lines that vanish when nothing follows; a removal when the target is not seen."""
    message = ImageMarker(header=header_message(header), ns="siamtrack", id=0, type=ImageMarker.LINE_STRIP)
    if box_xywh is None:
        message.action = ImageMarker.REMOVE
        return message
    message.lifetime = OVERLAY_LIFETIME
    x, y, w, h = box_xywh
    corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))
    # Markers count pixel centres from 0: half a pixel less than continuous coordinates.
    message.points = [Point(x=px - 0.5, y=py - 0.5) for px, py in corners]
    red, green, blue = STATE_RGB[state]
    message.outline_color, message.scale = ColorRGBA(r=red, g=green, b=blue, a=1.0), 2.0
    return message


def box_from_overlay(message: ImageMarker) -> tuple[Box | None, State]:
    """Box and state that `overlay_message` put into a marker."""
    if message.action == ImageMarker.REMOVE or not message.points:
        return None, State.LOST
    left, top = min(p.x for p in message.points), min(p.y for p in message.points)
    size = (max(p.x for p in message.points) - left, max(p.y for p in message.points) - top)
    colour = (message.outline_color.r, message.outline_color.g, message.outline_color.b)
    state = min(STATE_RGB, key=lambda s: math.dist(STATE_RGB[s], colour))  # colours are rounded on the way
    return (left + 0.5, top + 0.5, *size), state


def box_from_detection(message: Any) -> tuple[Box | None, float]:
    """Box and score of a detection; None and NaN without a hypothesis."""
    if not message.results:
        return None, math.nan
    centre, w, h = message.bbox.center.position, message.bbox.size_x, message.bbox.size_y
    return (centre.x - w / 2, centre.y - h / 2, w, h), float(message.results[0].hypothesis.score)


def truth_message(header: Header, box_xywh: Box, visible: float) -> PolygonStamped:
    """The box's four corners in continuous image pixels; z is how much of the target is to be seen, 0 to 1."""
    x, y, w, h = box_xywh
    corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
    return PolygonStamped(
        header=header_message(header), polygon=Polygon(points=[Point32(x=u, y=v, z=visible) for u, v in corners])
    )


def camera_info_message(header: Header, width: int, height: int, fov_deg: float) -> CameraInfo:
    """A pinhole camera without distortion that looks straight ahead."""
    focal_px = width / 2 / math.tan(math.radians(fov_deg) / 2)
    # Calibrations count pixel centres from 0, so the image's middle is half a pixel before half its size.
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    message = CameraInfo(
        header=header_message(header), width=width, height=height, distortion_model="plumb_bob", d=[0.0] * 5
    )
    message.k = [focal_px, 0.0, centre_x, 0.0, focal_px, centre_y, 0.0, 0.0, 1.0]
    message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    message.p = [focal_px, 0.0, centre_x, 0.0, 0.0, focal_px, centre_y, 0.0, 0.0, 0.0, 1.0, 0.0]
    return message


def camera_from_info(info: CameraInfo) -> Camera:
    """The camera of a CameraInfo, with its region of interest; binning is a scaled image like any other.

    Raises:
        ValueError: it is not calibrated, or of an unknown distortion model.
    """
    k, roi, width, height = list(info.k), info.roi, info.width, info.height
    if roi.width and roi.height:
        k[2], k[5], width, height = k[2] - roi.x_offset, k[5] - roi.y_offset, roi.width, roi.height
    return Camera(width, height, tuple(k), tuple(info.d), info.distortion_model)


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


def as_uint8_array(data: NDArray[np.uint8]) -> array.array[int]:
    """What a ``uint8[]`` field takes as it is; of anything else rclpy checks every single byte."""
    values = array.array("B")
    values.frombytes(np.ascontiguousarray(data).data.cast("B"))
    return values


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
        data=as_uint8_array(frame.data),
    )
    try:
        return CvBridge().imgmsg_to_cv2(message, "bgr8")
    except Exception as error:  # CvBridgeError and whatever OpenCV raises
        raise ValueError(f"cv_bridge cannot convert a {frame.encoding!r} image: {error}") from error
