"""Runners side by side: the same crops, and the same clip in a closed loop, since a box error moves the next window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from siamtrack.boxes import iou_xywh
from siamtrack.bundle import Bundle
from siamtrack.crop import Image, Window
from siamtrack.runners import Features, Runner, SearchResult
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import Scene
from siamtrack.sources import open_source
from siamtrack.tracker import SiamTracker

SHAKE_PX = 0.02  # crop pixels: what FP16 rounding does to a box
Box = tuple[float, float, float, float]
Pair = tuple[Image, Image, NDArray[np.float32]]


@dataclass(frozen=True)
class Tolerance:
    """What a precision may differ by.

    Attributes:
        response: raw confidence on single crops, absolute.
        box_px: box coordinates on single crops, as `Comparison.box_px`.
        loop_px: median over a clip of the largest difference of a box coordinate, image pixels.
        overlap: loss of mean overlap with the truth over a clip.
    """

    response: float
    box_px: float
    loop_px: float
    overlap: float


TOLERANCES = {
    "fp32": Tolerance(response=1e-3, box_px=0.05, loop_px=0.05, overlap=0.002),
    "fp16": Tolerance(response=0.05, box_px=1.0, loop_px=0.5, overlap=0.005),
    # Eight bits choose another cell now and then: what counts is where the track goes.
    "int8": Tolerance(response=math.inf, box_px=math.inf, loop_px=2.0, overlap=0.02),
}


@dataclass(frozen=True)
class Clip:
    """Frames to track through.

    Attributes:
        frames: uint8 ``[H, W, 3]`` BGR.
        truth_xywh: the target's box in every frame, or in the first alone.
    """

    frames: tuple[Image, ...]
    truth_xywh: tuple[Box, ...]


@dataclass(frozen=True)
class Comparison:
    """One runner against the reference.

    Attributes:
        name: of the runner.
        precision: key of `TOLERANCES`.
        template: largest difference of template tensors, relative to each one's largest value; NaN where they stay on
            the GPU.
        response: largest difference of raw confidence.
        box_px: 95th percentile, over the crops on which both chose the same cell, of the largest difference of a box
            coordinate, crop pixels.
        other_cell: share of crops on which they chose different cells.
        loop_px: median, 95th percentile and maximum over the clip of the largest box difference, image pixels.
        loop_iou: mean IoU of the two tracks.
        overlap: mean IoU with the truth; NaN where there is none.
        reference_overlap: the reference's.
        shaken_px: like the first of `loop_px`, for the reference itself with boxes shaken by `SHAKE_PX`.
    """

    name: str
    precision: str
    template: float
    response: float
    box_px: float
    other_cell: float
    loop_px: tuple[float, float, float]
    loop_iou: float
    overlap: float
    reference_overlap: float
    shaken_px: float

    @property
    def ok(self) -> bool:
        """Within the precision's tolerance; NaN is not, but where there is nothing to compare with.

        A clip on which the reference itself leaves its path when shaken says nothing below that.
        """
        tolerance = TOLERANCES[self.precision]
        return (
            self.response <= tolerance.response
            and self.box_px <= tolerance.box_px
            and self.loop_px[0] <= max(tolerance.loop_px, 2 * self.shaken_px)
            and (math.isnan(self.reference_overlap) or self.reference_overlap - self.overlap <= tolerance.overlap)
        )


class SubstituteRunner(OnnxRuntimeRunner):
    """A CPU runner whose graphs are run by something else.

    Args:
        bundle: what it claims to run.
        sessions: by graph, something with ONNX Runtime's ``run(output_names, feeds)``.
    """

    def __init__(self, bundle: Bundle, sessions: Mapping[str, Any]) -> None:
        super().__init__(bundle, threads=1)
        self._sessions = dict(sessions)


def literal_runner(bundle: Bundle) -> OnnxRuntimeRunner:
    """ONNX Runtime that computes every node as it stands.

    Its optimiser goes wrong on Q/DQ nodes with FP16 scales (1.31 scales biases in FP16), which TensorRT takes well.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return SubstituteRunner(
        bundle,
        {
            name: onnxruntime.InferenceSession(
                str(bundle.graph_path(name)), options, providers=["CPUExecutionProvider"]
            )
            for name in bundle.manifest.graphs
        },
    )


def scene_clip(frames: int, width: int = 640, height: int = 360) -> Clip:
    """The rendered scene, with its truth."""
    rendered = list(Scene(width=width, height=height, frames=frames))
    return Clip(tuple(frame.image for frame in rendered), tuple(frame.box_xywh for frame in rendered))


def folder_clip(folder: Path, frames: int, init_xywh: Box | None = None) -> Clip:
    """The first frames of a sequence.

    Args:
        folder: of images, or with an ``img`` folder of images.
        frames: how many.
        init_xywh: the target in the first; None for the first line of ``groundtruth_rect.txt`` in the folder.

    Raises:
        ValueError: no images, or no first box.
    """
    if init_xywh is None:
        file = folder / "groundtruth_rect.txt"
        try:
            numbers = [float(v) for v in file.read_text().splitlines()[0].replace(",", " ").split()]
        except (OSError, ValueError, IndexError):
            numbers = []
        if len(numbers) != 4:
            raise ValueError(f"{file}: no four numbers in the first line; give the first box with --init X,Y,W,H")
        init_xywh = (numbers[0], numbers[1], numbers[2], numbers[3])
    with open_source(str(folder)) as source:
        images = tuple(image for _, image in islice(source, frames))
    return Clip(images, (init_xywh,))


def compare(
    reference: Runner, subjects: Iterable[tuple[str, str, Runner]], pairs: Sequence[Pair], clip: Clip
) -> Iterator[Comparison]:
    """Each subject against the reference, one at a time.

    Args:
        reference: the FP32 bundle on ONNX Runtime.
        subjects: name, precision, runner.
        pairs: template crop, search crop, previous size ``[2]`` in crop pixels; at least one.
        clip: at least two frames.

    Raises:
        ValueError: nothing to compare on.
    """
    if not pairs or len(clip.frames) < 2:
        raise ValueError(f"got {len(pairs)} crops and {len(clip.frames)} frames to compare on; expected 1 and 2")
    expected = [_search(reference, pair) for pair in pairs]
    path = track(reference, clip)
    shaken = np.abs(track(cast(Runner, _Shaken(reference)), clip) - path).max(axis=1)[1:]
    for name, precision, runner in subjects:
        template = response = 0.0
        same_px = []
        stride = reference.bundle.manifest.grid.stride
        for pair, (features, result) in zip(pairs, expected, strict=True):
            ours, found = _search(runner, pair)
            template = _larger(template, _template_difference(features, ours))
            response = _larger(response, _largest(found.response - result.response))
            difference = _largest(found.box_cxcywh - result.box_cxcywh)
            if not (difference > stride / 4 and _other_cell(found, result)):
                same_px.append(difference)
        boxes = track(runner, clip)
        difference_px = np.abs(boxes - path).max(axis=1)[1:]
        yield Comparison(
            name,
            precision,
            template,
            response,
            float(np.percentile(same_px or [np.inf], 95)),
            1 - len(same_px) / len(pairs),
            (float(np.median(difference_px)), float(np.percentile(difference_px, 95)), float(difference_px.max())),
            _mean_iou(boxes, path),
            _mean_iou(boxes, clip.truth_xywh),
            _mean_iou(path, clip.truth_xywh),
            float(np.median(shaken)),
        )


def track(runner: Runner, clip: Clip) -> NDArray[np.float64]:
    """Boxes ``[frames, 4]`` (x, y, w, h; image pixels) of the clip's target."""
    tracker = SiamTracker(runner)
    first, *others = clip.frames
    boxes = [tracker.init(first, clip.truth_xywh[0]).box_xywh]
    boxes += [tracker.update(frame).box_xywh for frame in others]
    return np.array(boxes, np.float64)


def report(bundle: Bundle, comparisons: Sequence[Comparison], pairs: Sequence[Pair], clip: Clip) -> str:
    """What `compare` found of a bundle's reference and the others, for people."""
    lines = [f"{bundle.manifest.model} against ONNX Runtime fp32: {len(pairs)} crops, {len(clip.frames)} frames"]
    lines.append(table(comparisons))
    if comparisons:
        shaken = f"boxes shaken by {SHAKE_PX} px: median {comparisons[0].shaken_px:.3f}"
        lines.append(f"loop of ONNX Runtime fp32 itself, {shaken}")
    return "\n".join(lines)


def table(comparisons: Iterable[Comparison]) -> str:
    """One line a runner."""
    names = (
        "runner",
        "template",
        "response",
        "box p95",
        "other cell",
        "loop median",
        "p95",
        "max px",
        "IoU",
        "overlap",
    )
    rows = [[*names, ""]]
    for c in comparisons:
        rows.append(
            [
                c.name,
                "-" if math.isnan(c.template) else f"{c.template:.1e}",
                f"{c.response:.1e}",
                f"{c.box_px:.3f}",
                f"{c.other_cell:.1%}",
                *(f"{value:.3f}" for value in c.loop_px),
                f"{c.loop_iou:.3f}",
                "-" if math.isnan(c.overlap) else f"{c.overlap:.3f} ({c.overlap - c.reference_overlap:+.3f})",
                "ok" if c.ok else "OUTSIDE TOLERANCE",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


class _Shaken:
    """A runner whose boxes are a little off, the same way each time."""

    def __init__(self, runner: Runner) -> None:
        self.bundle, self.last_timing = runner.bundle, runner.last_timing
        self.template, self.update, self.close = runner.template, runner.update, runner.close
        self._search, self._rng = runner.search, np.random.default_rng(0)

    def search(self, *arguments: Any) -> SearchResult:
        result = self._search(*arguments)
        noise = self._rng.normal(0, SHAKE_PX, result.box_cxcywh.shape).astype(np.float32)
        return replace(result, box_cxcywh=result.box_cxcywh + noise)


def _search(runner: Runner, pair: Pair) -> tuple[Features, SearchResult]:
    template_crop, search_crop, size = pair
    tracking = runner.bundle.manifest.tracking
    features = runner.template(template_crop, _whole(template_crop), (0.0, 0.0, 0.0), (float(size[0]), float(size[1])))
    tuning = (tracking.penalty_k, tracking.window_influence, 0.0)
    return features, runner.search(search_crop, [_whole(search_crop)], [features], size[None], tuning)


def _other_cell(a: SearchResult, b: SearchResult) -> bool:
    """Do the chosen scores stand at different places of the responses, or at several, which is a tie?"""
    places = []
    for result in (a, b):
        away = np.abs(result.response[0] - result.score[0])
        places.append(np.flatnonzero(away == away.min()).tolist())
    return places[0] != places[1] or len(places[0]) > 1


def _whole(image: Image) -> Window:
    """The window that crops an image to itself."""
    return Window(0, 0, image.shape[1], image.shape[0])


def _template_difference(reference: Features, ours: Features) -> float:
    tensors = [(a, b) for a, b in zip(reference.tensors, ours.tensors, strict=False) if isinstance(b, np.ndarray)]
    if len(tensors) != len(reference.tensors):
        return math.nan
    return float(np.max([_largest(b - a) / max(_largest(a), 1e-12) for a, b in tensors]))


def _largest(values: NDArray[Any]) -> float:
    return float(np.abs(values).max())


def _larger(a: float, b: float) -> float:
    """The larger of two; NaN when one is NaN, which `max` would swallow."""
    return float(np.maximum(a, b))


def _mean_iou(boxes: NDArray[np.float64], others: Sequence[Box] | NDArray[np.float64]) -> float:
    """Mean IoU over the frames after the first; NaN where there are not as many others."""
    if len(others) != len(boxes):
        return math.nan
    return float(np.mean(iou_xywh(boxes[1:], np.asarray(others, np.float64)[1:])))
