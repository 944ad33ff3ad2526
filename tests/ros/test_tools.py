"""The tools over real topics: clip player, recorder, target selector, and the demo of all of them."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from geometry_msgs.msg import PolygonStamped
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from visualization_msgs.msg import ImageMarker

from ros2_siamtrack import messages, record_boxes, select_target
from ros2_siamtrack.clip_player import ClipPlayer
from ros2_siamtrack.demo import RECORDING
from ros2_siamtrack.images import Header
from ros2_siamtrack.init_publisher import parse_box
from ros2_siamtrack.record_boxes import BoxLog, BoxRecorder
from siamtrack.boxes import iou_xywh
from siamtrack.camera import Camera
from siamtrack.drawing import VideoWriter
from siamtrack.scene import Scene
from siamtrack.state import State
from tests.ros.conftest import Spinner, until

ROOT = Path(__file__).parents[2]
EVERY = QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)
SMALL = {"width": 240, "height": 136, "frames": 20}


def overrides(**values: Any) -> list[Parameter]:
    return [Parameter(name, value=value) for name, value in values.items()]


class Heard:
    """Everything a clip player says, from its first frame on."""

    def __init__(self, namespace: str, compressed: bool = False) -> None:
        self.node = Node("heard", namespace=namespace)
        self.images: list[Any] = []
        self.arrivals_s: list[float] = []
        self.infos: list[CameraInfo] = []
        self.truths: list[PolygonStamped] = []
        self.boxes: list[RegionOfInterest] = []
        self.detections: list[Any] = []
        kind, topic = (CompressedImage, "image/compressed") if compressed else (Image, "image")
        self.node.create_subscription(kind, topic, self._on_image, EVERY)
        self.node.create_subscription(CameraInfo, "camera_info", self.infos.append, EVERY)
        self.node.create_subscription(PolygonStamped, "clip_player/truth", self.truths.append, EVERY)
        self.node.create_subscription(RegionOfInterest, "siamtrack/init_box", self.boxes.append, EVERY)
        if messages.Detection2D is not None:
            topic = "siamtrack/init_detection"
            self.node.create_subscription(messages.Detection2D, topic, self.detections.append, EVERY)

    def _on_image(self, message: Any) -> None:
        self.images.append(message)
        self.arrivals_s.append(time.monotonic())


@contextmanager
def playing(namespace: str, compressed: bool = False, **parameters: Any) -> Iterator[tuple[ClipPlayer, Heard]]:
    heard = Heard(namespace, compressed)
    values = {"wait_for": 1, "start_delay_s": 1.0, "transport": "compressed" if compressed else "raw", **parameters}
    player = ClipPlayer(namespace=namespace, parameter_overrides=overrides(**values))
    spinners = [Spinner(player), Spinner(heard.node)]
    try:
        yield player, heard
    finally:
        for spinner in spinners:
            spinner.close()


def pixels(message: Image) -> np.ndarray:
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)


def test_scene_is_played_whole_with_its_truth() -> None:
    with playing("/play", **SMALL, rate_hz=25.0, frame_id="eye", init="truth") as (player, heard):
        until(player.done.done, "for the clip's end")
        until(lambda: min(len(heard.images), len(heard.infos), len(heard.truths)) == 20, "for all messages")
        assert player.done.result() == 20
    scene = list(Scene(240, 136, 20, fps=25.0))
    stamps = [messages.stamp_ns(m.header.stamp) for m in heard.images]
    assert stamps == sorted(set(stamps))
    # Loosely: the machine may be busy. Faster than asked for it never is.
    assert 19 / 25 * 0.9 <= (stamps[-1] - stamps[0]) / 1e9 < 19 / 25 * 5
    for frame, image, info, truth in zip(scene, heard.images, heard.infos, heard.truths, strict=True):
        assert (image.width, image.height, image.step, image.encoding) == (240, 136, 720, "bgr8")
        np.testing.assert_array_equal(pixels(image), frame.image)
        assert image.header == info.header == truth.header
        assert image.header.frame_id == "eye"
        assert (info.width, info.height, info.distortion_model) == (240, 136, "plumb_bob")
        corners = [(p.x, p.y) for p in truth.polygon.points]
        x, y, w, h = frame.box_xywh
        assert np.allclose(corners, [(x, y), (x + w, y), (x + w, y + h), (x, y + h)], atol=1e-4)
        assert all(math.isclose(p.z, frame.visible, abs_tol=1e-6) for p in truth.polygon.points)
    # The horizontal field of view is the angle between the left and the right edge.
    camera = messages.camera_from_info(heard.infos[0])
    assert isinstance(camera, Camera)
    left, right = camera.bearing(0, 68, 240, 136), camera.bearing(240, 68, 240, 136)
    assert math.degrees(math.acos(np.dot(left, right))) == pytest.approx(60, abs=0.01)
    # The tracker was told of the target once.
    boxes = [b for b in heard.boxes if b.width] + heard.detections
    assert len(boxes) == 1
    if heard.boxes:
        box = heard.boxes[0]
        found = (box.x_offset, box.y_offset, box.width, box.height)
        assert iou_xywh(found, scene[0].box_xywh) > 0.8


def test_video_is_played_in_a_loop_compressed(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", fps=20) as video:
        for level in (40, 120, 200):
            video.write(np.full((48, 64, 3), level, np.uint8))
    source = str(tmp_path / "clip.mp4")
    with playing("/loop", True, source=source, loop=True, init="5,6.5,7,8") as (player, heard):
        until(lambda: len(heard.images) >= 7 and len(heard.boxes) + len(heard.detections) >= 3, "for the third round")
        assert not player.done.done()
        assert player._rate_hz == pytest.approx(20)
    levels = [cv2.imdecode(np.frombuffer(m.data, np.uint8), cv2.IMREAD_COLOR).mean() for m in heard.images[:6]]
    assert levels == pytest.approx([40, 120, 200] * 2, abs=4)
    assert heard.images[0].format == "jpeg"
    assert not heard.truths
    if heard.boxes:
        box = heard.boxes[0]
        assert (box.x_offset, box.y_offset, box.width, box.height) == (5, 6, 7, 9)  # whole pixels round it


def test_folder_that_breaks_off_ends_the_player(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "2.png").write_bytes(b"no image")
    with playing("/broken", source=str(tmp_path), wait_for=0, start_delay_s=0.0) as (player, _):
        until(player.done.done, "for the failure")
        with pytest.raises(ValueError, match=r"2\.png does not decode"):
            player.done.result()


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"source": "/nowhere.mp4"}, "no such file or folder"),
        ({"source": "/nowhere.mp4", "init": "truth"}, "only the rendered scene has a truth"),
        ({"init": "1,2,3"}, "expected four numbers"),
        ({"transport": "theora"}, "transport must be one of raw, compressed"),
        ({"width": 1000, "height": 100}, "cannot be drawn"),
    ],
)
def test_player_refuses(parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ClipPlayer(namespace="/refused", parameter_overrides=overrides(**parameters))


# ---- recorder -------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_overlay_and_detection_come_back_as_they_went() -> None:
    header = Header(3, 4, "eye")
    for state in (State.TRACKING, State.UNCERTAIN):
        box, found = messages.box_from_overlay(messages.overlay_message(header, (1.5, 2.25, 30.0, 40.125), state))
        assert (box, found) == ((1.5, 2.25, 30.0, 40.125), state)
    assert messages.box_from_overlay(messages.overlay_message(header, None, State.LOST)) == (None, State.LOST)
    if messages.Detection2D is not None:
        detection = messages.detection_message(header, (1.5, 2.0, 30.0, 40.0), 0.75, "7")
        assert messages.box_from_detection(detection) == ((1.5, 2.0, 30.0, 40.0), 0.75)


def test_log_joins_parts_in_order(tmp_path: Path) -> None:
    with BoxLog(tmp_path / "a.csv", {"overlay", "truth"}) as log:
        for stamp in (1, 2, 3):
            log.add(stamp, "truth", {"truth_x": stamp})
        log.add(1, "overlay", {"x": 10, "state": "TRACKING"})
        log.add(3, "overlay", {"x": 30, "state": "LOST"})
        assert log.written == 1  # row 3 waits for row 2
    rows = read(tmp_path / "a.csv")
    assert [(r["stamp_ns"], r["x"], r["state"], r["truth_x"]) for r in rows] == [
        ("1", "10", "TRACKING", "1"),
        ("2", "", "", "2"),
        ("3", "30", "LOST", "3"),
    ]


def test_log_gives_missing_parts_up(tmp_path: Path) -> None:
    with BoxLog(tmp_path / "a.csv", {"overlay", "truth"}) as log:
        for stamp in range(record_boxes.WAIT_ROWS + 5):
            log.add(stamp, "truth", {})
        assert log.written == 5


def test_log_keeps_frames_without_stamps_apart(tmp_path: Path) -> None:
    with BoxLog(tmp_path / "a.csv", {"overlay", "detection"}) as log:
        for x in range(3):
            log.add(0, "overlay", {"x": x})
    assert [r["x"] for r in read(tmp_path / "a.csv")] == ["0", "1", "2"]


def test_recorder_writes_what_a_tracker_publishes(tmp_path: Path) -> None:
    file = tmp_path / "boxes.csv"
    values = overrides(file=str(file), tracker="eagle", truth="clip_player/truth")
    recorder = BoxRecorder(namespace="/record", parameter_overrides=values)
    world = Node("world", namespace="/record")
    overlays = world.create_publisher(ImageMarker, "eagle/overlay", EVERY)
    truths = world.create_publisher(PolygonStamped, "clip_player/truth", EVERY)
    spinner = Spinner(recorder)
    try:
        until(lambda: overlays.get_subscription_count() and truths.get_subscription_count(), "for the recorder")
        for second, box, state in ((5, (1.0, 2.0, 3.5, 4.0), State.TRACKING), (6, None, State.LOST)):
            header = Header(second, 250, "eye")
            overlays.publish(messages.overlay_message(header, box, state))
            if messages.Detection2D is None:
                until(lambda s=second: str(s * 10**9 + 250) in str(recorder.log._waiting), "for the overlay")
            truths.publish(messages.truth_message(header, (1.5, 2.5, 3.0, 4.0), 0.5))
        until(lambda: recorder.log.written + len(recorder.log._waiting) == 2, "for both rows")
        time.sleep(0.2)
    finally:
        spinner.close()
        world.destroy_node()
    first, second = read(file)
    assert list(first) == [*record_boxes.HEADER, *record_boxes.TRUTH_HEADER]
    assert (first["stamp_ns"], first["frame_id"], first["state"]) == ("5000000250", "eye", "TRACKING")
    assert [float(first[name]) for name in "xywh"] == [1.0, 2.0, 3.5, 4.0]
    assert [float(first[name]) for name in record_boxes.TRUTH_HEADER] == [1.5, 2.5, 3.0, 4.0, 0.5]
    assert int(first["received_ns"]) > 10**18
    assert (second["state"], second["x"], second["stamp_ns"]) == ("LOST", "", "6000000250")


def test_recorder_says_where_it_cannot_write(tmp_path: Path) -> None:
    values = overrides(file=str(tmp_path / "nowhere" / "boxes.csv"))
    with pytest.raises(ValueError, match=r"cannot write .*nowhere"):
        BoxRecorder(namespace="/record2", parameter_overrides=values)


# ---- target selector ------------------------------------------------------------------------------------------------


def run_tool(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"ros2_siamtrack.{name}", *arguments]
    everything = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=everything, timeout=120, check=False)


def test_a_box_without_a_window() -> None:
    heard = Heard("/select")
    spinner = Spinner(heard.node)
    try:
        done = run_tool("select_target", "--box", "10,20.5,30,40", "--ros-args", "-r", "__ns:=/select")
        until(lambda: heard.boxes or heard.detections, "for the box")
    finally:
        spinner.close()
    assert done.returncode == 0, done.stderr
    if heard.boxes:
        box = heard.boxes[0]
        assert (box.x_offset, box.y_offset, box.width, box.height) == (10, 20, 30, 41)


def test_a_box_nobody_takes() -> None:
    done = run_tool("select_target", "--box", "1,2,3,4", "--timeout", "0.3", "--ros-args", "-r", "__ns:=/nobody")
    assert done.returncode == 2
    assert "nobody listens to /nobody/siamtrack/init_" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("box", ["1,2,3", "1,2,0,4", "a,b,c,d", "1,2,nan,4"])
def test_no_box_at_all(box: str) -> None:
    with pytest.raises(ValueError, match="expected four numbers X,Y,W,H"):
        parse_box(box)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a screen")
def test_a_window_without_a_screen() -> None:
    done = run_tool("select_target", DISPLAY="", WAYLAND_DISPLAY="")
    assert done.returncode == 2
    assert "there is no screen" in done.stderr
    assert "--box" in done.stderr


def test_a_drag_in_any_direction_is_the_same_box() -> None:
    for start, end in (((10, 20), (29, 59)), ((29, 59), (10, 20)), ((10, 59), (29, 20))):
        drag = select_target.Drag()
        drag.on_mouse(cv2.EVENT_LBUTTONDOWN, *start)
        drag.on_mouse(cv2.EVENT_MOUSEMOVE, 15, 25)
        assert drag.finished is None
        drag.on_mouse(cv2.EVENT_LBUTTONUP, *end)
        assert drag.finished == (10.0, 20.0, 20.0, 40.0)


def test_a_click_is_no_box() -> None:
    drag = select_target.Drag()
    drag.on_mouse(cv2.EVENT_LBUTTONDOWN, 10, 20)
    drag.on_mouse(cv2.EVENT_LBUTTONUP, 11, 21)
    assert drag.finished is None
    assert drag.start is None


def test_a_box_drawn_belongs_to_the_frame_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window without a screen: frames go on coming while the user draws on a still one."""
    node = select_target.TargetSelector(select_target._parser().parse_args([]), namespace="/window")
    world = Node("world", namespace="/window")
    images = world.create_publisher(Image, "image", 10)
    sent: list[tuple[Any, Any]] = []
    shown: list[np.ndarray] = []
    monkeypatch.setattr(node, "send", lambda box, frame: sent.append((box, frame.header.sec)))
    mouse: list[Any] = []
    actions: list[Any] = [
        lambda: mouse[0](cv2.EVENT_LBUTTONDOWN, 10, 20, 0, None),
        lambda: mouse[0](cv2.EVENT_MOUSEMOVE, 30, 30, 0, None),
        lambda: mouse[0](cv2.EVENT_LBUTTONUP, 49, 59, 0, None),
    ]
    second = 0

    def wait_key(_: int) -> int:
        nonlocal second
        second += 1
        stamped = messages.header_message(Header(second, 0, ""))
        picture = np.full((100, 100, 3), second % 256, np.uint8)
        data = messages.as_uint8_array(picture)
        images.publish(Image(header=stamped, width=100, height=100, step=300, encoding="bgr8", data=data))
        if node.frame is None:
            return -1
        if actions:
            actions.pop(0)()
            return -1
        return ord("q") if sent else -1

    for name, stand_in in {
        "namedWindow": lambda *_: None,
        "setMouseCallback": lambda _, callback: mouse.append(callback),
        "getWindowProperty": lambda *_: 1.0,
        "imshow": lambda _, image: shown.append(image),
        "waitKey": wait_key,
    }.items():
        monkeypatch.setattr(cv2, name, stand_in)
    monkeypatch.setenv("DISPLAY", ":0")
    select_target.run_window(node)
    node.destroy_node()
    world.destroy_node()
    [(box, stamp_s)] = sent
    assert box == (10.0, 20.0, 40.0, 40.0)
    still = [image for image in shown if image[0, 0, 0] == stamp_s]  # what was on the screen all the while
    assert len(still) >= 3
    assert (still[-1] != stamp_s).any()  # with the box on it


# ---- everything together --------------------------------------------------------------------------------------------


def test_demo_end_to_end(tmp_path: Path) -> None:
    done = run_tool("demo", "--out", str(tmp_path), "--size", "480x270", "--frames", "60", "--rate", "20")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "demo.txt").read_text()
    assert table in done.stdout
    assert table.startswith("frames: 60 in, ")
    assert "latency, image stamp to box received by another process: p50 " in table
    rows = read(tmp_path / "demo.csv")
    # A busy machine may drop some; a graph that does not work drops nearly all.
    assert 30 <= len(rows) <= 60
    assert np.mean([float(row["iou"]) for row in rows[1:]]) > 0.4
    assert {row["state"] for row in rows} <= {"TRACKING", "UNCERTAIN", "LOST"}
    recorded = read(tmp_path / RECORDING)
    assert len([row for row in recorded if row["truth_x"]]) == 60
    latencies_s = [(int(r["received_ns"]) - int(r["stamp_ns"])) / 1e9 for r in recorded if r["state"]]
    assert all(0 < latency_s < 30 for latency_s in latencies_s)
    assert cv2.imread(str(tmp_path / "demo.png")) is not None
    video = cv2.VideoCapture(str(tmp_path / "demo.mp4"))
    assert (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_COUNT)) == (480, 60)


def processes_of(pid: int) -> list[str]:
    """Command lines in whose arguments the demo's namespace occurs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"/siamtrack_demo_{pid} " in line + " ":
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_takes_its_nodes_with_it(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "ros2_siamtrack.demo", "--out", str(tmp_path), "--size", "480x270"]
    demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(processes_of(demo.pid)) == 3, "for its nodes")
    demo.send_signal(number)
    assert demo.wait(60) == 130
    until(lambda: not processes_of(demo.pid), "for its nodes to end")


def test_demo_says_which_node_failed(tmp_path: Path) -> None:
    done = run_tool("demo", "--out", str(tmp_path), "--size", "480x270", RMW_IMPLEMENTATION="rmw_of_nobody")
    assert done.returncode == 2
    assert "ended with status" in done.stderr
    assert "rmw_of_nobody" in done.stderr  # the node's own words


def test_demo_without_a_model(tmp_path: Path) -> None:
    done = run_tool("demo", "--out", str(tmp_path), "--model", "no-such-model")
    assert done.returncode == 2
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr
