"""Frames played to the runners that `benchmarks.gpu_check` checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu_latency import FILL, TUNING, camera, moving_windows
from siamtrack.crop import Image, Window
from siamtrack.runners import Features, Runner

Opener = Callable[..., Any]
"""Opens the runner of one subject; takes ``graphs`` and ``max_batch``."""


def play_frames(runner: Runner, targets: int, count: int = 40) -> list[Any]:
    """Results over moving windows that also change the size of the upload; templates are renewed on the way."""
    images = camera((1280, 720), 4)
    features = [runner.template(images[0], Window(50 * i, 30 * i, 120, 120), FILL, (60, 50)) for i in range(targets)]
    prev_size = np.full((targets, 2), 60, np.float32)
    results = []
    for turn, windows in enumerate(moving_windows((1280, 720), targets, 300, count)):
        side = (40, 223, 300, 700)[turn % 4]
        if turn % 4 == 3:
            renew(runner, images[turn % 4], features, turn)
        resized = [Window(w.left, w.top, side, side) for w in windows]
        results.append(runner.search(images[turn % 4], resized, features, prev_size, TUNING))
    return results


def renew(runner: Runner, image: Image, features: list[Features], turn: int) -> None:
    """Renew the template of one target after the other, where the model can."""
    if "update" in runner.bundle.manifest.graphs:
        which = turn // 4 % len(features)
        features[which] = runner.update(image, Window(20 * which, turn % 50, 100, 100), features[which])


def same_results(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Have two plays the same responses, bit for bit?"""
    return all(x.response.tobytes() == y.response.tobytes() for x, y in zip(a, b, strict=True))
