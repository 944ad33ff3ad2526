"""SiamFC and SiamFC+ST: the scales inside the graph, the choice of scale and place, the update rule, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stand_ins import check_batch, crops, lively
from torch import Tensor
from torch.nn import functional

from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack.bundle import Bundle, UpdateSpec
from siamtrack.crop import Window
from siamtrack.nets.siamfc import (
    RESPONSE_SCALE,
    ResponseMaps,
    SiamFC,
    SiamFCConfig,
    SiamFCST,
    SiamFCSTConfig,
    cubic_upsampling,
    linear_resampling,
)
from siamtrack.nets.template_update import TransformerConfig
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner

SMALL = SiamFCSTConfig(transformer=TransformerConfig(layers=1, hidden=64))


@pytest.fixture(scope="module")
def siamfc() -> SiamFC:
    return calm(lively(SiamFC(), batch=2))


@pytest.fixture(scope="module")
def adaptive() -> SiamFCST:
    return calm(lively(SiamFCST(SMALL), batch=2))


def calm(net: Any) -> Any:
    """Responses of some ones, as training leaves them: the sigmoid of thousands says nothing."""
    with torch.no_grad():
        net.backbone.conv5[0].weight.mul_(0.3)
    return net


def test_shapes() -> None:
    with torch.device("meta"):
        net = SiamFC()
        template = net.template(torch.zeros(2, 3, 127, 127))
        raw = net.search(torch.zeros(2, 3, 265, 265), *template)
        trained = net(torch.zeros(2, 3, 127, 127), torch.zeros(2, 3, 265, 265))
    assert (net.template_size, net.search_size) == (127, 265)
    assert [tuple(t.shape) for t in template] == [(2, 256, 6, 6)]
    assert raw.logits.shape == (2, 3, 17, 17)
    assert trained.logits.shape == (2, 1, 17, 17)  # training looks at one scale
    assert raw.self_response is trained.self_response is None
    assert net.decoder.points.shape == (289, 2)
    assert net.grid.origin + 8 * net.grid.stride == 265 / 2


def test_parameters_are_named_as_in_the_reference() -> None:
    with torch.device("meta"):
        names = {name for name, _ in SiamFC().named_parameters()}
        extra = {name for name, _ in SiamFCST().named_parameters()} - names
    layers = {f"backbone.conv{i}.{j}.{kind}" for i in range(1, 5) for j in (0, 1) for kind in ("weight", "bias")}
    assert names == layers | {"backbone.conv5.0.weight", "backbone.conv5.0.bias"}
    assert all(name.startswith("st.") for name in extra)
    norm = SiamFC().backbone.conv1[1]
    assert (norm.eps, norm.momentum) == (1e-6, 0.05)


def test_scales_are_resampled_as_a_resize_would() -> None:
    net = SiamFC()
    image = crops(1, 265, 3)
    torch.testing.assert_close(net.resample[1] @ image @ net.resample[1].T, net.middle(image))
    for matrix, scale in zip(net.resample, (1 / 1.0375, 1, 1.0375), strict=True):
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(255))  # no sample lies outside the crop
        # Pixel centres of a 255 px crop that is `scale` times as large, in the sampler's coordinates -1..1.
        axis = (torch.arange(255) - 127) * scale * 2 / 265
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=2)[None]
        wanted = functional.grid_sample(image, grid, align_corners=False)
        torch.testing.assert_close(matrix @ image @ matrix.T, wanted, atol=0.02, rtol=0)


def test_responses_are_upsampled_bicubically() -> None:
    response = crops(1, 24, 5)[:, :1, :17, :17]
    matrix = torch.from_numpy(cubic_upsampling(17, 16)).float()
    wanted = functional.interpolate(response, scale_factor=16, mode="bicubic", align_corners=False)
    torch.testing.assert_close(matrix @ response @ matrix.T, wanted, rtol=1e-4, atol=1e-2)
    theirs = cv2.resize(response[0, 0].numpy(), (272, 272), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose((matrix @ response @ matrix.T)[0, 0].numpy(), theirs, atol=0.05)
    assert linear_resampling(5, 3, 1.0).tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]


def test_response_is_a_correlation(siamfc: SiamFC) -> None:
    image, (kernel,) = crops(2, 255, 1), siamfc.template(crops(2, 127, 2))
    with torch.no_grad():
        features = siamfc.backbone(image)[0]
        assert features.shape == (2, 256, 22, 22)
        wanted = torch.cat([functional.conv2d(features[i : i + 1], kernel[i : i + 1]) for i in range(2)]) * 0.001
        ours = siamfc.respond(image, kernel)
    assert ours.shape == (2, 1, 17, 17)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def by_hand(responses: NDArray[np.float32], influence: float) -> tuple[float, float, float, float]:
    """siamfc-pytorch's tracker step (reference 4.5): displacement in crop pixels, scale, response at the peak."""
    fine = np.stack([cv2.resize(r, (272, 272), interpolation=cv2.INTER_CUBIC) for r in responses])
    discount = np.array([0.9745, 1, 0.9745])
    best = int((fine * discount[:, None, None]).max(axis=(1, 2)).argmax())
    response = fine[best] * discount[best]
    response = response - response.min()
    response = response / response.sum()
    hann = np.outer(np.hanning(272), np.hanning(272))
    response = (1 - influence) * response + influence * hann / hann.sum()
    row, column = np.unravel_index(response.argmax(), response.shape)
    scale = 1.0375 ** (best - 1)
    return (column - 135.5) / 2 * scale, (row - 135.5) / 2 * scale, scale, float(fine[best][row, column])


@pytest.mark.parametrize("influence", [0.0, 0.176, 0.9])
def test_choice_is_that_of_the_original_tracker(influence: float) -> None:
    net = SiamFC()
    scales = set()
    for seed in range(12):
        maps = crops(1, 160, seed)[:, :, ::9, ::9][:, :, :17, :17].contiguous() / 128 - 0.5
        raw = ResponseMaps(maps)
        tuning = torch.tensor([net.tracking.penalty_k, influence, 0])
        choice = net.decoder(raw, torch.tensor([[60.0, 40.0]]), tuning)
        dx, dy, scale, peak = by_hand(maps[0].numpy(), influence)
        assert choice.box[0].tolist() == pytest.approx((132.5 + dx, 132.5 + dy, 60 * scale, 40 * scale), abs=1e-3)
        assert float(choice.score) == pytest.approx(1 / (1 + np.exp(-peak)), abs=1e-3)
        assert float(choice.penalty) == pytest.approx(1 if scale == 1 else 0.9745, abs=1e-5)
        chosen = maps[0, {1 / 1.0375: 0, 1.0: 1, 1.0375: 2}[scale]]
        torch.testing.assert_close(choice.response[0], torch.sigmoid(chosen))
        scales.add(scale)
    assert len(scales) == 3  # or the choice of scale was not tried


def test_a_flat_response_gives_a_finite_box() -> None:
    for raw in (ResponseMaps(torch.zeros(2, 3, 17, 17)), ResponseMaps(torch.zeros(2, 3, 17, 17), torch.ones(2, 1))):
        choice = SiamFC().decoder(raw, torch.full((2, 2), 50.0), torch.tensor([0.7, 0.176, 0]))
        assert all(torch.isfinite(value).all() for value in choice)
        assert choice.box[0, :2].tolist() == pytest.approx((132.5, 132.5), abs=0.3)


def test_upsampling_is_configured() -> None:
    assert SiamFC(SiamFCConfig(upsampling=4)).decoder.upsample.shape == (68, 17)
    with pytest.raises(ValueError, match="upsampling must be at least 1, got 0"):
        SiamFCConfig(upsampling=0)
    with pytest.raises(ValueError, match=r"width must be 256, that of the features, got 128"):
        SiamFCSTConfig(transformer=TransformerConfig(width=128))
    with pytest.raises(ValueError, match="attention must be one of paper, release"):
        SiamFCSTConfig(attention="mean")


# --- SiamFC+ST -----------------------------------------------------------------------------------------------------


def test_a_target_that_looks_like_the_first_template_has_score_1(adaptive: SiamFCST) -> None:
    """Erratum D14: the share of the self-response, which is what the template in the middle of the search answers."""
    template = crops(1, 127, 1)
    search = crops(1, 265, 2)
    search[:, :, 69:196, 69:196] = template
    with torch.no_grad():
        (first,) = adaptive.template(template)
        fused, self_response = adaptive.update(first, first, first)
        raw = adaptive.search(search, fused, self_response)
        wanted = (adaptive.st(first, first, first) * first).sum() * RESPONSE_SCALE
    assert self_response.shape == (1, 1)
    torch.testing.assert_close(self_response[0, 0], wanted.clamp(min=1e-3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw.logits[0, 1, 8, 8], wanted, rtol=1e-3, atol=1e-3)
    share = adaptive.decoder.confidence(raw, raw.logits[:, 1].flatten(1))[0]
    assert float(share[8 * 17 + 8]) == pytest.approx(1, abs=1e-3)
    assert ((share >= 0) & (share <= 1)).all()
    assert adaptive.update_rule == UpdateSpec(min_score=0.8)


def test_self_response_stays_that_of_the_first_frame(adaptive: SiamFCST) -> None:
    first, other = (adaptive.template(crops(1, 127, seed))[0].detach() for seed in (1, 2))
    with torch.no_grad():
        fused, self_response = adaptive.update(first, first, first)
        renewed, again = adaptive.update(first, fused, other)
    torch.testing.assert_close(again, self_response)
    assert (renewed - fused).abs().max() > 1e-3


def test_training_forward_fuses_three_templates(adaptive: SiamFCST) -> None:
    template, search, history, current = crops(2, 127, 1), crops(2, 265, 2), crops(2, 127, 3), crops(2, 127, 4)
    with torch.no_grad():
        features = [adaptive.template(crop)[0] for crop in (template, history, current)]
        for arguments, fused in (
            ((), adaptive.st(features[0], features[0], features[0])),
            ((history, current), adaptive.st(*features)),
        ):
            raw = adaptive(template, search, *arguments)
            wanted = adaptive.respond(adaptive.middle(search), fused)
            torch.testing.assert_close(raw.logits, wanted, rtol=1e-3, atol=1e-3)


def test_gradients_are_finite() -> None:
    net = SiamFCST(SMALL).train()
    net(crops(2, 127, 1), crops(2, 265, 2), crops(2, 127, 3), crops(2, 127, 4)).logits.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# --- graphs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(adaptive: SiamFCST, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle("siamfc-st", adaptive, tmp_path_factory.mktemp("siamfc"), "none")


def test_exported_siamfc_computes_the_network(siamfc: SiamFC, tmp_path: Path) -> None:
    bundle = export_bundle("siamfc", siamfc, tmp_path, "none")
    difference = compare_with_onnxruntime(siamfc, bundle, random_pairs(bundle, 2))
    assert difference.ok, difference
    check_batch(siamfc, bundle)
    assert bundle.manifest.update is None
    assert bundle.manifest.tracking.window_influence == 0.176


def test_exported_update_chain_computes_the_network(adaptive: SiamFCST, exported: Bundle) -> None:
    manifest = exported.manifest
    assert manifest.template_tensors == ("fused", "self_response")
    assert manifest.update is not None
    assert (manifest.update.min_score, manifest.update.interval) == (0.8, 1)
    assert "share" in manifest.score.meaning and "probability" not in manifest.score.meaning
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    frame = np.asarray(cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC), np.uint8)
    places = [Window(100, 100, 127, 127), Window(110, 104, 127, 127)]

    def feature(window: Window) -> Tensor:
        part = frame[window.top : window.top + 127, window.left : window.left + 127]
        return adaptive.template(torch.from_numpy(part.copy()).permute(2, 0, 1)[None].float())[0]

    with OnnxRuntimeRunner(exported, threads=1) as runner, torch.no_grad():
        start = runner.template(frame, places[0], (0, 0, 0))
        renewed = runner.update(frame, places[1], start)
        first, current = feature(places[0]), feature(places[1])
        wanted = adaptive.update(first, first, first)
        again = adaptive.update(first, wanted[0], current)
    for features, reference in ((start, wanted), (renewed, again)):
        for ours, theirs in zip(features.tensors, reference, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)
        assert features.history is features.tensors[0]
        np.testing.assert_allclose(features.first, first.numpy(), atol=1e-4 * float(first.abs().max()), rtol=1e-4)
