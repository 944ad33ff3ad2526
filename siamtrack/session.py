"""A tracker in a stream of stamped frames: which frame a box belongs to, when to start, what to report.

No threads and no ROS here: `siamtrack.worker` runs a session on its own thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from siamtrack.crop import Image
from siamtrack.state import State
from siamtrack.tracker import Box, SiamTracker, Track


class Frame(Protocol):
    """A frame as a transport delivers it."""

    @property
    def stamp_ns(self) -> int:
        """When it was taken; 0 when the camera does not say."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory it holds on to."""
        ...

    def bgr(self) -> Image:
        """The picture, uint8 ``[H, W, 3]``; decoded on demand.

        Raises:
            ValueError: it cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class InitRequest:
    """A box to start on.

    Attributes:
        box_xywh: in image pixels.
        stamp_ns: the frame it was drawn on; 0 stands for the newest.
        target_id: what the user calls the target; given back in reports.
    """

    box_xywh: Box
    stamp_ns: int = 0
    target_id: str = ""


@dataclass(frozen=True)
class Report:
    """What is known after a frame, or after something happened without one.

    Attributes:
        frame: the frame it is about; None without one.
        track: the target in that frame; None when there is no target, or none was found.
        state: of the target.
        reason: why the state is what it is, where a score does not explain it; "" otherwise.
        target_id: of the target.
        warning: something the user should know, to be logged; "" for nothing.
    """

    frame: Frame | None
    track: Track | None
    state: State
    reason: str = ""
    target_id: str = ""
    warning: str = ""


class FrameRing:
    """The last frames, for boxes that were drawn on a frame of the past. Safe to use from two threads.

    Args:
        span_s: how far back, by frame stamps.
        limit_mb: memory limit; the newest frame is always kept.
    """

    JUMP_NS = 500_000_000  # further back than any reordering on the way

    def __init__(self, span_s: float = 2.0, limit_mb: float = 256.0) -> None:
        self.span_ns, self.limit_bytes = int(span_s * 1e9), int(limit_mb * 1e6)
        self._frames: deque[Frame] = deque()
        self._held_bytes = 0
        self._lock = threading.Lock()

    def append(self, frame: Frame) -> bool:
        """Add a frame; returns True when time jumped back (a bag looped), which empties the ring first."""
        with self._lock:
            jumped = bool(self._frames) and 0 < frame.stamp_ns < self._frames[-1].stamp_ns - self.JUMP_NS
            if jumped:
                self._drop_all()
            self._frames.append(frame)
            self._held_bytes += frame.size_bytes
            while len(self._frames) > 1 and (
                self._held_bytes > self.limit_bytes or self._frames[0].stamp_ns < frame.stamp_ns - self.span_ns
            ):
                self._held_bytes -= self._frames.popleft().size_bytes
            return jumped

    def clear(self) -> None:
        """Forget all frames."""
        with self._lock:
            self._drop_all()

    def since(self, stamp_ns: int) -> tuple[list[Frame], str]:
        """Frames from the one with this stamp on, oldest first, and a warning when it is not there ("" when it is).

        A stamp between two frames means the later one; a stamp before the oldest frame means the oldest.
        """
        with self._lock:
            frames = list(self._frames)
        if not frames:
            return [], ""
        if stamp_ns < frames[0].stamp_ns:
            late_s = (frames[0].stamp_ns - stamp_ns) / 1e9
            return frames, f"the box is {late_s:.2f} s older than the oldest buffered frame: starting on that one"
        later = [f for f in frames if f.stamp_ns >= stamp_ns]
        if later and later[0].stamp_ns != stamp_ns:
            return later, "no frame has the box's stamp: starting on the next one"
        return later, ""

    def _drop_all(self) -> None:
        self._frames.clear()
        self._held_bytes = 0


class Session:
    """One target in one stream.

    Args:
        tracker: owned by the thread that calls `handle`.
        ring: filled by whoever receives frames, before `handle` sees them.
    """

    def __init__(self, tracker: SiamTracker, ring: FrameRing) -> None:
        self.tracker, self.ring = tracker, ring
        self._pending: InitRequest | None = None
        self._target_id = ""
        self._reason = ""

    @property
    def waiting(self) -> bool:
        """Whether a box waits for its frame."""
        return self._pending is not None

    def request(self, init: InitRequest) -> None:
        """Start on a box; takes effect with the next frame handled. The latest request wins."""
        self._pending = init

    def reset(self, reason: str = "") -> Report:
        """Forget the target and any waiting box."""
        self.tracker.reset()
        self._pending, self._target_id, self._reason = None, "", reason
        return Report(None, None, State.IDLE, reason)

    def lose(self, reason: str) -> Report | None:
        """Declare the target lost, because frames stopped or time jumped; None when there is no target."""
        if self.tracker.state is State.IDLE:
            return None
        self.tracker.mark_lost()
        self._reason = reason
        return Report(None, None, State.LOST, reason, self._target_id)

    def handle(self, frame: Frame) -> Report:
        """Follow the target into a frame, or start on a waiting box.

        Never raises for a frame or a box that cannot be used: the report's warning says what was wrong.
        """
        if self._pending is not None and self._pending.stamp_ns <= max(frame.stamp_ns, 0):
            return self._start(self._pending, frame)
        if self.tracker.state is State.IDLE:
            return Report(frame, None, State.IDLE, self._reason)
        return self._follow([frame], frame)

    def _start(self, init: InitRequest, frame: Frame) -> Report:
        self._pending = None
        frames, warning = self.ring.since(init.stamp_ns) if init.stamp_ns else ([frame], "")
        # The ring may already hold frames newer than this one, whose turn is still to come.
        frames = [f for f in frames if f.stamp_ns <= frame.stamp_ns] or [frame]
        try:
            track = self.tracker.init(frames[0].bgr(), init.box_xywh)
        except ValueError as error:
            kept = "; still following the previous target" if self.tracker.state is not State.IDLE else ""
            report = self._follow([frame], frame) if kept else Report(frame, None, State.IDLE, self._reason)
            return Report(frame, report.track, report.state, report.reason, report.target_id, f"{error}{kept}")
        self._target_id, self._reason = init.target_id, ""
        if frames[-1] is frames[0]:
            return Report(frame, track, track.state, "", self._target_id, warning)
        report = self._follow(frames[1:], frame)
        return Report(frame, report.track, report.state, report.reason, self._target_id, report.warning or warning)

    def _follow(self, frames: Sequence[Frame], frame: Frame) -> Report:
        track: Track | None = None
        for step in frames:
            try:
                image = step.bgr()
            except ValueError as error:  # one bad frame is no reason to give the target up
                return Report(frame, None, self.tracker.state, self._reason, self._target_id, str(error))
            try:
                track = self.tracker.update(image)
            except ValueError as error:
                return Report(frame, None, State.IDLE, self.reset(str(error)).reason, "", str(error))
        assert track is not None
        if track.state is not State.LOST:
            self._reason = ""
        elif not self._reason:
            self._reason = "target not seen"
        return Report(frame, track, track.state, self._reason, self._target_id)
