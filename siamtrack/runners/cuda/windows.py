"""What a GPU needs to know of crop windows, and which pixels of the image it needs for them.

A GPU gets no whole image: only the pixels inside a window, and of a window more than twice as tall as its crop only the
two rows that each output row lies between. So what is copied depends on the windows, not on the camera.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import Image, Window

WINDOW = np.dtype(
    [
        ("width", "<i4"), ("height", "<i4"), ("left", "<i4"), ("top", "<i4"), ("right", "<i4"), ("bottom", "<i4"),
        ("first_row", "<i4"), ("pitch", "<i4"), ("step_x", "<f8"), ("step_y", "<f8"), ("pixels", "<i8"),
        ("fill", "u1", (4,)), ("unused", "<i4"),
    ]
)  # fmt: skip
"""`struct Window` of kernels.cu, which describes the fields."""
PIXELS_ALIGNMENT = 16
LARGEST_SIDE_PX = 1 << 28  # positions and their sums stay far inside 32 bits


@dataclass(frozen=True)
class Patch:
    """The stored pixels of one window.

    Attributes:
        rows: image rows, a slice or one row number for each stored row.
        columns: image columns.
        offset: bytes from the start of the table to the first pixel.
        shape: stored rows, columns, 3.
    """

    rows: slice | NDArray[np.intp]
    columns: slice
    offset: int
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """What to send for some windows of one image.

    Attributes:
        table: one `WINDOW` each.
        patches: the pixels of each window; None for a window outside the image.
        nbytes: end of the last patch, bytes from the start of the table.
    """

    table: NDArray[Any]
    patches: tuple[Patch | None, ...]
    nbytes: int


def plan_windows(
    image_shape: Sequence[int],
    windows: Sequence[Window],
    fills_bgr: Sequence[tuple[float, float, float]],
    size_px: int,
    pixels_at: int,
) -> Plan:
    """Describe windows to the crop kernel.

    Args:
        image_shape: height and width of the image, pixels; what follows is ignored.
        windows: what to cut.
        fills_bgr: colour of outside pixels for each window, 0..255.
        size_px: side of the crops.
        pixels_at: where the first patch may start, bytes from the start of the table.

    Raises:
        ValueError: a window is so large or so far away that its positions would not fit into 32 bits.
    """
    height, width = image_shape[:2]
    table = np.zeros(len(windows), WINDOW)
    patches: list[Patch | None] = []
    end = pixels_at
    for i, (window, fill_bgr) in enumerate(zip(windows, fills_bgr, strict=True)):
        if max(abs(window.left), abs(window.top), window.width, window.height) > LARGEST_SIDE_PX:
            raise ValueError(f"{window} does not fit: sides and positions may be {LARGEST_SIDE_PX} pixels at most")
        left, right = _inside(window.left, window.width, width)
        top, bottom = _inside(window.top, window.height, height)
        patch, first_row = None, -1
        if left < right and top < bottom:
            rows, first_row = _rows(window, top, bottom, size_px)
            count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
            if count:  # else it is inside, but between the rows that are sampled
                offset = -(-end // PIXELS_ALIGNMENT) * PIXELS_ALIGNMENT
                columns = slice(window.left + left, window.left + right)
                patch = Patch(rows, columns, offset, (count, right - left, 3))
                end = offset + count * 3 * (right - left)
        patches.append(patch)
        fill = [*(round(value) for value in fill_bgr), 0]
        steps = step(window.width, size_px), step(window.height, size_px)
        if patch is None:  # no pixel is read where the inside is empty
            table[i] = (window.width, window.height, 0, 0, 0, 0, -1, 0, *steps, pixels_at, fill, 0)
        else:
            place = (left, top, right, bottom, first_row, 3 * (right - left))
            table[i] = (window.width, window.height, *place, *steps, patch.offset, fill, 0)
    return Plan(table, tuple(patches), end)


def write_pixels(image: Image, plan: Plan, block: NDArray[np.uint8]) -> None:
    """Copy the patches of a plan out of an image into a block of bytes that starts with the table.

    Args:
        image: uint8 ``[H, W, 3]``, any strides.
        plan: of this image.
        block: uint8 ``[at least plan.nbytes]``.
    """
    for patch in plan.patches:
        if patch is not None:
            size = patch.shape[0] * patch.shape[1] * 3
            target = block[patch.offset : patch.offset + size].reshape(patch.shape)
            np.copyto(target, image[patch.rows, patch.columns])


def step(side: int, size_px: int) -> float:
    """Window pixels per crop pixel, divided as OpenCV does it."""
    return 1.0 / (size_px / side)


def sampled_rows(height: int, size_px: int) -> NDArray[np.intp]:
    """The two window rows that each output row lies between, ``[size_px, 2]``: `taps_of` of kernels.cu."""
    position = ((np.arange(size_px) + 0.5) * step(height, size_px) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.intp)
    second = np.where(first < 0, 0, first + 1)  # before the middle of the first row there is only that one
    return np.stack([first, second], axis=1).clip(0, height - 1)


def _inside(start: int, length: int, limit: int) -> tuple[int, int]:
    """The part of a window's side that is inside the image, in window pixels."""
    return max(-start, 0), min(limit - start, length)


def _rows(window: Window, top: int, bottom: int, size_px: int) -> tuple[slice | NDArray[np.intp], int]:
    """Image rows to store, and the first output row they are for; -1 where all inside rows are stored."""
    if bottom - top <= 2 * size_px:
        return slice(window.top + top, window.top + bottom), -1
    pairs = sampled_rows(window.height, size_px)
    needed = np.flatnonzero(((pairs >= top) & (pairs < bottom)).any(axis=1))
    if not len(needed):
        return np.empty(0, np.intp), -1
    stored = pairs[needed[0] : needed[-1] + 1]
    # A row of a pair that lies outside is never read; it only keeps its place.
    return (window.top + np.clip(stored, top, bottom - 1)).ravel(), int(needed[0])
