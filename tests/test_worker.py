"""The tracking thread: queues, order, errors and ends. Trackers are those of `tests.scripted`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from siamtrack import SiamTracker, State
from siamtrack.session import InitRequest, Report
from siamtrack.worker import WARMUP_FRAMES, Worker
from tests.scripted import START, ScriptedRunner
from tests.test_session import Shot, stamp

PICTURE = np.zeros((240, 320, 3), np.uint8)
PATIENCE_S = 20


def shot(index: int) -> Shot:
    return Shot(stamp(index), PICTURE)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something another thread does; how long it takes is not tested."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


class Desk:
    """A worker, what it reported, and a gate that holds it up while closed."""

    def __init__(self, every: bool = False, helper_cores: frozenset[int] = frozenset(), **options: int) -> None:
        self.runner = ScriptedRunner()
        self.runner.helper_cores = helper_cores
        self.reports: list[Report] = []
        self.errors: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()
        self.worker = Worker(
            lambda: SiamTracker(self.runner), self._on_report, self.errors.append, every=every, **options
        )

    def _on_report(self, report: Report) -> None:
        assert threading.current_thread().name == "siamtrack"
        self.reports.append(report)
        assert self.gate.wait(PATIENCE_S)

    @property
    def stamps(self) -> list[int]:
        return [report.frame.stamp_ns for report in self.reports if report.frame is not None]

    def hold(self) -> None:
        """Let it take frame 0 and get stuck with it."""
        self.gate.clear()
        self.worker.submit(shot(0))
        until(lambda: len(self.reports) == 1)


@contextmanager
def desk(every: bool = False, helper_cores: frozenset[int] = frozenset(), **options: int) -> Iterator[Desk]:
    it = Desk(every, helper_cores, **options)
    it.worker.start()
    try:
        yield it
    finally:
        it.gate.set()
        it.worker.stop()
        assert it.runner.closed


def test_it_is_warm_before_the_first_frame() -> None:
    with desk() as it:
        assert len(it.runner.windows) == WARMUP_FRAMES
        assert (it.reports, it.worker.received, it.worker.handled) == ([], 0, 0)
        it.worker.submit(shot(0))
        until(lambda: len(it.reports) == 1)
        assert it.reports[0].state is State.IDLE  # the warm-up's target is forgotten


@pytest.mark.parametrize("where", ["opening", "warming up"])
def test_a_failing_start_is_raised_to_the_caller(where: str) -> None:
    runner = ScriptedRunner()

    def fail(*_: object) -> SiamTracker:
        raise OSError("model is damaged")

    runner.answer = fail
    worker = Worker(fail if where == "opening" else lambda: SiamTracker(runner), print, print)
    before = threading.active_count()
    with pytest.raises(OSError, match="model is damaged"):
        worker.start()
    assert threading.active_count() == before
    assert runner.closed == (where == "warming up")
    worker.stop()


def test_only_the_newest_frame_waits_and_the_rest_is_counted() -> None:
    with desk() as it:
        it.hold()
        for index in range(1, 50):
            it.worker.submit(shot(index))
        assert it.worker.dropped == 48
        it.gate.set()
        until(lambda: len(it.reports) == 2)
        assert it.stamps == [stamp(0), stamp(49)]
        assert (it.worker.received, it.worker.handled, it.worker.dropped) == (50, 2, 48)


def test_every_frame_in_order() -> None:
    with desk(every=True) as it:
        it.worker.request(InitRequest(START))
        for index in range(100):
            it.worker.submit(shot(index))
        until(lambda: len(it.reports) == 100)
        assert it.stamps == [stamp(index) for index in range(100)]
        assert (it.worker.handled, it.worker.dropped) == (100, 0)
        assert [report.track.frame for report in it.reports] == list(range(100))


def test_every_frame_across_a_jump_back() -> None:
    order = [*range(20, 40), *range(10), *range(20, 30)]
    with desk(every=True) as it:
        jumps = [it.worker.submit(shot(index)) for index in order]
        until(lambda: len(it.reports) == len(order))
        assert it.stamps == [stamp(index) for index in order]
        assert [index for index, jumped in enumerate(jumps) if jumped] == [20]


def test_a_full_queue_blocks_the_producer() -> None:
    with desk(every=True, queue_frames=3) as it:
        it.hold()
        handed_over: list[int] = []

        def produce() -> None:
            for index in range(1, 8):
                it.worker.submit(shot(index))
                handed_over.append(index)

        producer = threading.Thread(target=produce, daemon=True)
        producer.start()
        until(lambda: len(handed_over) == 3)
        time.sleep(0.05)
        assert len(handed_over) == 3
        it.gate.set()
        producer.join(PATIENCE_S)
        until(lambda: len(it.reports) == 8)
        assert it.worker.dropped == 0


def test_stop_sets_a_blocked_producer_free() -> None:
    with desk(every=True, queue_frames=1) as it:
        it.hold()
        it.worker.submit(shot(1))
        producer = threading.Thread(target=lambda: it.worker.submit(shot(2)), daemon=True)
        producer.start()
        stopper = threading.Thread(target=it.worker.stop, daemon=True)
        stopper.start()
        producer.join(PATIENCE_S)  # while the worker is still held up
        assert not producer.is_alive() and stopper.is_alive()
        it.gate.set()
        stopper.join(PATIENCE_S)
        assert it.stamps == [stamp(0)]  # what waited is not handled any more
        assert not it.worker.submit(shot(3))
        assert it.worker.received == 2
        it.worker.stop()


def test_clear_sets_a_blocked_producer_free_and_forgets_frames() -> None:
    with desk(every=True, queue_frames=1) as it:
        it.hold()
        it.worker.submit(shot(1))
        producer = threading.Thread(target=lambda: it.worker.submit(shot(2)), daemon=True)
        producer.start()
        it.worker.clear()
        producer.join(PATIENCE_S)
        assert not producer.is_alive()
        it.worker.clear()
        assert it.worker.ring.since(0)[0] == []
        it.gate.set()
        assert it.worker.settle()
        assert it.stamps == [stamp(0)]


@pytest.mark.parametrize("culprit", ["report", "tracker"])
def test_exceptions_do_not_end_it(culprit: str) -> None:
    with desk() as it:
        it.worker.request(InitRequest(START))
        it.worker.submit(shot(0))
        until(lambda: len(it.reports) == 1)
        good = it.runner.answer

        def fail(*_: object) -> None:
            raise RuntimeError("out of luck")

        if culprit == "tracker":
            it.runner.answer = fail
        else:
            it.worker._on_report = fail
        it.worker.submit(shot(1))
        until(lambda: len(it.errors) == 1)
        assert str(it.errors[0]) == "out of luck"
        it.runner.answer, it.worker._on_report = good, it._on_report
        it.worker.submit(shot(2))
        until(lambda: len(it.reports) == 2)
        assert it.reports[1].state is State.TRACKING


def test_requests_and_resets() -> None:
    with desk() as it:
        it.worker.request(InitRequest(START, target_id="rover"))
        it.worker.submit(shot(0))
        until(lambda: len(it.reports) == 1)
        assert (it.reports[0].state, it.reports[0].target_id) == (State.TRACKING, "rover")
        it.worker.lose("no image")
        it.worker.reset("by hand")
        assert it.worker.settle()
        assert [(r.state, r.reason) for r in it.reports[1:]] == [(State.LOST, "no image"), (State.IDLE, "by hand")]
        it.worker.lose("no image")  # nothing to lose
        assert it.worker.settle()
        assert len(it.reports) == 3


def test_pause_passes_frames_over_and_keeps_the_target() -> None:
    with desk() as it:
        it.worker.request(InitRequest(START))
        it.worker.submit(shot(0))
        until(lambda: len(it.reports) == 1)
        it.worker.pause(True)
        assert it.worker.paused
        for index in range(1, 20):
            it.worker.submit(shot(index))
        until(lambda: not it.worker._frames)
        assert it.worker.settle()
        assert (len(it.reports), it.worker.handled) == (1, 1)
        it.worker.pause(False)
        it.worker.submit(shot(20))
        until(lambda: len(it.reports) == 2)
        assert it.reports[1].track.frame == 1


def test_a_change_of_the_tracker_happens_on_its_thread() -> None:
    seen: list[tuple[str, SiamTracker]] = []
    with desk() as it:
        it.worker.configure(lambda tracker: seen.append((threading.current_thread().name, tracker)))
        assert it.worker.settle()
    (name, tracker) = seen[0]
    assert name == "siamtrack" and tracker.runner is it.runner


def test_settle_says_when_it_takes_too_long() -> None:
    with desk() as it:
        it.hold()
        assert not it.worker.settle(timeout_s=0.01)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be told apart here")
@pytest.mark.parametrize("taken", [0, 1, 2], ids=["none taken", "last taken", "all taken"])
def test_the_worker_keeps_off_the_cores_of_its_runner(taken: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    helpers = [frozenset(), frozenset(cores[-1:]), frozenset(cores)][taken]
    with desk(helper_cores=helpers) as it:
        seen: list[set[int]] = []
        it.worker.configure(lambda tracker: seen.append(os.sched_getaffinity(0)))
        assert it.worker.settle()
    assert seen == [set(cores) - helpers or set(cores)]
    assert os.sched_getaffinity(0) == set(cores)
