"""The thread that owns a tracker: newest frame in, reports out.

Frames arrive on any thread and are only put aside there; everything that takes time happens here. A tracker, and the
GPU context a runner may hold, never leaves this thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from siamtrack.session import Frame, FrameRing, InitRequest, Report, Session
from siamtrack.tracker import SiamTracker

WARMUP_FRAMES = 5


class Worker:
    """Runs a `Session` on its own thread.

    Args:
        open_tracker: makes the tracker; called on the worker's thread.
        on_report: called with every report, on the worker's thread.
        on_error: called with an exception that `on_report` or the tracker raised unforeseen; the worker goes on.
        ring: buffer of past frames.
        every: handle every frame in order instead of the newest one; `submit` then blocks while the queue is full.
        queue_frames: length of that queue.
    """

    def __init__(
        self,
        open_tracker: Callable[[], SiamTracker],
        on_report: Callable[[Report], None],
        on_error: Callable[[Exception], None],
        ring: FrameRing | None = None,
        every: bool = False,
        queue_frames: int = 8,
    ) -> None:
        self._open_tracker, self._on_report, self._on_error = open_tracker, on_report, on_error
        self.ring = ring or FrameRing()
        self._limit = queue_frames if every else 1
        self._every = every
        self._changed = threading.Condition()
        self._frames: deque[Frame] = deque()
        self._commands: deque[Callable[[Session], Report | None]] = deque()
        self._stopping = False
        self._paused = False
        self._opened = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.received = 0
        self.dropped = 0
        self.handled = 0

    def start(self) -> None:
        """Start the thread, open the tracker and warm it up, so that the first real frame is as fast as the rest.

        Raises:
            Exception: whatever `open_tracker` raised.
        """
        self._thread = threading.Thread(target=self._run, name="siamtrack", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self) -> None:
        """Finish the frame in hand, close the tracker on its thread, and end; safe to call twice."""
        with self._changed:
            self._stopping = True
            self._frames.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def submit(self, frame: Frame) -> bool:
        """Hand over a frame; returns True when its stamp shows that time jumped back. Does nothing once stopped."""
        with self._changed:
            if self._every:
                self._changed.wait_for(lambda: len(self._frames) < self._limit or self._stopping)
            if self._stopping:
                return False
            jumped = self.ring.append(frame)
            self.received += 1
            while len(self._frames) >= self._limit:
                self._frames.popleft()
                self.dropped += 1
            self._frames.append(frame)
            self._changed.notify_all()
        return jumped

    def clear(self) -> None:
        """Drop the frames that wait and those that are buffered."""
        with self._changed:
            self._frames.clear()
            self.ring.clear()
            self._changed.notify_all()

    def request(self, init: InitRequest) -> None:
        """Start on a box, from the next frame on or on the buffered frame it is stamped with."""
        self._command(lambda session: session.request(init))

    def reset(self, reason: str = "") -> None:
        """Forget the target."""
        self._command(lambda session: session.reset(reason))

    def lose(self, reason: str) -> None:
        """Declare the target lost for a reason outside the picture."""
        self._command(lambda session: session.lose(reason))

    @property
    def paused(self) -> bool:
        """Whether frames are passed over."""
        return self._paused

    def pause(self, paused: bool) -> None:
        """Pass frames over, target kept; or go on."""
        self._paused = paused

    def configure(self, change: Callable[[SiamTracker], None]) -> None:
        """Run a change of the tracker between two frames."""
        self._command(lambda session: change(session.tracker))

    def settle(self, timeout_s: float = 5.0) -> bool:
        """Wait until the frame in hand and all that was asked for before is done; False when it takes too long."""
        done = threading.Event()
        self._command(lambda session: done.set())
        return done.wait(timeout_s)

    def _command(self, command: Callable[[Session], Report | None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with contextlib.closing(self._open_tracker()) as tracker:
                _keep_off(tracker.runner.helper_cores)
                _warm_up(tracker)
                self._opened.set()
                self._serve(Session(tracker, self.ring))
        except BaseException as error:
            if self._opened.is_set():
                raise
            self._failure = error  # start() raises it
        finally:
            self._opened.set()

    def _serve(self, session: Session) -> None:
        while (work := self._next()) is not None:
            try:
                report = work(session)
                if report is not None:
                    self._on_report(report)
            except Exception as error:  # one bad frame or a closed publisher must not end the thread
                self._on_error(error)

    def _next(self) -> Callable[[Session], Report | None] | None:
        """The next thing to do; None to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._frames or self._stopping)
            if self._stopping:
                return None
            if self._commands:
                return self._commands.popleft()
            frame = self._frames.popleft()
            self._changed.notify_all()
            if self._paused:
                return lambda session: None
            self.handled += 1
            return lambda session: session.handle(frame)


def _keep_off(cores: frozenset[int]) -> None:
    """Bind this thread to the other cores it may use, if there are any."""
    if cores and (others := os.sched_getaffinity(0) - cores):
        os.sched_setaffinity(0, others)


def _warm_up(tracker: SiamTracker) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    tracker.init(noise, (96, 96, 64, 64))
    for _ in range(WARMUP_FRAMES):
        tracker.update(noise)
    tracker.reset()
