"""Width and height of an image, without decoding it where that can be had."""

from __future__ import annotations

from pathlib import Path

import cv2

# Frame headers of JPEG: C0 to CF but for C4 (Huffman tables), C8 (reserved) and CC (arithmetic coding tables).
FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
HEADER_BYTES = 1 << 16


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        ValueError: not a readable image.
    """
    with path.open("rb") as file:
        size = _jpeg_size(file.read(HEADER_BYTES))
    if size is not None:
        return size
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f"{path}: not a readable image")
    return image.shape[1], image.shape[0]


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Of a JPEG's beginning; None for another format, or one whose size stands further behind."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in FRAME_HEADERS:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 + length
    return None
