"""SiamLA: its parts against literal readings of the equations, switches, half-precision safety, export."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import check_batch, crops, lively, without_resnet
from torch import Tensor, nn
from torch.nn import functional

from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack.nets.aggregation import POINTS, FeatureAggregation, sampling_weights
from siamtrack.nets.attention import LocalisationNonLocal
from siamtrack.nets.correlation import depthwise_grouped, pixelwise, summed_cells
from siamtrack.nets.decode import Grid
from siamtrack.nets.siamla import LocalisationConfig, SiamLA, SiamLAConfig, SiamLAEdge, SiamLAEdgeConfig

GRID = Grid(size=25, stride=8, origin=31.5)
SMALL = SiamLAConfig(channels=32, inner=8)


@pytest.fixture(scope="module")
def edge() -> SiamLAEdge:
    torch.manual_seed(0)
    net = lively(SiamLAEdge())
    with torch.no_grad():  # or many cells are at the end of the range, and rounding chooses between them
        for head in (net.cls_logits, net.bbox_pred, net.localise.score):
            head.weight.mul_(0.05)
    return net


@pytest.fixture(scope="module")
def small() -> SiamLA:
    return lively(without_resnet(SiamLA, SMALL))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(batch: int, size: int, seed: int = 0) -> Tensor:
    """Distances of 1 to 150 px, so that many boxes reach over the map's edge."""
    return torch.exp(5 * torch.rand(batch, 4, size, size, generator=torch.Generator().manual_seed(seed)))


def five_points(ltrb: Tensor, grid: Grid) -> Tensor:
    """``[N, 5, H, W, 2]`` x, y in crop pixels, as section III-D names them: centre, TL, TR, BR, BL."""
    x, y = grid.points().reshape(grid.size, grid.size, 2).unbind(2)
    left, top, right, bottom = ltrb.unbind(1)
    x0, y0, x1, y1 = x - left, y - top, x + right, y + bottom
    pairs = [((x0 + x1) / 2, (y0 + y1) / 2), (x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    return torch.stack([torch.stack(pair, dim=-1) for pair in pairs], dim=1)


# --- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [GRID, Grid(size=14, stride=16, origin=0.5)], ids=["r50", "edge"])
def test_sampling_is_bilinear_with_border(grid: Grid) -> None:
    features, ltrb = randn(2, 7, grid.size, grid.size), distances(2, grid.size)
    weights = sampling_weights(ltrb, grid, torch.tensor(POINTS))
    cells = grid.size**2
    assert weights.shape == (2, cells, 5 * cells)
    for k, points in enumerate(five_points(ltrb, grid).unbind(1)):
        # align_corners=True: -1 and 1 are the middles of the first and the last cell.
        at = 2 * (points - grid.origin) / (grid.stride * (grid.size - 1)) - 1
        wanted = functional.grid_sample(features, at, mode="bilinear", padding_mode="border", align_corners=True)
        ours = features.flatten(2) @ weights[:, :, k * cells : (k + 1) * cells].transpose(1, 2)
        torch.testing.assert_close(ours.reshape(wanted.shape), wanted, atol=1e-4, rtol=1e-4)


def test_sampling_weights_by_hand() -> None:
    ltrb = torch.full((1, 4, 25, 25), 8.0)
    # Cell (row 3, column 5): left 12, top 8, right 4, bottom 200 px. In cells: x0 = 3.5, x1 = 5.5, y0 = 2, y1 = 28.
    ltrb[0, :, 3, 5] = torch.tensor([12.0, 8.0, 4.0, 200.0])
    weights = sampling_weights(ltrb, GRID, torch.tensor(POINTS))[0, 3 * 25 + 5].reshape(5, 25, 25)
    assert weights.sum(dim=(1, 2)).tolist() == pytest.approx([1] * 5)
    centre, top_left, top_right, bottom_right, bottom_left = weights
    assert [centre[15, 4].item(), centre[15, 5].item()] == pytest.approx([0.5, 0.5])  # (4.5, 15): of the box (L12)
    assert [top_left[2, 3].item(), top_left[2, 4].item()] == pytest.approx([0.5, 0.5])
    assert [top_right[2, 5].item(), top_right[2, 6].item()] == pytest.approx([0.5, 0.5])
    assert [bottom_right[24, 5].item(), bottom_right[24, 6].item()] == pytest.approx([0.5, 0.5])  # 28 is outside: 24
    assert [bottom_left[24, 3].item(), bottom_left[24, 4].item()] == pytest.approx([0.5, 0.5])


def test_aggregation_is_sample_concatenate_fuse() -> None:
    block = FeatureAggregation(GRID, channels=6, width=4, norm=nn.BatchNorm2d(4)).eval()
    y, ltrb = randn(2, 6, 25, 25), distances(2, 25, seed=3)
    at = 2 * (five_points(ltrb, GRID) - GRID.origin) / (8 * 24) - 1
    sampled = [functional.grid_sample(y, p, padding_mode="border", align_corners=True) for p in at.unbind(1)]
    # The fusing convolution over 5 x 6 concatenated channels, from the projections kept point by point.
    fuse = block.project.weight.reshape(len(POINTS), 4, 6).permute(1, 0, 2).reshape(4, 30, 1, 1)
    with torch.no_grad():
        wanted = torch.relu(block.norm(functional.conv2d(torch.cat(sampled, dim=1), fuse)))
        torch.testing.assert_close(block(y, ltrb), wanted, atol=1e-5, rtol=1e-4)


def test_localisation_does_not_move_the_boxes() -> None:
    block = FeatureAggregation(GRID, channels=6, width=4, norm=nn.Identity())
    y, ltrb = randn(1, 6, 25, 25).requires_grad_(), distances(1, 25).requires_grad_()
    block(y, ltrb).sum().backward()
    assert ltrb.grad is None
    assert y.grad is not None and y.grad.abs().sum() > 0


# --- non-local block and position embedding ------------------------------------------------------------------------


def test_non_local_block_is_equation_9() -> None:
    block = LocalisationNonLocal(channels=6, inner=4, responses=3)
    x, h = randn(2, 6, 4, 5), randn(2, 3, 4, 5, seed=1)

    def linear(layer: nn.Conv2d, t: Tensor) -> Tensor:
        assert layer.bias is not None
        return torch.einsum("oc,ncm->nom", layer.weight[:, :, 0, 0], t) + layer.bias[:, None]

    with torch.no_grad():
        flat, p = x.flatten(2), linear(block.embed, h.flatten(2))
        theta, phi = linear(block.theta, flat + p), linear(block.phi, flat + p)
        g = linear(block.g, flat)  # of x alone
        attention = torch.softmax(torch.einsum("ncm,nck->nmk", theta, phi), dim=2)  # no 1/sqrt(d)
        wanted = linear(block.f, torch.einsum("nmk,nck->ncm", attention, g)) + flat
        torch.testing.assert_close(block(x, h).flatten(2), wanted, atol=1e-5, rtol=1e-5)


def test_position_embedding_is_the_naive_correlation(small: SiamLA) -> None:
    image, template = crops(2, 255, 3), small.template(crops(2, 127, 4))
    seen: list[Tensor] = []
    assert small.localise.non_local is not None
    handle = small.localise.non_local.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    with torch.no_grad():
        small.search(image, *template)
        features = small.features(image)
    handle.remove()
    assert seen[0].shape == (2, 3, 25, 25)
    for level, (x, z) in enumerate(zip(features, template, strict=True)):
        for sample in range(2):
            naive = functional.conv2d(x[sample : sample + 1], z[sample : sample + 1])[0, 0]  # over all channels
            torch.testing.assert_close(seen[0][sample, level], naive / (32 * 49), atol=1e-5, rtol=1e-4)


def test_summed_cells_is_the_naive_correlation() -> None:
    x, z = randn(2, 6, 9, 8), randn(2, 6, 3, 3, seed=1)
    products = pixelwise(x, z.flatten(2).transpose(1, 2))
    wanted = depthwise_grouped(functional.pad(x, [1] * 4), z).sum(dim=1, keepdim=True)
    torch.testing.assert_close(summed_cells(products, 3), wanted, atol=1e-5, rtol=1e-4)


def test_large_activations_stay_in_half_precision() -> None:
    raw: Any
    net = without_resnet(SiamLA, SMALL)
    with torch.no_grad():
        net.bbox_pred.weight.fill_(1e4)
        net.bbox_pred.bias.fill_(1e4)
        raw = net.eval().search(crops(1, 255, 1), *net.template(crops(1, 127, 2)))
    assert torch.isfinite(raw.ltrb.half()).all()
    assert 255 < raw.ltrb.max() < 500  # a box can fill the crop, and no more
    torch.manual_seed(0)
    block, x, h = LocalisationNonLocal(32, 16, 3), 20 * randn(1, 32, 25, 25), randn(1, 3, 25, 25, seed=1)
    with torch.no_grad():
        wanted = block(x, h)
        ours = block.half()(x.half(), h.half())
    assert torch.isfinite(ours).all()
    assert (ours - wanted).abs().median() < 0.01 * wanted.abs().median()


# --- the networks --------------------------------------------------------------------------------------------------


def test_paper_shapes() -> None:
    with torch.device("meta"):
        net = SiamLA()
        template = net.template(torch.zeros(2, 3, 127, 127))
        raw = net.search(torch.zeros(2, 3, 255, 255), *template)
    assert [tuple(t.shape) for t in template] == [(2, 256, 7, 7)] * 3
    assert len(net.template_names) == 3
    assert raw.logits.shape == (2, 1, 25, 25)
    assert raw.ltrb.shape == (2, 4, 25, 25)
    assert raw.quality is not None and raw.quality.shape == (2, 1, 25, 25)


def test_edge_shapes(edge: SiamLAEdge) -> None:
    with torch.no_grad():
        template = edge.template(crops(2, 127, 1) / 127.5 - 1)
        raw = edge.search(crops(2, 209, 2) / 127.5 - 1, *template)
    assert [tuple(t.shape) for t in template] == [(2, 49, 96)]
    assert raw.logits.shape == (2, 1, 14, 14)
    assert raw.ltrb.shape == (2, 4, 14, 14)
    assert raw.quality is not None and raw.quality.shape == (2, 1, 14, 14)
    assert (raw.ltrb > 0).all()


def test_confidence_is_classification_times_localisation(small: SiamLA) -> None:
    with torch.no_grad():
        raw = small(crops(1, 127, 1), crops(1, 255, 2))
        scores = small.decoder.candidates(raw).scores
    assert raw.quality is not None
    torch.testing.assert_close(scores, (torch.sigmoid(raw.logits) * torch.sigmoid(raw.quality)).flatten(1))
    assert small.decoder.average == 3


BRANCH = "localise."
SWITCHES: list[tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
    ({"localisation": "none"}, (BRANCH,), ()),
    ({"localisation": "centreness"}, (BRANCH,), ("centerness.weight", "centerness.bias")),
    ({"non_local": False}, ("localise.non_local.",), ()),
    ({"aggregation": False}, ("localise.aggregate.",), ("localise.aggregate.0.", "localise.aggregate.1.")),
]


@pytest.mark.parametrize(("switch", "lost", "gained"), SWITCHES, ids=[str(s[0]) for s in SWITCHES])
@pytest.mark.parametrize("build", [SiamLA, SiamLAEdge])
def test_each_switch_removes_its_own_parameters(
    build: Any, switch: dict[str, Any], lost: tuple[str, ...], gained: tuple[str, ...]
) -> None:
    config: LocalisationConfig = SiamLAConfig() if build is SiamLA else SiamLAEdgeConfig()
    with torch.device("meta"):
        everything = {name for name, _ in build(config).named_parameters()}
        remaining = {name for name, _ in build(dataclasses.replace(config, **switch)).named_parameters()}
    assert everything - remaining == {name for name in everything if name.startswith(lost)}
    assert all(name.startswith(gained) for name in remaining - everything)
    assert remaining != everything


@pytest.mark.parametrize("switch", [s[0] for s in SWITCHES] + [{"average": 1}, {"correlation": "matmul"}], ids=str)
def test_every_configuration_runs(switch: dict[str, Any]) -> None:
    net = without_resnet(SiamLA, dataclasses.replace(SMALL, **switch)).eval()
    with torch.no_grad():
        raw = net(crops(1, 127, 1), crops(1, 255, 2))
        choice = net.decoder(raw, torch.full((1, 2), 60.0), torch.zeros(3))
    assert (raw.quality is None) == (switch.get("localisation") == "none")
    assert choice.response.shape == (1, 25, 25)


def test_switches_leave_classification_and_boxes_alone() -> None:
    with_branch, without = (
        without_resnet(SiamLA, dataclasses.replace(SMALL, localisation=s)) for s in ("separate", "none")
    )
    without.load_state_dict(with_branch.state_dict(), strict=False)
    with torch.no_grad():
        a, b = (net.eval()(crops(1, 127, 1), crops(1, 255, 2)) for net in (with_branch, without))
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.ltrb, b.ltrb)


def test_unknown_localisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"localisation must be one of separate, centreness, none, got 'lafa'"):
        SiamLAConfig(localisation="lafa")
    with pytest.raises(ValueError, match=r"correlation must be one of"):
        SiamLAConfig(correlation="fourier")


@pytest.mark.parametrize("build", [SiamLA, SiamLAEdge])
def test_gradients_are_finite_and_reach_every_parameter(build: Any) -> None:
    torch.manual_seed(0)
    net = without_resnet(SiamLA, SMALL) if build is SiamLA else SiamLAEdge()
    side = net.search_size
    raw = net.train()(crops(2, 127, 1) * net.normalisation.scale, crops(2, side, 2) * net.normalisation.scale)
    assert raw.quality is not None
    (raw.logits.square().mean() + raw.ltrb.log().square().mean() + (raw.quality - 1).square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    silent = [n for n, p in net.named_parameters() if n.startswith("localise") and not p.grad.abs().sum() > 0]
    # The same for every cell, phi's bias leaves the softmax as it is; one before a normalisation cancels likewise.
    assert all(name.endswith("bias") for name in silent), silent


def test_difference_of_two_logits_is_the_one() -> None:
    """How weights of SiamCAR become ours (section 6 of the reference): w = w1 - w0, b = b1 - b0."""
    two, one = nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
    assert two.bias is not None and one.bias is not None
    with torch.no_grad():
        one.weight.copy_(two.weight[1:] - two.weight[:1])
        one.bias.copy_(two.bias[1:] - two.bias[:1])
        x = randn(1, 4, 5, 5)
        torch.testing.assert_close(torch.sigmoid(one(x))[:, 0], torch.softmax(two(x), dim=1)[:, 1])


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["siamla-r50", "siamla-mobilenetv2"])
def test_graphs_compute_the_network(model: str, edge: SiamLAEdge, tmp_path: Path) -> None:
    net = edge if model == "siamla-mobilenetv2" else lively(without_resnet(SiamLA))
    with torch.no_grad():  # or attention looks at one cell alone, and rounding chooses which
        net.localise.non_local.theta.weight.mul_(1 / math.sqrt(net.config.inner))
    bundle = export_bundle(model, net, tmp_path, "unspecified")
    difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 4))
    assert difference.ok, difference
    check_batch(net, bundle)
