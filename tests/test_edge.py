"""The edge SiamCAN: shapes, switches, names of its weights, its running template, what the target's size changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from stand_ins import count, rand, seeded
from torch import nn

from siamtrack.nets.backbones import MobileNetV2
from siamtrack.nets.decode import (
    SearchGraph,
    TemplateGraph,
    is_adaptive,
)
from siamtrack.nets.edge import cell_kernel, covered_cells
from siamtrack.nets.siamcan import SiamCANEdge, SiamCANEdgeConfig


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
    assert (edge.template_names, edge.update_names) == (("feature",), ("kernel",))
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
    assert (sized.template_names, sized.update_names) == (("kernel", "bias"), ())


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


def test_a_track_starts_with_the_first_frame_s_kernel_and_an_average_never_leaves_it(edge: SiamCANEdge) -> None:
    with torch.no_grad():
        first, seen = (edge.template(rand(2, 3, 127, 127, seed=seed))[0] for seed in (0, 1))
        torch.testing.assert_close(edge.update(first, first, first)[0], first)
        (once,) = edge.update(first, first, seen)
        torch.testing.assert_close(once, 0.86 * first + 0.14 * seen, rtol=1e-4, atol=1e-6)  # 0.7 of 0.2 is the new one
        history = first
        for _ in range(60):
            (history,) = edge.update(first, history, seen)
    torch.testing.assert_close(history, 0.3 * first + 0.7 * seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [SiamCANEdgeConfig(update_share=0), SiamCANEdgeConfig(takes_size=True)])
def test_a_template_that_is_not_renewed_says_so(config: SiamCANEdgeConfig) -> None:
    net, crop = SiamCANEdge(config), rand(2, 3, 127, 127)
    assert not is_adaptive(net)
    with pytest.raises(ValueError, match="update_share 0, or takes_size"):
        net.update(crop, crop, crop)


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
