"""DASTSiam, paper-sized and edge: shapes, geometry, switches, training forward, and update graphs end to end."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
from stand_ins import crops, lively
from torch import Tensor, nn
from torch.nn import functional

from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack import Bundle, SiamTracker, State
from siamtrack.bundle import SEARCH_OUTPUTS, UpdateSpec
from siamtrack.crop import Window
from siamtrack.nets.backbones import ResNet50Layer3, TwoBackbones
from siamtrack.nets.dastsiam import DASTSiam, DASTSiamConfig, DASTSiamEdge, DASTSiamEdgeConfig
from siamtrack.nets.decode import SearchGraph, TemplateGraph, UpdateGraph, is_adaptive
from siamtrack.nets.pretrained import load_resnet50_imagenet
from siamtrack.nets.siamrpn import RATIOS, anchor_sizes
from siamtrack.nets.template_update import TransformerConfig
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import SceneFrame
from siamtrack.state import Thresholds

SMALL = TransformerConfig(width=32, layers=2, heads=4, hidden=48)
TINY = TransformerConfig(width=32, layers=1, heads=2, hidden=32)


class PooledLayer3(nn.Module):
    """Stands in for the backbone: 1024 channels whose cell k is centred on pixel 8 k, almost for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Conv2d(3, 1024, 1)

    def trainable_stages(self) -> list[nn.Module]:
        return [self.level]

    def forward(self, image: Tensor) -> tuple[Tensor]:
        pooled = functional.avg_pool2d(image, 15, 8, padding=7)  # 127 -> 16, 287 -> 36
        return (torch.sin(4 * self.level(pooled)),)


def small(**config: Any) -> Any:
    """DASTSiam with the paper's geometry, a stand-in for its backbone and narrow modules."""
    torch.manual_seed(0)
    with patch("siamtrack.nets.dastsiam.ResNet50Layer3", PooledLayer3):
        return DASTSiam(DASTSiamConfig(**{"transformer": SMALL, **config}))


def pair(net: Any, batch: int = 2) -> tuple[Tensor, Tensor]:
    scale = net.normalisation.scale
    return (crops(batch, 127, 11) - 127) * scale, (crops(batch, net.search_size, 12) - 127) * scale


def shapes(tensors: Any) -> list[tuple[int, ...] | None]:
    return [None if t is None else tuple(t.shape) for t in tensors]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# --- shapes and geometry -------------------------------------------------------------------------------------------


def test_shapes_of_the_release() -> None:
    with torch.device("meta"):
        net = DASTSiam()
        (feature,) = net.template(torch.zeros(2, 3, 127, 127))
        tensors = net.update(feature, feature, feature)
        raw = net.search(torch.zeros(2, 3, 287, 287), *tensors)
        x = net.reduce(net.backbone(torch.zeros(2, 3, 287, 287))[0])
    assert (net.template_size, net.search_size) == (127, 287)  # erratum D1
    assert feature.shape == (2, 256, 16, 16)
    assert x.shape == (2, 256, 36, 36)
    assert dict(zip(net.update_names, shapes(tensors), strict=True)) == {
        "fused": (2, 256, 16, 16), "cls_kernel": (2, 256, 8, 8), "loc_kernel": (2, 256, 8, 8),
    }  # fmt: skip
    assert shapes(raw) == [(2, 2, 25, 25), (2, 4, 25, 25), (2, 1, 25, 25)]
    assert net.decoder.sizes.shape == (625, 2)
    assert DASTSiamConfig().anchors_px == ((64, 64),)  # erratum D11


def test_untied_backbones_double_the_backbone() -> None:
    with torch.device("meta"):
        tied, untied = DASTSiam(), DASTSiam(DASTSiamConfig(untied=True))
    assert parameters(tied) == pytest.approx(22.63e6, rel=0.005)
    assert parameters(untied) == pytest.approx(31.17e6, rel=0.005)
    assert parameters(untied) - parameters(tied) == parameters(tied.backbone)
    assert isinstance(untied.backbone, TwoBackbones)
    stages = untied.backbone.trainable_stages()
    assert len(stages) == len(tied.backbone.trainable_stages()) == 4
    assert sum(map(parameters, stages)) == parameters(untied.backbone)
    net = small(untied=True).eval()
    template, search = pair(net)
    with torch.no_grad():
        before = net(template, search)
        net.backbone.template.level.weight.add_(0.5)
        feature = net.template(template)[0]
        assert (net(template, search).logits - before.logits).abs().max() > 0
        net.backbone.search.level.weight.add_(0.5)
        torch.testing.assert_close(net.template(template)[0], feature)


def test_backbone_cell_is_centred_on_pixel_8k() -> None:
    """With one channel and averaging kernels the gradient of a cell is where it looks."""
    backbone = ResNet50Layer3()

    def average(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                conv = nn.Conv2d(1, 1, child.kernel_size, child.stride, child.padding, bias=False)  # type: ignore[arg-type]
                nn.init.constant_(conv.weight, 1 / conv.weight.numel())
                setattr(module, name, conv)
            elif isinstance(child, (nn.BatchNorm2d, nn.ReLU)):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, child.stride, child.padding))
            else:
                average(child)

    average(backbone)
    assert [backbone(torch.zeros(1, 1, side, side))[0].shape[2] for side in (127, 255, 287)] == [16, 32, 36]
    image = torch.zeros(1, 1, 511, 511, requires_grad=True)  # so large that the middle cells see no border
    backbone(image)[0][0, 0, 32, 30].backward()
    assert image.grad is not None
    for axis, k in enumerate((32, 30)):
        weight = image.grad[0, 0].sum(dim=1 - axis)
        assert float((weight * torch.arange(511)).sum() / weight.sum()) == pytest.approx(8 * k, abs=0.01)


def test_torchvision_weights_fit_and_are_turned_to_bgr() -> None:
    source, backbone = ResNet50Layer3(), ResNet50Layer3()
    state = {**source.state_dict(), "fc.weight": torch.zeros(1), "layer4.0.conv1.weight": torch.zeros(1)}
    assert load_resnet50_imagenet(backbone, state) == ["fc.weight", "layer4.0.conv1.weight"]
    image = crops(1, 63, 1)
    with torch.no_grad():
        ours, theirs = backbone.eval()(image)[0], source.eval()(image.flip(1))[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_response_origin_is_47() -> None:
    """The template of a target, found anywhere in the search crop, answers where the grid says the target is."""
    net = small(da=False, st=False).eval()
    with torch.no_grad():
        # Whole cells only: the answer then is a plain correlation of 8x8 cells, two cells of border cut off.
        grid = torch.rand(1, 3, 36, 36, generator=torch.Generator().manual_seed(0))
        for row, column in ((10, 9), (14, 20)):
            template = grid[:, :, row : row + 16, column : column + 16]
            response = functional.conv2d(grid - 0.5, template[:, :, 4:12, 4:12] - 0.5)[0, 0, 2:-2, 2:-2]
            assert response.shape == (25, 25)
            i, j = divmod(int(response.argmax()), 25)
            # The target is on pixel 63 of its template crop, whose cell 0 is on pixel 0 and here on 8 row, 8 column.
            expected = (8 * column + 63, 8 * row + 63)
            point = net.decoder.points[25 * i + j] - 0.5  # continuous position to pixel
            assert point.tolist() == list(expected)
        # And the network crops, correlates and cuts the very same cells.
        features = torch.rand(1, 32, 16, 16)
        wanted = [net.adjust[f"z_{branch}"](features[:, :, 4:12, 4:12]) for branch in ("cls", "loc")]
        for ours, theirs in zip(net._prepare(features), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert net.grid.origin - 0.5 == 47 == 143 - 12 * 8


# --- switches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "names", "adaptive"),
    [
        ({}, ("fused", "cls_kernel", "loc_kernel"), True),
        ({"st": False}, ("fused", "cls_kernel", "loc_kernel"), False),  # the augmentation looks at the feature
        ({"da": False}, ("fused", "cls_kernel", "loc_kernel"), True),
        ({"st": False, "da": False}, ("cls_kernel", "loc_kernel"), False),
        (
            {"cached_memory": True},
            ("fused", "key0", "value0", "key1", "value1", "cls_kernel", "loc_kernel"),
            True,
        ),
    ],
    ids=["all", "no st", "no da", "baseline", "cached"],
)
def test_tensors_of_each_configuration(switch: dict[str, Any], names: tuple[str, ...], adaptive: bool) -> None:
    net = small(**switch).eval()
    template, search = pair(net)
    with torch.no_grad():
        tensors = net.template(template)
        if adaptive:
            assert net.template_names == ("feature",)
            tensors = net.update(*tensors * 3)
        else:
            with pytest.raises(ValueError, match="no fusion"):
                net.update(template, template, template)
        raw = net.search(search, *tensors)
    assert is_adaptive(net) is adaptive
    assert (net.update_names if adaptive else net.template_names) == names
    assert len(tensors) == len(names)
    assert shapes(raw) == [(2, 2, 25, 25), (2, 4, 25, 25), (2, 1, 25, 25)]


def test_each_switch_removes_its_own_parameters() -> None:
    def names(**switch: Any) -> set[str]:
        with torch.device("meta"):
            return {name for name, _ in DASTSiam(DASTSiamConfig(**switch)).named_parameters()}

    everything = names()
    for switch, prefix in (("st", "st."), ("da", "da."), ("second", "second.")):
        remaining = names(**{switch: False})
        assert remaining <= everything
        assert {name for name in everything if name.startswith(prefix)} == everything - remaining
    assert {name.split(".")[1] for name in names(gated=True) - everything} == {"gate", "gated_filter", "branch_weight"}
    assert names(attention="release") == names(st_grid=8) == names(cached_memory=True) == everything


def test_cached_memory_changes_nothing_but_where_it_is_computed() -> None:
    plain, cached = lively(small()), small(cached_memory=True).eval()
    cached.load_state_dict(plain.state_dict())
    template, search = pair(plain)
    with torch.no_grad():
        torch.testing.assert_close(cached(template, search), plain(template, search))


def test_presets_differ_once_the_templates_do() -> None:
    paper, release = lively(small(transformer=TINY)), small(transformer=TINY, attention="release").eval()
    release.load_state_dict(paper.state_dict())
    template, search = pair(paper)
    with torch.no_grad():
        torch.testing.assert_close(release(template, search), paper(template, search))  # one layer, one template
        history = template.flip(3)
        difference = release(template, search, history, template).logits - paper(template, search, history).logits
    assert difference.abs().max() > 1e-3


def test_fusing_8x8_cells() -> None:
    """Erratum D5: the crop may come before the fusion, as the text has it."""
    net = small(st_grid=8).eval()
    template, search = pair(net)
    with torch.no_grad():
        (feature,) = net.template(template)
        fused, cls_kernel, _ = net.update(feature, feature, feature)
        assert shapes((feature, fused, cls_kernel)) == [(2, 32, 8, 8)] * 3
        assert net(template, search).logits.shape == (2, 2, 25, 25)
        whole = small().eval()
        whole.load_state_dict(net.state_dict())
        torch.testing.assert_close(feature, whole.template(template)[0][:, :, 4:12, 4:12])


@pytest.mark.parametrize("build", [small, lambda **c: DASTSiamEdge(DASTSiamEdgeConfig(**c))], ids=["r50", "edge"])
def test_baseline_of_table_3(build: Any) -> None:
    """Labels by anchor IoU need the five anchors of SiamRPN, and one classification branch."""
    net = build(st=False, da=False, second=False, anchors_px=anchor_sizes(RATIOS, 8, 8)).eval()
    with torch.no_grad():
        raw = net(*pair(net, 1))
    cells = net.grid.size
    assert shapes(raw) == [(1, 10, cells, cells), (1, 20, cells, cells), None]
    assert len(net.decoder.sizes) == 5 * cells * cells


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (DASTSiamConfig, {"attention": "mine"}, "attention must be one of paper, release, got 'mine'"),
        (DASTSiamConfig, {"st_grid": 12}, "st_grid must be 8 or 16, got 12"),
        (DASTSiamConfig, {"correlation": "fft"}, "correlation must be one of"),
        (DASTSiamConfig, {"anchors_px": ()}, "anchors_px must be pairs"),
        (DASTSiamConfig, {"anchors_px": ((64, 0),)}, "anchors_px must be pairs"),
        (DASTSiamConfig, {"da": False, "cached_memory": True}, "cached_memory.*needs st=True and da=True"),
        (DASTSiamConfig, {"st": False, "cached_memory": True}, "cached_memory.*needs st=True and da=True"),
        (DASTSiamEdgeConfig, {"blocks": 0}, "blocks must be at least 1, got 0"),
        (DASTSiamEdgeConfig, {"attention": ""}, "attention must be one of"),
    ],
)
def test_configurations_that_cannot_be_are_refused(kind: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**change)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [False, True], ids=["r50", "edge"])
def test_training_forward_fuses_three_templates(edge: bool) -> None:
    net: Any = lively(DASTSiamEdge() if edge else small())
    template, search = pair(net)
    history, current = template.flip(3), template.roll(5, 2)
    with torch.no_grad():
        first, past, now = (net.template(crop)[0] for crop in (template, history, current))
        for arguments, fused in (
            ({}, net.update(first, first, first)),
            ({"history": history}, net.update(first, past, first)),
            ({"current": current}, net.update(first, first, now)),
            ({"history": history, "current": current}, net.update(first, past, now)),
        ):
            raw = net(template=template, search=search, **arguments)
            torch.testing.assert_close(raw, net.search(search, *fused), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edge", [False, True], ids=["r50", "edge"])
def test_gradients_are_finite_and_reach_every_parameter(edge: bool) -> None:
    torch.manual_seed(0)
    net: Any = DASTSiamEdge().train() if edge else small(gated=True).train()
    template, search = pair(net)
    raw = net(template, search, template.flip(3), template.roll(5, 2))
    raw = [value.square().mean() for value in raw]
    sum(raw).backward()  # type: ignore[union-attr]
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# --- graphs and the tracker ----------------------------------------------------------------------------------------

Exported = tuple[Any, Bundle]
ANY_SCORE = Thresholds(tracking_above=0.0, uncertain_below=0.0, lost_below=0.0, lost_after=1, found_above=0.0)


def quiet(net: Any) -> Any:
    """Box deltas of the size that training leaves."""
    with torch.no_grad():
        last = net.loc if isinstance(net.loc, nn.Conv2d) else net.loc[-1]
        last.weight.mul_(0.05)
    return net


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    net = quiet(lively(DASTSiamEdge()))
    return net, export_bundle("dastsiam-mobilenetv2", net, tmp_path_factory.mktemp("edge"), "none")


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    net = quiet(lively(small(transformer=TINY)))
    return net, export_bundle("dastsiam-r50", net, tmp_path_factory.mktemp("paper"), "none", update=UpdateSpec(0.5, 7))


@pytest.fixture(scope="module")
def fused_unseen(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    net = quiet(lively(small(transformer=TINY, da=False)))
    return net, export_bundle("dastsiam-r50", net, tmp_path_factory.mktemp("no_da"), "none")


@pytest.mark.parametrize("which", ["edge", "paper", "fused_unseen"])
def test_graphs_compute_the_network(which: str, request: pytest.FixtureRequest) -> None:
    net, bundle = request.getfixturevalue(which)
    manifest = bundle.manifest

    def image(side: int, seed: int) -> Tensor:
        return crops(3, side, seed).permute(0, 2, 3, 1).to(torch.uint8).contiguous()

    templates, search = image(127, 1), image(net.search_size, 2)
    sizes, tuning = torch.tensor([[60.0, 40], [30, 90], [80, 80]]), torch.zeros(3)
    with OnnxRuntimeRunner(bundle, threads=1) as runner, torch.no_grad():
        features = [TemplateGraph(net)(templates[i : i + 1])[0] for i in range(3)]
        rows = []
        for i in range(3):
            (ours,) = runner.session("template").run(None, {"image": templates[i : i + 1].numpy()})
            close(ours, features[i])
            # Three different templates, or inputs that were mixed up would pass.
            first, history, current = features[i], features[(i + 1) % 3], features[(i + 2) % 3]
            wanted = UpdateGraph(net)(first, history, current)
            feeds = {"first": first.numpy(), "history": history.numpy(), "current": current.numpy()}
            for value, reference in zip(runner.session("update").run(None, feeds), wanted, strict=True):
                close(value, reference)
            rows.append(wanted)
        tensors = dict(zip(net.update_names, (torch.cat(parts) for parts in zip(*rows, strict=True)), strict=True))
        reference = SearchGraph(net)(search, *tensors.values(), sizes, tuning)
        feeds = {"image": search, "prev_size": sizes, "tuning": tuning}
        feeds |= {name: tensors[name] for name in manifest.template_tensors}
        together = runner.session("search").run(list(SEARCH_OUTPUTS), {k: v.numpy() for k, v in feeds.items()})
        for name, value, theirs in zip(SEARCH_OUTPUTS, together, reference, strict=True):
            tolerance = 0.05 if name == "box" else 1e-4
            np.testing.assert_allclose(value, theirs.numpy(), atol=tolerance, rtol=0, err_msg=name)
        alone = {k: v[1:2].numpy() if k != "tuning" else v.numpy() for k, v in feeds.items()}
        for value, theirs in zip(runner.session("search").run(list(SEARCH_OUTPUTS), alone), together, strict=True):
            np.testing.assert_allclose(value[0], theirs[1], atol=1e-3, rtol=1e-4)
    assert np.abs(together[3][0] - together[3][1]).max() > 1e-3


def close(ours: Any, theirs: Tensor) -> None:
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4 * float(theirs.abs().max()), rtol=0)


def test_export_verifies_the_update_too(edge: Exported, fused_unseen: Exported) -> None:
    for net, bundle in (edge, fused_unseen):
        difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 4))
        assert difference.ok, difference
    net, bundle = edge
    changed = copy.deepcopy(net)
    with torch.no_grad():
        changed.st.layers[0].self_attn.in_proj_weight[96:192].mul_(1.1)  # keys: they matter where templates differ
    assert compare_with_onnxruntime(changed, bundle, random_pairs(bundle, 4)).template > 1e-4


def test_manifests_of_adaptive_models(edge: Exported, paper: Exported, fused_unseen: Exported) -> None:
    assert edge[1].manifest.update == UpdateSpec(min_score=0.59, interval=1)  # erratum D13: 1.18 of two scores
    assert paper[1].manifest.update == UpdateSpec(min_score=0.5, interval=7)
    assert paper[1].manifest.template_tensors == ("fused", "cls_kernel", "loc_kernel")
    assert paper[1].manifest.tracking == DASTSiam.tracking
    # Without augmentation search does not look at the fused template; it stays the history all the same.
    assert fused_unseen[1].manifest.template_tensors == ("cls_kernel", "loc_kernel")
    assert [t.name for t in fused_unseen[1].manifest.graphs["update"].outputs] == ["fused", "cls_kernel", "loc_kernel"]
    assert paper[1].manifest.grid.origin == 47.5


def test_graphs_have_plain_operations(edge: Exported, paper: Exported) -> None:
    for _, bundle in (edge, paper):
        for graph in ("update", "search"):
            nodes = onnx.load(str(bundle.graph_path(graph))).graph.node
            operations = {node.op_type for node in nodes}
            assert {"MatMul", "Softmax"} <= operations
            assert not operations & {"Attention", "MultiHeadAttention", "Shape", "If", "Loop", "Einsum"}
            assert all(node.domain == "" for node in nodes)


def test_update_parameters_are_of_adaptive_networks_only(tmp_path: Path) -> None:
    net = small(transformer=TINY, st=False)
    with pytest.raises(ValueError, match="toy has no template update"):
        export_bundle("toy", net, tmp_path, "none", update=UpdateSpec(0.5))


PLACES = [Window(60, 40, 127, 127), Window(70, 44, 120, 120), Window(90, 60, 100, 100)]


def test_runner_chains_the_updates(edge: Exported, scene: list[SceneFrame]) -> None:
    net, bundle = edge
    with OnnxRuntimeRunner(bundle, threads=1) as runner, torch.no_grad():
        start = runner.template(scene[0].image, PLACES[0], (1, 2, 3))
        once = runner.update(scene[4].image, PLACES[1], start)
        timing = runner.last_timing
        twice = runner.update(scene[8].image, PLACES[2], once)
        current = [runner.template(scene[k].image, PLACES[i], (1, 2, 3)).first for i, k in ((1, 4), (2, 8))]
        first = torch.from_numpy(start.first)
        fused = net.update(first, first, first)[0]
        close(start.history, fused)
        for features, now in ((once, current[0]), (twice, current[1])):
            fused = net.update(first, fused, torch.from_numpy(now))[0]  # what was fused is the next history
            close(features.history, fused)
            assert features.first is start.first  # "will never change in the whole tracking process"
            assert features.fill_bgr == (1, 2, 3)
    assert np.abs(once.history - start.history).max() > 1e-2
    assert timing["update"] > 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_runner_refuses_what_is_not_finite(edge: Exported, scene: list[SceneFrame], poison: float) -> None:
    with OnnxRuntimeRunner(edge[1], threads=1) as runner:
        start = runner.template(scene[0].image, PLACES[0], (0, 0, 0))
        broken = dataclasses.replace(start, history=np.full_like(start.history, poison))
        assert runner.update(scene[1].image, PLACES[0], broken) is broken  # the caller keeps what it had
        assert runner.update(scene[1].image, PLACES[0], start) is not start


def test_models_without_update_say_so(plain_bundle: Bundle, scene: list[SceneFrame]) -> None:
    with OnnxRuntimeRunner(plain_bundle, threads=1) as runner:
        features = runner.template(scene[0].image, PLACES[0], (0, 0, 0))
        assert features.first is features.history is None
        with pytest.raises(ValueError, match="siamla-mobilenetv2 has no update graph"):
            runner.update(scene[0].image, PLACES[0], features)


class CountingRunner(OnnxRuntimeRunner):
    """Writes down the frames whose template was taken in, by the number of searches before."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, threads=1)
        self.searches, self.renewed = 0, []

    def search(self, *arguments: Any) -> Any:
        self.searches += 1
        return super().search(*arguments)

    def update(self, *arguments: Any) -> Any:
        self.renewed.append(self.searches)
        return super().update(*arguments)


def tracking(bundle: Bundle, update: UpdateSpec, thresholds: Thresholds = ANY_SCORE) -> SiamTracker:
    """A tracker of random weights, in state TRACKING whatever the score is."""
    score = dataclasses.replace(bundle.manifest.score, thresholds=thresholds)
    manifest = dataclasses.replace(bundle.manifest, score=score)
    return SiamTracker(CountingRunner(dataclasses.replace(bundle, manifest=manifest)), template_update=update)


@pytest.mark.parametrize(
    ("spec", "renewed"),
    [(UpdateSpec(0.0), [1, 2, 3, 4, 5, 6]), (UpdateSpec(0.0, 3), [3, 6]), (UpdateSpec(1.0), [])],
    ids=["every frame", "every third", "never"],
)
def test_tracker_renews_by_interval_and_threshold(
    edge: Exported, scene: list[SceneFrame], spec: UpdateSpec, renewed: list[int]
) -> None:
    tracker = tracking(edge[1], spec)
    tracker.init(scene[0].image, scene[0].box_xywh)
    tracks = [tracker.update(frame.image) for frame in scene[1:7]]
    assert all(np.isfinite(track.box_xywh).all() for track in tracks)
    assert tracker.runner.renewed == renewed
    tracker.close()


def test_tracker_does_not_renew_while_lost(edge: Exported, scene: list[SceneFrame]) -> None:
    lost_for_good = dataclasses.replace(ANY_SCORE, found_above=1.0)
    tracker = tracking(edge[1], UpdateSpec(0.0), lost_for_good)
    tracker.init(scene[0].image, scene[0].box_xywh)
    tracker.update(scene[1].image)
    tracker.mark_lost()
    assert {tracker.update(frame.image).state for frame in scene[2:6]} == {State.LOST}
    assert tracker.runner.renewed == [1]
    tracker.close()


def test_tracker_survives_an_update_that_is_not_finite(edge: Exported, scene: list[SceneFrame]) -> None:
    tracker = tracking(edge[1], UpdateSpec(0.0))
    runner = tracker.runner
    fuse = runner._fuse

    def overflow(*arguments: Any) -> Any:
        features = fuse(*arguments)
        return dataclasses.replace(features, tensors=tuple(tensor * np.nan for tensor in features.tensors))

    tracker.init(scene[0].image, scene[0].box_xywh)
    tracker.update(scene[1].image)
    with patch.object(runner, "_fuse", overflow):
        tracker.update(scene[2].image)
    track = tracker.update(scene[3].image)
    assert (track.state, track.frame) == (State.TRACKING, 3)
    assert track.score > 0  # a poisoned template would answer NaN, which counts as 0
    tracker.close()
