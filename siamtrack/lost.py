"""Where to look for a target that was lost: windows in growing rings round the place of loss."""

from __future__ import annotations

from collections.abc import Iterator

from siamtrack.crop import Window, square_window


def search_windows(
    cx: float, cy: float, side_px: float, width: int, height: int, overlap: float = 0.4
) -> Iterator[Window]:
    """Windows round ``(cx, cy)``, ring after ring, for ever.

    The first window is the place of loss. Ring k is the square of tiles k steps away, in reading order; the outermost
    tiles are centred on the image's edge, others outside are left out. When the rings have covered every pixel of the
    image the search starts over.

    Args:
        cx: last known centre, image pixels.
        cy: likewise.
        side_px: window side.
        width: image width.
        height: image height.
        overlap: share of a window that its neighbour covers too, so that a target on a seam is whole in one of them.
    """
    step = max(side_px * (1 - overlap), 1.0)
    cx, cy = min(max(cx, 0.0), float(width)), min(max(cy, 0.0), float(height))
    rings = int(max(cx, width - cx, cy, height - cy) / step) + 1
    while True:
        for ring in range(rings + 1):
            for row, column in _ring(ring):
                x, y = cx + column * step, cy + row * step
                # Half a step beyond the edge, or a strip of the image between the last tile and the edge stays unseen.
                if -step / 2 <= x <= width + step / 2 and -step / 2 <= y <= height + step / 2:
                    yield square_window(min(max(x, 0.0), width), min(max(y, 0.0), height), side_px)


def _ring(ring: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of the tiles exactly `ring` steps away, in reading order."""
    for row in range(-ring, ring + 1):
        edge = abs(row) == ring
        for column in range(-ring, ring + 1) if edge else (-ring, ring):
            yield row, column
