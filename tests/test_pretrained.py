"""ImageNet weights of other packages in our backbones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from stand_ins import rand, randn
from torch import Tensor
from torch.nn import functional

from siamtrack.nets.backbones import MobileNetV2, ResNet50Dilated
from siamtrack.nets.pretrained import load_mobilenetv2_imagenet, load_resnet50_imagenet


@pytest.fixture(scope="module")
def resnet() -> ResNet50Dilated:
    torch.manual_seed(0)
    return ResNet50Dilated().eval()


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
