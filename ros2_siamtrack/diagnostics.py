"""What ``/diagnostics`` says of a tracker."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from ros2_siamtrack.images import RosFrame
from siamtrack.state import State
from siamtrack.worker import Worker

WINDOW = 300  # frames over which latency percentiles are taken


class Health:
    """Collects figures from the tracking thread; `message` turns them into a report."""

    def __init__(self) -> None:
        self.model = ""
        self.facts: dict[str, str] = {}
        """What runs it; see `siamtrack.runners.facts_of`."""
        self.state = State.IDLE
        self.reason = ""
        self.score = float("nan")
        self.lost_in_transport = 0
        self._latencies_ms: deque[float] = deque(maxlen=WINDOW)
        self._last: tuple[float, int, int] = (time.monotonic(), 0, 0)

    def handled(self, frame: RosFrame, now_ns: int) -> None:
        """A frame's results were published at `now_ns`, ROS time."""
        self._latencies_ms.append((now_ns - (frame.stamp_ns or frame.arrival_ns)) / 1e6)

    def message(self, stamp: Any, name: str, worker: Worker, silent: bool) -> DiagnosticArray:
        """The current report; rates are since the last one."""
        now, received, handled = time.monotonic(), worker.received, worker.handled
        then, received_then, handled_then = self._last
        self._last = (now, received, handled)
        elapsed = max(now - then, 1e-6)
        latencies = np.array(list(self._latencies_ms) or [np.nan])
        values = {
            "state": str(self.state),
            "reason": self.reason,
            "score": f"{self.score:.3f}",
            "model": self.model,
            **self.facts,
            "rate in (Hz)": f"{(received - received_then) / elapsed:.1f}",
            "rate out (Hz)": f"{(handled - handled_then) / elapsed:.1f}",
            "latency p50 (ms)": f"{np.percentile(latencies, 50):.1f}",
            "latency p99 (ms)": f"{np.percentile(latencies, 99):.1f}",
            "frames received": str(received),
            "frames tracked": str(handled),
            "frames dropped": str(worker.dropped),
            "frames lost in transport": str(self.lost_in_transport),
            "paused": str(worker.paused).lower(),
        }
        status = DiagnosticStatus(name=f"{name}: tracker", hardware_id=name)
        status.level, status.message = self._level(silent, worker.paused)
        status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
        array = DiagnosticArray(status=[status])
        array.header.stamp = stamp
        return array

    def _level(self, silent: bool, paused: bool) -> tuple[bytes, str]:
        if silent:
            return DiagnosticStatus.ERROR, self.reason or "no images"
        if paused:
            return DiagnosticStatus.WARN, "paused"
        if self.state is State.LOST:
            return DiagnosticStatus.WARN, f"LOST: {self.reason}"
        return DiagnosticStatus.OK, str(self.state)
