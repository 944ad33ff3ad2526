"""Which frames of a track make a sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rng = np.random.Generator


def pair_frames(frames: NDArray[np.int_], furthest: int, rng: Rng) -> tuple[int, int]:
    """Template and search frame of a pair.

    Args:
        frames: frame numbers of a track's sightings, rising.
        furthest: largest distance between the two, in frames.
        rng: what to draw with.

    Returns:
        Indices into `frames`.
    """
    first = int(rng.integers(len(frames)))
    near = np.flatnonzero(np.abs(frames - frames[first]) <= furthest)
    return first, int(near[rng.integers(len(near))])  # as `rng.choice(near)`, which takes longer


def triplet_frames(frames: NDArray[np.int_], length: int, rng: Rng) -> tuple[int, int, int, int]:
    """First template T_i, history T_a, current T_c and search frame, of one part of a track (DASTSiam section 2.3).

    T_i is anywhere in the part, T_a and T_c are neighbours in time, the search frame comes later: as while tracking.
    Of a part of two sightings the later one is T_c and search frame, of a single one all four.

    Args:
        frames: as in `pair_frames`.
        length: frames that the part spans; 50 in the paper.
        rng: what to draw with.

    Returns:
        Indices into `frames`.
    """
    start = frames[int(rng.integers(len(frames)))]
    start = max(min(start, frames[-1] - length + 1), frames[0])  # a full part where the track has one
    low, end = (int(i) for i in np.searchsorted(frames, (start, start + length)))
    last = end - 1
    history = int(rng.integers(low, max(last - 1, low + 1)))
    current = min(history + 1, last)
    later = int(rng.integers(min(current + 1, last), end))
    return int(rng.integers(low, end)), history, current, later
