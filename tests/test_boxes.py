from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from siamtrack.boxes import clip_xywh, cxcywh_to_xywh, iou_xywh, xywh_to_cxcywh, xywh_to_xyxy, xyxy_to_xywh

NAN = float("nan")
CONVERSIONS = [xywh_to_cxcywh, cxcywh_to_xywh, xywh_to_xyxy, xyxy_to_xywh]


@pytest.mark.parametrize(
    ("convert", "boxes", "expected"),
    [
        (xywh_to_cxcywh, np.empty((0, 4)), np.empty((0, 4))),
        (cxcywh_to_xywh, np.empty((0, 4)), np.empty((0, 4))),
        (xywh_to_xyxy, np.empty((0, 4)), np.empty((0, 4))),
        (xyxy_to_xywh, np.empty((0, 4)), np.empty((0, 4))),
        (xywh_to_cxcywh, [10, 20, 4, 5], [12, 22.5, 4, 5]),
        (cxcywh_to_xywh, [12, 22.5, 4, 5], [10, 20, 4, 5]),
        (xywh_to_xyxy, [10, 20, 4, 5], [10, 20, 14, 25]),
        (xyxy_to_xywh, [10, 20, 14, 25], [10, 20, 4, 5]),
        (xywh_to_cxcywh, (-3, -1, 3, 1), [-1.5, -0.5, 3, 1]),  # a tuple, left of and above the origin
        (xywh_to_xyxy, [[0, 0, 1, 2], [3, 4, 0, 0]], [[0, 0, 1, 2], [3, 4, 3, 4]]),
        (xyxy_to_xywh, [[0, 0, 1, 2], [3, 4, 3, 4]], [[0, 0, 1, 2], [3, 4, 0, 0]]),
        (xywh_to_cxcywh, [NAN, 0, 2, 4], [NAN, 2, 2, 4]),  # a NaN stays in the columns it belongs to
        (xywh_to_xyxy, [0, 0, NAN, 4], [0, 0, NAN, 4]),
    ],
)
def test_conversion(convert: Callable, boxes: object, expected: object) -> None:
    converted = convert(boxes)
    assert converted.dtype == np.float64
    np.testing.assert_array_equal(converted, expected)


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (xywh_to_cxcywh, cxcywh_to_xywh), (cxcywh_to_xywh, xywh_to_cxcywh),
        (xywh_to_xyxy, xyxy_to_xywh), (xyxy_to_xywh, xywh_to_xyxy),
    ],
)  # fmt: skip
def test_round_trip_of_any_leading_shape(there: Callable, back: Callable) -> None:
    boxes = np.random.default_rng(0).uniform(-50, 50, (3, 5, 4))
    assert there(boxes).shape == (3, 5, 4)
    np.testing.assert_allclose(back(there(boxes)), boxes, atol=1e-12)


def test_whole_number_boxes_keep_their_halves() -> None:
    np.testing.assert_array_equal(xywh_to_cxcywh(np.array([0, 0, 3, 5], np.uint8)), [1.5, 2.5, 3, 5])


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        (np.empty((0, 4)), np.empty((0, 4))),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([0, 0, 10, 8], [0, 0, 10, 8]),
        ([-2, -3, 5, 5], [0, 0, 3, 2]),
        ([8, 6, 5, 5], [8, 6, 2, 2]),
        ([-5, -5, 100, 100], [0, 0, 10, 8]),
        ([20, 30, 5, 5], [10, 8, 0, 0]),
        ([-20, 2, 5, 5], [0, 2, 0, 5]),
        ([2, 2, -1, 3], [2, 2, 0, 3]),  # a negative size is no area, not a box to the left
        ([[-1, 0, 2, 1], [9.5, 7.5, 2, 2]], [[0, 0, 1, 1], [9.5, 7.5, 0.5, 0.5]]),
    ],
)
def test_clip(boxes: object, expected: object) -> None:
    np.testing.assert_array_equal(clip_xywh(boxes, 10, 8), expected)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.empty((0, 4)), np.empty((0, 4)), np.empty(0)),
        (np.empty((0, 4)), [0, 0, 1, 1], np.empty(0)),
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([0, 0, 2, 2], [1, 1, 2, 2], 1 / 7),
        ([0, 0, 4, 4], [1, 1, 2, 2], 4 / 16),
        ([0, 0, 2, 2], [2, 0, 2, 2], 0.0),  # a shared edge is no overlap
        ([0, 0, 2, 2], [5, 5, 2, 2], 0.0),
        ([0, 0, 0.5, 0.5], [0, 0, 1, 1], 0.25),
        ([1, 1, 0, 0], [1, 1, 0, 0], 0.0),
        ([0, 0, 0, 4], [0, 0, 4, 4], 0.0),
        ([3, 3, -2, -2], [1, 1, 2, 2], 0.0),  # the same square by its corners, but a negative size has no area
        ([NAN, 0, 2, 2], [0, 0, 2, 2], 0.0),
        ([0, 0, 2, 2], [0, 0, 2, NAN], 0.0),
        ([[0, 0, 2, 2], [NAN] * 4, [1, 1, 2, 2]], [0, 0, 2, 2], [1, 0, 1 / 7]),
        ([[[0, 0, 2, 2]], [[1, 1, 2, 2]]], [[0, 0, 2, 2], [1, 1, 2, 2]], [[1, 1 / 7], [1 / 7, 1]]),  # 2x1 with 2
    ],
)
def test_iou(a: object, b: object, expected: object) -> None:
    with np.errstate(all="raise"):  # no warning may hide in a console
        np.testing.assert_allclose(iou_xywh(a, b), expected, rtol=1e-12)
        np.testing.assert_allclose(iou_xywh(b, a), expected, rtol=1e-12)


def test_iou_refuses_shapes_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        iou_xywh(np.ones((2, 4)), np.ones((3, 4)))


@pytest.mark.parametrize("function", [*CONVERSIONS, lambda b: clip_xywh(b, 4, 4), lambda b: iou_xywh(b, b)])
def test_arguments_are_not_edited_nor_shared(function: Callable) -> None:
    boxes = np.array([[-1.0, -2.0, 3.0, 40.0], [NAN, 5, 0, 1]])
    before = boxes.copy()
    result = function(boxes)
    np.testing.assert_array_equal(boxes, before)
    assert not np.shares_memory(result, boxes)


@pytest.mark.parametrize("function", [*CONVERSIONS, lambda b: clip_xywh(b, 4, 4), lambda b: iou_xywh(b, [0, 0, 1, 1])])
@pytest.mark.parametrize(("bad", "came"), [(5.0, r"\(\)"), ([], r"\(0,\)"), ([1, 2, 3], r"\(3,\)")])
def test_bad_shape_is_named(function: Callable, bad: object, came: str) -> None:
    with pytest.raises(ValueError, match=rf"\[\.\.\., 4\], got {came}"):
        function(bad)
