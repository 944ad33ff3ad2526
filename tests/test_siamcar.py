"""SiamCAR: shapes, weights' layout, the two ways of finding the target, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stand_ins import check_batch, crops, lively, without_resnet
from torch import Tensor, nn

from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack.nets.decode import Grid, RawMaps
from siamtrack.nets.siamcar import PeakRefined, SiamCAR, SiamCARConfig

SMALL = SiamCARConfig(channels=32)


def test_shapes() -> None:
    with torch.device("meta"):
        net = SiamCAR()
        template = net.template(torch.zeros(2, 3, 127, 127))
        raw = net.search(torch.zeros(2, 3, 255, 255), *template)
    assert [tuple(t.shape) for t in template] == [(2, 256, 7, 7)] * 3
    assert len(net.template_names) == 3
    assert raw.logits.shape == (2, 2, 25, 25)
    assert raw.ltrb.shape == (2, 4, 25, 25)
    assert raw.quality is not None and raw.quality.shape == (2, 1, 25, 25)


def test_parameters_are_named_as_in_the_release() -> None:
    """But for the prefix `car_head.` and the necks (reference, section 6)."""
    with torch.device("meta"):
        names = {name for name in SiamCAR().state_dict() if not name.startswith(("backbone.", "necks."))}
    towers = {
        f"{tower}.{i}.{part}"
        for tower in ("cls_tower", "bbox_tower")
        for i in (0, 1, 3, 4, 6, 7, 9, 10)
        for part in ("weight", "bias")
    }
    heads = {
        f"{head}.{part}" for head in ("cls_logits", "bbox_pred", "centerness", "down") for part in ("weight", "bias")
    }
    assert names == towers | heads


def test_transposed_convolution_is_ours_transposed() -> None:
    theirs, ours = nn.ConvTranspose2d(6, 2, 1), nn.Conv2d(6, 2, 1)
    ours.load_state_dict({"weight": theirs.weight.transpose(0, 1), "bias": theirs.bias})
    x = torch.randn(1, 6, 3, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_levels_are_correlated_each_with_its_own_template() -> None:
    net = without_resnet(SiamCAR, SMALL).eval()
    image = crops(1, 255, 1)
    with torch.no_grad():
        template = net.template(crops(1, 127, 2))
        before = net.correlations(image, template)
        after = net.correlations(image, (template[0], 2 * template[1], template[2]))
    assert [tuple(m.shape) for m in before] == [(1, 32, 25, 25)] * 3
    torch.testing.assert_close(after, [before[0], 2 * before[1], before[2]])


@pytest.mark.parametrize("origin_px", [31, 32])
def test_origin_shifts_boxes(origin_px: int) -> None:
    net = without_resnet(SiamCAR, SiamCARConfig(channels=32, origin_px=origin_px))
    raw = RawMaps(torch.zeros(1, 2, 25, 25), torch.full((1, 4, 25, 25), 10.0), torch.zeros(1, 1, 25, 25))
    boxes = net.decoder.candidates(raw).boxes
    assert boxes[0, 0].tolist() == pytest.approx([origin_px + 0.5, origin_px + 0.5, 20, 20])  # quirk B1


def test_a_peak_lies_where_it_is_whatever_the_boxes_were_trained_with() -> None:
    """The release infers with 31 what it trained with 32 (quirk B1): its centre is the peak's, not a box's."""
    logits = torch.zeros(1, 2, 25, 25)
    logits[0, 1, 12, 12] = 5.0
    raw = RawMaps(logits, torch.full((1, 4, 25, 25), 20.0))
    net = without_resnet(SiamCAR, SiamCARConfig(channels=32, origin_px=32, selection="peak"))
    assert net.decoder.candidates(raw).boxes[0, 0, 0] == 32.5
    box = net.decoder(raw, torch.full((1, 2), 40.0), torch.zeros(3))[0]
    assert box[0].tolist() == pytest.approx([127.5, 127.5, 40, 40])


def test_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match=r"selection must be neighbours or peak, got 'best'"):
        SiamCARConfig(selection="best")


def test_gradients_are_finite_and_reach_every_parameter() -> None:
    net = without_resnet(SiamCAR, SMALL).train()
    raw = net(crops(2, 127, 1), crops(2, 255, 2))
    (raw.logits.square().mean() + raw.ltrb.log().square().mean() + (raw.quality - 1).square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


# --- peak refinement -----------------------------------------------------------------------------------------------

Maps = NDArray[np.float32]


def refine_with_opencv(
    cls: Maps, cen: Maps, ltrb: Maps, prev: tuple[float, float], k: float, influence: float
) -> tuple[list[float], float]:
    """Reference 4.3 read literally, one sample: box (cx, cy, w, h) and enlarged classification at its centre."""

    def enlarge(map_: Maps) -> Maps:
        return np.asarray(cv2.resize(map_, (193, 193), interpolation=cv2.INTER_CUBIC), np.float32)

    def padded(w: Any, h: Any) -> Any:
        return np.sqrt((w + (w + h) / 2) * (h + (w + h) / 2))

    stretched = (cen - cen.min()) / (cen.max() - cen.min())
    w, h = ltrb[0] + ltrb[2], ltrb[1] + ltrb[3]
    scale, aspect = padded(w, h) / padded(*prev), (w / h) / (prev[0] / prev[1])
    change = np.maximum(scale, 1 / scale) * np.maximum(aspect, 1 / aspect)
    plain = np.exp(-(change - 1) * k) * cls * stretched
    windowed = plain * (1 - influence) + np.outer(np.hanning(25), np.hanning(25)) * influence
    coarse = enlarge(windowed.astype(np.float32))
    row, column = np.unravel_index(coarse.argmax(), coarse.shape)
    cell = [min(int(round(v / (193 / 25))), 24) for v in (row, column)]
    left, top, right, bottom = (int(min(max(v, 12), 55) / 2) for v in ltrb[:, cell[0], cell[1]])
    fine = np.full((193, 193), -np.inf, np.float32)
    region = slice(max(row - top, 0), row + bottom + 1), slice(max(column - left, 0), column + right + 1)
    fine[region] = enlarge(plain.astype(np.float32))[region]
    row, column = np.unravel_index(fine.argmax(), fine.shape)
    size = [float(enlarge(side)[row, column]) for side in (w, h)]
    return [31.5 + column, 31.5 + row, *size], float(enlarge(cls)[row, column])


def smooth(batch: int, channels: int, seed: int) -> Tensor:
    return crops(batch * channels, 40, seed)[:, 0, :25, :25].reshape(batch, channels, 25, 25) / 255


@pytest.mark.parametrize("influence", [0.0, 0.3])
def test_peak_refinement_is_the_releases(influence: float) -> None:
    decoder = PeakRefined(Grid(25, 8, 31.5), 31.5)
    raw = RawMaps(4 * smooth(3, 2, 1), 8 + 80 * smooth(3, 4, 2), 3 * smooth(3, 1, 3))
    prev, k = torch.tensor([[60.0, 40.0], [90.0, 80.0], [30.0, 60.0]]), 0.04
    box, score, penalty, response = decoder(raw, prev, torch.tensor([k, influence, 0.0]))
    assert response.shape == (3, 25, 25)
    assert ((penalty > 0) & (penalty <= 1)).all()
    cls = torch.softmax(raw.logits, dim=1)[:, 1].numpy()
    assert raw.quality is not None
    for i in range(3):
        size = (float(prev[i, 0]), float(prev[i, 1]))
        wanted, confidence = refine_with_opencv(
            cls[i], raw.quality[i, 0].numpy(), raw.ltrb[i].numpy(), size, k, influence
        )
        assert box[i].tolist() == pytest.approx(wanted, abs=1e-2)
        assert float(score[i]) == pytest.approx(confidence, abs=1e-4)
    assert len({tuple(b) for b in box.tolist()}) == 3


def test_peak_lies_between_cells() -> None:
    # Equal scores of two neighbours: the peak is between them, which no cell is.
    logits = torch.full((1, 2, 25, 25), 0.0)
    logits[0, 0] = 5.0
    logits[0, 0, 12, 12:14] = -5.0
    raw = RawMaps(logits, torch.full((1, 4, 25, 25), 20.0))
    box, *_ = PeakRefined(Grid(25, 8, 31.5), 31.5)(raw, torch.full((1, 2), 40.0), torch.zeros(3))
    assert box[0].tolist() == pytest.approx([127.5 + 4, 127.5, 40, 40], abs=1)


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["neighbours", "peak"])
def test_graphs_compute_the_network(selection: str, tmp_path: Path) -> None:
    net = lively(without_resnet(SiamCAR, SiamCARConfig(channels=64, selection=selection)))
    bundle = export_bundle("siamcar-r50", net, tmp_path, "unspecified")
    difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 4))
    assert difference.ok, difference
    check_batch(net, bundle)
