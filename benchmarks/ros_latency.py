"""Camera message published to box received by another process, over real topics.

    python -m benchmarks.ros_latency [--sizes 640x480 1280x720] [--frames 200] [--rate 30]

For every image size and transport three nodes, each a process of its own, take turns in the same run:

* ``siamtrack``: ours;
* ``plain``: the node one would write first (subscribe to messages, copy the pixels out as cv_bridge does, track in the
  callback, publish);
* ``echo``: takes the serialised image and publishes at once, tracking nothing: what ROS itself costs on this machine.

All publish the same stamped marker. This process publishes the images, serialised beforehand as a camera driver in C++
would have them, and takes the time. Beside them stands what the tracker takes for these frames without ROS, one after
the other and at the camera's rate. Writes ``ros_latency.csv``.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks import command, write_csv
from siamtrack.benchmark import measure
from siamtrack.scene import Scene, SceneFrame
from siamtrack.state import State
from siamtrack.tracker import SiamTracker

DEFAULT_OUT = Path("benchmarks/results")
SIZES = ("640x480", "1280x720", "1920x1080", "3840x2160")
SCENE_FRAMES = 40  # rendered once, played forth and back
WARMUP = 20
START_TIMEOUT_S = 60.0
DRAIN_S = 1.0
STAMP_AT = 4  # bytes into a serialised message whose first field is a header


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 where ROS is missing or a node did not start."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ros_latency", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="WxH")
    parser.add_argument("--transports", nargs="+", default=["raw", "compressed"], choices=["raw", "compressed"])
    parser.add_argument("--frames", type=int, default=200, help="frames timed (default %(default)s)")
    parser.add_argument("--rate", type=float, default=30.0, help="Hz (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the model (default %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--serve", nargs=2, metavar=("NODE", "TRANSPORT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    if options.serve:
        node, transport = options.serve
        return _serve_plain(transport, options.threads) if node == "plain" else _serve_echo(transport)
    os.environ["ROS_DOMAIN_ID"] = str(os.getpid() % 100)
    try:
        import rclpy

        from ros2_siamtrack.clip_player import make_room_for_images
    except ImportError:
        print("ros_latency: needs rclpy: source a ROS 2 installation, or pip install '.[ros]'", file=sys.stderr)
        return 2
    make_room_for_images()  # or Fast DDS loses images larger than its 0.5 MB of shared memory
    rclpy.init()
    rows = []
    try:
        for size in options.sizes:
            width, height = (int(v) for v in size.split("x"))
            frames = list(Scene(width, height, frames=SCENE_FRAMES))
            at_once_ms, paced_ms = (_tracker_ms(frames, options.threads, options.frames, r) for r in (0, options.rate))
            for transport in options.transports:
                images = [serialised_image(f.image, transport) for f in frames]
                for node in ("siamtrack", "plain", "echo"):
                    latency_ms, lost = _measure(node, transport, frames, images, options)
                    p50, p95, p99 = np.percentile(latency_ms, [50, 95, 99])
                    rows.append(
                        {
                            "size": size,
                            "transport": transport,
                            "node": node,
                            "frames": len(latency_ms),
                            "unanswered": lost,
                            "latency_ms_p50": p50,
                            "latency_ms_p95": p95,
                            "latency_ms_p99": p99,
                            "tracker_ms_p50": at_once_ms,
                            "tracker_at_rate_ms_p50": paced_ms,
                        }
                    )
                    print(
                        f"{size:>10} {transport:<11}{node:<10} p50 {p50:6.2f} ms, p99 {p99:6.2f} ms, tracker alone "
                        f"{at_once_ms:.2f} ms, at {options.rate:g} Hz {paced_ms:.2f} ms, {lost} unanswered"
                    )
    except TimeoutError as error:
        print(f"ros_latency: {error}", file=sys.stderr)
        return 2
    finally:
        rclpy.try_shutdown()
    write_csv(options.out / "ros_latency.csv", rows, command("benchmarks.ros_latency", arguments))
    return 0


def _tracker_ms(frames: Sequence[SceneFrame], threads: int, iterations: int, rate_hz: float) -> float:
    tracker = SiamTracker.from_pretrained(threads=threads)
    try:
        images = [f.image for f in frames]
        times = measure(tracker, images, frames[0].box_xywh, iterations=iterations, rate_hz=rate_hz)
    finally:
        tracker.close()
    return float(np.median(times["total"]))


def serialised_image(image: Any, transport: str) -> bytearray:
    """The image as a message on the wire, its stamp still zero."""
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import CompressedImage, Image

    if transport == "raw":
        height, width = image.shape[:2]
        message = Image(height=height, width=width, encoding="bgr8", step=3 * width)
    else:
        message = CompressedImage(format="jpeg")
        image = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 90))[1]
    message.header.frame_id = "camera"
    message.data = array.array("B", image.tobytes())  # taken over by rclpy without a check of every element
    return bytearray(serialize_message(message))


def _measure(
    node: str,
    transport: str,
    frames: Sequence[SceneFrame],
    serialised: Sequence[bytearray],
    options: argparse.Namespace,
) -> tuple[Any, int]:
    """Latencies in ms ``[M]`` of the timed frames that were answered, and how many were not."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CompressedImage, Image, RegionOfInterest
    from visualization_msgs.msg import ImageMarker

    process = subprocess.Popen(_node_command(node, transport, options.threads), stderr=subprocess.DEVNULL)
    here = rclpy.create_node("ros_latency")
    answered: dict[int, int] = {}

    def on_marker(marker: ImageMarker) -> None:
        now = time.monotonic_ns()
        answered.setdefault(marker.header.stamp.sec * 10**9 + marker.header.stamp.nanosec, now)

    topic, kind = ("image", Image) if transport == "raw" else ("image/compressed", CompressedImage)
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    images = here.create_publisher(kind, topic, best_effort)
    boxes = here.create_publisher(RegionOfInterest, "/siamtrack/init_box", 10)
    here.create_subscription(ImageMarker, "/siamtrack/overlay", on_marker, 10)
    executor = SingleThreadedExecutor()
    executor.add_node(here)
    spinner = threading.Thread(target=executor.spin, daemon=True)
    spinner.start()
    try:
        wait_for(lambda: images.get_subscription_count() > 0 and boxes.get_subscription_count() > 0, node)
        x, y, w, h = (round(v) for v in frames[0].box_xywh)
        boxes.publish(RegionOfInterest(x_offset=x, y_offset=y, width=w, height=h))
        time.sleep(0.5)
        order = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
        sent: dict[int, int] = {}
        start = time.monotonic()
        for turn in range(WARMUP + options.frames):
            message = serialised[order[turn % len(order)]]
            stamp_ns = time.time_ns()
            struct.pack_into("<iI", message, STAMP_AT, *divmod(stamp_ns, 10**9))
            wire = bytes(message)
            time.sleep(max(start + turn / options.rate - time.monotonic(), 0))
            if turn >= WARMUP:
                sent[stamp_ns] = time.monotonic_ns()
            images.publish(wire)
        time.sleep(DRAIN_S)
        latency = [(answered[stamp] - at) / 1e6 for stamp, at in sent.items() if stamp in answered]
        if not latency:
            raise TimeoutError(f"the {node} node answered no {transport} image")
        return np.array(latency), len(sent) - len(latency)
    finally:
        executor.shutdown()
        spinner.join()
        here.destroy_node()
        process.terminate()
        process.wait()


def _node_command(node: str, transport: str, threads: int) -> list[str]:
    if node != "siamtrack":
        serve = ["--serve", node, transport, "--threads", str(threads)]
        return [sys.executable, "-m", "benchmarks.ros_latency", *serve]
    parameters = ["-p", f"image_transport:={transport}", "-p", f"threads:={threads}"]
    return [sys.executable, "-m", "ros2_siamtrack.tracker_node", "--ros-args", *parameters]


def wait_for(ready: Any, node: str) -> None:
    """Wait until a node that was started is there; a `TimeoutError` names it when it takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the {node} node did not subscribe within {START_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


def _serve_echo(transport: str) -> int:
    """The least a node in Python can do with an image: take its bytes, publish a marker."""
    import rclpy
    from rclpy.executors import ExternalShutdownException
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CompressedImage, Image, RegionOfInterest
    from visualization_msgs.msg import ImageMarker

    from ros2_siamtrack.images import Header
    from ros2_siamtrack.messages import overlay_message

    rclpy.init()
    node = rclpy.create_node("echo")
    markers = node.create_publisher(ImageMarker, "/siamtrack/overlay", 10)

    def on_image(serialised: bytes) -> None:
        stamp = struct.unpack_from("<iI", serialised, STAMP_AT)
        markers.publish(overlay_message(Header(*stamp, "camera"), (0.0, 0.0, 10.0, 10.0), State.TRACKING))

    topic, kind = ("image", Image) if transport == "raw" else ("image/compressed", CompressedImage)
    node.create_subscription(kind, topic, on_image, qos_profile_sensor_data, raw=True)
    node.create_subscription(RegionOfInterest, "/siamtrack/init_box", lambda box: None, 10)
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.spin(node)
    return 0


def _serve_plain(transport: str, threads: int) -> int:
    """The node one would write first: messages, a copy, the tracker in the callback."""
    import rclpy
    from rclpy.executors import ExternalShutdownException
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CompressedImage, Image, RegionOfInterest
    from visualization_msgs.msg import ImageMarker

    from ros2_siamtrack.images import Header
    from ros2_siamtrack.messages import overlay_message

    rclpy.init()
    node = rclpy.create_node("plain_tracker")
    tracker = SiamTracker.from_pretrained(threads=threads)
    markers = node.create_publisher(ImageMarker, "/siamtrack/overlay", 10)
    waiting: list[tuple[float, float, float, float]] = []

    def on_box(roi: RegionOfInterest) -> None:
        waiting.append((float(roi.x_offset), float(roi.y_offset), float(roi.width), float(roi.height)))

    def on_image(message: Any) -> None:
        data = np.frombuffer(message.data, np.uint8)
        if transport == "raw":
            frame = data.reshape(message.height, message.step)[:, : 3 * message.width]
            frame = frame.reshape(message.height, message.width, 3).copy()
        else:
            frame = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
        if waiting:
            track = tracker.init(frame, waiting.pop())
        elif tracker.state.value == "IDLE":
            return
        else:
            track = tracker.update(frame)
        header = Header(message.header.stamp.sec, message.header.stamp.nanosec, message.header.frame_id)
        markers.publish(overlay_message(header, track.box_xywh, track.state))

    topic, kind = ("image", Image) if transport == "raw" else ("image/compressed", CompressedImage)
    node.create_subscription(kind, topic, on_image, qos_profile_sensor_data)
    node.create_subscription(RegionOfInterest, "/siamtrack/init_box", on_box, 10)
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.spin(node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
