"""Weights of public implementations: the same answers as there, and files that do not fit are refused.

The files in ``tests/golden/`` were computed once by the public implementations themselves, at the commits they name, on
a CPU: every parameter and buffer of the original was drawn by `golden_weights.draw` from its name and shape, the input
crops by `golden_weights.image`, and the raw output maps summarised: twelve cells, mean, deviation, largest value. The
names and shapes listed are those of the original's state dict. Here the same weights are drawn again, imported, and our
network has to give the same maps.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from golden_weights import draw, image, uniform
from torch import Tensor, nn
from torch.nn import functional

from model_export.cli import main as export_main
from siamtrack import cli, load_bundle
from siamtrack.bundle import sha256
from siamtrack.nets import MODELS
from siamtrack.nets.backbones import MobileNetV2, ResNet50Dilated
from siamtrack.nets.checkpoint import load_checkpoint
from siamtrack.nets.importing import PublicWeights, fill_model, import_checkpoint, read_weights
from siamtrack.nets.layers import PyramidFeatures
from siamtrack.nets.layouts import LAYOUTS, logit_difference, transposed
from siamtrack.nets.pretrained import import_mobilenetv2, raw_bgr

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="module")
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@lru_cache
def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def drawn(name: str) -> PublicWeights:
    """The weights that the golden outputs were computed with."""
    return PublicWeights(Path(name), {k: draw(k, tuple(shape)) for k, shape in golden(name)["names"].items()})


def inputs(name: str) -> list[Tensor]:
    """Template, search, and where there are any history and current crops."""
    sides = golden(name)["inputs"]
    return [image(crop, sides[crop]) for crop in ("template", "search", "history", "current") if crop in sides]


def check(name: str, outputs: str, maps: dict[str, Tensor]) -> None:
    """Our maps against the original's, to 1e-4 of the largest value of the map."""
    wanted = golden(name)["outputs"][outputs]
    assert set(maps) == set(wanted)
    for key, reference in wanted.items():
        ours = maps[key].double().numpy()
        assert list(ours.shape) == reference["shape"], key
        tolerance = 1e-4 * reference["peak"]
        cells = [ours[0, c, row, column] for c, row, column in reference["cells"]]
        np.testing.assert_allclose(cells, reference["values"], rtol=0, atol=tolerance, err_msg=key)
        got = (ours.mean(), ours.std(), np.abs(ours).max())
        np.testing.assert_allclose(got, [reference[k] for k in ("mean", "std", "peak")], rtol=0, atol=tolerance)
        assert np.ptp(reference["values"]) > 20 * tolerance  # or the comparison would show nothing


def named(raw: Any) -> dict[str, Tensor]:
    return {name: value for name, value in raw._asdict().items() if value is not None}


# --- the same answers as the public implementations ----------------------------------------------------------------


@pytest.fixture(scope="module")
def pyramid() -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """SiamRPN++ from its golden file, its backbone and necks, and their features of the golden crops.

    SiamBAN and SiamCAR have the same backbone and necks under the same names, so the same weights are drawn for them.
    """
    net = fill_model(drawn("siamrpnpp"), "siamrpnpp-r50").net
    crops = inputs("siamrpnpp")
    features = {crop.shape[3]: net.features(crop) for crop in crops}
    trunk = {k: v for k, v in net.state_dict().items() if k.startswith(("backbone.", "necks."))}

    def remembered(self: nn.Module, crop: Tensor) -> list[Tensor]:
        state = self.state_dict()
        assert all(torch.equal(state[k], v) for k, v in trunk.items())
        assert any(torch.equal(crop, known) for known in crops)
        return features[crop.shape[3]]

    with patch.object(PyramidFeatures, "features", remembered):
        yield net, trunk


def raw_maps(net: Any, name: str) -> dict[str, Tensor]:
    template, search = inputs(name)
    return named(net.search(search, *net.template(template)))


def test_siamrpnpp(pyramid: Any) -> None:
    net, _ = pyramid
    assert net.config.weighted_levels
    check("siamrpnpp", "weighted", raw_maps(net, "siamrpnpp"))


def test_siamrpnpp_for_otb_takes_the_mean_of_its_levels(pyramid: Any) -> None:
    weights = drawn("siamrpnpp")
    for name in ("rpn_head.cls_weight", "rpn_head.loc_weight"):
        del weights.state[name]
    imported = fill_model(weights, "siamrpnpp-r50")
    assert imported.config == {"weighted_levels": False}
    check("siamrpnpp", "mean", raw_maps(imported.net, "siamrpnpp"))


def test_siamban_and_the_warm_start_of_siamcan(pyramid: Any) -> None:
    weights = drawn("siamban")
    ban = fill_model(weights, "siamban-r50")
    assert (ban.config, ban.unused, ban.fresh, ban.taken) == ({}, (), (), len(weights.state))
    check("siamban", "maps", raw_maps(ban.net, "siamban"))

    can = fill_model(weights, "siamcan-r50")
    ours, theirs = can.net.state_dict(), ban.net.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert set(can.fresh) == set(ours) - set(theirs)
    assert {name.split(".")[0] for name in can.fresh} == {"attentions", "cls", "loc"}
    assert "at random until trained (9 names)" in str(can)
    plain = fill_model(weights, "siamcan-r50", {"channel_attention": False, "spatial_attention": False})
    assert plain.fresh == ()
    check("siamban", "maps", raw_maps(plain.net, "siamban"))


def test_siamcar_and_the_warm_start_of_siamla(pyramid: Any) -> None:
    weights = drawn("siamcar")
    car = fill_model(weights, "siamcar-r50")
    assert car.config == {"origin_px": 32}  # quirk B1
    assert car.net.grid.origin == 32.5
    check("siamcar", "maps", raw_maps(car.net, "siamcar"))

    la = fill_model(weights, "siamla-r50")
    assert set(la.unused) == {"car_head.centerness.weight", "car_head.centerness.bias"}
    assert {name.split(".")[0] for name in la.fresh} == {"localise"}
    theirs = raw_maps(car.net, "siamcar")
    template, search = inputs("siamcar")
    with patch.object(la.net, "_quality", lambda *_: None):  # as good as its random weights
        ours = la.net.search(search, *la.net.template(template))
    torch.testing.assert_close(torch.sigmoid(ours.logits[:, 0]), theirs["logits"].softmax(1)[:, 1])
    torch.testing.assert_close(ours.ltrb, theirs["ltrb"])


@pytest.mark.parametrize("form", ["legacy", "retrain"])
def test_siamrpn_on_alexnet(form: str) -> None:
    name = f"siamrpn-alexnet-{form}"
    imported = fill_model(drawn(name), "siamrpn-alexnet")
    assert (imported.config, imported.unused, imported.fresh) == ({}, (), ())
    check(name, "maps", raw_maps(imported.net, name))


def test_siamfc_is_turned_from_rgb_to_bgr() -> None:
    weights = drawn("siamfc")
    net = fill_model(weights, "siamfc").net
    template, search = (crop.flip(1) for crop in inputs("siamfc"))
    check("siamfc", "maps", {"logits": net.respond(search, net.template(template)[0])})
    adaptive = fill_model(weights, "siamfc-st")
    assert {name.split(".")[0] for name in adaptive.fresh} == {"st"}
    torch.testing.assert_close(adaptive.net.template(template)[0], net.template(template)[0])


def test_dastsiam() -> None:
    imported = fill_model(drawn("dastsiam"), "dastsiam-r50")
    assert imported.config == {"untied": True, "attention": "release", "gated": True}
    assert (imported.unused, imported.fresh) == ((), ())
    net: Any = imported.net
    template, search, *further = inputs("dastsiam")
    features = [net.template(crop)[0] for crop in (template, *further)]
    tensors = net.update(*features)
    check("dastsiam", "maps", {**named(net.search(search, *tensors)), "fused": tensors[0]})
    net.st.gate = None  # the gated branch off: Eq. 1
    check("dastsiam", "eq1", {"fused": net.st(*features)})


def test_dastsiam_without_the_gated_branch() -> None:
    weights = drawn("dastsiam")
    imported = fill_model(weights, "dastsiam-r50", {"gated": False})
    assert len(imported.unused) == 15 and all(name in weights.state for name in imported.unused)
    assert imported.net.st.gate is None  # type: ignore[union-attr]


# --- ImageNet ------------------------------------------------------------------------------------------------------


def test_mobilenetv2_of_torchvision() -> None:
    backbone = MobileNetV2().eval()
    unused = import_mobilenetv2(backbone, drawn("mobilenetv2").state)
    # Past stride 16: the third block of 96 channels and all behind it.
    assert {name.rpartition(".conv")[0] or name.split(".")[0] for name in unused} >= {"features.13", "classifier"}
    assert not any(name.startswith(f"features.{n}.") for name in unused for n in range(13))
    stride8, stride16 = backbone(image("search", 95).flip(1))
    check("mobilenetv2", "maps", {"stride8": stride8, "stride16": stride16})


def test_resnet_of_torchvision_takes_raw_bgr() -> None:
    stem = ResNet50Dilated().eval()
    weight, statistics = draw("conv1.weight", (64, 3, 7, 7)), {}
    for part in ("weight", "bias", "running_mean", "running_var"):
        statistics[part] = draw(f"bn1.{part}", (64,))
    ours = raw_bgr({"conv1.weight": weight, **{f"bn1.{part}": value for part, value in statistics.items()}})
    stem.load_state_dict(ours, strict=False)
    rgb = 127.5 * (1 + uniform("rgb", (1, 3, 31, 31)))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (rgb / 255 - mean[:, None, None]) / deviation[:, None, None]
    moments = (statistics["running_mean"], statistics["running_var"])
    wanted = functional.batch_norm(
        functional.conv2d(normalised, weight, stride=2), *moments, statistics["weight"], statistics["bias"]
    )
    torch.testing.assert_close(stem.bn1(stem.conv1(rgb.flip(1))), wanted, rtol=1e-4, atol=1e-4)


def test_an_imagenet_backbone_leaves_the_rest_at_random(tmp_path: Path) -> None:
    state = {name: draw(name, tuple(value.shape)) for name, value in ResNet50Dilated().state_dict().items()}
    weights = PublicWeights(tmp_path, {**state, "fc.weight": torch.zeros(1000, 2048)})
    weights.state.update({k: v for k, v in weights.state.items() if not k.endswith("num_batches_tracked")})
    one, two = (fill_model(weights, "siamcar-r50") for _ in range(2))
    assert "fc.weight" in one.unused
    assert {name.split(".")[0] for name in one.fresh} >= {"necks", "down", "cls_tower"}
    ours = one.net.state_dict()
    assert torch.equal(ours["backbone.layer4.2.conv3.weight"], state["layer4.2.conv3.weight"])
    assert all(torch.equal(value, ours[name]) for name, value in two.net.state_dict().items())  # the same each time
    del weights.state["layer3.0.bn1.bias"]
    with pytest.raises(ValueError, match=r"not ResNet-50 weights: layer3\.0\.bn1\.bias missing"):
        fill_model(weights, "siamcar-r50")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siamfc() -> PublicWeights:
    return drawn("siamfc")


def without(weights: PublicWeights, *names: str, **more: Tensor) -> PublicWeights:
    state = {name: value for name, value in weights.state.items() if name not in names}
    return PublicWeights(weights.path, {**state, **{name.replace("__", "."): value for name, value in more.items()}})


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["backbone.conv3.1.running_mean"], {}, r"missing, by our names \(1\): backbone\.conv3\.1\.running_mean"),
        ([], {"head__scale": torch.zeros(1)}, r"unknown \(1\): head\.scale"),
        ([], {"backbone__conv6__0__weight": torch.zeros(1)}, r"unknown \(1\): backbone\.conv6\.0\.weight"),
        (
            [],
            {"backbone__conv5__0__bias": torch.zeros(32)},
            r"of another shape \(1\): .* gives \(32,\), .* is \(256,\)",
        ),
        ([], {"backbone__conv1__0__weight": torch.zeros(96)}, r".* backbone\.conv1\.0\.weight gives \(96,\)"),
    ],
)
def test_every_name_and_shape_has_to_fit(
    siamfc: PublicWeights, names: list[str], more: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"siamfc looks like SiamFC .* does not fit siamfc; {message}"):
        fill_model(without(siamfc, *names, **more), "siamfc")


def test_changes_leave_another_shape_for_the_check() -> None:
    assert transposed(torch.zeros(3)).shape == (3,)
    assert logit_difference(torch.zeros(1, 256, 3, 3)).shape != (1, 256, 3, 3)


def test_a_file_of_another_model_names_its_own(siamfc: PublicWeights) -> None:
    with pytest.raises(ValueError, match="which fits --model siamfc, siamfc-st; got siamban-r50"):
        fill_model(siamfc, "siamban-r50")
    with pytest.raises(ValueError, match="unknown model 'siamxyz'; known: siamfc"):
        fill_model(siamfc, "siamxyz")
    with pytest.raises(ValueError, match=r"of no known layout: it has mask_head\.a, b; known: SiamRPN\+\+"):
        fill_model(PublicWeights(Path("f"), {"mask_head.a.x": torch.zeros(1), "b": torch.zeros(1)}), "siamfc")
    with pytest.raises(ValueError, match="unknown field upsamplin"):
        fill_model(siamfc, "siamfc", {"upsamplin": 8})


def test_layouts_are_told_apart() -> None:
    assert {layout.model for layout in LAYOUTS} == set(MODELS)
    for name, source in (("siamfc", "SiamFC"), ("dastsiam", "DASTSiam"), ("siamrpn-alexnet-retrain", "retrained")):
        state = golden(name)["names"]
        fitting = {layout.source for layout in LAYOUTS if all(key in state for key in layout.signature)}
        assert len(fitting) == 1 and source in fitting.pop()


class Runs:
    """Unpickled as a call, as a malicious file would have it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, mark = tmp_path / "f.pth", tmp_path / "was here"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "optimizer": Runs(mark)}, file)
    with pytest.raises(ValueError, match=r"is refused: reading it would run \w+\.mkdir, .* write its tensors alone"):
        read_weights(file)
    assert not mark.exists()
    assert cli.main(["import-checkpoint", str(file), "--model", "siamfc", "--out", str(tmp_path / "c.pth")]) == 2
    assert "is refused" in capsys.readouterr().err
    assert not (tmp_path / "c.pth").exists()


def test_numbers_of_numpy_beside_the_weights_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """The learning rates of pysot's own snapshots are such."""
    torch.save({"state_dict": {"a": torch.zeros(1)}, "optimizer": {"lr": np.float64(0.1)}}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match=r"would run numpy\..*scalar.*write its tensors alone"):
        read_weights(tmp_path / "f.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"weights", "not a file of tensors and plain values: damaged, or of another format"),
        (torch.zeros(3), "expected a state dict, bare or under 'state_dict', got Tensor"),
        ({"epoch": 3, "model": {"a": torch.zeros(1)}}, "these are none: epoch, model"),
        ({}, "expected a state dict"),
    ],
)
def test_a_file_without_a_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "f.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        read_weights(file)


# --- the command ---------------------------------------------------------------------------------------------------


def test_from_file_to_bundle(siamfc: PublicWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, checkpoint, bundle = tmp_path / "public.pth", tmp_path / "new" / "c.pth", tmp_path / "bundle"
    state = {f"module.{name}": value for name, value in siamfc.state.items()}
    state["module.backbone.conv1.1.num_batches_tracked"] = torch.tensor(7)
    torch.save({"epoch": 19, "state_dict": state, "optimizer": {"state": {}, "lr": [0.1]}}, file)
    options = ["--model", "siamfc", "--out", str(checkpoint), "--config", "upsampling=8"]
    assert cli.main(["import-checkpoint", str(file), *options]) == 0
    said = capsys.readouterr().out
    assert "siamfc <- SiamFC (siamfc-pytorch): 26 tensors" in said
    assert "configuration: upsampling=8" in said and f"wrote {checkpoint}" in said
    content = torch.load(checkpoint, weights_only=True)
    assert content["source"]["sha256"] == sha256(file)
    assert content["source"]["file"] == "public.pth"
    loaded = load_checkpoint(checkpoint)
    assert (loaded.model, loaded.net.config.upsampling, loaded.provenance["epoch"]) == ("siamfc", 8, "19")  # type: ignore[union-attr]
    wanted = fill_model(siamfc, "siamfc").net.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.net.state_dict().items())
    assert export_main(["onnx", "--checkpoint", str(checkpoint), "--out", str(bundle), "--crops", "1"]) == 0
    assert load_bundle(bundle).manifest.provenance["checkpoint_sha256"] == sha256(checkpoint)


def test_a_bare_state_dict_and_safetensors(siamfc: PublicWeights, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.save(copy.copy(siamfc.state), tmp_path / "bare.pth")
    save_file(siamfc.state, tmp_path / "bare.safetensors")
    nets = [
        import_checkpoint(tmp_path / f"bare{end}", "siamfc", tmp_path / "c.pth").net.state_dict()
        for end in (".pth", ".safetensors")
    ]
    assert all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())
    assert "epoch" not in torch.load(tmp_path / "c.pth", weights_only=True)


def test_without_torch_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "siamtrack.nets.importing", None)
    assert cli.main(["import-checkpoint", "f.pth", "--model", "siamfc", "--out", str(tmp_path / "c.pth")]) == 2
    assert "needs PyTorch: pip install 'siamtrack[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["origin_px", "=31"])
def test_a_field_of_the_configuration_has_a_value(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["import-checkpoint", "f.pth", "--model", "siamcar-r50", "--out", "c.pth", "--config", field])
    assert "expected FIELD=VALUE" in capsys.readouterr().err
