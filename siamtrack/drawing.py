"""Pictures of a track for people: boxes on frames, contact sheets, and video files.

Line widths and text grow with the image, so the same call is legible on a 320 x 240 preview and on a 4K frame.
Functions return new images and leave their arguments alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

STATE_BGR: dict[str, Colour] = {
    "TRACKING": (90, 210, 80),
    "UNCERTAIN": (40, 180, 250),
    "LOST": (70, 70, 240),
    "IDLE": (165, 165, 165),
}
TRUTH_BGR: Colour = (255, 255, 255)
_PAPER_BGR: Colour = (32, 28, 26)
_INK_BGR: Colour = (235, 235, 235)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_PX = 22.0  # cap height of the Hershey font at scale 1


def draw_track(
    frame: Image,
    box_xywh: Sequence[float] | None,
    state: str,
    score: float,
    label: str = "",
    truth_xywh: Sequence[float] | None = None,
) -> Image:
    """A copy of a frame with the track drawn on it.

    Args:
        frame: uint8 ``[H, W, 3]`` BGR.
        box_xywh: the tracker's box in continuous image pixels, or None for none. Parts outside the image are not seen.
        state: "TRACKING" (green), "UNCERTAIN" (amber), "LOST" (red; the box is dashed, since it is where the target
            was last seen, not where it is) or "IDLE" (grey).
        score: confidence, written as it is; NaN is written as a dash.
        label: text for a tag at the box; not drawn without a box.
        truth_xywh: the true box, drawn thin and white, or None.

    Raises:
        ValueError: a frame of another shape or type, an unknown state, or a box that is not four finite numbers
            with sizes of 0 or more.
    """
    _check_image(frame, "frame")
    if state not in STATE_BGR:
        raise ValueError(f"unknown state {state!r}: expected one of {', '.join(STATE_BGR)}")
    image = frame.copy()
    colour, unit = STATE_BGR[state], _unit(image)
    if truth_xywh is not None:
        _draw_box(image, _checked_box(truth_xywh, "truth_xywh"), TRUTH_BGR, max(round(unit), 1), dashed=False)
    if box_xywh is not None:
        box = _checked_box(box_xywh, "box_xywh")
        thickness = max(round(3.0 * min(image.shape[:2]) / 720), 1)
        # A dark rim keeps the line visible on a ground of its own colour.
        _draw_box(image, box, _PAPER_BGR, thickness + 2 * max(round(0.8 * unit), 1), dashed=state == "LOST")
        _draw_box(image, box, colour, thickness, dashed=state == "LOST")
        if label:
            _draw_tag(image, box, label, colour, unit)
    _draw_header(image, state, "score " + (f"{score:.2f}" if math.isfinite(score) else "-"), colour, unit)
    return image


def contact_sheet(
    images: Sequence[Image], captions: Sequence[str], columns: int = 4, tile_width: int = 480, margin: int = 8
) -> Image:
    """Images side by side in rows, each with a caption under it.

    Every tile has the first image's aspect; an image of another aspect is fitted into its tile with bars around it.

    Args:
        images: uint8 ``[H, W, 3]`` each, at least one.
        captions: one for each image; "" for none.
        columns: tiles a row, at least 1.
        tile_width: width of a tile in pixels, at least 32.
        margin: pixels around each tile.

    Raises:
        ValueError: no images, as many captions as not images, or a setting out of range.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"expected at least one image and a caption for each, got {len(images)} and {len(captions)}")
    if columns < 1 or tile_width < 32 or margin < 0:
        raise ValueError(
            f"expected columns >= 1, tile_width >= 32, margin >= 0; got {columns}, {tile_width} and {margin}"
        )
    for index, image in enumerate(images):
        _check_image(image, f"images[{index}]")
    tile_height = max(round(tile_width * images[0].shape[0] / images[0].shape[1]), 1)
    text_px = min(max(tile_width / 34, 8.0), 26.0)
    caption_height = round(2.2 * text_px) if any(captions) else 0
    step_x, step_y = tile_width + margin, tile_height + caption_height + margin
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = np.empty((rows * step_y + margin, columns * step_x + margin, 3), np.uint8)
    sheet[:] = _PAPER_BGR
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = margin + index % columns * step_x, margin + index // columns * step_y
        fitted = _fit(image, tile_width, tile_height)
        inset_y, inset_x = (tile_height - fitted.shape[0]) // 2, (tile_width - fitted.shape[1]) // 2
        sheet[top + inset_y :, left + inset_x :][: fitted.shape[0], : fitted.shape[1]] = fitted
        if caption:
            _put_text(sheet, caption, (left, top + tile_height + 1.55 * text_px), text_px, _INK_BGR, tile_width)
    return sheet


class VideoWriter:
    """An mp4 file (MPEG-4 part 2, code mp4v) written frame by frame; a context manager.

    The file is opened at the first frame, whose size the rest must have. Without any frame no file is made.

    Raises:
        ValueError: a name that does not end in .mp4, a folder that is not there, a frame rate out of range, or a file
            that OpenCV cannot open.
    """

    def __init__(self, path: str | Path, fps: float = 30.0) -> None:
        self.path, self.fps = Path(path), float(fps)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"expected a file name that ends in .mp4, got {self.path}")
        if not self.path.parent.is_dir():
            raise ValueError(f"cannot write {self.path}: there is no folder {self.path.parent}; make it first")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"expected fps above 0 and at most 1000, got {fps}")
        self._writer: Any = None
        self._shape: tuple[int, ...] = ()

    def write(self, frame: Image) -> None:
        """Append a uint8 ``[H, W, 3]`` BGR frame.

        Raises:
            ValueError: not such a frame, a size other than the first frame's, or a file that cannot be opened.
        """
        _check_image(frame, "frame")
        if self._writer is None:
            height, width = frame.shape[:2]
            code = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(self.path), code, self.fps, (width, height))
            if not writer.isOpened():
                raise ValueError(
                    f"OpenCV cannot open {self.path} for {width} x {height} mp4v video: check that the folder can be "
                    "written, that the disk is not full and that this build of OpenCV has FFmpeg"
                )
            self._writer, self._shape = writer, frame.shape
        if frame.shape != self._shape:
            raise ValueError(
                f"{self.path} holds frames of shape {self._shape}, got {frame.shape}: resize it, or start another file"
            )
        self._writer.write(frame)

    def close(self) -> None:
        """Finish the file. Calling it twice does no harm."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unit(image: Image) -> float:
    """What one pixel of a 720-line image is here; never below 0.65, where text stops being legible."""
    return max(min(image.shape[:2]) / 720, 0.65)


def _check_image(image: Image, name: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"{name} must be a uint8 BGR image [H, W, 3], got {image.dtype} {list(image.shape)}")


def _checked_box(box_xywh: Sequence[float], name: str) -> Box:
    values = np.asarray(box_xywh, dtype=np.float64)
    if values.shape != (4,) or not np.isfinite(values).all() or values[2:].min() < 0:
        raise ValueError(f"{name} must be four finite numbers x, y, width, height, sizes 0 or more; got {box_xywh}")
    x, y, w, h = np.clip(values, -1e6, 1e6).tolist()  # far enough outside, and safe to round to int
    return x, y, w, h


def _draw_box(image: Image, box: Box, colour: Colour, thickness: int, dashed: bool) -> None:
    """Four bars of whole pixels, centred on the box's edges: half-covered pixels would wash out a thin line."""
    x0, y0 = math.floor(box[0] - thickness / 2 + 0.5), math.floor(box[1] - thickness / 2 + 0.5)
    x1, y1 = math.floor(box[0] + box[2] - thickness / 2 + 0.5), math.floor(box[1] + box[3] - thickness / 2 + 0.5)
    for first, last in _dashes(x0, x1 + thickness, image) if dashed else [(x0, x1 + thickness)]:
        _fill(image, first, y0, last, y0 + thickness, colour)
        _fill(image, first, y1, last, y1 + thickness, colour)
    for first, last in _dashes(y0, y1 + thickness, image) if dashed else [(y0, y1 + thickness)]:
        _fill(image, x0, first, x0 + thickness, last, colour)
        _fill(image, x1, first, x1 + thickness, last, colour)


def _dashes(start: int, stop: int, image: Image) -> list[tuple[int, int]]:
    """Every other stretch of a side. Their count is odd, so that a dash closes each corner."""
    parts = min(2 * round((stop - start) / (20 * _unit(image))), 400) + 1
    cuts = np.round(np.linspace(start, stop, parts + 1)).astype(int).tolist()
    return list(zip(cuts[::2], cuts[1::2], strict=True))


def _fill(image: Image, x0: int, y0: int, x1: int, y1: int, colour: Colour) -> None:
    image[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = colour


def _draw_tag(image: Image, box: Box, text: str, colour: Colour, unit: float) -> None:
    text_px = 11 * unit
    width, height = _text_width(text, text_px) + 1.2 * text_px, 2 * text_px
    left = min(max(box[0], 0), max(image.shape[1] - width, 0))
    above = box[1] - height - 4 * unit
    top = above if above >= 3 * text_px else box[1] + box[3] + 4 * unit  # below the box where the header is in the way
    _shade(image, left, top, width, height, colour, 0.85)
    _put_text(image, text, (left + 0.6 * text_px, top + 1.5 * text_px), text_px, _PAPER_BGR, image.shape[1])


def _draw_header(image: Image, state: str, text: str, colour: Colour, unit: float) -> None:
    text_px = 17 * unit
    bar, chip = 2.4 * text_px, _text_width(state, text_px) + 1.6 * text_px
    score_width = _text_width(text, text_px) + 1.4 * text_px
    _shade(image, 0, 0, chip + score_width, bar, _PAPER_BGR, 0.72)
    _shade(image, 0, 0, chip, bar, colour, 0.9)
    _put_text(image, state, (0.8 * text_px, 1.7 * text_px), text_px, _PAPER_BGR, image.shape[1])
    _put_text(image, text, (chip + 0.7 * text_px, 1.7 * text_px), text_px, _INK_BGR, image.shape[1])


def _shade(image: Image, left: float, top: float, width: float, height: float, colour: Colour, opacity: float) -> None:
    x0, y0 = max(round(left), 0), max(round(top), 0)
    patch = image[y0 : max(round(top + height), 0), x0 : max(round(left + width), 0)]
    patch[:] = np.round(patch * (1 - opacity) + np.array(colour) * opacity)


def _text_width(text: str, text_px: float) -> float:
    scale = text_px / _FONT_PX
    return float(cv2.getTextSize(text, _FONT, scale, _stroke(text_px))[0][0])


def _stroke(text_px: float) -> int:
    return max(round(text_px / 8), 1)


def _put_text(
    image: Image, text: str, at: tuple[float, float], text_px: float, colour: Colour, max_width: float
) -> None:
    """Text with its baseline's left end at `at`; shrunk where it would be wider than `max_width`."""
    text_px *= min(1.0, max_width / max(_text_width(text, text_px), 1.0))
    position = (round(at[0]), round(at[1]))
    cv2.putText(image, text, position, _FONT, text_px / _FONT_PX, colour, _stroke(text_px), cv2.LINE_AA)


def _fit(image: Image, width: int, height: int) -> Image:
    factor = min(width / image.shape[1], height / image.shape[0])
    size = (min(max(round(image.shape[1] * factor), 1), width), min(max(round(image.shape[0] * factor), 1), height))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    fitted: Any = cv2.resize(image, size, interpolation=interpolation)
    return fitted
