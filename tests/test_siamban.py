"""SiamBAN, and SiamCAN as SiamBAN with attentions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stand_ins import check_batch, crops, lively, without_resnet

from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack.nets.siamban import SiamBAN, SiamBANConfig
from siamtrack.nets.siamcan import SiamCAN, SiamCANConfig


@pytest.mark.parametrize(
    ("config", "kernel", "quality"),
    [
        (SiamBANConfig(), 5, None),
        (SiamBANConfig(adjust_convs=False), 7, None),
        (SiamBANConfig(centreness=True), 5, (2, 1, 25, 25)),
    ],
    ids=["paper", "no adjust", "centre-ness"],
)
def test_shapes(config: SiamBANConfig, kernel: int, quality: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        net = SiamBAN(config)
        template = net.template(torch.zeros(2, 3, 127, 127))
        raw = net.search(torch.zeros(2, 3, 255, 255), *template)
    assert [tuple(t.shape) for t in template] == [(2, 256, kernel, kernel)] * 6
    assert len(net.template_names) == 6
    assert raw.logits.shape == (2, 2, 25, 25)
    assert raw.ltrb.shape == (2, 4, 25, 25)
    assert (None if raw.quality is None else tuple(raw.quality.shape)) == quality


def test_parameters_are_named_as_in_the_release() -> None:
    """`head.box{2,3,4}.{cls,loc}` is ``{cls,loc}.{0,1,2}``, inner names are the same (reference, section 6)."""
    with torch.device("meta"):
        names = {
            name
            for name in SiamBAN().state_dict()
            if name.startswith("cls.1.") and not name.endswith("num_batches_tracked")
        }
        rest = {name for name in SiamBAN().state_dict() if not name.startswith(("backbone.", "necks.", "cls.", "loc."))}
    norm = ("weight", "bias", "running_mean", "running_var")
    adjust = {
        f"{side}.{part}" for side in ("conv_kernel", "conv_search") for part in ("0.weight", *(f"1.{n}" for n in norm))
    }
    head = {f"head.{part}" for part in ("0.weight", *(f"1.{n}" for n in norm), "3.weight", "3.bias")}
    assert names == {f"cls.1.{name}" for name in adjust | head}
    assert rest == {"cls_weight", "loc_weight", "loc_scale"}


def test_siamcan_without_attentions_is_siamban() -> None:
    plain = SiamCANConfig(channels=32, channel_attention=False, spatial_attention=False)
    can, ban = lively(without_resnet(SiamCAN, plain)), without_resnet(SiamBAN, SiamBANConfig(channels=32)).eval()
    ban.load_state_dict(can.state_dict())  # strict: the same parameters
    with torch.no_grad():
        torch.testing.assert_close(ban(crops(1, 127, 1), crops(1, 255, 2)), can(crops(1, 127, 1), crops(1, 255, 2)))


def test_siamcan_starts_from_weights_of_siamban() -> None:
    with torch.device("meta"):
        missing = set(SiamCAN().state_dict()) - set(SiamBAN().state_dict())
        assert set(SiamBAN().state_dict()) <= set(SiamCAN().state_dict())
    assert missing == {f"attentions.{i}.conv.weight" for i in range(3)} | {
        f"{branch}.{i}.spatial.conv.weight" for branch in ("cls", "loc") for i in range(3)
    }


def test_centreness_is_the_third_channel() -> None:
    with_it = lively(without_resnet(SiamCAN, SiamCANConfig(channels=32, centreness=True)))
    raw = with_it(crops(1, 127, 1), crops(1, 255, 2))
    scores = with_it.decoder.candidates(raw).scores
    expected = torch.softmax(raw.logits, dim=1)[:, 1:] * torch.sigmoid(raw.quality)
    torch.testing.assert_close(scores, expected.flatten(1))


def test_gradients_are_finite_and_reach_every_parameter() -> None:
    net = without_resnet(SiamBAN, SiamBANConfig(channels=32)).train()
    raw = net(crops(2, 127, 1), crops(2, 255, 2))
    (raw.logits.square().mean() + raw.ltrb.log().square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


def test_graphs_compute_the_network(tmp_path: Path) -> None:
    net = lively(without_resnet(SiamBAN, SiamBANConfig(channels=64)))
    bundle = export_bundle("siamban-r50", net, tmp_path, "unspecified")
    difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 4))
    assert difference.ok, difference
    check_batch(net, bundle)
