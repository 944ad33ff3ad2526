from __future__ import annotations

import math
import tracemalloc

import cv2
import numpy as np
import pytest

from siamtrack.crop import Window, context_size, crop, mean_bgr, square_window

FILL = (10.0, 20.0, 30.0)


def noise(height: int = 60, width: int = 80) -> np.ndarray:
    """An image without any two equal neighbourhoods, and without the fill colour."""
    return np.random.default_rng(0).integers(40, 256, (height, width, 3), dtype=np.uint8)


def padded_crop(image: np.ndarray, window: Window, size_px: int, margin: int) -> np.ndarray:
    """The plain way: an image with a wide border of the fill colour, sliced and resized."""
    wide = cv2.copyMakeBorder(image, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=FILL)
    top, left = window.top + margin, window.left + margin
    return cv2.resize(wide[top : top + window.height, left : left + window.width], (size_px, size_px))


@pytest.mark.parametrize(
    ("width", "height", "context", "expected"),
    [
        (10, 10, 0.5, 20.0),  # a square gets its own side as context
        (30, 10, 0.5, math.sqrt(50 * 30)),
        (10, 30, 0.5, math.sqrt(50 * 30)),
        (10, 40, 0.0, 20.0),
        (10, 10, 0.25, 15.0),
    ],
)
def test_context_size(width: float, height: float, context: float, expected: float) -> None:
    assert context_size(width, height, context) == pytest.approx(expected)


def test_context_share_defaults_to_a_half() -> None:
    assert context_size(10, 10) == pytest.approx(20)


@pytest.mark.parametrize(
    ("cx", "cy", "side", "expected"),
    [
        (10, 20, 4, Window(8, 18, 4, 4)),
        (10.5, 20.5, 5, Window(8, 18, 5, 5)),  # an odd side is centred on a pixel's middle
        (10, 20, 4.4, Window(8, 18, 4, 4)),
        (10, 20, 0.2, Window(10, 20, 1, 1)),  # never less than a pixel
        (0, 0, 100, Window(-50, -50, 100, 100)),
    ],
)
def test_square_window(cx: float, cy: float, side: float, expected: Window) -> None:
    assert square_window(cx, cy, side) == expected


@pytest.mark.parametrize("side", [1, 2, 7, 8, 254.6, 255])
@pytest.mark.parametrize("centre", [-3.75, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 99.9])
def test_square_window_is_centred_within_half_a_pixel(side: float, centre: float) -> None:
    window = square_window(centre, -centre, side)
    assert window.width == window.height == round(side)
    assert abs(window.left + window.width / 2 - centre) <= 0.5
    assert abs(window.top + window.height / 2 + centre) <= 0.5


@pytest.mark.parametrize("window", [Window(0, 0, 10, 10), Window(-7, 33, 64, 64), Window(5, -9, 31, 77)])
@pytest.mark.parametrize("size_px", [1, 127, 255])
def test_to_image_is_the_way_back_from_to_crop(window: Window, size_px: int) -> None:
    box = (12.25, -3.5, 8.0, 5.5)
    np.testing.assert_allclose(window.to_image(tuple(window.to_crop(box, size_px)), size_px), box, atol=1e-12)


def test_to_crop_by_hand() -> None:
    window = Window(10, 20, 50, 100)  # 50 x 100 pixels onto 200 x 200: 4 times and 2 times
    np.testing.assert_allclose(window.to_crop((10, 20, 5, 5), 200), [0, 0, 20, 10])
    np.testing.assert_allclose(window.to_crop((35, 70, 50, 100), 200), [100, 100, 200, 200])


def test_crop_without_resize_is_an_exact_copy() -> None:
    image = noise()
    cut = crop(image, Window(5, 7, 32, 32), 32, FILL)
    np.testing.assert_array_equal(cut, image[7:39, 5:37])
    assert not np.shares_memory(cut, image)


@pytest.mark.parametrize("left", [11, 12])
@pytest.mark.parametrize(
    ("side", "size_px"), [(60, 127), (60, 255), (128, 64), (150, 127), (255, 127)], ids=lambda v: str(v)
)
def test_a_rectangle_lands_where_to_crop_says(left: int, side: int, size_px: int) -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    x, y, w, h = 41, 37, 21, 26
    image[y : y + h, x : x + w] = 200
    window = Window(left, 9, side, side)
    weight = crop(image, window, size_px, FILL)[..., 0].astype(float)
    middle = np.arange(size_px) + 0.5  # pixel i covers [i, i + 1)
    found = [(weight.sum(axis=0) @ middle) / weight.sum(), (weight.sum(axis=1) @ middle) / weight.sum()]
    cx, cy, crop_w, crop_h = window.to_crop((x + w / 2, y + h / 2, w, h), size_px)
    np.testing.assert_allclose(found, [cx, cy], atol=0.15)  # half a pixel off would be the classic mistake
    assert weight.sum() / 200 == pytest.approx(crop_w * crop_h, rel=0.04)


@pytest.mark.parametrize(
    ("window", "outside"),
    [
        (Window(-8, 10, 20, 20), np.s_[:, :8]),
        (Window(68, 10, 20, 20), np.s_[:, 12:]),
        (Window(10, -5, 20, 20), np.s_[:5]),
        (Window(10, 53, 20, 20), np.s_[7:]),
    ],
    ids=["left", "right", "above", "below"],
)
def test_outside_takes_the_fill_colour_and_inside_stays(window: Window, outside: tuple[slice, ...]) -> None:
    image = noise(60, 80)
    cut = crop(image, window, 20, FILL)
    is_outside = np.zeros((20, 20), bool)
    is_outside[outside] = True
    assert (cut[is_outside] == FILL).all()
    assert not (cut[~is_outside] == FILL).all(axis=-1).any()
    np.testing.assert_array_equal(cut, padded_crop(image, window, 20, margin=30))


@pytest.mark.parametrize(
    "window",
    [
        Window(-20, 0, 20, 20), Window(80, 0, 20, 20), Window(0, -20, 20, 20), Window(0, 60, 20, 20),
        Window(10_000, -10_000, 33, 20),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size_px", [7, 20])
def test_entirely_outside_is_all_fill(window: Window, size_px: int) -> None:
    cut = crop(noise(60, 80), window, size_px, FILL)
    assert cut.shape == (size_px, size_px, 3)
    assert (cut == FILL).all()


@pytest.mark.parametrize("window", [Window(10, 10, 40, 40), Window(-10, 30, 50, 50), Window(-300, -200, 700, 700)])
@pytest.mark.parametrize("size_px", [40, 64])
@pytest.mark.parametrize(
    "view",
    [
        lambda i: i[:, ::-1], lambda i: i[::-1], lambda i: i[..., ::-1], lambda i: i[10:, 5:-5],
        lambda i: i[::2, ::2], lambda i: i.transpose(1, 0, 2),
    ],
    ids=["mirrored", "upside_down", "rgb", "roi", "every_second", "transposed"],
)  # fmt: skip
def test_a_view_gives_what_its_copy_gives(view: object, window: Window, size_px: int) -> None:
    image = view(noise(120, 160))
    assert not image.flags.c_contiguous
    copy = np.ascontiguousarray(image)
    np.testing.assert_array_equal(crop(image, window, size_px, FILL), crop(copy, window, size_px, FILL))
    np.testing.assert_allclose(mean_bgr(image), mean_bgr(copy))


@pytest.mark.parametrize("window", [Window(5, 5, 20, 20), Window(-5, -5, 20, 20), Window(-500, -500, 1500, 1500)])
def test_input_is_neither_edited_nor_needed_writable(window: Window) -> None:
    image = noise()
    before = image.copy()
    image.setflags(write=False)
    crop(image, window, 20, FILL)[:] = 0  # the result is the caller's own
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("window", [Window(-300, -400, 1500, 1500), Window(200, -100, 1203, 1177)])
def test_large_window_is_the_plain_crop_within_a_grey_level(window: Window) -> None:
    # Beyond four times the crop the border is not built but sampled: the result must not show which way was taken.
    image = noise(700, 900)
    difference = crop(image, window, 127, FILL).astype(int) - padded_crop(image, window, 127, margin=1200)
    assert np.abs(difference).max() <= 1


def test_huge_window_needs_no_memory_for_its_border() -> None:
    image = np.full((60, 80, 3), 200, np.uint8)
    tracemalloc.start()
    cut = crop(image, square_window(40, 30, 1_000_000), 32, FILL)  # its border alone would be 3 TB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (cut == FILL).all(axis=-1).mean() > 0.9  # the image is a dot in it
    assert peak < 1e6


def test_mean_bgr() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[:2] = (10, 20, 40)
    assert mean_bgr(image) == pytest.approx((5, 10, 20))
