"""Play the same sequences again and again with other tracking parameters: frames decoded once, a process a share."""

from __future__ import annotations

import heapq
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cv2
import numpy as np

from evaluation.layouts import SequenceRef
from evaluation.metrics import success_auc
from evaluation.processes import context
from evaluation.sequences import Sequence as ImageSequence
from evaluation.sequences import read_frame
from siamtrack.boxes import iou_xywh
from siamtrack.bundle import TrackingSpec, load_bundle
from siamtrack.crop import Image
from siamtrack.runners import open_runner
from siamtrack.tracker import SiamTracker

Play = Callable[[TrackingSpec], list[float]]


def scorable(ref: SequenceRef) -> ImageSequence:
    """A sequence, read.

    Raises:
        ValueError: it has no box to score a pass on.
    """
    sequence = ref.load()
    if not sequence.scorable[sequence.start + 1 :].any():
        raise ValueError(
            f"{ref.name} has no box after the one it starts with, so no trial can be scored on it; leave it out"
        )
    return sequence


class Player:
    """Plays sequences again and again, on one runner with one thread.

    Args:
        path: bundle folder.
        sequences: what to play.
        memory: bytes for decoded frames; those that do not fit are decoded anew every time.
    """

    def __init__(self, path: Path, sequences: Sequence[ImageSequence], memory: float) -> None:
        cv2.setNumThreads(1)
        bundle = load_bundle(path)
        # The bundle's own precision: values must not depend on what this CPU is fast at.
        self._runner = open_runner(bundle, threads=1, precision=bundle.manifest.precision)
        self._sequences = sequences
        self._frames: dict[Path, Image] = {}
        self._free = memory

    def play(self, tracking: TrackingSpec) -> list[float]:
        """Success AUC of one pass over each sequence, as `evaluation.onepass` has it.

        Raises:
            ValueError: an image cannot be decoded, or the first box cannot be used.
        """
        tracker = SiamTracker(self._runner, tracking)
        aucs = []
        for sequence in self._sequences:
            try:
                aucs.append(self._play(tracker, sequence))
            except ValueError as error:
                raise ValueError(f"sequence {sequence.name}: {error}") from error
        return aucs

    def close(self) -> None:
        """Give the model's memory and the frames back."""
        self._runner.close()
        self._frames.clear()

    def _play(self, tracker: SiamTracker, sequence: ImageSequence) -> float:
        start = sequence.start
        tracker.init(self._frame(sequence.frames[start]), sequence.truth_xywh[start])
        rest = sequence.frames[start + 1 :]
        boxes = np.array([tracker.update(self._frame(path)).box_xywh for path in rest])
        scored = sequence.scorable[start + 1 :]
        return success_auc(iou_xywh(boxes[scored], sequence.truth_xywh[start + 1 :][scored]))

    def _frame(self, path: Path) -> Image:
        frame = self._frames.get(path)
        if frame is None:
            frame = read_frame(path)
            if frame.nbytes <= self._free:
                self._free -= frame.nbytes
                self._frames[path] = frame
        return frame


@contextmanager
def players(path: Path, sequences: Sequence[ImageSequence], processes: int, memory: float) -> Iterator[Play]:
    """A function that plays all sequences with given parameters, in this process or in several.

    Every process keeps its share of the sequences from trial to trial, so that a frame is decoded and held once. The
    boxes do not depend on how many processes there are.

    Args:
        path: bundle folder.
        sequences: what to play.
        processes: how many play at a time.
        memory: bytes for decoded frames, in all processes together.
    """
    shares = share_out([len(sequence.frames) for sequence in sequences], processes)
    if len(shares) == 1:
        player = Player(path, sequences, memory)
        try:
            yield player.play
        finally:
            player.close()
        return
    with ExitStack() as stack:
        pools = []
        for share in shares:
            given = (path, [sequences[index] for index in share], memory / len(shares))
            pool = ProcessPoolExecutor(1, mp_context=context(), initializer=_start_worker, initargs=given)
            pools.append(stack.enter_context(pool))

        def play(tracking: TrackingSpec) -> list[float]:
            futures = [pool.submit(_play_in_worker, tracking) for pool in pools]
            aucs = [math.nan] * len(sequences)
            for share, future in zip(shares, futures, strict=True):
                for index, auc in zip(share, future.result(), strict=True):
                    aucs[index] = auc
            return aucs

        yield play


def share_out(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Indices of sequences for each process, so that all have about as many frames; no process without any."""
    shares: list[list[int]] = [[] for _ in range(min(processes, len(lengths)))]
    loads = [(0, number) for number in range(len(shares))]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + lengths[index], number))
        shares[number].append(index)
    return shares


_player: Player | None = None  # of a worker process


def _start_worker(path: Path, sequences: Sequence[ImageSequence], memory: float) -> None:
    global _player
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that was started
    _player = Player(path, sequences, memory)


def _play_in_worker(tracking: TrackingSpec) -> list[float]:
    assert _player is not None
    return _player.play(tracking)
