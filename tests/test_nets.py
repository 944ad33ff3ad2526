"""Networks: shapes, geometry and gradients.

Expensive forward passes of ResNet-50 are done once; everything behind the backbone is tested on made-up feature maps.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from stand_ins import count, rand, randn
from torch import Tensor, nn

from siamtrack.nets import MODELS
from siamtrack.nets.backbones import ResNet50Dilated
from siamtrack.nets.correlation import DEPTHWISE_FORMS
from siamtrack.nets.decode import (
    RawMaps,
)
from siamtrack.nets.siamcan import SiamCAN, SiamCANConfig, SiamCANEdge


def on_meta(config: SiamCANConfig) -> SiamCAN:
    """The network without memory for its weights: enough to count and name them."""
    with torch.device("meta"):
        return SiamCAN(config)


class FixedBackbone(nn.Module):
    """Stands in for a backbone: the same feature maps whatever the image."""

    def __init__(self, features: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.features


def siamcan_without_backbone(config: SiamCANConfig, batch: int = 1, cells: int = 31) -> SiamCAN:
    """SiamCAN behind made-up feature maps. The same seed gives the same weights for the parts configurations share."""
    with torch.device("meta"):
        net = SiamCAN(config)
    net.backbone = None  # type: ignore[assignment]
    net.to_empty(device="cpu")
    for name, value in net.state_dict().items():
        seed = sum(map(ord, name))
        if name.endswith("running_var"):
            value.copy_(0.5 + rand(*value.shape, seed=seed))
        elif value.is_floating_point() and value.dim() > 1:
            value.copy_(randn(*value.shape, seed=seed) / math.sqrt(value[0].numel()))
        elif value.is_floating_point():
            value.copy_(0.5 + rand(*value.shape, seed=seed))
    maps = tuple(randn(batch, channels, cells, cells, seed=channels) for channels in SiamCAN.levels)
    net.backbone = FixedBackbone(maps)  # type: ignore[assignment]
    return net.eval()


@pytest.fixture(scope="module")
def resnet() -> ResNet50Dilated:
    torch.manual_seed(0)
    return ResNet50Dilated().eval()


def test_siamcan_r50_shapes() -> None:
    torch.manual_seed(0)
    net = SiamCAN().eval()
    assert (net.template_size, net.search_size) == (127, 255)
    with torch.no_grad():
        template = net.template(rand(1, 3, 127, 127))
        raw = net.search(rand(1, 3, 255, 255, seed=1), *template)
    assert [tuple(t.shape) for t in template] == [(1, 256, 5, 5)] * 6 + [(1, 256, 1, 1)] * 3
    assert len(net.template_names) == len(template)
    assert raw.logits.shape == (1, 2, 25, 25)
    assert raw.ltrb.shape == (1, 4, 25, 25)
    assert (raw.ltrb > 0).all()
    assert all(((v > 0) & (v < 1)).all() for v in template[6:])


def test_siamcan_r50_size() -> None:
    full = count(on_meta(SiamCANConfig()))
    assert full == pytest.approx(53.93e6, rel=0.005)
    plain = count(on_meta(SiamCANConfig(channel_attention=False, spatial_attention=False)))
    assert full - plain == 603  # 3 Conv1d of 5, 6 Conv2d of 2 x 7 x 7: "almost free" (algorithms 1.5)


@pytest.mark.parametrize(
    ("switch", "lost"),
    [
        ({"channel_attention": False}, {f"attentions.{i}.conv.weight" for i in range(3)}),
        (
            {"spatial_attention": False},
            {f"{branch}.{i}.spatial.conv.weight" for branch in ("cls", "loc") for i in range(3)},
        ),
        (
            {"adjust_convs": False},
            {
                f"{branch}.{i}.{side}.{part}"
                for branch in ("cls", "loc")
                for i in range(3)
                for side in ("conv_kernel", "conv_search")
                for part in ("0.weight", "1.weight", "1.bias")
            },
        ),
        ({"correlation": "matmul"}, set()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_switch_removes_its_own_parameters(switch: dict[str, Any], lost: set[str]) -> None:
    everything = {name for name, _ in on_meta(SiamCANConfig()).named_parameters()}
    remaining = {name for name, _ in on_meta(SiamCANConfig(**switch)).named_parameters()}
    assert everything - remaining == lost
    assert remaining <= everything


def test_channels_set_the_width() -> None:
    net = siamcan_without_backbone(SiamCANConfig(channels=32))
    with torch.no_grad():
        assert net.template(rand(1))[0].shape[1] == 32


def test_unknown_correlation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"correlation must be one of.*'fourier'"):
        SiamCANConfig(correlation="fourier")


def one_channel_copy(net: ResNet50Dilated) -> nn.Module:
    """The same strides, paddings and dilations with one channel and averaging kernels.

    Its gradient shows where a cell looks, at a thousandth of the cost. The max pool becomes an average of the same
    window, because a maximum passes its gradient to one pixel only.
    """

    def replace(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                geometry: Any = (child.kernel_size, child.stride, child.padding, child.dilation)
                conv = nn.Conv2d(1, 1, *geometry, bias=False)
                nn.init.constant_(conv.weight, 1 / conv.weight.numel())
                setattr(module, name, conv)
            elif isinstance(child, (nn.BatchNorm2d, nn.ReLU)):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, child.stride, child.padding))
            else:
                replace(child)

    copied = copy.deepcopy(net)
    replace(copied)
    return copied


@pytest.mark.parametrize(
    # Pixels seen by hand: 35 after layer1, then 2 x stride x dilation more for every 3x3.
    ("level", "reach"),
    [(0, 35 + 8 + 3 * 16), (1, 91 + 16 + 5 * 32), (2, 267 + 32 + 2 * 64)],
    ids=["layer2", "layer3", "layer4"],
)
@pytest.mark.parametrize("cell", [(31, 31), (28, 33)], ids=str)
def test_stride_8_cell_is_centred_on_pixel_7_plus_8k(
    resnet: ResNet50Dilated, level: int, reach: int, cell: tuple[int, int]
) -> None:
    # 511 pixels: the layer4 cells in the middle then see no border, which would pull their centroid inwards.
    image = torch.zeros(1, 1, 511, 511, requires_grad=True)
    features = one_channel_copy(resnet)(image)[level]
    assert features.shape[2:] == (63, 63)
    features[0, 0, cell[0], cell[1]].backward()
    assert image.grad is not None
    seen = image.grad[0, 0]
    for axis, k in enumerate(cell):
        weight = seen.sum(dim=1 - axis)
        touched = weight.nonzero()[:, 0]
        centroid = float((weight * torch.arange(511)).sum() / weight.sum())
        assert (int(touched[0]) + int(touched[-1])) / 2 == 7 + 8 * k
        assert int(touched[-1]) - int(touched[0]) + 1 == reach
        assert centroid == pytest.approx(7 + 8 * k, abs=0.01)


@pytest.mark.parametrize(("side", "cells"), [(127, 15), (255, 31), (287, 35)])
def test_backbone_map_sizes(resnet: ResNet50Dilated, side: int, cells: int) -> None:
    maps = one_channel_copy(resnet)(torch.zeros(1, 1, side, side))
    assert [tuple(m.shape[2:]) for m in maps] == [(cells, cells)] * 3


@pytest.mark.parametrize(
    ("model", "size", "first", "last"), [("siamcan-r50", 25, 31.5, 223.5), ("siamcan-mobilenetv2", 14, 0.5, 208.5)]
)
def test_grid_points(model: str, size: int, first: float, last: float) -> None:
    grid = MODELS[model].grid  # type: ignore[attr-defined]
    points = grid.points().reshape(size, size, 2)
    assert points[0, 0].tolist() == [first, first]
    assert points[-1, -1].tolist() == [last, last]
    assert points[0, 1].tolist() == [first + grid.stride, first]  # x runs along a row


def test_template_is_the_centre_of_the_crop() -> None:
    net = siamcan_without_backbone(SiamCANConfig(adjust_convs=False), cells=15)
    with torch.no_grad():
        kernel = net.template(rand(1))[0]
        whole = net.necks[0](net.backbone(rand(1))[0])
    assert kernel.shape == (1, 256, 7, 7)
    torch.testing.assert_close(kernel, whole[:, :, 4:11, 4:11])  # cell 7 of 15 in the middle


def test_without_adjust_convs_v_folds_into_the_kernel() -> None:
    net = siamcan_without_backbone(SiamCANConfig(adjust_convs=False))
    kernels = [randn(1, 256, 7, 7, seed=i) / 49 for i in range(6)]
    weights = [rand(1, 256, 1, 1, seed=i) for i in range(3)]
    ones = [torch.ones(1, 256, 1, 1)] * 3
    folded = [kernel * weights[i % 3] for i, kernel in enumerate(kernels)]
    with torch.no_grad():
        apart = net.search(rand(1), *kernels, *weights)
        together = net.search(rand(1), *folded, *ones)
        unweighted = net.search(rand(1), *kernels, *ones)
    assert apart.logits.shape == (1, 2, 25, 25)
    assert apart.ltrb.shape == (1, 4, 25, 25)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert (unweighted.logits - apart.logits).abs().max() > 1e-3  # or the weights did nothing at all


def test_correlation_forms_give_one_network() -> None:
    grouped, matmul = (siamcan_without_backbone(SiamCANConfig(correlation=form), batch=2) for form in DEPTHWISE_FORMS)
    with torch.no_grad():
        template = grouped.template(rand(1))
        template = tuple(t[:, :, :5, :5] for t in template)  # from a 31x31 map: any 5x5 will do
        torch.testing.assert_close(
            matmul.search(rand(1), *template), grouped.search(rand(1), *template), atol=1e-5, rtol=1e-5
        )


def test_levels_are_mixed_by_softmax_weights() -> None:
    net = siamcan_without_backbone(SiamCANConfig(channels=16))
    kernels = [randn(1, 16, 5, 5, seed=i) for i in range(6)]
    ones = [torch.ones(1, 16, 1, 1)] * 3

    def maps(cls_weight: list[float], loc_weight: list[float]) -> RawMaps:
        with torch.no_grad():
            net.cls_weight.copy_(torch.tensor(cls_weight))
            net.loc_weight.copy_(torch.tensor(loc_weight))
            return net.search(rand(1), *kernels, *ones)

    far = 100.0  # softmax of (100, 0, 0) is one level alone
    alone = [maps([far * (i == j) for j in range(3)], [far * (i == j) for j in range(3)]) for i in range(3)]
    mixed = maps([0.0, math.log(2), 0.0], [math.log(2), 0.0, 0.0])
    torch.testing.assert_close(mixed.logits, (alone[0].logits + 2 * alone[1].logits + alone[2].logits) / 4)
    torch.testing.assert_close(mixed.ltrb, (2 * alone[0].ltrb + alone[1].ltrb + alone[2].ltrb) / 4)


def test_distances_stay_finite_however_large_the_raw_map() -> None:
    net = siamcan_without_backbone(SiamCANConfig(channels=16))
    with torch.no_grad():
        net.loc_scale.fill_(1e6)
        raw = net.search(rand(1), *[randn(1, 16, 5, 5, seed=i) for i in range(6)], *[torch.ones(1, 16, 1, 1)] * 3)
    assert torch.isfinite(raw.ltrb).all()
    assert raw.ltrb.max() > 255  # yet a box can fill the crop


@pytest.mark.parametrize("model", ["siamcan-r50", "siamcan-mobilenetv2"])
def test_gradients_are_finite_and_reach_every_head_parameter(model: str) -> None:
    if model == "siamcan-r50":
        net: nn.Module = siamcan_without_backbone(SiamCANConfig(channels=16))
        template, search = rand(1), rand(1)
        # From 31x31 maps the crop is taken at the same cells as from 15x15: still 7x7.
    else:
        torch.manual_seed(0)
        net = SiamCANEdge()
        template, search = rand(1, 3, 127, 127), rand(1, 3, 255, 255, seed=1)
    raw = net.train()(template, search)
    (raw.logits.square().mean() + raw.ltrb.log().square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    silent = [name for name, p in net.named_parameters() if not p.grad.abs().sum() > 0]  # type: ignore[union-attr]
    # A kernel in front of BatchNorm with one sample's constant is the only thing that may cancel out; weights may not.
    assert not [name for name in silent if "attention" in name or "spatial" in name or "head" in name]
