"""Everything that goes wrong in a stream: defined, told once, and never the end of the node."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import Point, PointStamped
from rclpy.qos import ReliabilityPolicy
from sensor_msgs.msg import Image, RegionOfInterest

from ros2_siamtrack import cause_log, image_input, messages
from ros2_siamtrack.cause_log import CauseLog
from ros2_siamtrack.qos import every_message_qos, newest_frame_qos
from tests.ros.conftest import Log, Parameter, Rig, camera_info, header_message, image_message, stamp_ns, until

OUTPUTS = ("roi", "bearing", "overlay")


def still_tracks(rig: Rig, first: int = 20) -> None:
    """Whatever happened: a box starts a track, and it goes on."""
    rig.follow(first, first + 1, first + 2)
    until(lambda: any(m.header == header_message(stamp_ns(first + 2)) and m.points for m in rig.received["overlay"]))
    rig.state("TRACKING")


# ---------------------------------------------------------------------------------------------------- images that stop


def test_when_images_stop_the_target_is_lost(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(timeout_s=0.4)
    rig.publish(camera_info(480, 270), "camera_info")
    until(lambda: rig.tracker._camera is not None)
    rig.follow(0, 1, 2)
    rig.state("LOST")
    status = rig.diagnosis(level=DiagnosticStatus.ERROR, state="LOST", reason="no image for 0.4 s")
    assert status.message == "no image for 0.4 s"
    heard = {name: len(rig.received[name]) for name in OUTPUTS}
    before = len(rig.received["diagnostics"])
    until(lambda: len(rig.received["diagnostics"]) > before)
    assert {name: len(rig.received[name]) for name in OUTPUTS} == heard  # nothing stale is repeated
    assert rig.received["state"].count("LOST") == 1
    rig.tracker.set_parameters([Parameter("timeout_s", value=60.0)])
    rig.show(*range(3, 12))  # they are back, and so is the target
    rig.state("TRACKING")
    rig.diagnosis(level=DiagnosticStatus.OK, reason="")
    assert len(rig.received["bearing"]) > heard["bearing"]


def test_no_bearing_and_no_roi_while_lost(rig: Rig) -> None:
    rig.publish(camera_info(480, 270), "camera_info")
    until(lambda: rig.tracker._camera is not None)
    rig.follow(0)
    black = np.zeros((270, 480, 3), np.uint8)
    for index in range(1, 60):
        rig.send(image_message(black, stamp_ns(index)))
        if rig.tracker._health.state == "LOST":
            break
    rig.state("LOST")
    until(lambda: rig.received["overlay"][-1].header == header_message(stamp_ns(index)))
    heard = {name: len(rig.received[name]) for name in ("roi", "bearing")}
    rig.send(image_message(black, stamp_ns(index + 1)))
    until(lambda: rig.received["overlay"][-1].header == header_message(stamp_ns(index + 1)))
    last = rig.received["overlay"][-1]
    assert last.action == last.REMOVE and not last.points
    assert {name: len(rig.received[name]) for name in ("roi", "bearing")} == heard
    rig.diagnosis(level=DiagnosticStatus.WARN, reason="target not seen", message="LOST: target not seen")


def test_no_image_at_all_is_told_with_the_publishers(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_input, "SILENCE_WARNING_S", 0.3)
    rig = make_rig(timeout_s=0.2)
    until(lambda: rig.tracker.log.count("nobody publishes it"))
    rig.diagnosis(level=DiagnosticStatus.ERROR, message="no images")
    silent = make_rig(timeout_s=0.2, start=False)
    silent.world.create_publisher(Image, "image", 10)
    until(lambda: silent.tracker.get_publishers_info_by_topic(f"{silent.namespace}/image"))
    silent.start()
    until(lambda: silent.tracker.log.count("world offers RELIABLE, VOLATILE"))
    before = len(silent.received["diagnostics"])
    until(lambda: len(silent.received["diagnostics"]) > before + 1)
    assert silent.tracker.log.count("no image on") == 1
    silent.show(0)


def test_publishers_that_cannot_be_heard_are_told(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(processing="every", reliable=False)
    rig.world.create_publisher(Image, "image", newest_frame_qos())
    until(lambda: rig.tracker.log.count("world offers BEST_EFFORT"))
    (text,) = {text for _, text in rig.tracker.log.lines if "BEST_EFFORT" in text}
    hint = f"qos_overrides.{rig.namespace}/image.subscription.reliability:=best_effort"
    assert hint in text
    override = {"qos_overrides__/heard/image__subscription__reliability": "best_effort"}
    heard = make_rig(processing="every", reliable=False, namespace="/heard", **override)
    assert heard.reliability is ReliabilityPolicy.BEST_EFFORT
    heard.show(0)
    other = make_rig()  # an override is for its own topic only
    assert every_message_qos().reliability is ReliabilityPolicy.RELIABLE
    other.show(0)


# ---------------------------------------------------------------------------------------------------------------- time


def test_time_jumping_back(rig: Rig) -> None:
    rig.follow(30, 31)
    rig.state("TRACKING")
    rig.show(0)
    until(lambda: "LOST" in rig.received["state"])
    assert rig.tracker.log.count("time jumped back: buffered frames dropped") == 1
    assert len(rig.worker.ring.since(0)[0]) == 1
    rig.show(*range(1, 10))
    rig.state("TRACKING")  # found again
    still_tracks(rig)


def test_stamps_out_of_order_are_passed_over(rig: Rig) -> None:
    rig.follow(5, 6)
    received = rig.worker.received
    for index in (4, 3, 5):
        rig.show(index)
    rig.show(7)
    assert rig.worker.received == received + 1
    assert rig.tracker.log.count("before that of the one before") == 1
    until(lambda: len(rig.received["overlay"]) == 3)
    rig.show(7)  # the same stamp again is none
    until(lambda: len(rig.received["overlay"]) == 4)


def test_images_without_stamps(rig: Rig) -> None:
    rig.show(0, stamp=0)
    x, y, w, h = rig.scene[1].box_xywh
    point = PointStamped(header=header_message(stamp_ns(1)), point=Point(x=x + w / 2, y=y + h / 2))
    rig.ask(point, "siamtrack/init_point")
    rig.show(1, 2, stamp=0)
    rig.state("TRACKING")
    until(lambda: len(rig.received["overlay"]) == 2)
    assert rig.received["overlay"][0].header == header_message(0)
    assert rig.tracker.log.count("frames have no stamps") == 1
    still_tracks(rig)


# -------------------------------------------------------------------------------------------------------------- images


def bad_images(scene: list) -> dict[str, object]:
    picture = scene[1].image
    short = image_message(picture, stamp_ns(1))
    short.data = short.data[:-1]
    return {
        "data has 388799 bytes, 388800 are needed": short,
        "step is 100 bytes, a row needs 1440": image_message(picture, stamp_ns(1), step=100),
        "0x270 bgr8 image is empty": image_message(picture, stamp_ns(1), width=0),
        "unknown image encoding 'martian'": image_message(picture, stamp_ns(1), "martian"),
    }


def test_bad_images_are_told_once_each_and_passed_over(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "CvBridge", None)  # which learns of an encoding only when it converts
    rig.follow(0)
    for message in bad_images(rig.scene).values():
        before = len(rig.tracker.log.lines)
        for _ in range(3):
            rig.send(message)
        assert len(rig.tracker.log.lines) == before + 1
    assert rig.worker.received == 1
    rig.show(2, 3)
    until(lambda: len(rig.received["overlay"]) == 3)
    rig.state("TRACKING")
    for text in bad_images(rig.scene):
        assert rig.tracker.log.count(text) == 1


def test_another_resolution(rig: Rig) -> None:
    rig.follow(0, 1)
    rig.state("TRACKING")
    for index in (2, 3, 4):
        rig.send(image_message(rig.scene[index].image[:200], stamp_ns(index)))
    rig.state("IDLE")
    reason = "frame size changed from 480x270 to 480x200: call init with a box in the new frame"
    rig.diagnosis(reason=reason, state="IDLE")
    assert rig.tracker.log.lines.count(("warning", reason)) == 1
    assert len(rig.received["overlay"]) == 2
    still_tracks(rig)


def test_another_encoding_is_no_problem(rig: Rig) -> None:
    rig.follow(0, 1)
    rig.send(image_message(rig.scene[2].image[:, :, ::-1], stamp_ns(2), "rgb8"))
    rig.send(image_message(rig.scene[3].image.mean(axis=2).astype(np.uint8), stamp_ns(3), "mono8"))
    rig.show(4)
    until(lambda: len(rig.received["overlay"]) == 5)
    rig.state("TRACKING")


def test_a_picture_only_the_decoder_refuses(rig: Rig) -> None:
    rig.follow(0, 1)
    odd = np.zeros((270, 479, 2), np.uint8)
    rig.send(image_message(odd, stamp_ns(2), "yuv422"))
    assert [level for level, _ in rig.tracker.log.lines].count("error") == 0
    still_tracks(rig)


# --------------------------------------------------------------------------------------------------------------- boxes


def test_boxes_that_cannot_be_are_told_and_the_target_is_kept(rig: Rig) -> None:
    rig.show(0)
    bad = [
        (RegionOfInterest(x_offset=900, y_offset=900, width=10, height=10), "siamtrack/init_box", "outside"),
        (RegionOfInterest(), "siamtrack/init_box", "above 0"),
        (Point(x=math.nan, y=1.0), "image_mouse_left", "finite"),
        (PointStamped(point=Point(x=-500.0, y=1.0)), "siamtrack/init_point", "outside"),
    ]
    for index, (message, topic, why) in enumerate(bad, start=1):
        rig.ask(message, topic)
        rig.show(index)
        assert any(why in text for _, text in rig.tracker.log.lines)
    rig.state("IDLE")
    rig.follow(5)
    rig.state("TRACKING")
    for index, (message, topic, _) in enumerate(bad, start=6):
        rig.ask(message, topic)
        rig.show(index)
    assert rig.tracker.log.count("still following the previous target")
    until(lambda: len(rig.received["overlay"]) == 5)
    rig.state("TRACKING")


def test_warnings_with_numbers_are_one_cause_and_memory_of_causes_is_bounded() -> None:
    told = Log()
    log = CauseLog(told)
    for number in range(1000):
        log.warn(f"stamp {number} is {number / 7:.3f} s old, encoding 'x{number}'")
    assert told.count("stamp ") == 1
    for number in range(1000):
        log.warn("text", cause=f"cause {number}")
    assert told.count("text") == 1000
    assert len(log._occurred_s) <= cause_log.CAUSES_KEPT


def test_a_cause_that_comes_back_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter((1000.0, 1004.0, 1008.0, 1008.0 + cause_log.QUIET_S))
    monkeypatch.setattr(cause_log, "time", SimpleNamespace(monotonic=lambda: next(clock_s)))
    told = Log()
    log = CauseLog(told)
    for _ in range(3):  # it goes on for longer than that
        log.warn("again")
    assert told.count("again") == 1
    log.warn("again")
    assert told.count("again") == 2


# -------------------------------------------------------------------------------------------------------------- camera


def test_a_camera_that_is_not_calibrated_gives_no_bearing(rig: Rig) -> None:
    for _ in range(3):
        rig.publish(camera_info(480, 270, k=[0.0] * 9), "camera_info")
    until(lambda: rig.tracker.log.count("no bearing"))
    rig.follow(0, 1)
    until(lambda: len(rig.received["roi"]) == 2)
    assert not rig.received["bearing"]
    assert rig.tracker.log.count("camera is not calibrated") == 1


def test_images_and_camera_info_of_another_size(rig: Rig) -> None:
    rig.publish(camera_info(960, 540), "camera_info")
    until(lambda: rig.tracker._camera is not None)
    rig.follow(0)
    until(lambda: rig.received["bearing"])
    rig.publish(camera_info(640, 480), "camera_info")  # another aspect: no scaled image of that camera
    until(lambda: rig.tracker._camera.width == 640)
    rig.show(1, 2)
    until(lambda: len(rig.received["roi"]) == 3)
    assert len(rig.received["bearing"]) == 1
    assert rig.tracker.log.count("no bearing: image is 480x270, but the camera was calibrated at 640x480") == 1
    rig.state("TRACKING")
