"""A tracker in a stream of stamped frames: which frame a box belongs to, when to start, what to report.

No threads and no ROS here: `siamtrack.worker` runs a session on its own thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        image: the frame's picture; None where it was not needed, or does not decode.
    """

    frame: Frame | None
    track: Track | None
    state: State
    reason: str = ""
    target_id: str = ""
    warning: str = ""
    image: Image | None = None


class FrameRing:
    """The last frames, for boxes that were drawn on a frame of the past. Safe to use from two threads.

    Frames without a stamp are not kept: no box can be meant for one.

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
        if frame.stamp_ns <= 0:
            return False
        with self._lock:
            jumped = bool(self._frames) and frame.stamp_ns < self._frames[-1].stamp_ns - self.JUMP_NS
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
        self._last_ns = 0  # stamp of the last frame handled
        self._behind = 0  # frames passed while fast-forwarding; 0 once the target is followed live

    @property
    def waiting(self) -> bool:
        """Whether a box waits for its frame."""
        return self._pending is not None

    def request(self, init: InitRequest) -> None:
        """Start on a box; takes effect with the next frame handled. The latest request wins."""
        self._pending = init

    def reset(self, reason: str = "") -> Report:
        """Forget the target and any waiting box."""
        self._pending = None
        return self._forget(reason)

    def _forget(self, reason: str) -> Report:
        """Forget the target only."""
        self.tracker.reset()
        self._target_id, self._reason, self._behind = "", reason, 0
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
        stamp_ns, last_ns = frame.stamp_ns, self._last_ns
        if stamp_ns > 0:
            self._last_ns = stamp_ns
            if stamp_ns < last_ns - FrameRing.JUMP_NS:
                return self._jump_back(frame)
        missed = self._missed(last_ns, stamp_ns)
        init = self._pending
        if init is not None and (stamp_ns <= 0 or init.stamp_ns <= stamp_ns):
            return self._start(init, frame)
        if self.tracker.state is State.IDLE:
            report = Report(frame, None, State.IDLE, self._reason)
        else:
            report = self._follow([*missed, frame], frame)
        if init is not None and init.stamp_ns > stamp_ns + FrameRing.JUMP_NS:
            ahead_s = (init.stamp_ns - stamp_ns) / 1e9
            report = replace(report, warning=f"the box's stamp is {ahead_s:.2f} s ahead of the frames: it waits")
        return report

    def _jump_back(self, frame: Frame) -> Report:
        """The stream starts over (a bag loops): what was known of the target is of another time."""
        self._behind = 0
        self.lose("time jumped back")
        init, warning = self._pending, ""
        if init is not None and init.stamp_ns <= frame.stamp_ns:
            return self._start(init, frame)
        if init is not None and init.stamp_ns > frame.stamp_ns + FrameRing.JUMP_NS:
            self._pending, warning = None, "time jumped back: the box that waited for its frame is dropped"
        return Report(frame, None, self.tracker.state, self._reason, self._target_id, warning)

    def _missed(self, last_ns: int, stamp_ns: int) -> list[Frame]:
        """Frames that came while a fast-forward ran. They are made up for as long as they get fewer each time."""
        if not self._behind:
            return []
        missed = [f for f in self.ring.since(last_ns + 1)[0] if f.stamp_ns < stamp_ns]
        self._behind = len(missed) if len(missed) < self._behind else 0
        return missed if self._behind else []

    def _start(self, init: InitRequest, frame: Frame) -> Report:
        self._pending = None
        frames, warning = [frame], ""
        if init.stamp_ns > 0 and frame.stamp_ns > 0:
            buffered, warning = self.ring.since(init.stamp_ns)
            # The ring may already hold frames newer than this one, whose turn is still to come.
            frames = [f for f in buffered if f.stamp_ns <= frame.stamp_ns] or [frame]
        elif init.stamp_ns > 0:
            warning = "frames have no stamps: starting on the newest one"
        try:
            image = frames[0].bgr()
            track = self.tracker.init(image, init.box_xywh)
        except ValueError as error:
            idle = self.tracker.state is State.IDLE
            report = Report(frame, None, State.IDLE, self._reason) if idle else self._follow([frame], frame)
            kept = "" if idle else "; still following the previous target"
            return replace(report, warning=f"box refused: {error}{kept}")
        self._target_id, self._reason, self._behind = init.target_id, "", len(frames) - 1
        if len(frames) == 1:
            return Report(frame, track, track.state, "", self._target_id, warning, image)
        report = self._follow(frames[1:], frame)
        return replace(report, warning=report.warning or warning)

    def _follow(self, frames: Sequence[Frame], frame: Frame) -> Report:
        """Through all `frames`, the last of which is `frame`; one bad frame is no reason to give the target up."""
        track: Track | None = None
        image: Image | None = None
        warning = ""
        for step in frames:
            track = image = None
            try:
                image = step.bgr()
            except ValueError as error:
                warning = str(error)
                continue
            try:
                track = self.tracker.update(image)
            except ValueError as error:
                self._forget(str(error))  # a box that waits for a coming frame may fit that one
                return Report(frame, None, State.IDLE, self._reason, "", str(error))
        state = self.tracker.state
        if track is not None and state is not State.LOST:
            self._reason = ""
        elif state is State.LOST and not self._reason:
            self._reason = "target not seen"
        return Report(frame, track, state, self._reason, self._target_id, warning, image)
