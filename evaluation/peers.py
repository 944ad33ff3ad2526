"""What a user would pick instead: OpenCV's classical trackers behind the interface of `siamtrack.SiamTracker`.

Most of them live in OpenCV's contrib modules, which ``opencv-python`` lacks; `available_peers` lists what this
installation has. They report no confidence: the score is 1 where OpenCV says it found the target and 0 where not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.state import State

Box = tuple[float, float, float, float]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class PeerTrack:
    """One update's answer.

    Attributes:
        box_xywh: image pixels; the last found box where the update failed.
        score: 1 found, 0 not found.
        state: TRACKING found, LOST not found.
    """

    box_xywh: Box
    score: float
    state: State


class StaticTracker:
    """A box that never moves: what a sequence is worth without any tracking. It never doubts itself."""

    def init(self, frame_bgr: Image, box_xywh: Box) -> PeerTrack:
        """Remember the box ``x, y, w, h``; the image is not looked at."""
        x, y, w, h = box_xywh
        self._box = (float(x), float(y), float(w), float(h))
        return PeerTrack(self._box, 1.0, State.TRACKING)

    def update(self, frame_bgr: Image) -> PeerTrack:
        """The box of `init`."""
        return PeerTrack(self._box, 1.0, State.TRACKING)


class OpenCvTracker:
    """An OpenCV tracker with `init` and `update` as here.

    Args:
        make: returns a new OpenCV tracker; called by every `init`, because OpenCV's trackers start only once.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def init(self, frame_bgr: Image, box_xywh: Box) -> PeerTrack:
        """Start on a box, rounded to the whole pixels of at least 1 x 1 that OpenCV takes."""
        x, y, w, h = (int(round(value)) for value in box_xywh)
        whole = (x, y, max(w, 1), max(h, 1))
        cv2.setRNGSeed(0)  # MIL draws samples: what it finds must not depend on what ran before
        self._tracker = self._make()
        # The new API returns None here, cv2.legacy returns whether it started.
        if self._tracker.init(frame_bgr, whole) is False:
            raise ValueError(f"OpenCV refused to start on the box {whole} in an image of {frame_bgr.shape[:2]}")
        self._box: Box = (float(whole[0]), float(whole[1]), float(whole[2]), float(whole[3]))
        return PeerTrack(self._box, 1.0, State.TRACKING)

    def update(self, frame_bgr: Image) -> PeerTrack:
        """The next box; a failed update repeats the last one."""
        found, box = self._tracker.update(frame_bgr)
        if found:
            x, y, w, h = box
            self._box = (float(x), float(y), float(w), float(h))
        return PeerTrack(self._box, float(found), State.TRACKING if found else State.LOST)


def _opencv(name: str) -> Any:
    """The class ``Tracker<name>`` of cv2, or of cv2.legacy where OpenCV moved it there; None where absent."""
    for module in (cv2, getattr(cv2, "legacy", None)):
        create = getattr(module, f"Tracker{name}_create", None)
        if create is not None:
            return create
    return None


def _kcf_without_threshold() -> Any:
    contrib: Any = cv2  # whose type stubs, in opencv-python, lack this tracker
    params = contrib.TrackerKCF_Params()
    params.detect_thresh = 0.0
    return contrib.TrackerKCF_create(params)


# name: (the OpenCV tracker it needs, how to make one)
PEERS: dict[str, tuple[str | None, Callable[[], Any]]] = {
    "csrt": ("CSRT", lambda: _opencv("CSRT")()),
    # The fair variant. OpenCV's default detect_thresh of 0.5 gives up at the first weak response and stays there.
    "kcf": ("KCF", _kcf_without_threshold),
    "kcf-default": ("KCF", lambda: _opencv("KCF")()),
    "mil": ("MIL", lambda: _opencv("MIL")()),
    "medianflow": ("MedianFlow", lambda: _opencv("MedianFlow")()),
    "mosse": ("MOSSE", lambda: _opencv("MOSSE")()),
    "static": (None, StaticTracker),
}


def available_peers() -> list[str]:
    """Names of the peers that this installation of OpenCV can make."""
    return [name for name, (needs, _) in PEERS.items() if needs is None or _opencv(needs) is not None]


def create_peer(name: str) -> StaticTracker | OpenCvTracker:
    """A new peer by its name in `PEERS`.

    Raises:
        ValueError: no such name.
        ImportError: this OpenCV lacks it.
    """
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}; expected one of {', '.join(PEERS)}")
    needs, make = PEERS[name]
    if needs is None:
        return StaticTracker()
    if _opencv(needs) is None:
        raise ImportError(
            f"peer {name!r} needs OpenCV's {needs} tracker, which cv2 {cv2.__version__} lacks; in an environment of "
            "its own: pip install opencv-contrib-python (it replaces opencv-python, do not install both)"
        )
    return OpenCvTracker(make)
