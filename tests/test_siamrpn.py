"""SiamRPN on AlexNet and SiamRPN++: shapes, geometry, anchors, names of the reference implementation, export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import check_batch, crops, lively, without_resnet
from torch import nn

from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack.nets.backbones import AlexNet, AlexNetV1
from siamtrack.nets.build import build_model
from siamtrack.nets.decode import AnchorBased, AnchorMaps
from siamtrack.nets.siamrpn import RATIOS, SiamRPN, SiamRPNConfig, SiamRPNpp, SiamRPNppConfig, anchor_sizes


@pytest.fixture(scope="module")
def alexnet() -> SiamRPN:
    return quiet(lively(SiamRPN(), batch=2))


@pytest.fixture(scope="module")
def pyramid() -> SiamRPNpp:
    """SiamRPN++ on a stand-in for its backbone."""
    return quiet(lively(without_resnet(SiamRPNpp, SiamRPNppConfig(channels=64)), batch=2))


def quiet(net: Any) -> Any:
    """Box deltas of the size that training leaves, not boxes sixty times their anchor."""
    with torch.no_grad():
        for head in getattr(net, "heads", None) or [net.head]:
            head.loc.head[-1].weight.mul_(0.02)
    return net


def test_anchors_are_truncated_to_strides() -> None:
    assert anchor_sizes(RATIOS, 8, 8) == ((104, 32), (88, 40), (64, 64), (40, 80), (32, 96))
    assert anchor_sizes((1.0,), 8, 8) == ((64, 64),)


@pytest.mark.parametrize(
    ("build", "kernel", "count", "search", "cells"), [(SiamRPN, 4, 2, 287, 21), (SiamRPNpp, 5, 6, 255, 25)]
)
def test_shapes(build: Any, kernel: int, count: int, search: int, cells: int) -> None:
    with torch.device("meta"):
        net = build()
        template = net.template(torch.zeros(2, 3, 127, 127))
        raw = net.search(torch.zeros(2, 3, search, search), *template)
    assert (net.template_size, net.search_size) == (127, search)
    assert [tuple(t.shape) for t in template] == [(2, 256, kernel, kernel)] * count
    assert len(net.template_names) == len(set(net.template_names)) == count
    assert raw.logits.shape == (2, 10, cells, cells)
    assert raw.deltas.shape == (2, 20, cells, cells)
    assert raw.second is None
    assert net.decoder.sizes.shape == (5 * cells * cells, 2)
    # Middle cell on the middle of the crop.
    assert net.grid.origin + net.grid.stride * (cells - 1) / 2 == search / 2


@pytest.mark.parametrize(("build", "cells"), [(AlexNet, (6, 26)), (AlexNetV1, (6, 26))])
def test_alexnet_cell_is_centred_on_pixel_43_plus_8k(build: Any, cells: tuple[int, int]) -> None:
    net = build()
    with torch.device("meta"):
        maps = [build()(torch.zeros(1, 3, side, side))[0] for side in (127, 287)]
    assert [tuple(m.shape) for m in maps] == [(1, 256, n, n) for n in cells]
    for module in net.modules():  # average everything: the gradient then is the field of view, symmetric
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, 2))
            elif isinstance(child, (nn.BatchNorm2d, nn.ReLU)):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                nn.init.constant_(child.weight, 1 / child.weight[0].numel())
    image = torch.zeros(1, 3, 127, 127, requires_grad=True)
    net(image)[0][0, 0, 2, 3].backward()
    assert image.grad is not None
    for axis, k in ((1, 2), (2, 3)):
        weight = image.grad[0].abs().sum(dim=(0, 3 - axis))
        assert float((weight * torch.arange(127)).sum() / weight.sum()) == pytest.approx(43 + 8 * k, abs=0.01)


def test_parameters_are_named_as_in_the_reference() -> None:
    """pysot's legacy AlexNet, and its heads as ``head.{cls,loc}`` or ``heads.{0,1,2}.{cls,loc}`` (reference, 6)."""
    with torch.device("meta"):
        alexnet, pyramid = SiamRPN().state_dict(), SiamRPNpp().state_dict()
    indices = {int(name.split(".")[2]) for name in alexnet if name.startswith("backbone.")}
    assert indices == {0, 1, 4, 5, 8, 9, 11, 12, 14, 15}
    assert alexnet["backbone.features.4.weight"].shape == (256, 96, 5, 5)  # no groups
    for prefix in ("head", "heads.2"):
        state = alexnet if prefix == "head" else pyramid
        assert state[f"{prefix}.cls.conv_kernel.0.weight"].shape == (256, 256, 3, 3)
        assert state[f"{prefix}.loc.conv_search.1.running_var"].shape == (256,)
        assert state[f"{prefix}.loc.head.3.bias"].shape == (20,)
    rest = {name for name in pyramid if not name.startswith(("backbone.", "necks.", "heads."))}
    assert rest == {"cls_weight", "loc_weight"}
    with torch.device("meta"):
        mean = SiamRPNpp(SiamRPNppConfig(weighted_levels=False)).state_dict()
    assert set(pyramid) - set(mean) == rest


def test_levels_are_mixed_by_softmax_weights_or_evenly(pyramid: SiamRPNpp) -> None:
    even = without_resnet(SiamRPNpp, SiamRPNppConfig(channels=64, weighted_levels=False)).eval()
    even.load_state_dict({k: v for k, v in pyramid.state_dict().items() if k not in ("cls_weight", "loc_weight")})
    template, search = crops(1, 127, 3), crops(1, 255, 4)

    def maps(cls_weight: list[float], loc_weight: list[float]) -> AnchorMaps:
        with torch.no_grad():
            pyramid.cls_weight.copy_(torch.tensor(cls_weight))
            pyramid.loc_weight.copy_(torch.tensor(loc_weight))
            return pyramid(template, search)

    alone = [maps([99.0 * (i == j) for j in range(3)], [99.0 * (i == j) for j in range(3)]) for i in range(3)]
    mixed = maps([0.0, math.log(2), 0.0], [math.log(2), 0.0, 0.0])
    with torch.no_grad():
        mean = even(template, search)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(mixed.logits, (alone[0][0] + 2 * alone[1][0] + alone[2][0]) / 4, **tolerance)
    torch.testing.assert_close(mixed.deltas, (2 * alone[0][1] + alone[1][1] + alone[2][1]) / 4, **tolerance)
    torch.testing.assert_close(mean.logits, (alone[0][0] + alone[1][0] + alone[2][0]) / 3, **tolerance)
    maps([0.0] * 3, [0.0] * 3)


def test_a_box_is_its_anchor_moved_and_stretched() -> None:
    decoder = AnchorBased(SiamRPN.grid, anchor_sizes(RATIOS, 8, 8))
    logits, deltas = torch.zeros(1, 10, 21, 21), torch.zeros(1, 20, 21, 21)
    logits[0, 5 + 3, 4, 7] = 5  # anchor 3, 40x80, is the target's at row 4, column 7
    deltas[0, 3, 4, 7], deltas[0, 8, 4, 7] = 0.5, -0.25
    deltas[0, 13, 4, 7], deltas[0, 18, 4, 7] = math.log(2), math.log(0.5)
    choice = decoder(AnchorMaps(logits, deltas), torch.full((1, 2), 60.0), torch.zeros(3))
    wanted = (63.5 + 8 * 7 + 0.5 * 40, 63.5 + 8 * 4 - 0.25 * 80, 80, 40)
    assert choice.box[0].tolist() == pytest.approx(wanted, rel=1e-5)
    assert float(choice.score) == pytest.approx(1 / (1 + math.exp(-5)))
    assert float(choice.response[0, 4, 7]) == pytest.approx(float(choice.score))  # the best anchor of each cell


def test_alexnet_has_no_levels_to_configure() -> None:
    for field in ("channels", "weighted_levels"):
        with pytest.raises(ValueError, match=f"unknown field {field}; known: correlation, ratios, scale"):
            build_model("siamrpn-alexnet", {field: 64})
    assert build_model("siamrpn-alexnet", {"scale": 4}).config == SiamRPNConfig(scale=4)


def test_gradients_are_finite() -> None:
    net = without_resnet(SiamRPNpp, SiamRPNppConfig(channels=16)).train()
    raw = net(crops(2, 127, 1), crops(2, 255, 2))
    (raw.logits.square().mean() + raw.deltas.abs().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("which", ["alexnet", "pyramid"])
def test_exported_graphs_compute_the_network(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    net = request.getfixturevalue(which)
    bundle = export_bundle("siamrpn", net, tmp_path, "none")
    difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 2))
    assert difference.ok, difference
    check_batch(net, bundle)
    tracking = bundle.manifest.tracking  # as published
    wanted = (0.16, 0.4, 0.3) if which == "alexnet" else (0.05, 0.42, 0.38)
    assert (tracking.penalty_k, tracking.window_influence, tracking.size_rate) == wanted
