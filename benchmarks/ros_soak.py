"""Does the node grow? Images over real topics for minutes, the node's memory, threads and open files all along.

    python -m benchmarks.ros_soak [--minutes 10] [--rate 60] [--size 1280x720]

The node runs in a process of its own and tracks the rendered scene's target, which this process publishes forth and
back. Writes ``ros_soak.csv``, a row every ten seconds; exit status 1 when memory grew by more than 2 % from the second
minute on.
"""

from __future__ import annotations

import argparse
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command, write_csv
from benchmarks.ros_latency import DEFAULT_OUT, SCENE_FRAMES, STAMP_AT, serialised_image, wait_for
from siamtrack.scene import Scene

SAMPLE_S = 10.0
SETTLED_S = 60.0
GROWTH = 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ros_soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=60.0, help="Hz (default %(default)s)")
    parser.add_argument("--size", default="1280x720", metavar="WxH")
    parser.add_argument("--threads", type=int, default=2, help="of the model (default %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    options = parser.parse_args(arguments)
    os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ["ROS_DOMAIN_ID"] = str(os.getpid() % 100)
    try:
        import rclpy

        from ros2_siamtrack.clip_player import make_room_for_images
    except ImportError:
        print("ros_soak: needs rclpy: source a ROS 2 installation, or pip install '.[ros]'", file=sys.stderr)
        return 2
    make_room_for_images()
    rclpy.init()
    try:
        rows = _soak(options)
    finally:
        rclpy.try_shutdown()
    write_csv(options.out / "ros_soak.csv", rows, command("benchmarks.ros_soak", arguments))
    settled = [row["rss_mib"] for row in rows if row["time_s"] >= SETTLED_S] or [rows[-1]["rss_mib"]]
    grown = settled[-1] / settled[0] - 1
    answered = f"{rows[-1]['answered']} of {rows[-1]['sent']} images answered"
    print(f"{answered}, memory {100 * grown:+.1f} % after the first minute")
    return 1 if grown > GROWTH else 0


def _soak(options: argparse.Namespace) -> list[dict[str, float]]:
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image, RegionOfInterest
    from visualization_msgs.msg import ImageMarker

    width, height = (int(v) for v in options.size.split("x"))
    frames = list(Scene(width, height, frames=SCENE_FRAMES))
    images = [serialised_image(frame.image, "raw") for frame in frames]
    process = subprocess.Popen(
        [sys.executable, "-m", "ros2_siamtrack.tracker_node", "--ros-args", "-p", f"threads:={options.threads}"],
        stderr=subprocess.DEVNULL,
    )
    here = rclpy.create_node("ros_soak")
    answered = 0

    def on_marker(marker: ImageMarker) -> None:
        nonlocal answered
        answered += 1

    publisher = here.create_publisher(Image, "image", QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT))
    boxes = here.create_publisher(RegionOfInterest, "/siamtrack/init_box", 10)
    here.create_subscription(ImageMarker, "/siamtrack/overlay", on_marker, 10)
    executor = SingleThreadedExecutor()
    executor.add_node(here)
    spinner = threading.Thread(target=executor.spin, daemon=True)
    spinner.start()
    rows: list[dict[str, float]] = []
    try:
        wait_for(lambda: publisher.get_subscription_count() > 0 and boxes.get_subscription_count() > 0, "siamtrack")
        x, y, w, h = (round(v) for v in frames[0].box_xywh)
        boxes.publish(RegionOfInterest(x_offset=x, y_offset=y, width=w, height=h))
        order = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
        start = time.monotonic()
        turn = 0
        while (passed := time.monotonic() - start) < 60 * options.minutes:
            if passed >= SAMPLE_S * (len(rows) + 1):
                rows.append({"time_s": round(passed), **_usage(process.pid), "sent": turn, "answered": answered})
                print("  ".join(f"{name} {value:g}" for name, value in rows[-1].items()), flush=True)
            image = images[order[turn % len(order)]]
            struct.pack_into("<iI", image, STAMP_AT, *divmod(time.time_ns(), 10**9))
            time.sleep(max(start + turn / options.rate - time.monotonic(), 0))
            publisher.publish(bytes(image))
            turn += 1
            if process.poll() is not None:
                raise RuntimeError(f"the node ended with status {process.returncode} after {passed:.0f} s")
        time.sleep(1.0)
        rows.append({"time_s": round(passed), **_usage(process.pid), "sent": turn, "answered": answered})
        return rows
    finally:
        executor.shutdown()
        spinner.join()
        here.destroy_node()
        process.send_signal(signal.SIGINT)
        process.wait()


def _usage(pid: int) -> dict[str, float]:
    """Memory in MiB, threads and open files of a process (Linux)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "threads": int(status["Threads"]),
        "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


if __name__ == "__main__":
    sys.exit(main())
