from __future__ import annotations

import itertools

import numpy as np
import pytest

from siamtrack.crop import Window, square_window
from siamtrack.lost import search_windows

SIZE = (320, 200)


def one_round(cx: float, cy: float, side: float, width: int, height: int, **options: float) -> list[Window]:
    """Windows until the search starts over, which it does with its first window."""
    windows = search_windows(cx, cy, side, width, height, **options)
    first = next(windows)
    return [first, *itertools.takewhile(lambda window: window != first, itertools.islice(windows, 100_000))]


def centres(windows: list[Window]) -> np.ndarray:
    return np.array([(w.left + w.width / 2, w.top + w.height / 2) for w in windows])


@pytest.mark.parametrize("place", [(0, 0), (100.25, 60.5), (319, 199)])
def test_the_place_of_loss_comes_first(place: tuple[float, float]) -> None:
    assert next(search_windows(*place, 64, *SIZE)) == square_window(*place, 64)


def test_rings_grow() -> None:
    windows = one_round(160, 100, 40, 320, 200)
    step = 40 * (1 - 0.4)
    rings = np.rint(np.abs(centres(windows) - (160, 100)).max(axis=1) / step)
    assert (np.diff(rings) >= 0).all()
    assert [int((rings == k).sum()) for k in (0, 1, 2, 3)] == [1, 8, 16, 24]


PLACES = [(0, 0), (320, 0), (0, 200), (320, 200), (160, 100), (3.5, 150.25), (311, 77)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("side", [17, 40, 64.5, 150, 1000])
@pytest.mark.parametrize("size", [SIZE, (97, 320)])
def test_one_round_covers_every_pixel(place: tuple[float, float], side: float, size: tuple[int, int]) -> None:
    seen = np.zeros(size[::-1], bool)
    for w in one_round(*place, side, *size):
        seen[max(w.top, 0) : max(w.top + w.height, 0), max(w.left, 0) : max(w.left + w.width, 0)] = True
    assert seen.all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("side", [17, 150, 1000])
def test_centres_are_inside_the_image(place: tuple[float, float], side: float) -> None:
    windows = one_round(*place, side, *SIZE)
    assert {(w.width, w.height) for w in windows} == {(round(side), round(side))}
    x, y = centres(windows).T
    assert (x >= -0.5).all() and (x <= SIZE[0] + 0.5).all()  # windows have whole edges: half a pixel of rounding
    assert (y >= -0.5).all() and (y <= SIZE[1] + 0.5).all()


@pytest.mark.parametrize("overlap", [0.0, 0.4, 0.75])
def test_neighbours_overlap_by_the_share_given(overlap: float) -> None:
    windows = one_round(160, 100, 40, *SIZE, overlap=overlap)
    columns = np.unique([w.left for w in windows])[1:-1]  # the outermost ones are drawn in to the edge
    assert len(columns) >= 5
    np.testing.assert_allclose(np.diff(columns), 40 * (1 - overlap), atol=1)


def test_the_search_starts_over() -> None:
    once = one_round(100, 60, 64, *SIZE)
    assert len(once) > 9
    again = list(itertools.islice(search_windows(100, 60, 64, *SIZE), 2 * len(once)))
    assert again == once + once


@pytest.mark.parametrize(
    ("place", "nearest"), [((-50, 90), (0, 90)), ((1e6, -1e6), (320, 0)), ((160, 200.5), (160, 200))]
)
def test_a_place_outside_counts_as_the_nearest_inside(place: tuple[float, float], nearest: tuple[float, float]) -> None:
    assert one_round(*place, 64, *SIZE) == one_round(*nearest, 64, *SIZE)


def test_a_window_larger_than_the_image_still_yields_for_ever() -> None:
    assert len(list(itertools.islice(search_windows(5, 5, 500, 10, 10), 50))) == 50


def test_a_window_under_a_pixel_does_not_stall() -> None:
    assert len(one_round(5, 5, 0.1, 10, 10)) >= 100
