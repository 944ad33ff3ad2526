"""Backbones: the modified ResNet-50 of the SiamRPN++ family, and MobileNetV2 for the edge models.

Both take a normalised image ``[N, 3, H, W]`` in BGR order (the tracker's order everywhere) and return a tuple of
feature maps. Import functions turn public ImageNet weights into this order and layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """ResNet bottleneck 1x1, 3x3, 1x1 whose shortcut may be a 3x3 convolution (pysot's `resnet_atrous`)."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        padding = 0 if stride == 2 else dilation  # the only strided block (layer2) is unpadded: erratum S1
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet50Dilated(nn.Module):
    """ResNet-50 of total stride 8 with dilated last stages; parameter names are pysot's.

    For an input of 127 / 255 pixels the three outputs (512, 1024 and 2048 channels) are 15x15 / 31x31 maps, and cell
    ``k`` of each is centred on pixel ``7 + 8 k``. The stem convolution and the strided block are unpadded (SiamCAN
    erratum S1: "without padding" cannot hold for the other stages).
    """

    stages = ("layer2", "layer3", "layer4")

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(64, 64, blocks=3, stride=1, dilation=1)
        self.layer2 = self._stage(256, 128, blocks=4, stride=2, dilation=1)
        self.layer3 = self._stage(512, 256, blocks=6, stride=1, dilation=2)
        self.layer4 = self._stage(1024, 512, blocks=3, stride=1, dilation=4)

    @staticmethod
    def _stage(inputs: int, width: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
        first_dilation = max(dilation // 2, 1)  # the first block still runs at the previous stage's dilation
        if stride == 1 and dilation == 1:  # layer1
            shortcut_conv = nn.Conv2d(inputs, width * 4, 1, bias=False)
        else:
            padding = 0 if stride == 2 else first_dilation
            shortcut_conv = nn.Conv2d(inputs, width * 4, 3, stride, padding, first_dilation, bias=False)
        shortcut = nn.Sequential(shortcut_conv, nn.BatchNorm2d(width * 4))
        layers = [Bottleneck(inputs, width, stride, first_dilation, shortcut)]
        layers += [Bottleneck(width * 4, width, 1, dilation, None) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def trainable_stages(self) -> list[nn.Module]:
        """Parts in depth order, for freezing from the front."""
        return [nn.ModuleList([self.conv1, self.bn1]), self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature maps of layer2, layer3 and layer4 for ``image`` ``[N, 3, H, W]`` (BGR, 0..255)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        level2 = self.layer2(self.layer1(x))
        level3 = self.layer3(level2)
        return level2, level3, self.layer4(level3)


class ConvAct(nn.Module):
    """Convolution with bias (BatchNorm folded in) and ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(self.conv(x), inplace=True)


class InvertedResidual(nn.Module):
    """MobileNetV2 block: 1x1 expansion, 3x3 depthwise, linear 1x1 projection, shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = ConvAct(inputs, width, 1) if expansion > 1 else None
        self.depthwise = ConvAct(width, width, 3, stride, groups=width)
        self.project = nn.Conv2d(width, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else self.expand(x)
        out = self.project(self.depthwise(out))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 to stride 16, BatchNorm folded into the convolutions.

    A tracker fine-tunes the backbone with frozen statistics, so folding loses nothing and saves memory
    traffic. Symmetric padding keeps features centred: cell ``i`` of stride ``s`` lies on pixel ``s i`` for inputs of
    127 and 223 pixels.
    """

    # Outputs, blocks, stride and expansion of each stage (Sandler et al. 2018, table 2, up to stride 16). The last
    # stage keeps two of its three blocks: without the third the network is cheaper.
    STAGES = ((16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 2, 1, 6))

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvAct(3, 32, 3, stride=2)
        self.stages = nn.ModuleList()
        inputs = 32
        for outputs, blocks, stride, expansion in self.STAGES:
            layers = [InvertedResidual(inputs, outputs, stride, expansion)]
            layers += [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(1, blocks)]
            self.stages.append(nn.Sequential(*layers))
            inputs = outputs

    def trainable_stages(self) -> list[nn.Module]:
        """Parts in depth order, for freezing from the front."""
        return [self.stem, *self.stages]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Stride-8 features (32 channels) and stride-16 features (96) of ``image`` ``[N, 3, H, W]`` (BGR, -1..1)."""
        x = self.stem(image)
        for stage in self.stages[:3]:
            x = stage(x)
        stride8 = x
        for stage in self.stages[3:]:
            x = stage(x)
        return stride8, x


def load_mobilenetv2_imagenet(backbone: MobileNetV2, state: Mapping[str, Tensor], eps: float = 1e-5) -> None:
    """Load ImageNet weights in timm's `mobilenetv2_100` key names, folding BatchNorm and turning the stem to BGR.

    Args:
        backbone: filled in place.
        state: timm state dict; keys past stride 16 are not needed.
        eps: BatchNorm epsilon of the source model.

    Raises:
        ValueError: a key is missing or has another shape.
    """

    def fold(into: nn.Conv2d, conv: str, norm: str) -> None:
        names = [f"{conv}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"not timm mobilenetv2_100 weights: {', '.join(missing)} missing")
        weight, gamma, beta, mean, var = (state[name].float() for name in names)
        if weight.shape != into.weight.shape:
            raise ValueError(f"{conv}.weight has shape {tuple(weight.shape)}, expected {tuple(into.weight.shape)}")
        scale = gamma / torch.sqrt(var + eps)
        with torch.no_grad():
            into.weight.copy_(weight * scale[:, None, None, None])
            assert into.bias is not None
            into.bias.copy_(beta - mean * scale)

    fold(backbone.stem.conv, "conv_stem", "bn1")
    with torch.no_grad():
        backbone.stem.conv.weight.copy_(backbone.stem.conv.weight.flip(1))  # RGB -> BGR input order
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(cast(Iterable[InvertedResidual], stage)):
            key = f"blocks.{s}.{b}"
            if block.expand is None:
                fold(block.depthwise.conv, f"{key}.conv_dw", f"{key}.bn1")
                fold(block.project, f"{key}.conv_pw", f"{key}.bn2")
            else:
                fold(block.expand.conv, f"{key}.conv_pw", f"{key}.bn1")
                fold(block.depthwise.conv, f"{key}.conv_dw", f"{key}.bn2")
                fold(block.project, f"{key}.conv_pwl", f"{key}.bn3")


def load_resnet50_imagenet(backbone: ResNet50Dilated, state: Mapping[str, Tensor]) -> list[str]:
    """Load ImageNet ResNet-50 weights (pysot's `resnet50.model`, or torchvision's).

    Torchvision's 1x1 shortcuts of layers 2 to 4 go into the centre of our 3x3 ones, which computes the same function.
    Torchvision models take RGB in another normalisation; pysot's file takes BGR 0..255 as this network does, so it is
    the exact start and torchvision's a warm one.

    Returns:
        The keys that were not used.

    Raises:
        ValueError: a key is missing or does not fit.
    """
    own = backbone.state_dict()
    loaded: dict[str, Tensor] = {}
    for name, target in own.items():
        if name.endswith("num_batches_tracked"):
            loaded[name] = target
            continue
        if name not in state:
            raise ValueError(f"not ResNet-50 weights: {name} missing")
        value = state[name]
        if value.shape != target.shape and value.shape[:2] == target.shape[:2] and value.shape[2:] == (1, 1):
            centred = torch.zeros_like(target)
            centred[:, :, 1, 1] = value[:, :, 0, 0]
            value = centred
        if value.shape != target.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
        loaded[name] = value
    backbone.load_state_dict(loaded)
    return sorted(set(state) - set(own))
