"""A tracker whose network is a script: what it answers is what the test says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from siamtrack import Bundle, SiamTracker, Track
from siamtrack.bundle import CropSpec, GridSpec, Manifest, ScoreSpec, TrackingSpec, UpdateSpec
from siamtrack.crop import Window
from siamtrack.runners import Features, SearchResult
from siamtrack.state import Thresholds

WIDTH, HEIGHT = 320, 240
FRAME = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
START = (100.0, 80.0, 24.0, 20.0)  # xywh
CENTRE = (112.0, 90.0)
THRESHOLDS = Thresholds(tracking_above=0.5, uncertain_below=0.4, lost_below=0.2, lost_after=3, found_above=0.6)
Answer = tuple[tuple[float, float, float, float], float]  # cx, cy, w, h in image pixels, and the score


class ScriptedRunner:
    """A `siamtrack.runners.Runner` that answers what the test says and writes down what it was asked.

    `answer` is called for each window and may be replaced between frames.
    """

    def __init__(self, update: UpdateSpec | None = None) -> None:
        score = ScoreSpec("what the script says", THRESHOLDS)
        grid = GridSpec(16, 16, 0.5)
        self.bundle = Bundle(
            Path("no folder"),
            Manifest(1, "script", {}, CropSpec(127, 255), grid, score, "none", TrackingSpec(), update),
        )
        self.last_timing: dict[str, float] = {}
        self.helper_cores: frozenset[int] = frozenset()
        self.answer: Callable[[Window], Answer] = lambda window: ((*CENTRE, 24, 20), 0.9)
        self.windows: list[list[Window]] = []
        self.influence: list[float] = []
        self.sizes: list[np.ndarray] = []  # [N, 2] a frame, previous size in image pixels
        self.renewed: list[Window] = []
        self.sought: list[Features] = []  # the features of each frame
        self.closed = False

    def update(self, image: np.ndarray, window: Window, features: Features) -> Features:
        self.renewed.append(window)
        return dataclasses.replace(features, tensors=(*features.tensors, window))

    def template(
        self,
        image: np.ndarray,
        window: Window,
        fill_bgr: tuple[float, float, float],
        size: tuple[float, float] | None = None,
    ) -> Features:
        self.size = size
        return Features((window,), fill_bgr)

    def search(
        self,
        image: np.ndarray,
        windows: Sequence[Window],
        features: Sequence[Features],
        prev_size: np.ndarray,
        tuning: tuple[float, float, float],
    ) -> SearchResult:
        assert len(windows) == len(features) and prev_size.shape == (len(windows), 2)
        self.windows.append(list(windows))
        self.sought.append(features[0])
        self.influence.append(tuning[1])
        self.sizes.append(np.array([size * w.width / 255 for size, w in zip(prev_size, windows, strict=True)]))
        answers = [self.answer(window) for window in windows]
        boxes = [window.to_crop(box, 255) for window, (box, _) in zip(windows, answers, strict=True)]
        ones = np.ones(len(windows), np.float32)
        score = np.array([score for _, score in answers], np.float32)
        return SearchResult(np.array(boxes, np.float32), score, ones, np.ones((len(windows), 16, 16), np.float32))

    def close(self) -> None:
        self.closed = True


def play(tracker: SiamTracker, *scores: float, at: tuple[float, float] = CENTRE) -> list[Track]:
    """A frame a score, the best box of which is always `at`."""
    tracks = []
    for score in scores:
        tracker.runner.answer = lambda window, score=score: ((*at, 24, 20), score)
        tracks.append(tracker.update(FRAME))
    return tracks


def names(tracks: Sequence[Track]) -> str:
    return "".join(track.state.name[0] for track in tracks)


def scripted(**tracking: float) -> SiamTracker:
    runner = ScriptedRunner()
    tracker = SiamTracker(runner, dataclasses.replace(TrackingSpec(), **tracking))
    tracker.init(FRAME, START)
    return tracker


def lost(**tracking: float) -> SiamTracker:
    """A tracker that has just lost its target at `START`; what the runner saw before is forgotten."""
    tracker = scripted(**tracking)
    assert names(play(tracker, 0.1, 0.1, 0.1)) == "UUL"
    for record in (tracker.runner.windows, tracker.runner.influence, tracker.runner.sizes):
        record.clear()
    return tracker


def centre_of(window: Window) -> tuple[float, float]:
    return window.left + window.width / 2, window.top + window.height / 2


def seen(tracker: SiamTracker, expected: float, elsewhere: Answer | float) -> Track:
    """The next frame: what is found where the target is expected, in the window's middle, and in the second window.

    A score alone stands for a find in the middle.
    """
    answers = iter([expected, elsewhere])

    def answer(window: Window) -> Answer:
        given = next(answers)
        return given if isinstance(given, tuple) else ((*centre_of(window), 24, 20), given)

    tracker.runner.answer = answer
    return tracker.update(FRAME)
