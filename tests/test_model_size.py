"""Parameters and multiply-accumulates of every network against those of the reference implementations."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest

from benchmarks.model_size import NETWORKS, PAGE, Size, measure, table
from siamtrack.nets import MODELS

# Parameters in millions, GMAC of template, update and search graph; None where nothing is published to compare with.
REFERENCE: dict[str, tuple[float, float | None, float | None, float | None]] = {
    "siamfc": (2.34, 0.46, None, None),
    "siamrpn-alexnet": (6.25, None, None, None),
    "siamrpnpp-r50": (53.95, 10.74, None, 48.72),
    "siamban-r50": (53.93, 10.74, None, 48.71),
    "siamcar-r50": (51.38, 10.65, None, 48.57),
    "siamcan-r50": (53.93, 10.74, None, 48.71),
    # 5 points x 625 boxes x 625 cells x 256 channels: sampling as a matrix product.
    "siamla-r50": (54.20, 10.65, None, 50.43 + 5 * 625 * 625 * 256 / 1e9),
    # The encoder, and two 3x3 convolutions of the 8x8 template that the update graph takes off the search graph.
    "dastsiam-r50": (22.63, 2.47, 1.24 + 2 * 9 * 256 * 256 * 64 / 1e9, 26.1),
}


@cache
def size_of(name: str) -> Size:
    return measure(name)


@pytest.mark.parametrize("name", REFERENCE)
def test_paper_sized_networks(name: str) -> None:
    size = size_of(name)
    counted = (size.parameters_m, size.template_gmac, size.update_gmac, size.search_gmac)
    for ours, wanted in zip(counted, REFERENCE[name], strict=True):
        if wanted is not None:
            assert ours == pytest.approx(wanted, rel=0.005)


def test_edge_networks_are_small() -> None:
    for name in MODELS:
        if name.endswith("mobilenetv2"):
            size = size_of(name)
            assert size.parameters_m < 2
            assert size.search_gmac < 0.35


def test_edge_siamla_costs_about_what_edge_siamcan_does() -> None:
    assert size_of("siamla-mobilenetv2").search_gmac < 1.25 * size_of("siamcan-mobilenetv2").search_gmac


def test_only_adaptive_networks_have_an_update() -> None:
    assert {name for name in MODELS if not math.isnan(size_of(name).update_gmac)} == {
        "siamfc-st",
        "siamcan-mobilenetv2",
        "dastsiam-r50",
        "dastsiam-mobilenetv2",
    }


def test_page_is_up_to_date() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "model_size.md"
    wanted = PAGE + table([size_of(name) for name in NETWORKS]) + "\n"
    assert page.read_text(encoding="utf-8") == wanted, "run: python -m benchmarks.model_size"
