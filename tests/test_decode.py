"""The decode that every backend shares: boxes, penalty, window, choice."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siamtrack.nets import MODELS
from siamtrack.nets.decode import (
    AnchorFree,
    Grid,
    Normalisation,
    RawMaps,
    SearchGraph,
    TemplateGraph,
    normalise,
    size_penalty,
    target_probability,
)


def test_normalise_casts_centres_and_keeps_bgr_order() -> None:
    image = torch.tensor([[[[0, 127, 255], [10, 20, 30]]]], dtype=torch.uint8)  # [1, 1, 2, 3]
    out = normalise(image, Normalisation(mean=127.5, scale=1 / 127.5))
    assert out.shape == (1, 3, 1, 2)
    assert out.dtype == torch.float32
    assert out[0, :, 0, 0].tolist() == pytest.approx([-1, -0.5 / 127.5, 1])
    assert out[0, 1, 0, 1] == pytest.approx((20 - 127.5) / 127.5)


def test_confidence_is_channel_1_of_two_or_a_sigmoid() -> None:
    two = torch.tensor([0.0, math.log(3)])[None, :, None, None]
    one = torch.tensor([math.log(3)])[None, :, None, None]
    assert target_probability(two).item() == pytest.approx(0.75)  # erratum S8
    assert target_probability(one).item() == pytest.approx(0.75)
    assert target_probability(two).shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("cell", "ltrb", "box"),
    [
        (0, (10, 10, 10, 10), (31.5, 31.5, 20, 20)),
        (1, (10, 10, 10, 10), (39.5, 31.5, 20, 20)),  # cells run along x first
        (3, (10, 4, 30, 8), (41.5, 41.5, 40, 12)),  # second row of three
    ],
)
def test_boxes_from_distances(cell: int, ltrb: tuple[float, ...], box: tuple[float, ...]) -> None:
    maps = torch.full((2, 4, 3, 3), 1.0)
    maps[1].flatten(1)[:, cell] = torch.tensor(ltrb, dtype=torch.float32)
    boxes = AnchorFree(Grid(3, 8, 31.5)).boxes(maps)
    assert boxes.shape == (2, 9, 4)
    assert boxes[1, cell].tolist() == pytest.approx(box)
    assert boxes[0, cell, 2:].tolist() == [2, 2]


@pytest.mark.parametrize("model", ["siamcan-mobilenetv2", "siamla-mobilenetv2", "siamrpnpp-r50"])
def test_a_search_makes_no_tensor_of_host_values(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each would wait for a copy, which a CUDA graph cannot capture."""
    net: Any = MODELS[model]().to("meta").eval()
    with torch.device("meta"):
        crops = [torch.zeros(1, px, px, 3, dtype=torch.uint8) for px in (net.template_size, net.search_size)]
        size_and_tuning = torch.ones(1, 2), torch.zeros(3)
    template = TemplateGraph(net)(crops[0])
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, None)
    SearchGraph(net)(crops[1], *template, *size_and_tuning)


def penalty(size: tuple[float, float], before: tuple[float, float], k: float) -> float:
    return float(size_penalty(torch.tensor([[size]]), torch.tensor([before]), torch.tensor(k))[0, 0])


@pytest.mark.parametrize(
    ("size", "before", "k", "wanted"),
    [
        ((40, 30), (40, 30), 0.5, 1.0),
        ((80, 80), (40, 40), 0.5, math.exp(-0.5 * (2 - 1))),  # scale change 2, aspect change 1
        ((20, 20), (40, 40), 0.5, math.exp(-0.5 * (2 - 1))),
        # Aspect change 4; padded sides sqrt(130 * 70) and 80: change 4 * 95.394 / 80.
        ((80, 20), (40, 40), 0.1, math.exp(-0.1 * (4 * math.sqrt(130 * 70) / 80 - 1))),
        ((20, 80), (40, 40), 0.1, math.exp(-0.1 * (4 * math.sqrt(130 * 70) / 80 - 1))),
        ((400, 10), (40, 40), 0.0, 1.0),
    ],
)
def test_size_penalty_by_hand(size: tuple[float, float], before: tuple[float, float], k: float, wanted: float) -> None:
    assert penalty(size, before, k) == pytest.approx(wanted, rel=1e-5)


def test_size_penalty_falls_with_change_both_ways() -> None:
    # Erratum L9: the printed sign would reward change.
    for ratios in ([1.0, 1.2, 1.5, 2.0, 3.0], [1.0, 1 / 1.2, 1 / 1.5, 0.5, 1 / 3]):
        grown = [penalty((40 * r, 30 * r), (40, 30), 0.1) for r in ratios]
        stretched = [penalty((40 * r, 30 / r), (40, 30), 0.1) for r in ratios]
        for values in (grown, stretched):
            assert values[0] == pytest.approx(1)
            assert all(later < sooner for sooner, later in itertools.pairwise(values))
    assert penalty((60, 60), (40, 40), 0.1) == pytest.approx(penalty((40, 40), (60, 60), 0.1))


class FixedMaps(nn.Module):
    """A network that answers with given maps; its "template" tensor is added to the logits."""

    template_size, search_size = 127, 255
    template_names = ("bias",)
    normalisation = Normalisation(0.0, 1.0)

    def __init__(self, grid: Grid, logits: Tensor, ltrb: Tensor) -> None:
        super().__init__()
        self.grid, self.logits, self.ltrb = grid, logits, ltrb
        self.decoder = AnchorFree(grid)

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        return (image.mean(dim=(1, 2, 3))[:, None, None, None],)

    def search(self, image: Tensor, *template: Tensor) -> RawMaps:
        return RawMaps(self.logits + template[0], self.ltrb)


def peaks(cells: dict[tuple[int, int], float], grid: Grid) -> Tensor:
    probability = torch.full((1, 1, grid.size, grid.size), 0.01)
    for (row, column), value in cells.items():
        probability[0, 0, row, column] = value
    return torch.logit(probability)


GRID = Grid(25, 8, 31.5)
NO_BIAS = torch.zeros(1, 1, 1, 1)
IMAGE = torch.zeros(1, 255, 255, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("influence", "chosen"),
    [(0.0, (2, 3)), (0.1, (2, 3)), (0.6, (13, 11)), (1.0, (12, 12))],
    ids=["score alone", "a little window", "mostly window", "window alone"],
)
def test_window_decides_between_far_and_near(influence: float, chosen: tuple[int, int]) -> None:
    logits = peaks({(2, 3): 0.9, (13, 11): 0.6}, GRID)
    graph = SearchGraph(FixedMaps(GRID, logits, torch.full((1, 4, 25, 25), 20.0)))
    box, score, _, response = graph(IMAGE, NO_BIAS, torch.full((1, 2), 40.0), torch.tensor([0.0, influence, 0.0]))
    row, column = chosen
    assert box[0].tolist() == pytest.approx([31.5 + 8 * column, 31.5 + 8 * row, 40, 40])
    assert score[0] == pytest.approx(float(torch.sigmoid(logits[0, 0, row, column])), abs=1e-6)
    assert response.shape == (1, 25, 25)


def test_score_is_raw_and_penalty_decides() -> None:
    logits = peaks({(4, 4): 0.9, (10, 10): 0.8}, GRID)
    ltrb = torch.full((1, 4, 25, 25), 20.0)
    ltrb[:, :, 4, 4] = 60.0  # the better cell asks for three times the size
    graph = SearchGraph(FixedMaps(GRID, logits, ltrb))
    size = torch.full((1, 2), 40.0)
    _, score, factor, response = graph(IMAGE, NO_BIAS, size, torch.tensor([0.0, 0.0, 0.0]))
    assert (float(score), float(factor)) == pytest.approx((0.9, 1.0))
    box, score, factor, response = graph(IMAGE, NO_BIAS, size, torch.tensor([0.5, 0.0, 0.0]))
    assert box[0, 2:].tolist() == pytest.approx([40, 40])
    assert (float(score), float(factor)) == pytest.approx((0.8, 1.0))
    # Where even the chosen cell is penalised, score and response stay as the network gave them.
    _, score, factor, response = graph(IMAGE, NO_BIAS, size / 2, torch.tensor([0.5, 0.0, 0.0]))
    assert float(factor) == pytest.approx(math.exp(-0.5))
    assert float(score) == pytest.approx(0.8) == pytest.approx(float(response[0, 10, 10]))
    assert float(response[0, 4, 4]) == pytest.approx(0.9)


def numbered_maps(cells: list[dict[tuple[int, int], float]]) -> RawMaps:
    """Given probabilities, 0.01 elsewhere; a box's width and height tell which cell of which sample it is of."""
    logits = torch.cat([peaks(sample, GRID) for sample in cells])
    number = torch.arange(len(cells) * 625, dtype=torch.float32).reshape(len(cells), 1, 25, 25)
    return RawMaps(logits, (1 + number / 2).repeat(1, 4, 1, 1))


def mean_box(cells: list[tuple[int, int]], sample: int = 0) -> list[float]:
    sides = [2 + sample * 625 + 25 * row + column for row, column in cells]
    x, y, side = (sum(v) / len(cells) for v in ([c for _, c in cells], [r for r, _ in cells], sides))
    return [31.5 + 8 * x, 31.5 + 8 * y, side, side]


NO_PENALTY = torch.zeros(3)


@pytest.mark.parametrize(
    ("cells", "averaged"),
    [
        # A second peak far away is better than the neighbours, and no part of the mean (SiamLA erratum L14).
        (
            {(10, 10): 0.9, (10, 11): 0.8, (9, 9): 0.7, (11, 10): 0.6, (2, 2): 0.85, (10, 12): 0.84},
            [(10, 10), (10, 11), (9, 9)],
        ),
        # In a corner three neighbours are there; the cells before and after in memory lie at the other end of a row.
        ({(0, 0): 0.9, (0, 1): 0.5, (1, 1): 0.4, (1, 0): 0.3, (0, 24): 0.8, (1, 24): 0.8}, [(0, 0), (0, 1), (1, 1)]),
        (
            {(24, 24): 0.9, (24, 23): 0.2, (23, 23): 0.4, (23, 24): 0.3, (24, 0): 0.8, (23, 0): 0.8},
            [(24, 24), (23, 23), (23, 24)],
        ),
        ({(7, 0): 0.9, (6, 24): 0.8, (7, 24): 0.8, (8, 1): 0.5, (6, 0): 0.4}, [(7, 0), (8, 1), (6, 0)]),
        ({(0, 24): 0.9, (1, 0): 0.8, (0, 23): 0.3, (1, 23): 0.2}, [(0, 24), (0, 23), (1, 23)]),
    ],
    ids=["inside", "first corner", "last corner", "left edge", "right corner"],
)
def test_box_is_the_mean_of_the_best_three_neighbours(
    cells: dict[tuple[int, int], float], averaged: list[tuple[int, int]]
) -> None:
    choice = AnchorFree(GRID, average=3)(numbered_maps([cells]), torch.full((1, 2), 40.0), NO_PENALTY)
    assert choice.box[0].tolist() == pytest.approx(mean_box(averaged))
    assert float(choice.score) == pytest.approx(0.9)  # of the best cell alone
    alone = AnchorFree(GRID)(numbered_maps([cells]), torch.full((1, 2), 40.0), NO_PENALTY)
    assert alone.box[0].tolist() == pytest.approx(mean_box(averaged[:1]))
    assert alone.penalty == choice.penalty


def test_each_sample_averages_round_its_own_best() -> None:
    cells = [
        {(10, 10): 0.9, (10, 11): 0.8, (9, 9): 0.7, (20, 20): 0.85},
        {(20, 20): 0.9, (20, 21): 0.8, (19, 20): 0.7, (10, 10): 0.85},
        {(0, 24): 0.9, (1, 24): 0.5, (1, 23): 0.4, (2, 0): 0.85},
    ]
    choice = AnchorFree(GRID, average=3)(numbered_maps(cells), torch.full((3, 2), 40.0), NO_PENALTY)
    for i, sample in enumerate(cells):
        assert choice.box[i].tolist() == pytest.approx(mean_box(list(sample)[:3], i))


def test_neighbours_are_ranked_as_the_best_cell_is() -> None:
    # By score alone the third would be (9, 9); the window prefers what is nearer to the middle of the map.
    cells = {(10, 10): 0.9, (10, 11): 0.8, (9, 9): 0.61, (11, 11): 0.6}
    raw, size = numbered_maps([cells]), torch.full((1, 2), 40.0)
    by_score = AnchorFree(GRID, average=3)(raw, size, NO_PENALTY).box[0]
    windowed = AnchorFree(GRID, average=3)(raw, size, torch.tensor([0.0, 0.3, 0.0])).box[0]
    assert by_score.tolist() == pytest.approx(mean_box([(10, 10), (10, 11), (9, 9)]))
    assert windowed.tolist() == pytest.approx(mean_box([(10, 10), (10, 11), (11, 11)]))


@pytest.mark.parametrize("average", [0, 5])
def test_average_beyond_a_corner_is_refused(average: int) -> None:
    with pytest.raises(ValueError, match=f"average must be 1 to 4.*got {average}"):
        AnchorFree(GRID, average=average)


def test_confidence_is_the_product_with_quality() -> None:
    raw = numbered_maps([{(3, 4): 0.8, (5, 6): 0.7}])
    quality = torch.zeros(1, 1, 25, 25)
    quality[0, 0, 5, 6] = math.log(9)  # probability 0.9 there, 0.5 elsewhere
    choice = AnchorFree(GRID)(raw._replace(quality=quality), torch.full((1, 2), 40.0), NO_PENALTY)
    assert choice.box[0].tolist() == pytest.approx(mean_box([(5, 6)]))
    assert float(choice.score) == pytest.approx(0.63)
    assert float(choice.response[0, 3, 4]) == pytest.approx(0.4)


def test_template_graph_normalises() -> None:
    net = FixedMaps(GRID, torch.zeros(1, 1, 25, 25), torch.ones(1, 4, 25, 25))
    net.normalisation = Normalisation(100.0, 0.1)
    (out,) = TemplateGraph(net)(torch.full((1, 127, 127, 3), 130, dtype=torch.uint8))
    assert float(out) == pytest.approx(3.0, rel=1e-5)
