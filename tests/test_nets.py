"""Networks: shapes, geometry, parts against hand-made references, imports, and the decode that every backend shares.

Expensive forward passes of ResNet-50 are done once; everything behind the backbone is tested on made-up feature maps.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from siamtrack.nets import MODELS
from siamtrack.nets.attention import ChannelAttention, SpatialAttention
from siamtrack.nets.backbones import MobileNetV2, ResNet50Dilated
from siamtrack.nets.correlation import DEPTHWISE_FORMS, pixelwise
from siamtrack.nets.decode import (
    AnchorFree,
    Grid,
    Normalisation,
    RawMaps,
    SearchGraph,
    TemplateGraph,
    decode_boxes,
    normalise,
    size_penalty,
    target_probability,
)
from siamtrack.nets.edge import cell_kernel, covered_cells
from siamtrack.nets.pretrained import load_mobilenetv2_imagenet, load_resnet50_imagenet
from siamtrack.nets.siamcan import SiamCAN, SiamCANConfig, SiamCANEdge, SiamCANEdgeConfig


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


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


# --- the paper's network -------------------------------------------------------------------------------------------


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


# --- the edge network ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edge() -> SiamCANEdge:
    """Weights that keep activations alive, so that different images give different answers."""
    torch.manual_seed(0)
    net = SiamCANEdge()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net.eval()


def test_edge_shapes(edge: SiamCANEdge) -> None:
    with torch.no_grad():
        template = edge.template(rand(2, 3, 127, 127))
        raw = edge.search(rand(2, 3, 209, 209, seed=1), *template)
    assert [tuple(t.shape) for t in template] == [(2, 49, 96)]
    assert edge.template_names == ("kernel",)
    assert raw.logits.shape == (2, 1, 14, 14)
    assert raw.ltrb.shape == (2, 4, 14, 14)
    assert (raw.ltrb > 0).all()


@pytest.mark.parametrize(
    ("switch", "lost"),
    [
        ({"channel_attention": False}, {"attention.conv.weight"}),
        ({"spatial_attention": False}, {"cls.spatial.conv.weight", "loc.spatial.conv.weight"}),
    ],
    ids=["channel", "spatial"],
)
def test_each_edge_switch_removes_its_own_parameters(switch: dict[str, bool], lost: set[str]) -> None:
    with torch.device("meta"):
        everything = {name for name, _ in SiamCANEdge().named_parameters()}
        remaining = {name for name, _ in SiamCANEdge(SiamCANEdgeConfig(**switch)).named_parameters()}
    assert everything - remaining == lost
    assert remaining <= everything


def test_edge_blocks_and_channels_set_the_size() -> None:
    with torch.device("meta"):
        default, deeper, wider = (
            count(SiamCANEdge(c))
            for c in (SiamCANEdgeConfig(), SiamCANEdgeConfig(blocks=4), SiamCANEdgeConfig(channels=128))
        )
    width = 96
    block = (9 * width + 2 * width) + (width * width + 2 * width)  # depthwise 3x3 + BN, 1x1 + BN
    assert deeper - default == 2 * block
    assert wider > default


def test_edge_weights_keep_their_names() -> None:
    """Checkpoints of the shipped model must go on loading: its parameters, and their shapes, are a file format."""
    with torch.device("meta"):
        state = {name: tuple(value.shape) for name, value in SiamCANEdge().state_dict().items()}

    def norm(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias", "running_mean", "running_var")
        return {**{f"{prefix}.{part}": (width,) for part in parts}, f"{prefix}.num_batches_tracked": ()}

    head: dict[str, tuple[int, ...]] = {
        "neck8.weight": (96, 32, 2, 2),
        "neck16.weight": (96, 96, 1, 1),
        "attention.conv.weight": (1, 1, 5),
        "mix.0.weight": (96, 49, 1, 1),
        **norm("neck_norm", 96),
        **norm("mix.1", 96),
    }
    for branch, outputs in (("cls", 1), ("loc", 4)):
        head |= {
            f"{branch}.spatial.conv.weight": (1, 2, 7, 7),
            f"{branch}.predict.weight": (outputs, 96, 1, 1),
            f"{branch}.predict.bias": (outputs,),
        }
        for i in range(6):
            head[f"{branch}.tower.{i}.0.weight"] = (96, 96, 1, 1) if i % 2 else (96, 1, 3, 3)
            head |= norm(f"{branch}.tower.{i}.1", 96)
    assert {name: shape for name, shape in state.items() if not name.startswith("backbone.")} == head
    backbone = {name.removeprefix("backbone.") for name in state} & set(MobileNetV2().state_dict())
    assert backbone == {n.removeprefix("backbone.") for n in state if n.startswith("backbone.")}
    assert {"stem.conv.weight", "stages.1.0.expand.conv.bias", "stages.4.1.project.weight"} <= backbone


def test_edge_template_kernel_holds_the_attended_cells(edge: SiamCANEdge) -> None:
    image = rand(1, 3, 127, 127)
    with torch.no_grad():
        z = edge.features(image)
        assert z.shape == (1, 96, 8, 8)
        z = z[:, :, 1:8, 1:8]
        assert edge.attention is not None
        z = z * edge.attention(z)
        (kernel,) = edge.template(image)
    for row, column in ((0, 0), (3, 3), (2, 6)):
        torch.testing.assert_close(kernel[0, 7 * row + column], z[0, :, row, column] / math.sqrt(96))


@pytest.mark.parametrize(
    ("size", "across", "down"),
    [
        ((127.0, 16.0), [1] * 7, [0, 0, 0, 1, 0, 0, 0]),
        ((48.0, 80.0), [0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]),
        ((8.0, 0.0), [0, 0, 0, 0.5, 0, 0, 0], [0] * 7),
    ],
)
def test_covered_cells_are_those_of_the_box(size: tuple[float, float], across: list[float], down: list[float]) -> None:
    """Cells lie 1 px right of and below the middle, so that a box of whole cells covers 1/16 of the next one."""
    covered = covered_cells(torch.tensor([[60.0, 60.0], size]), 7)
    assert covered.shape == (2, 49)
    wanted = torch.tensor(down)[:, None] * torch.tensor(across)[None, :]
    assert (covered[1].reshape(7, 7) - wanted).abs().max() < 0.13
    assert (covered[0].reshape(7, 7)[2:5, 2:5] == 1).all()
    total = covered[1].sum() * 16**2
    assert total == pytest.approx(min(size[0], 7 * 16) * size[1], rel=0.02)


@pytest.fixture(scope="module")
def sized(edge: SiamCANEdge) -> SiamCANEdge:
    """The same weights in a network that is told the target's size."""
    net = SiamCANEdge(SiamCANEdgeConfig(takes_size=True))
    net.load_state_dict(edge.state_dict())
    return net.eval()


def test_weights_of_an_edge_network_start_one_that_is_told_the_size(edge: SiamCANEdge, sized: SiamCANEdge) -> None:
    image, search = rand(2, 3, 127, 127), rand(2, 3, 209, 209, seed=1)
    with torch.no_grad():
        before = edge(image, search)
        for size in ([[64.0, 64], [64, 64]], [[100.0, 40], [30, 90]]):
            template = sized.template(image, torch.tensor(size))
            assert [tuple(t.shape) for t in template] == [(2, 98, 96), (2, 96, 1, 1)]
            now = sized.search(search, *template)
            torch.testing.assert_close(now.logits, before.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(now.ltrb, before.ltrb, rtol=2e-3, atol=0)
    again = SiamCANEdge(SiamCANEdgeConfig(takes_size=True))
    again.load_state_dict(sized.state_dict())  # its own weights are taken as they are
    assert sized.template_names == ("kernel", "bias")
    assert edge.template_names == ("kernel",)


def test_the_size_parts_the_template_and_sets_the_bias(sized: SiamCANEdge) -> None:
    net = copy.deepcopy(sized)
    image, size = rand(1, 3, 127, 127), torch.tensor([[48.0, 80.0]])
    with torch.no_grad():
        nn.init.normal_(net.shape.weight)
        kernel, bias = net.template(image, size)
        whole = cell_kernel(net.template_features(image) * net.attention(net.template_features(image)))  # type: ignore[misc]
        covered = covered_cells(size, 7)
        torch.testing.assert_close(kernel[:, :49] + kernel[:, 49:], whole)
        torch.testing.assert_close(kernel[0, 24], whole[0, 24])  # the middle is all target
        assert (kernel[0, 0] == 0).all()  # a corner is none of it
        torch.testing.assert_close(bias[0, :, 0, 0], net.shape.weight @ covered[0])
        search = rand(1, 3, 209, 209, seed=1)
        seen = [net(image, search, torch.tensor([wh])) for wh in ([48.0, 80.0], [80.0, 48.0])]
    assert (seen[0].ltrb - seen[1].ltrb).abs().max() > 1e-3


def test_edge_cell_lies_on_pixel_16_i() -> None:
    """The claim behind origin 0.5: with averaging kernels a cell's gradient is symmetric about pixel 16 i."""
    backbone = MobileNetV2()
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            p.fill_(0.0 if name.endswith("bias") else 1 / p[0].numel())
    image = torch.full((1, 3, 255, 255), 0.005, requires_grad=True)  # so small that ReLU6 stays the identity
    features = backbone(image)[1]
    assert features.shape == (1, 96, 16, 16)
    features[0, 0, 8, 8].backward()  # sees 117 pixels to each side, all inside
    assert image.grad is not None
    weight = image.grad[0, 0].sum(dim=0)
    touched = weight.nonzero()[:, 0]
    assert (int(touched[0]) + int(touched[-1])) / 2 == 128
    assert float((weight * torch.arange(255)).sum() / weight.sum()) == pytest.approx(128, abs=0.01)


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


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", sorted(DEPTHWISE_FORMS))
def test_depthwise_forms_equal_a_loop(form: str, batch: int) -> None:
    search, kernel = randn(batch, 5, 9, 11, seed=1), randn(batch, 5, 3, 3, seed=2)
    wanted = torch.zeros(batch, 5, 7, 9)
    for row in range(7):
        for column in range(9):
            wanted[:, :, row, column] = (search[:, :, row : row + 3, column : column + 3] * kernel).sum(dim=(2, 3))
    torch.testing.assert_close(DEPTHWISE_FORMS[form](search, kernel), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_depthwise_forms_agree_at_full_size(batch: int) -> None:
    search, kernel = randn(batch, 256, 29, 29, seed=1), randn(batch, 256, 5, 5, seed=2) / 5
    grouped, matmul = (form(search, kernel) for form in DEPTHWISE_FORMS.values())
    assert grouped.shape == (batch, 256, 25, 25)
    assert (grouped - matmul).abs().max() < 1e-5 * grouped.abs().max()


def test_pixelwise_is_an_inner_product() -> None:
    search, kernel = randn(2, 6, 4, 5, seed=1), randn(2, 7, 6, seed=2)
    torch.testing.assert_close(pixelwise(search, kernel), torch.einsum("nchw,nmc->nmhw", search, kernel))


def test_channel_attention_by_hand() -> None:
    attention = ChannelAttention(kernel=3)
    with torch.no_grad():
        attention.conv.weight.copy_(torch.tensor([[[0.5, 1.0, -2.0]]]))
    # Channel means 1, 2, 3, 4; outside channels count as 0.
    template = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None, None] + torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
    raw = [1 - 2 * 2, 0.5 * 1 + 2 - 2 * 3, 0.5 * 2 + 3 - 2 * 4, 0.5 * 3 + 4]
    wanted = [1 / (1 + math.exp(-r)) for r in raw]
    with torch.no_grad():
        weights = attention(template)
    assert weights.shape == (1, 4, 1, 1)
    assert weights.flatten().tolist() == pytest.approx(wanted)


def test_channel_attention_kernel_is_5() -> None:
    assert ChannelAttention().conv.weight.shape == (1, 1, 5)  # erratum S3
    assert ChannelAttention().conv.bias is None


def test_spatial_attention_multiplies_its_input() -> None:
    attention = SpatialAttention(kernel=1)
    with torch.no_grad():
        attention.conv.weight.copy_(torch.tensor([2.0, -1.0])[None, :, None, None])  # 2 mean - max
    x = randn(2, 3, 4, 4)
    gate = torch.sigmoid(2 * x.mean(dim=1, keepdim=True) - x.max(dim=1, keepdim=True).values)
    with torch.no_grad():
        out = attention(x)
    assert out.shape == x.shape  # the equations would give one channel (erratum S5)
    torch.testing.assert_close(out, x * gate)


def test_spatial_attention_looks_7_wide() -> None:
    x = torch.zeros(1, 2, 15, 15)
    x[0, :, 7, 7] = 1
    attention = SpatialAttention()
    with torch.no_grad():
        attention.conv.weight.fill_(1.0)
        gate = attention.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1))
    assert int((gate != 0).sum()) == 49


# --- imports -------------------------------------------------------------------------------------------------------


def timm_keys(backbone: MobileNetV2) -> list[tuple[str, str, tuple[int, ...]]]:
    """(convolution, its norm, weight shape) of timm's `mobilenetv2_100`, stem first."""
    keys = [("conv_stem", "bn1", (32, 3, 3, 3))]
    inputs = 32
    for s, (outputs, blocks, _, expansion) in enumerate(backbone.STAGES):
        for b in range(blocks):
            prefix, width = f"blocks.{s}.{b}", inputs * expansion
            names = ("conv_dw", "conv_pw") if expansion == 1 else ("conv_pw", "conv_dw", "conv_pwl")
            shapes = [(width, 1, 3, 3), (outputs, width, 1, 1)]
            if expansion > 1:
                shapes.insert(0, (width, inputs, 1, 1))
            keys += [
                (f"{prefix}.{name}", f"{prefix}.bn{i}", shape)
                for i, (name, shape) in enumerate(zip(names, shapes, strict=True), start=1)
            ]
            inputs = outputs
    return keys


def timm_state(backbone: MobileNetV2) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for seed, (conv, norm, shape) in enumerate(timm_keys(backbone)):
        state[f"{conv}.weight"] = randn(*shape, seed=seed) * math.sqrt(2 / math.prod(shape[1:]))
        state[f"{norm}.weight"] = 0.5 + rand(shape[0], seed=seed + 100)
        state[f"{norm}.bias"] = randn(shape[0], seed=seed + 200) * 0.3
        state[f"{norm}.running_mean"] = randn(shape[0], seed=seed + 300) * 0.3
        state[f"{norm}.running_var"] = 0.2 + rand(shape[0], seed=seed + 400)
    state["classifier.weight"] = torch.zeros(2, 2)  # what a real file also holds
    return state


def explicit_mobilenet(state: dict[str, Tensor], image_rgb: Tensor) -> list[Tensor]:
    """Output of every stage with BatchNorm written out, in RGB order, as timm computes it."""

    def unit(x: Tensor, conv: str, norm: str, stride: int = 1, active: bool = True) -> Tensor:
        weight = state[f"{conv}.weight"]
        groups = weight.shape[0] if weight.shape[1] == 1 else 1
        x = functional.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=groups)
        parts = [state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = functional.batch_norm(x, *parts, training=False, eps=1e-5)
        return functional.relu6(x) if active else x

    x = unit(image_rgb, "conv_stem", "bn1", 2)
    outputs = []
    for s, (_, blocks, stride, expansion) in enumerate(MobileNetV2.STAGES):
        for b in range(blocks):
            key, step, before = f"blocks.{s}.{b}", stride if b == 0 else 1, x
            if expansion == 1:
                x = unit(x, f"{key}.conv_dw", f"{key}.bn1", step)
                x = unit(x, f"{key}.conv_pw", f"{key}.bn2", active=False)
            else:
                x = unit(x, f"{key}.conv_pw", f"{key}.bn1")
                x = unit(x, f"{key}.conv_dw", f"{key}.bn2", step)
                x = unit(x, f"{key}.conv_pwl", f"{key}.bn3", active=False)
            if b > 0:
                x = x + before
        outputs.append(x)
    return outputs


def test_mobilenet_import_folds_batchnorm_and_turns_rgb_to_bgr() -> None:
    backbone = MobileNetV2().eval()
    state = timm_state(backbone)
    load_mobilenetv2_imagenet(backbone, state)
    image_bgr = randn(1, 3, 63, 63, seed=9)
    with torch.no_grad():
        stride8, stride16 = backbone(image_bgr)
        stages = explicit_mobilenet(state, image_bgr.flip(1))
    assert stride8.shape == (1, 32, 8, 8)
    for ours, wanted in ((stride8, stages[2]), (stride16, stages[4])):
        # Rounding grows through the random blocks; the wrong epsilon, order or stem would be a hundred times worse.
        assert (ours - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("blocks.3.2.bn2.running_var", None, r"blocks\.3\.2\.bn2\.running_var missing"),
        ("conv_stem.weight", None, r"conv_stem\.weight missing"),
        ("blocks.1.0.conv_pw.weight", torch.zeros(96, 17, 1, 1), r"shape \(96, 17, 1, 1\), expected \(96, 16, 1, 1\)"),
    ],
)
def test_mobilenet_import_names_what_does_not_fit(key: str, value: Tensor | None, message: str) -> None:
    backbone = MobileNetV2()
    state = timm_state(backbone)
    del state[key]
    if value is not None:
        state[key] = value
    with pytest.raises(ValueError, match=message):
        load_mobilenetv2_imagenet(backbone, state)


def torchvision_state(resnet: ResNet50Dilated) -> dict[str, Tensor]:
    """Torchvision's layout: every shortcut is 1x1, and there is a classifier."""
    state = {name: value.clone() for name, value in resnet.state_dict().items()}
    for stage in (2, 3, 4):
        name = f"layer{stage}.0.downsample.0.weight"
        state[name] = randn(*state[name].shape[:2], 1, 1, seed=stage)
    state["conv1.weight"] = randn(*state["conv1.weight"].shape)
    state["fc.weight"] = torch.zeros(1000, 2048)
    return state


def test_resnet_import_puts_1x1_shortcuts_into_the_centre(resnet: ResNet50Dilated) -> None:
    loaded = copy.deepcopy(resnet)
    state = torchvision_state(resnet)
    assert load_resnet50_imagenet(loaded, state) == ["fc.weight"]
    torch.testing.assert_close(loaded.conv1.weight, state["conv1.weight"])
    for stage, channels in ((2, 256), (3, 512), (4, 1024)):
        block = getattr(loaded, f"layer{stage}")[0]
        x = randn(1, channels, 15, 15, seed=stage)
        # The strided block is unpadded: its cells lie on odd positions. The others keep every cell.
        seen = x[:, :, 1:-1:2, 1:-1:2] if stage == 2 else x
        with torch.no_grad():
            wanted = functional.conv2d(seen, state[f"layer{stage}.0.downsample.0.weight"])
            torch.testing.assert_close(block.downsample[0](x), wanted, rtol=1e-4, atol=1e-3)


def test_resnet_import_takes_its_own_layout_as_it_is(resnet: ResNet50Dilated) -> None:
    state = {name: value for name, value in resnet.state_dict().items() if "num_batches" not in name}
    state["layer4.0.downsample.0.weight"] = state["layer4.0.downsample.0.weight"] + 1
    loaded = copy.deepcopy(resnet)
    assert load_resnet50_imagenet(loaded, state) == []
    torch.testing.assert_close(loaded.layer4[0].downsample[0].weight, state["layer4.0.downsample.0.weight"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer3.5.bn2.running_mean", None, "layer3.5.bn2.running_mean missing"),
        ("layer1.0.conv2.weight", torch.zeros(64, 32, 3, 3), r"layer1.0.conv2.weight has shape \(64, 32, 3, 3\)"),
    ],
)
def test_resnet_import_names_what_does_not_fit(
    resnet: ResNet50Dilated, name: str, value: Tensor | None, message: str
) -> None:
    state = dict(resnet.state_dict())
    del state[name]
    if value is not None:
        state[name] = value
    with pytest.raises(ValueError, match=message):
        load_resnet50_imagenet(resnet, state)


# --- decode --------------------------------------------------------------------------------------------------------


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
    boxes = decode_boxes(maps, Grid(3, 8, 31.5).points())
    assert boxes.shape == (2, 9, 4)
    assert boxes[1, cell].tolist() == pytest.approx(box)
    assert boxes[0, cell, 2:].tolist() == [2, 2]


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


def test_batch_of_three_equals_three_singles(edge: SiamCANEdge) -> None:
    side = edge.search_size
    images = torch.randint(0, 256, (3, side, side, 3), generator=seeded(), dtype=torch.uint8)
    templates = torch.randint(0, 256, (3, 127, 127, 3), generator=seeded(1), dtype=torch.uint8)
    sizes, tuning = 20 + 100 * rand(3, 2), torch.tensor([0.06, 0.4, 0.0])
    search, template = SearchGraph(edge), TemplateGraph(edge)
    with torch.no_grad():
        (kernels,) = template(templates)
        together = search(images, kernels, sizes, tuning)
        for i in range(3):
            (kernel,) = template(templates[i : i + 1])
            alone = search(images[i : i + 1], kernel, sizes[i : i + 1], tuning)
            for whole, single in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[i : i + 1], single, rtol=1e-4, atol=1e-4)
    # Three different answers, or the comparison would not notice samples that were mixed up.
    assert len({tuple(box) for box in together[0].tolist()}) == 3
