"""Boxes from masks: segmentation data sets (DAVIS) and folders with a mask an image, as tracking sequences."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.trax import mask_box


def read_mask(path: Path) -> NDArray[np.int64]:
    """Object ids of every pixel, int64 ``[H, W]``; 0 is the background.

    OpenCV shows a palette image in its colours. DAVIS and PASCAL VOC spread the bits of an id over the three channels,
    highest first, so the id can be read back from the colour. A grey image holds its ids as they are.

    Raises:
        ValueError: the file does not decode as an image.
    """
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError(f"cannot decode the mask {path}")
    pixels = np.asarray(image).astype(np.int64)
    if pixels.ndim == 2:
        return pixels
    grey = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())
    if grey:  # a black and white mask saved in colour, or with an alpha channel
        return pixels[..., 0]
    ids = np.zeros(pixels.shape[:2], np.int64)
    for bit in range(8):
        for channel, offset in ((2, 0), (1, 1), (0, 2)):  # red, green, blue
            ids |= ((pixels[..., channel] >> (7 - bit)) & 1) << (3 * bit + offset)
    return ids


def object_ids(mask: NDArray[np.int64]) -> tuple[int, ...]:
    """Ids in a mask in rising order, without the background; 255, DAVIS' mark for "do not care", only if alone."""
    ids = [int(value) for value in np.unique(mask) if value]
    return tuple(ids if ids == [255] else [value for value in ids if value != 255])


def boxes_of_masks(masks: dict[str, Path], frames: tuple[Path, ...], target: int | None) -> NDArray[np.float64]:
    """A box a frame, float64 ``[F, 4]``; NaN where the frame has no mask or the target no pixel in it.

    Args:
        masks: mask files by the stem of the image they belong to.
        frames: images in playing order.
        target: object id; None for everything that is not background.

    Raises:
        ValueError: a mask does not decode.
    """
    boxes = np.full((len(frames), 4), np.nan)
    for index, frame in enumerate(frames):
        if frame.stem in masks:
            mask = read_mask(masks[frame.stem])
            pixels = mask > 0 if target is None else mask == target
            if pixels.any():
                boxes[index] = mask_box(pixels)
    return boxes
