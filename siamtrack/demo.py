"""Track the rendered scene, compare with its exact ground truth, and leave pictures a person can judge by."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from siamtrack.boxes import iou_xywh
from siamtrack.crop import Image
from siamtrack.drawing import VideoWriter, contact_sheet, draw_track
from siamtrack.scene import Scene, SceneFrame
from siamtrack.state import State
from siamtrack.tracker import Box, SiamTracker

SHEET_TILES = 12
CSV_HEADER = ("frame", "x", "y", "w", "h", "score", "state", "truth_x", "truth_y", "truth_w", "truth_h", "iou")
HIDDEN_BELOW = 0.3  # a target of which less is visible counts as hidden


@dataclass(frozen=True)
class Outcome:
    """What came out for one frame.

    Attributes:
        box_xywh: the box given; None for none.
        score: its confidence; NaN where it is not known.
        state: of the target.
        seconds: what the frame took.
    """

    box_xywh: Box | None
    score: float
    state: State
    seconds: float


class DemoFiles:
    """Writes ``demo.mp4``, ``demo.png``, ``demo.csv`` and ``demo.txt``; a context manager.

    Args:
        out: folder for them; made when missing.
        scene: the clip that is followed; its frame rate and length count.
    """

    def __init__(self, out: Path, scene: Scene) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self._stack = ExitStack()
        self._video = self._stack.enter_context(VideoWriter(out / "demo.mp4", scene.fps))
        self._rows = csv.writer(self._stack.enter_context((out / "demo.csv").open("w", newline="")))
        self._rows.writerow(CSV_HEADER)
        count = len(scene)
        self._wanted = {round(i) for i in np.linspace(0, count - 1, min(SHEET_TILES, count))}
        self._tiles: list[tuple[Image, str]] = []
        self._outcomes: list[tuple[Outcome, float, float]] = []

    def add(self, index: int, frame: SceneFrame, outcome: Outcome, fresh: bool = True) -> None:
        """Score and draw a frame.

        Args:
            index: of the frame in the scene.
            frame: picture and truth.
            outcome: what is known of the target; a missing box overlaps nothing.
            fresh: False for a frame that nobody tracked: `outcome` is then the last one before, which is drawn but
                neither scored nor listed.
        """
        box = outcome.box_xywh
        iou = float(iou_xywh(box, frame.box_xywh)) if box is not None else 0.0
        if fresh:
            self._outcomes.append((outcome, iou, frame.visible))
            columns = [f"{v:.2f}" for v in box] if box is not None else [""] * 4
            truth = [f"{v:.2f}" for v in frame.box_xywh]
            self._rows.writerow((index, *columns, f"{outcome.score:.4f}", outcome.state, *truth, f"{iou:.3f}"))
        drawn = draw_track(frame.image, box, str(outcome.state), outcome.score, truth_xywh=frame.box_xywh)
        self._video.write(drawn)
        if index in self._wanted:
            said = f"IoU {iou:.2f}" if fresh else "not tracked"
            self._tiles.append((drawn, f"frame {index}   {said}   {frame.visible:.0%} visible"))

    def finish(self, timing: str, percentiles: Sequence[int], heading: str = "") -> str:
        """Write sheet and table; the frame that the target was given on does not count.

        Args:
            timing: what `Outcome.seconds` measures.
            percentiles: of it, to be listed.
            heading: first line of the table; "" for none.

        Returns:
            The table, and where everything is.
        """
        if self._tiles:
            images, captions = [image for image, _ in self._tiles], [caption for _, caption in self._tiles]
            cv2.imwrite(str(self.out / "demo.png"), contact_sheet(images, captions))
        counted = self._outcomes[1:]
        lines = [heading] if heading else []
        if counted:
            ious, visible = np.array([(i, v) for _, i, v in counted]).T
            lines += _table([o.state for o, _, _ in counted], ious, visible)
            times_ms = np.percentile([o.seconds * 1e3 for o, _, _ in counted], percentiles)
            shares = ", ".join(f"p{p} {ms:.2f} ms" for p, ms in zip(percentiles, times_ms, strict=True))
            lines.append(f"{timing}: {shares}")
        table = "\n".join(lines)
        (self.out / "demo.txt").write_text(table + "\n")
        return f"{table}\nvideo, contact sheet, boxes and this table: {self.out}/demo.mp4 demo.png demo.csv demo.txt"

    def __enter__(self) -> DemoFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def run_demo(tracker: SiamTracker, scene: Scene, out: Path) -> str:
    """Follow the scene's target from its first frame to its last.

    Args:
        tracker: any model.
        scene: what to render.
        out: folder for the files, see `DemoFiles`.

    Returns:
        The table, as written to ``demo.txt``.
    """
    with DemoFiles(out, scene) as files:
        for index, frame in enumerate(tqdm(scene, unit="frame", disable=None)):
            began = time.perf_counter()
            track = tracker.init(frame.image, frame.box_xywh) if index == 0 else tracker.update(frame.image)
            seconds = time.perf_counter() - began
            files.add(index, frame, Outcome(track.box_xywh, track.score, track.state, seconds))
        return files.finish("update", (50, 95))


def _table(states: Sequence[State], ious: NDArray[np.float64], visible: NDArray[np.float64]) -> list[str]:
    seen = visible >= HIDDEN_BELOW
    reported = (State.TRACKING, State.UNCERTAIN, State.LOST)
    lines = [f"{'target':<10}{'frames':>8}{'mean IoU':>10}{'IoU>0.5':>9}" + "".join(f"{s:>11}" for s in reported)]
    for name, chosen in (("visible", seen), ("hidden", ~seen), ("all", np.ones_like(seen))):
        if not chosen.any():
            continue
        shares = [np.mean([state is s for state, c in zip(states, chosen, strict=True) if c]) for s in reported]
        row = f"{name:<10}{chosen.sum():>8}{ious[chosen].mean():>10.3f}{(ious[chosen] > 0.5).mean():>9.1%}"
        lines.append(row + "".join(f"{share:>11.1%}" for share in shares))
    return lines
