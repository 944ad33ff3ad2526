"""Labels: worked values, the counts each paper's rule gives on a typical target, negative pairs, sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from siamtrack.nets.decode import Grid
from training.dataset import LabelConfig
from training.labels import (
    RULES,
    Cells,
    anchor_iou,
    circle_labels,
    dastsiam_labels,
    foreign_labels,
    nearest_candidate,
    sample,
    siamban_labels,
    siamcan_labels,
    siamcar_labels,
    siamfc_labels,
    siamla_labels,
    siamrpn_labels,
)
from training.pairs import Pair

FINE = Grid(size=25, stride=8, origin=31.5)  # of the ResNet-50 networks: cell (12, 12) lies at 127.5
COARSE = Grid(size=14, stride=16, origin=0.5)  # of the edge networks
ANCHORS = ((104, 32), (88, 40), (64, 64), (40, 80), (32, 96))  # SiamRPN++'s


def cells(grid: Grid, *anchors: tuple[float, float]) -> Cells:
    points = grid.points().numpy()
    if not anchors:
        return Cells(points, grid.stride)
    sizes = np.repeat(np.array(anchors, np.float32), len(points), axis=0)
    return Cells(np.tile(points, (len(anchors), 1)), grid.stride, sizes)


def at(*offset: float) -> Cells:
    """One cell so far from (100, 120)."""
    return Cells(np.array([[100 + offset[0], 120 + offset[1]]], np.float32), 8)


def box(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


# --- counts on a typical target ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ("siamcan", 24.6),  # r = 22.45 px: pi r^2 / 64 = 24.7
        ("siamcan-circle", 24.6),  # the same circle C2
        ("siamban", 12.3),  # pi (63.5 / 4)^2 / 64 = 12.4
        ("siamcar", 10.1),  # (0.4 63.5 / 8)^2
        ("siamla", 63.0),  # (63.5 / 8)^2, centre and boundary
        ("dastsiam", 12.5),  # pi 4 = 12.6
        ("siamfc", 8.0),  # a diamond of 2 * 16^2 px^2 / 64; 13 when it stands on a cell
    ],
)
def test_target_cells_of_a_typical_target(rule: str, count: float) -> None:
    """A 63.5 px square, which is what the context rule makes of any square target, over sub-cell positions."""
    rng = np.random.default_rng(0)
    grid = cells(FINE)
    counts = [int((RULES[rule](grid, box(*(127.5 + rng.uniform(-4, 4, 2)), 63.5, 63.5)) > 0).sum()) for _ in range(400)]
    assert np.mean(counts) == pytest.approx(count, abs=0.45)


def test_siamrpn_targets_of_a_typical_target() -> None:
    """Of the five shapes only the square one fits; it may be off by as much as leaves an IoU of 0.6."""
    labels = siamrpn_labels(cells(FINE, *ANCHORS), box(127.5, 127.5, 63.5, 63.5)).reshape(5, 25, 25)
    assert [(part == 1).any() for part in labels] == [False, False, True, False, False]
    rows, columns = np.nonzero(labels[2] == 1)
    # d px off along one axis (63.75 - d) 63.5 px^2 are shared: IoU 0.77 at one cell, 0.595 at two. Off by one cell both
    # ways: 55.75^2 / (64^2 + 63.5^2 - 55.75^2) = 0.62.
    assert (columns[rows == 12].tolist(), rows[columns == 12].tolist()) == ([11, 12, 13],) * 2
    assert rows.size == 9


# --- rules by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "offset", "label"),
    [
        # w = h = 80: r = 1600 / sqrt(3200) = 28.28, ellipse = circle of 40.
        ((80, 80), (28.2, 0), 1),
        ((80, 80), (28.4, 0), -1),
        ((80, 80), (0, -39.9), -1),
        ((80, 80), (0, -40.1), 0),
        # w = 160, h = 40: r = 1600 / sqrt(6800) = 19.40, semi-axes 80 and 20.
        ((160, 40), (19.3, 0), 1),
        ((160, 40), (0, 19.3), 1),
        ((160, 40), (19.5, 0), -1),
        ((160, 40), (79, 0), -1),
        ((160, 40), (0, 20.5), 0),
        ((160, 40), (81, 0), 0),
        # An ellipse, not the box: (60, 15) lies in the box but (60/80)^2 + (15/20)^2 = 1.125.
        ((160, 40), (60, 15), 0),
        ((160, 40), (55, 14), -1),
    ],
)
def test_siamcan_circle_and_ellipse(size: tuple[float, float], offset: tuple[float, float], label: int) -> None:
    assert siamcan_labels(at(*offset), box(100, 120, *size)).tolist() == [label]


@pytest.mark.parametrize(
    ("offset", "label"),
    [
        # w = 160, h = 40: semi-axes 40 and 10, 80 and 20.
        ((39.9, 0), 1),
        ((40.1, 0), -1),
        ((0, 9.9), 1),
        ((0, 10.1), -1),
        ((0, -19.9), -1),
        ((0, -20.1), 0),
        ((30, 7), -1),  # (30/40)^2 + (7/10)^2 = 1.05
        ((30, 6), 1),  # 0.92
    ],
)
def test_siamban_ellipses(offset: tuple[float, float], label: int) -> None:
    assert siamban_labels(at(*offset), box(100, 120, 160, 40)).tolist() == [label]


@pytest.mark.parametrize(
    ("offset", "label"),
    [
        # w = 160, h = 40: C2 has radius 19.40, the outer circle sqrt(1600) = 40.
        ((19.3, 0), 1),
        ((0, 19.5), -1),
        ((0, 39.9), -1),
        ((40.1, 0), 0),
    ],
)
def test_siamcan_circles(offset: tuple[float, float], label: int) -> None:
    assert circle_labels(at(*offset), box(100, 120, 160, 40)).tolist() == [label]


def test_ablation_labels_of_siamcan_agree_on_a_square() -> None:
    """Of a square E1 is a circle; C2 has sqrt(2) the radius of SiamBAN's inner circle, twice its area."""
    square, grid = box(127, 121, 70, 70), cells(FINE)
    np.testing.assert_array_equal(circle_labels(grid, square), siamcan_labels(grid, square))
    np.testing.assert_array_equal(siamban_labels(grid, square) == 0, siamcan_labels(grid, square) == 0)
    assert (siamban_labels(grid, square) == 1).sum() < (siamcan_labels(grid, square) == 1).sum()


@pytest.mark.parametrize(
    ("offset", "car", "la"),
    [
        # w = 160, h = 40: the centre is 64 x 16, so 32 and 8 to either side; the box 80 and 20.
        ((31.9, -7.9), 1, 1),
        ((32.1, 0), 0, 2),
        ((0, 8.1), 0, 2),
        ((79.9, 19.9), 0, 2),  # a corner of the box, which no ellipse reaches
        ((80.1, 0), 0, 0),
        ((0, -20.1), 0, 0),
    ],
)
def test_siamcar_centre_and_siamla_boundary(offset: tuple[float, float], car: int, la: int) -> None:
    assert siamcar_labels(at(*offset), box(100, 120, 160, 40)).tolist() == [car]
    assert siamla_labels(at(*offset), box(100, 120, 160, 40)).tolist() == [la]


@pytest.mark.parametrize(
    ("offset", "label"), [((0, 0), 1), ((16, 0), 1), ((8, 8), 1), ((16, 1), 0), ((17, 0), 0), ((-9, 8), 0)]
)
@pytest.mark.parametrize("size", [(20, 20), (160, 40)])
def test_siamfc_block_distance(offset: tuple[float, float], label: int, size: tuple[float, float]) -> None:
    assert siamfc_labels(at(*offset), box(100, 120, *size)).tolist() == [label]  # whatever the target's size


def test_siamfc_labels_of_a_centred_target() -> None:
    """The 15x15 map of a 239 px search crop: a diamond of 1 + 4 + 8 cells."""
    labels = siamfc_labels(cells(Grid(15, 8, 63.5)), box(119.5, 119.5, 40, 40)).reshape(15, 15)
    assert labels.sum() == 13
    assert [row.sum() for row in labels[4:11]] == [0, 1, 3, 5, 3, 1, 0]


@pytest.mark.parametrize(
    ("offset", "label"),
    # T = 4 squared cells of 8 px: 16 px.
    [((15.9, 0), 1), ((16, 0), 0), ((11, 11), 1), ((12, 11), 0)],
)
def test_dastsiam_centre_distance(offset: tuple[float, float], label: int) -> None:
    assert dastsiam_labels(at(*offset), box(100, 120, 160, 40)).tolist() == [label]
    assert dastsiam_labels(at(*(2 * v for v in offset)), box(100, 120, 160, 40), 16.0).tolist() == [label]


@pytest.mark.parametrize(
    ("anchor", "offset", "iou", "label"),
    [
        ((64, 64), (0, 0), 1.0, 1),
        ((64, 64), (32, 0), 1 / 3, -1),  # half of one covers half of the other
        ((64, 64), (32, 32), 1 / 7, 0),
        ((64, 64), (64, 0), 0.0, 0),
        ((32, 32), (10, -10), 0.25, 0),  # inside
        ((128, 64), (0, 0), 0.5, -1),
        ((80, 64), (0, 0), 0.8, 1),
    ],
)
def test_siamrpn_anchor_iou(anchor: tuple[float, float], offset: tuple[float, float], iou: float, label: int) -> None:
    one = Cells(at(*offset).points, 8, np.array([anchor], np.float32))
    assert anchor_iou(one, box(100, 120, 64, 64)).tolist() == pytest.approx([iou], abs=1e-6)
    assert siamrpn_labels(one, box(100, 120, 64, 64)).tolist() == [label]


def test_anchor_labels_without_anchors() -> None:
    with pytest.raises(ValueError, match="need a network with anchors"):
        siamrpn_labels(at(0, 0), box(100, 120, 64, 64))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_labels_every_candidate(rule: str) -> None:
    grid = cells(FINE, *ANCHORS) if rule == "siamrpn" else cells(FINE)
    for target in (box(127.5, 127.5, 64, 64), box(10, 240, 5, 300), box(-50, -50, 3, 3)):
        labels = RULES[rule](grid, target)
        assert (labels.shape, labels.dtype) == ((len(grid.points),), np.int8)
        assert set(np.unique(labels)) <= {-1, 0, 1, 2}


# --- negative pairs, nearest cell, sampling ------------------------------------------------------------------------


def test_negative_pairs_of_siamrpn_are_the_7x7_cells_of_all_anchors() -> None:
    labels = foreign_labels(cells(FINE, *ANCHORS), box(127.5, 135.5, 10, 10), siamrpn_labels).reshape(5, 25, 25)
    rows, columns = np.nonzero(labels[0] == 0)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 16, 9, 15)
    assert (labels == 0).sum() == 5 * 49
    assert set(np.unique(labels)) == {-1, 0}


def test_negative_pairs_of_siamban_are_the_inner_ellipse() -> None:
    target, grid = box(127.5, 127.5, 80, 60), cells(FINE)
    labels = foreign_labels(grid, target, siamban_labels)
    np.testing.assert_array_equal(labels == 0, siamban_labels(grid, target) == 1)
    assert not (labels > 0).any()


def pair(*values: float, positive: bool = True) -> Pair:
    nothing = np.zeros((1, 1, 3), np.uint8)
    return Pair(nothing, nothing, box(*values), (60.0, 50.0), positive)


@pytest.mark.parametrize(
    ("config", "positive", "counts"),
    [
        ({"rule": "siamban", "positives": 16, "negatives": 48}, True, (16, 48)),
        ({"rule": "siamban", "positives": 16, "negatives": 48}, False, (0, 48)),
        ({"rule": "siamban", "positives": 16, "negatives": 48, "foreign": 16}, False, (0, 16)),
        ({"rule": "siamcar"}, False, (0, 625)),
        ({"rule": "siamfc"}, True, (13, 612)),
        ({"rule": "siamfc", "border": 1}, True, (13, 23 * 23 - 13)),
        ({"rule": "siamcar", "border": 5}, False, (0, 15 * 15)),
        ({"rule": "dastsiam"}, True, (9, 616)),  # cells nearer than two cells: the block of 3x3
        ({"rule": "dastsiam", "distance": 1.0}, True, (1, 624)),
        ({"rule": "dastsiam", "foreign": 99}, False, (0, 9)),
        ({"rule": "dastsiam", "distance": 1.0, "foreign": 99}, False, (0, 1)),
        ({"rule": "siamcan", "foreign": 20}, False, (0, 20)),
    ],
)
def test_label_config(config: dict[str, Any], positive: bool, counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    labels = LabelConfig(**config).label(cells(FINE), pair(127.5, 127.5, 120, 120, positive=positive), rng)
    assert ((labels > 0).sum(), (labels == 0).sum()) == counts


def test_nearest_gives_a_small_box_its_one_cell() -> None:
    small, large = (127, 121, 9, 9), (128, 128, 90, 70)  # between the 16 px cells: r = 3.2 px reaches none
    rng, coarse = np.random.default_rng(0), cells(COARSE)
    plain, nearest = LabelConfig(rule="siamcan"), LabelConfig(rule="siamcan", nearest=True)
    assert (plain.label(coarse, pair(*small), rng) == 1).sum() == 0
    labels = nearest.label(coarse, pair(*small), rng)
    assert np.flatnonzero(labels == 1).tolist() == [8 * 14 + 8]  # cell (8, 8) lies at 128.5
    np.testing.assert_array_equal(plain.label(coarse, pair(*large), rng), nearest.label(coarse, pair(*large), rng))
    assert (nearest.label(coarse, pair(*small, positive=False), rng) == 0).all()


def test_nearest_anchor_is_the_one_that_fits_best() -> None:
    grid, wide = cells(FINE, *ANCHORS), box(127.5, 127.5, 160, 20)
    assert not (siamrpn_labels(grid, wide) > 0).any()
    assert nearest_candidate(grid, wide) == 12 * 25 + 12  # 104 x 32, the first shape, at the middle


@pytest.mark.parametrize(
    ("limits", "kept"), [((16, 48), (16, 48)), ((100, 1000), (30, 500)), ((0, 5), (0, 5)), ((30, 500), (30, 500))]
)
def test_sample_keeps_at_most_so_many(limits: tuple[int, int], kept: tuple[int, int]) -> None:
    labels = np.repeat(np.array([1, 2, 0, -1], np.int8), (20, 10, 500, 70))
    before = labels.copy()
    sampled = sample(labels, *limits, np.random.default_rng(0))
    assert ((sampled > 0).sum(), (sampled == 0).sum()) == kept
    assert ((sampled == labels) | (sampled == -1)).all()  # nothing changes side
    np.testing.assert_array_equal(labels, before)
    assert sampled.dtype == np.int8


def test_sample_is_random() -> None:
    labels = np.zeros(625, np.int8)
    draws = [sample(labels, 16, 48, np.random.default_rng(seed)) for seed in (0, 1, 0)]
    assert (draws[0] != draws[1]).any()
    np.testing.assert_array_equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rule": "circle"}, "rule must be one of"),
        ({"positives": -1}, "positives must be at least 0"),
        ({"foreign": -1}, "foreign must be at least 0"),
        ({"distance": 0.0}, "distance must be above 0"),
    ],
)
def test_label_config_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelConfig(**config)
