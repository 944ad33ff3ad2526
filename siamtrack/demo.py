"""Track the rendered scene, compare with its exact ground truth, and leave pictures a person can judge by."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from siamtrack.boxes import iou_xywh
from siamtrack.crop import Image
from siamtrack.drawing import VideoWriter, contact_sheet, draw_track
from siamtrack.scene import Scene
from siamtrack.state import State
from siamtrack.tracker import SiamTracker

SHEET_TILES = 12
TRUTH_HEADER = ("truth_x", "truth_y", "truth_w", "truth_h", "iou")
HIDDEN_BELOW = 0.3  # a target of which less is visible counts as hidden


def run_demo(tracker: SiamTracker, scene: Scene, out: Path) -> str:
    """Follow the scene's target from its first frame to its last.

    Args:
        tracker: any model.
        scene: what to render.
        out: folder for ``demo.mp4``, ``demo.png``, ``demo.csv`` and ``demo.txt``; made when missing.

    Returns:
        The table, as written to ``demo.txt``.
    """
    out.mkdir(parents=True, exist_ok=True)
    count = len(scene)
    ious, visible, seconds = np.zeros(count), np.zeros(count), np.zeros(count)
    states: list[State] = []
    tiles: dict[int, Image] = {}
    wanted = {round(i) for i in np.linspace(0, count - 1, min(SHEET_TILES, count))}
    with VideoWriter(out / "demo.mp4", scene.fps) as video, (out / "demo.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("frame", "x", "y", "w", "h", "score", "state", *TRUTH_HEADER))
        for index, frame in enumerate(tqdm(scene, unit="frame", disable=None)):
            began = time.perf_counter()
            track = tracker.init(frame.image, frame.box_xywh) if index == 0 else tracker.update(frame.image)
            seconds[index] = time.perf_counter() - began
            ious[index], visible[index] = iou_xywh(track.box_xywh, frame.box_xywh), frame.visible
            states.append(track.state)
            boxes = [f"{v:.2f}" for v in (*track.box_xywh, *frame.box_xywh)]
            row = (index, *boxes[:4], f"{track.score:.4f}", track.state, *boxes[4:], f"{ious[index]:.3f}")
            rows.writerow(row)
            drawn = draw_track(frame.image, track.box_xywh, str(track.state), track.score, truth_xywh=frame.box_xywh)
            video.write(drawn)
            if index in wanted:
                tiles[index] = drawn
    captions = [f"frame {i}   IoU {ious[i]:.2f}   {visible[i]:.0%} visible" for i in tiles]
    cv2.imwrite(str(out / "demo.png"), contact_sheet(list(tiles.values()), captions))
    table = _table(ious[1:], visible[1:], seconds[1:], states[1:])
    (out / "demo.txt").write_text(table + "\n")
    return f"{table}\nvideo, contact sheet, boxes and this table: {out}/demo.mp4 demo.png demo.csv demo.txt"


def _table(
    ious: NDArray[np.float64], visible: NDArray[np.float64], seconds: NDArray[np.float64], states: list[State]
) -> str:
    seen = visible >= HIDDEN_BELOW
    reported = (State.TRACKING, State.UNCERTAIN, State.LOST)
    lines = [f"{'target':<10}{'frames':>8}{'mean IoU':>10}{'IoU>0.5':>9}" + "".join(f"{s:>11}" for s in reported)]
    for name, chosen in (("visible", seen), ("hidden", ~seen), ("all", np.ones_like(seen))):
        if not chosen.any():
            continue
        shares = [np.mean([states[i] is s for i in np.flatnonzero(chosen)]) for s in reported]
        row = f"{name:<10}{chosen.sum():>8}{ious[chosen].mean():>10.3f}{(ious[chosen] > 0.5).mean():>9.1%}"
        lines.append(row + "".join(f"{share:>11.1%}" for share in shares))
    p50, p95 = np.percentile(seconds * 1e3, [50, 95])
    lines.append(f"update: p50 {p50:.2f} ms, p95 {p95:.2f} ms")
    return "\n".join(lines)
