"""`SiamTracker`: give it a box once, then frame after frame."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siamtrack.boxes import clip_xywh, cxcywh_to_xywh, iou_xywh, xywh_to_cxcywh
from siamtrack.bundle import TrackingSpec, UpdateSpec, load_bundle
from siamtrack.crop import Image, Window, context_size, mean_bgr, square_window
from siamtrack.lost import search_windows
from siamtrack.runners import EngineOptions, Features, Runner, open_runner
from siamtrack.state import State, Status, advance

Box = tuple[float, float, float, float]

SAME_PLACE = 0.3  # IoU with the box expected from which on a second look has seen the target there


@dataclass(frozen=True)
class Track:
    """What a tracker says after a frame.

    Attributes:
        box_xywh: left, top, width, height in image pixels (continuous; pixel i covers [i, i + 1)). Its centre is inside
            the image, its edges need not be. While LOST, the last box that was believed; do not act on it.
        score: raw confidence in [0, 1] that the target is in the box.
        state: see `siamtrack.state.State`.
        frame: frames since `init`, whose frame is 0.
    """

    box_xywh: Box
    score: float
    state: State
    frame: int


@dataclass(frozen=True)
class _Target:
    """Everything that is remembered of the target between two frames."""

    box_cxcywh: Box
    believed_cxcywh: Box  # the box of the last TRACKING frame: where the search starts when the target is lost
    seen_cxcywh: Box  # that of the last frame that was not weak: where a second look is taken
    features: Features
    first_features: Features  # of the first frame, as nothing has renewed them
    status: Status
    frame_size: tuple[int, int]  # height, width
    min_size_px: float
    velocity: tuple[float, float] = (0.0, 0.0)  # of the centre, image pixels a frame
    frame: int = 0
    renewed: int = 0  # frame of the last try to renew the template
    hunt: Iterator[Window] | None = None  # further windows to search while LOST
    glimpse: Window | None = None  # where something was seen while LOST that was not enough to be found


class SiamTracker:
    """Follows one target with a Siamese network.

    ```
    tracker = SiamTracker.from_pretrained()
    tracker.init(frame_bgr, (x, y, w, h))
    track = tracker.update(next_frame_bgr)
    ```

    A model with an update graph, such as the default one, renews its template after frames in which the target was seen
    well; such an `update` takes longer by about an `init`. See `siamtrack.bundle.UpdateSpec`.

    Args:
        runner: owns the model; closed with the tracker.
        tracking: replaces the manifest's tracking parameters.
        template_update: replaces the manifest's parameters of the template update.

    Raises:
        ValueError: `template_update` for a model without an update graph.
    """

    def __init__(
        self, runner: Runner, tracking: TrackingSpec | None = None, template_update: UpdateSpec | None = None
    ) -> None:
        manifest = runner.bundle.manifest
        if template_update is not None and manifest.update is None:
            raise ValueError(f"{manifest.model} has no update graph, so there is nothing for template_update to set")
        self.runner = runner
        self.tracking = tracking or manifest.tracking
        self.template_update = template_update or manifest.update
        self._thresholds = manifest.score.thresholds
        self._target: _Target | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path | None = None,
        backend: str = "onnxruntime",
        threads: int = 0,
        engines: EngineOptions | None = None,
        precision: str = "auto",
    ) -> SiamTracker:
        """A tracker of a shipped model or a bundle folder; the default model when nothing is named.

        Args:
            name_or_dir: see `siamtrack.bundle.load_bundle`.
            backend: see `siamtrack.runners.BACKENDS`.
            threads: CPU threads, 0 for the available cores up to 4.
            engines: for "tensorrt" and "auto": which engines may be loaded. The thread that calls is the only one that
                may then use the tracker.
            precision: see `siamtrack.runners.PRECISION_CHOICES`.

        Raises:
            BundleError: the bundle is missing or damaged, its engines cannot be used, or it has no such precision.
            ValueError: no such backend or precision.
            RuntimeError: CUDA cannot be used, or there is not enough GPU memory.
        """
        return cls(open_runner(load_bundle(name_or_dir), backend, threads, engines, precision))

    @property
    def state(self) -> State:
        """IDLE before `init` and after `reset`, else the state after the last frame."""
        return self._target.status.state if self._target else State.IDLE

    def init(self, frame_bgr: Image, box_xywh: Sequence[float] | NDArray[np.floating]) -> Track:
        """Start following what is in the box; replaces a target that is being followed.

        Args:
            frame_bgr: uint8 ``[H, W, 3]``.
            box_xywh: left, top, width, height in pixels; the part outside the image is cut off.

        Raises:
            ValueError: the frame or the box cannot be used. The previous target, if any, is kept.
        """
        check_frame(frame_bgr)
        height, width = frame_bgr.shape[:2]
        box = _cxcywh(check_box(box_xywh, width, height))
        features = self.runner.template(frame_bgr, self._template_window(box), mean_bgr(frame_bgr), box[2:])
        min_size = min(self.tracking.min_size_px, *box[2:])
        self._target = _Target(box, box, box, features, features, Status(State.TRACKING), (height, width), min_size)
        return self._track(self._target, 1.0)

    def update(self, frame_bgr: Image) -> Track:
        """Find the target in the next frame.

        Args:
            frame_bgr: uint8 ``[H, W, 3]``, of the same size as the frame given to `init`.

        An error of the backend is passed on and the track goes on with the next frame: from the frame before when the
        search failed, from this frame with the old template when renewing that failed.

        Raises:
            RuntimeError: there is no target yet.
            ValueError: the frame cannot be used; the track goes on with the next good frame.
        """
        target = self._target
        if target is None:
            raise RuntimeError("no target to follow: call init(frame, box) first")
        check_frame(frame_bgr)
        if frame_bgr.shape[:2] != target.frame_size:
            (h0, w0), (h1, w1) = target.frame_size, frame_bgr.shape[:2]
            raise ValueError(f"frame size changed from {w0}x{h0} to {w1}x{h1}: call init with a box in the new frame")
        lost = target.status.state is State.LOST
        windows = self._lost_windows(target) if lost else self._windows(target)
        tuning = (self.tracking.penalty_k, 0.0 if lost else self.tracking.window_influence, 0.0)
        search_px = self.runner.bundle.manifest.crop.search_px
        size = np.array(target.box_cxcywh[2:])
        prev_size = np.array([size * search_px / w.width for w in windows], np.float32)
        result = self.runner.search(frame_bgr, windows, [target.features] * len(windows), prev_size, tuning)
        # A network that overflows must not poison the track: an answer that is no number is no evidence.
        usable = np.isfinite(result.box_cxcywh).all(axis=1) & np.isfinite(result.score) & np.isfinite(result.penalty)
        if not lost:
            usable[1:] &= result.score[1:] >= self._thresholds.lost_below
        best = int(np.where(usable, result.score, -1.0).argmax())
        score, rate, found = 0.0, 0.0, target.box_cxcywh
        if usable[best]:
            score = float(result.score[best])
            rate = float(result.penalty[best]) * score * self.tracking.size_rate
            found = _box(windows[best].to_image(_box(result.box_cxcywh[best]), search_px))
        elsewhere = best > 0 and _overlap(found, _ahead(target)) < SAME_PLACE
        self._target = self._follow(replace(target, frame=target.frame + 1), found, score, rate, elsewhere)
        if self._may_renew(self._target, found, score):
            # A try counts, whatever comes of it: a model that cannot renew must not cost as much every frame.
            self._target = replace(self._target, renewed=self._target.frame)
            window = self._template_window(self._target.box_cxcywh)
            features = self.runner.update(frame_bgr, window, self._target.features)
            self._target = replace(self._target, features=features)
        return self._track(self._target, score)

    def mark_lost(self) -> None:
        """Declare the target lost, for a reason the score cannot show, such as a gap in the stream.

        The next updates search for it as after any loss. Does nothing without a target.
        """
        if self._target is not None and self._target.status.state is not State.LOST:
            self._target = self._lose(self._target)

    def reset(self) -> None:
        """Forget the target: IDLE."""
        self._target = None

    def close(self) -> None:
        """Forget the target and give the model's memory back."""
        self.reset()
        self.runner.close()

    def _follow(self, target: _Target, found: Box, score: float, rate: float, elsewhere: bool) -> _Target:
        """The target after a frame whose best box and score these were, not where it was expected if `elsewhere`."""
        status = advance(target.status, score, self._thresholds, elsewhere)
        if status.state is State.LOST:
            if target.status.state is not State.LOST:
                return self._lose(target)
            # Too little to be found, but not little: looked at once more, from nearer, before the search passes by.
            glimpsed = score >= self._thresholds.uncertain_below
            return replace(target, glimpse=self._window((*found[:2], *target.box_cxcywh[2:])) if glimpsed else None)
        if status.state is not State.TRACKING:
            rate *= self.tracking.uncertain_rate
        height, width = target.frame_size
        cx, cy = min(max(found[0], 0.0), float(width)), min(max(found[1], 0.0), float(height))
        w, h = (
            min(max((1 - rate) * old + rate * new, target.min_size_px), float(limit))
            for old, new, limit in zip(target.box_cxcywh[2:], found[2:], (width, height), strict=True)
        )
        box = (cx, cy, w, h)
        velocity = (0.0, 0.0)  # a target found again starts anew
        if not elsewhere and target.status.state is not State.LOST:
            gain = self.tracking.motion_rate * score
            moved = (cx - target.box_cxcywh[0], cy - target.box_cxcywh[1])
            velocity = (
                target.velocity[0] + gain * (moved[0] - target.velocity[0]),
                target.velocity[1] + gain * (moved[1] - target.velocity[1]),
            )
        believed = box if status.state is State.TRACKING else target.believed_cxcywh
        seen = target.seen_cxcywh if status.weak_frames else box
        target = replace(target, status=status, box_cxcywh=box, believed_cxcywh=believed, seen_cxcywh=seen)
        return replace(target, velocity=velocity, hunt=None, glimpse=None)

    def _lose(self, target: _Target) -> _Target:
        """Frames before a loss may have led astray: fall back to where the target was last believed, and to its start.

        What hides a target is taken into its template before the score falls.
        """
        return replace(
            target,
            status=Status(State.LOST),
            box_cxcywh=target.believed_cxcywh,
            features=target.first_features,
            hunt=self._hunt(target.believed_cxcywh, target.frame_size),
        )

    def _may_renew(self, target: _Target, found: Box, score: float) -> bool:
        """Was the target seen well enough to learn from (DASTSiam section 2.3, erratum D13; D14 for SiamFC+ST)?

        Only in state TRACKING, above the score, not too often, and when the box found has its centre in the image.
        """
        spec = self.template_update
        if spec is None or target.status.state is not State.TRACKING or not score > spec.min_score:
            return False
        height, width = target.frame_size
        valid = 0 <= found[0] <= width and 0 <= found[1] <= height and found[2] > 0 and found[3] > 0
        return valid and target.frame - target.renewed >= spec.interval

    def _template_window(self, box_cxcywh: Box) -> Window:
        cx, cy, w, h = box_cxcywh
        return square_window(cx, cy, context_size(w, h, self.runner.bundle.manifest.crop.context))

    def _window(self, box_cxcywh: Box) -> Window:
        cx, cy, w, h = box_cxcywh
        spec = self.runner.bundle.manifest.crop
        return square_window(cx, cy, context_size(w, h, spec.context) * spec.search_px / spec.template_px)

    def _windows(self, target: _Target) -> list[Window]:
        """Where the target is expected. After a weak frame also, and wider, where it was last seen.

        A box that follows weak evidence strays, and then its window may miss a target that comes back.
        """
        windows = [self._window(_ahead(target))]
        if target.status.weak_frames and self.tracking.second_look and self.tracking.lost_windows > 1:
            cx, cy, w, h = target.seen_cxcywh
            windows.append(self._window((cx, cy, w * self.tracking.second_look, h * self.tracking.second_look)))
        return windows

    def _hunt(self, box_cxcywh: Box, frame_size: tuple[int, int]) -> Iterator[Window]:
        height, width = frame_size
        windows = search_windows(box_cxcywh[0], box_cxcywh[1], self._window(box_cxcywh).width, width, height)
        next(windows)  # the place of loss, which is searched every frame anyway
        return windows

    def _lost_windows(self, target: _Target) -> list[Window]:
        """The place of loss, that of a glimpse, and the next tiles of the growing search."""
        assert target.hunt is not None
        windows = [self._window(target.box_cxcywh), *([target.glimpse] if target.glimpse else [])]
        more = max(self.tracking.lost_windows - len(windows), 0)
        return [*windows, *itertools.islice(target.hunt, more)][: self.tracking.lost_windows]

    @staticmethod
    def _track(target: _Target, score: float) -> Track:
        return Track(_box(cxcywh_to_xywh(target.box_cxcywh)), score, target.status.state, target.frame)


def check_frame(frame_bgr: object) -> None:
    """Refuse what is not a colour image.

    Raises:
        ValueError: not a uint8 array ``[H, W, 3]`` with at least one pixel.
    """
    if not isinstance(frame_bgr, np.ndarray):
        raise ValueError(f"frame must be a numpy array, got {type(frame_bgr).__name__}")
    if frame_bgr.dtype != np.uint8:
        raise ValueError(f"frame must be uint8 (0..255), got {frame_bgr.dtype}; convert it first")
    if frame_bgr.ndim != 3 or frame_bgr.shape[2] != 3:
        channels = {2: 1, 3: frame_bgr.shape[-1]}.get(frame_bgr.ndim)
        hint = {1: "cv2.COLOR_GRAY2BGR", 4: "cv2.COLOR_BGRA2BGR"}.get(channels, "") if channels else ""
        advice = f"; convert it with cv2.cvtColor(frame, {hint})" if hint else ""
        raise ValueError(f"frame must have shape [height, width, 3] (BGR), got {list(frame_bgr.shape)}{advice}")
    if frame_bgr.size == 0:
        raise ValueError(f"frame is empty: shape {list(frame_bgr.shape)}")


def check_box(box_xywh: Sequence[float] | NDArray[np.floating], width: int, height: int) -> Box:
    """The part of a box inside the image.

    Raises:
        ValueError: not four finite numbers, no area, or less than a pixel inside the image.
    """
    try:
        box = np.asarray(box_xywh, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"box must be four numbers x, y, width, height, got {box_xywh!r}") from error
    if box.shape != (4,):
        raise ValueError(f"box must be four numbers x, y, width, height, got shape {list(box.shape)}")
    if not np.isfinite(box).all():
        raise ValueError(f"box must be finite, got {box.tolist()}")
    if box[2] <= 0 or box[3] <= 0:
        raise ValueError(f"box width and height must be above 0, got {box[2]:g} x {box[3]:g}")
    x, y, w, h = clip_xywh(box, width, height).tolist()
    # A box of a fraction of a pixel that lies inside is kept; one that only grazes the image is not. Clipping goes over
    # x + w, which costs the size its last digits.
    if w < min(1.0, box[2] * 0.999) or h < min(1.0, box[3] * 0.999) or w * h == 0:
        raise ValueError(f"box {box.tolist()} lies outside the {width}x{height} image")
    return x, y, w, h


def _ahead(target: _Target) -> Box:
    """Where the box will be if the target keeps its velocity; its centre stays inside the image."""
    cx, cy, w, h = target.box_cxcywh
    height, width = target.frame_size
    x, y = cx + target.velocity[0], cy + target.velocity[1]
    return min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height)), w, h


def _overlap(box_cxcywh: Box, other_cxcywh: Box) -> float:
    return float(iou_xywh(cxcywh_to_xywh(box_cxcywh), cxcywh_to_xywh(other_cxcywh)))


def _box(values: Sequence[float] | NDArray[np.floating]) -> Box:
    a, b, c, d = (float(v) for v in values)
    return a, b, c, d


def _cxcywh(box_xywh: Box) -> Box:
    return _box(xywh_to_cxcywh(box_xywh))
