"""The node over real topics: a target followed, every way to start, every output."""

from __future__ import annotations

import array
import itertools
import threading
import time
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import Point, PointStamped
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CompressedImage, Image, RegionOfInterest
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from ros2_siamtrack import messages
from siamtrack import SiamTracker
from siamtrack.boxes import iou_xywh
from siamtrack.camera import Camera
from siamtrack.scene import Scene, SceneFrame
from tests.ros.conftest import FRAME_ID, Rig, camera_info, header_message, image_message, stamp_ns, time_message, until


def marker_box(marker: object) -> tuple[float, float, float, float]:
    xs, ys = [p.x + 0.5 for p in marker.points], [p.y + 0.5 for p in marker.points]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def test_a_target_is_followed(rig: Rig) -> None:
    rig.publish(camera_info(480, 270), "camera_info")
    until(lambda: rig.tracker._camera is not None)
    rig.follow(*range(40))
    rig.state("TRACKING")
    for name in ("overlay", "roi", "bearing"):
        until(lambda name=name: len(rig.received[name]) == 40, f"for {name}")
    truth = [frame.box_xywh for frame in rig.scene[:40]]
    boxes = [marker_box(marker) for marker in rig.received["overlay"]]
    assert iou_xywh(boxes, truth)[1:].mean() > 0.4
    for index, (marker, bearing) in enumerate(zip(rig.received["overlay"], rig.received["bearing"], strict=True)):
        assert marker.header == bearing.header == header_message(stamp_ns(index))
    camera = Camera(480, 270, (400.0, 0, 240, 0, 400, 135, 0, 0, 1))
    for (x, y, w, h), message, roi in zip(boxes, rig.received["bearing"], rig.received["roi"], strict=True):
        vector = (message.vector.x, message.vector.y, message.vector.z)
        assert vector == pytest.approx(camera.bearing(x + w / 2, y + h / 2, 480, 270))
        assert roi.x_offset == int(max(x, 0)) and roi.y_offset == int(max(y, 0))
        assert 0 <= roi.x_offset + roi.width - min(x + w, 480) < 1
        assert 0 <= roi.y_offset + roi.height - min(y + h, 270) < 1
    status = rig.diagnosis(frames_tracked="40", state="TRACKING")
    values = {value.key: value.value for value in status.values}
    assert (status.level, status.message, values["reason"]) == (DiagnosticStatus.OK, "TRACKING", "")
    assert values["frames received"] == "40" and values["frames dropped"] == "0"
    assert values["model"] == "siamcan-mobilenetv2" and values["backend"] == "onnxruntime"
    for name in ("rate in (Hz)", "rate out (Hz)", "latency p50 (ms)", "latency p99 (ms)", "score"):
        assert float(values[name]) >= 0


def test_nothing_is_said_of_a_target_before_there_is_one(rig: Rig) -> None:
    rig.show(0, 1, 2)
    rig.state("IDLE")
    assert not any(rig.received[name] for name in ("roi", "bearing", "overlay"))


def expected_box(scene: list[SceneFrame], box: tuple, first: int, last: int) -> tuple:
    with SiamTracker.from_pretrained(threads=1).runner as runner:
        tracker = SiamTracker(runner)
        track = tracker.init(scene[first].image, box)
        for frame in scene[first + 1 : last + 1]:
            track = tracker.update(frame.image)
        return track.box_xywh


def last_box(rig: Rig, index: int) -> tuple:
    """The box given for a frame."""
    marks = rig.received["overlay"]
    until(lambda: any(m.header == header_message(stamp_ns(index)) and m.points for m in marks), f"for frame {index}")
    return marker_box(next(m for m in marks if m.header == header_message(stamp_ns(index)) and m.points))


def centre(box: tuple) -> tuple[float, float]:
    return box[0] + box[2] / 2, box[1] + box[3] / 2


@pytest.mark.parametrize("way", ["point", "stamped point", "click"])
def test_a_point_starts_a_track(make_rig: Callable[..., Rig], way: str) -> None:
    rig = make_rig(init_point_size_px=40.0, listen=("overlay",))
    rig.show(*range(6))
    first = 2 if way == "stamped point" else 6
    x, y = centre(rig.scene[first].box_xywh)
    point = Point(x=x - 0.5, y=y - 0.5)  # pixel coordinates: pixel centres are whole numbers
    if way == "click":
        rig.ask(point, "image_mouse_left")
    else:
        header = header_message(stamp_ns(first) if way == "stamped point" else 0)
        rig.ask(PointStamped(header=header, point=point), "siamtrack/init_point")
    rig.show(6, 7)
    expected = expected_box(rig.scene, (x - 20, y - 20, 40, 40), first, 7)
    assert last_box(rig, 7) == pytest.approx(expected, abs=1e-6)


def test_a_box_before_the_first_image(rig: Rig) -> None:
    rig.follow(0, 1)
    rig.state("TRACKING")
    assert rig.tracker.log.count("before the first image") == 1


def test_a_box_older_than_the_buffer(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(buffer_s=0.1, listen=("overlay",))
    rig.show(*range(8))
    x, y = centre(rig.scene[5].box_xywh)
    point = PointStamped(header=header_message(stamp_ns(0)), point=Point(x=x, y=y))
    rig.ask(point, "siamtrack/init_point")
    rig.show(8)
    rig.state("TRACKING")
    assert rig.tracker.log.count("older than the oldest buffered frame") == 1


@pytest.mark.skipif(messages.Detection2D is None, reason="vision_msgs is not installed")
def test_a_detection_starts_a_track_and_detections_come_out(rig: Rig) -> None:
    rig.received["detection"] = []
    rig.world.create_subscription(messages.Detection2D, "siamtrack/detection", rig.received["detection"].append, 100)
    until(lambda: rig.tracker._outputs.publishers["detection"].get_subscription_count())
    rig.show(0, 1)
    x, y, w, h = rig.scene[0].box_xywh
    detection = messages.Detection2D(header=header_message(stamp_ns(0)), id="rover")
    detection.bbox.center.position.x, detection.bbox.center.position.y = x + w / 2, y + h / 2
    detection.bbox.size_x, detection.bbox.size_y = w, h
    rig.ask(detection, "siamtrack/init_detection")
    rig.show(2)
    until(lambda: rig.received["detection"])
    found = rig.received["detection"][0]
    assert (found.header, found.id, len(found.results)) == (header_message(stamp_ns(2)), "rover", 1)
    assert found.bbox.size_x == pytest.approx(last_box(rig, 2)[2])
    rig.send(image_message(np.zeros((270, 480, 3), np.uint8), stamp_ns(3)))


def test_without_vision_msgs_it_says_so_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    assert rig.tracker.log.count("vision_msgs is not installed") == (messages.Detection2D is None)
    for name in ("deactivate", "cleanup", "configure", "activate"):
        rig.spinner.call(getattr(rig.tracker, f"trigger_{name}"))
    assert rig.tracker.log.count("vision_msgs is not installed") == (messages.Detection2D is None)


@pytest.mark.parametrize("picture_format", ["jpeg", "png"])
def test_compressed_images(make_rig: Callable[..., Rig], picture_format: str) -> None:
    rig = make_rig(image_transport="compressed", listen=("overlay",))
    rig.box(0)
    for index in range(10):
        _, data = cv2.imencode(f".{picture_format}", rig.scene[index].image)
        picture = array.array("B", data.tobytes())
        message = CompressedImage(header=header_message(stamp_ns(index)), format=picture_format, data=picture)
        rig.send(message, "image/compressed")
    until(lambda: len(rig.received["overlay"]) == 10)
    assert iou_xywh([last_box(rig, 9)], [rig.scene[9].box_xywh])[0] > 0.4
    rig.send(CompressedImage(header=header_message(stamp_ns(10)), format="jpeg", data=[1, 2, 3]), "image/compressed")
    assert rig.tracker.log.count("does not decode") == 1


def test_the_topic_can_be_remapped_with_its_companions(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(start=False, image_transport="compressed")
    resolve = rig.tracker.resolve_topic_name
    rig.tracker.resolve_topic_name = lambda name: "/front/image_raw" if name == "image" else resolve(name)
    rig.start()
    topics = {subscription.topic_name for subscription in rig.tracker._held_subscriptions}
    assert {"/front/image_raw/compressed", "/front/image_raw_mouse_left"} <= topics


def test_late_joiners_get_the_state(rig: Rig) -> None:
    rig.follow(0)
    rig.state("TRACKING")
    late: list[str] = []
    qos = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    rig.world.create_subscription(String, "siamtrack/state", lambda m: late.append(m.data), qos)
    until(lambda: late)
    assert late == ["TRACKING"]
    rig.spinner.call(rig.tracker.trigger_deactivate)
    until(lambda: late == ["TRACKING", "IDLE"])


def call(rig: Rig, kind: type, name: str, request: object) -> object:
    client = rig.world.create_client(kind, name)
    assert client.wait_for_service(30)
    future = client.call_async(request)
    until(future.done)
    return future.result()


def test_reset_and_pause(rig: Rig) -> None:
    rig.follow(0, 1)
    rig.state("TRACKING")
    reply = call(rig, SetBool, "siamtrack/pause", SetBool.Request(data=True))
    assert (reply.success, reply.message) == (True, "paused")
    until(lambda: len(rig.received["overlay"]) == 2)
    rig.show(2, 3)
    rig.diagnosis(paused="true", message="paused", level=DiagnosticStatus.WARN)
    assert call(rig, SetBool, "siamtrack/pause", SetBool.Request(data=False)).message == "running"
    rig.show(4)
    until(lambda: len(rig.received["overlay"]) == 3)
    assert rig.received["overlay"][2].header == header_message(stamp_ns(4))
    assert call(rig, Trigger, "siamtrack/reset", Trigger.Request()).success
    rig.state("IDLE")
    rig.show(5)
    assert len(rig.received["overlay"]) == 3


def test_the_annotated_picture_is_painted_for_listeners_only(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(listen=("debug_image/compressed",), debug_image_hz=1000.0)
    rig.show(0)
    rig.follow(1, 2)
    pictures = rig.received["debug_image/compressed"]
    until(lambda: pictures and pictures[-1].header == header_message(stamp_ns(2)))
    assert pictures[-1].format == "jpeg"
    assert cv2.imdecode(np.frombuffer(pictures[-1].data, np.uint8), 1).shape == (270, 480, 3)
    deaf = make_rig(listen=())
    painted: list[object] = []
    deaf.tracker._outputs._painter.offer = painted.append
    deaf.follow(0, 1)
    assert not painted


@pytest.mark.parametrize("encoding", ["rgb8", "mono8", "bgra8"])
def test_other_encodings_are_followed(make_rig: Callable[..., Rig], encoding: str) -> None:
    rig = make_rig(listen=("overlay",))
    code = {"rgb8": cv2.COLOR_BGR2RGB, "mono8": cv2.COLOR_BGR2GRAY, "bgra8": cv2.COLOR_BGR2BGRA}[encoding]
    rig.box(0)
    for index in range(8):
        rig.send(image_message(cv2.cvtColor(rig.scene[index].image, code), stamp_ns(index), encoding))
    box = last_box(rig, 7)
    if encoding == "mono8":
        assert iou_xywh([box], [rig.scene[7].box_xywh])[0] > 0.2
    else:
        whole = tuple(round(v) for v in rig.scene[0].box_xywh)
        assert box == pytest.approx(expected_box(rig.scene, whole, 0, 7), abs=1e-6)


def test_4k(make_rig: Callable[..., Rig]) -> None:
    scene = [SceneFrame(cv2.resize(f.image, (3840, 2160)), tuple(8 * v for v in f.box_xywh), 1.0, ()) for f in SMALL]
    namespace = "/big"
    override = {f"qos_overrides__{namespace}/image__subscription__reliability": "reliable"}
    rig = make_rig(scene=scene, namespace=namespace, listen=("overlay",), **override)
    rig.follow(*range(len(scene)))
    assert iou_xywh([last_box(rig, 3)], [scene[3].box_xywh])[0] > 0.4
    assert rig.tracker._worker.ring._held_bytes == 4 * 3840 * 2160 * 3


SMALL = [Scene(480, 270, frames=60).render(index) for index in range(4)]


def test_two_trackers_in_two_namespaces(make_rig: Callable[..., Rig]) -> None:
    left = make_rig()
    right = make_rig(scene=list(Scene(320, 240, frames=12, seed=3)))
    left.box(0)
    right.box(0)
    for index in range(12):
        for rig in (left, right):
            rig.publish(image_message(rig.scene[index].image, stamp_ns(index)), "image")
        for rig in (left, right):
            until(lambda rig=rig, index=index: rig.worker.handled == index + 1)
    for rig in (left, right):
        assert iou_xywh([last_box(rig, 11)], [rig.scene[11].box_xywh])[0] > 0.3
        assert {m.header.frame_id for m in rig.received["overlay"]} == {FRAME_ID}
        until(lambda rig=rig: len(rig.received["overlay"]) == 12)


def test_every_frame_gives_the_same_boxes_each_time(make_rig: Callable[..., Rig]) -> None:
    runs = []
    for _ in range(2):
        rig = make_rig(processing="every", listen=("overlay",))
        x, y = centre(rig.scene[3].box_xywh)
        rig.ask(PointStamped(header=header_message(stamp_ns(3)), point=Point(x=x, y=y)), "siamtrack/init_point")
        for index in range(40):  # as fast as they go: far more than the queue takes
            rig.publish(image_message(rig.scene[index].image, stamp_ns(index)), "image")
        until(lambda rig=rig: len(rig.received["overlay"]) == 37)
        assert (rig.worker.handled, rig.worker.dropped) == (40, 0)
        stamps = [m.header.stamp for m in rig.received["overlay"]]
        assert stamps == [time_message(stamp_ns(index)) for index in range(3, 40)]
        runs.append([marker_box(m) for m in rig.received["overlay"]])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("processing", ["newest", "every"])
def test_deactivation_under_a_flood_of_images(make_rig: Callable[..., Rig], processing: str) -> None:
    rig = make_rig(processing=processing)
    rig.box(0)
    publisher = rig.publisher(Image, "image")
    over = threading.Event()

    def flood() -> None:
        for number in itertools.count():
            if over.is_set():
                return
            publisher.publish(image_message(rig.scene[number % 60].image, stamp_ns(number)))

    camera = threading.Thread(target=flood, daemon=True)
    camera.start()
    until(lambda: rig.worker.handled > 3)
    assert str(rig.spinner.call(rig.tracker.trigger_deactivate)).endswith("SUCCESS")
    over.set()
    camera.join()
    heard = len(rig.received["overlay"])
    rig.state("IDLE")
    time.sleep(0.1)
    assert len(rig.received["overlay"]) <= heard + 1  # one may have been on its way
    assert not rig.worker._frames and rig.worker.ring.since(0)[0] == []
    rig.spinner.call(rig.tracker.trigger_cleanup)
    assert rig.tracker._worker is None


def test_a_roi_at_the_edge_stays_inside(rig: Rig) -> None:
    rig.ask(RegionOfInterest(x_offset=470, y_offset=262, width=40, height=40), "siamtrack/init_box")
    rig.show(0)
    until(lambda: rig.received["roi"])
    roi = rig.received["roi"][0]
    assert (roi.x_offset, roi.y_offset, roi.width, roi.height) == (470, 262, 10, 8)
