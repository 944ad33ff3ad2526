"""Backbones: two AlexNets, two ResNet-50 of stride 8, and MobileNetV2 for the edge models.

All take a normalised image ``[N, 3, H, W]`` in BGR order (the tracker's order everywhere) and return a tuple of feature
maps. `siamtrack.nets.pretrained` turns public ImageNet weights into this order and layout.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """ResNet bottleneck 1x1, 3x3, 1x1 whose shortcut may be a 3x3 convolution (pysot's `resnet_atrous`)."""

    def __init__(
        self, inputs: int, width: int, stride: int, padding: int, dilation: int, shortcut: nn.Module | None
    ) -> None:
        super().__init__()
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


class ResNet50(nn.Module):
    """Stem and first two stages of every ResNet-50 here; total stride 8. Parameter names are torchvision's and pysot's.

    Args:
        stem_padding: of the 7x7 convolution.
        padded: pad the strided block as torchvision does; pysot's has no padding there and 3x3 shortcuts from there on.
    """

    def __init__(self, stem_padding: int, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.conv1 = nn.Conv2d(3, 64, 7, 2, stem_padding, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self.stage(64, 64, blocks=3, stride=1, dilation=1, shortcut_kernel=1)
        self.layer2 = self.stage(256, 128, blocks=4, stride=2, dilation=1, shortcut_kernel=1 if padded else 3)

    def stage(
        self, inputs: int, width: int, blocks: int, stride: int, dilation: int, shortcut_kernel: int
    ) -> nn.Sequential:
        """Blocks of `width` inner and four times as many outer channels; the first one strides and dilates half."""
        first_dilation = max(dilation // 2, 1)  # the first block still runs at the previous stage's dilation
        padding = first_dilation if stride == 1 or self.padded else 0
        shortcut_conv = nn.Conv2d(
            inputs,
            width * 4,
            shortcut_kernel,
            stride,
            padding if shortcut_kernel > 1 else 0,
            first_dilation if shortcut_kernel > 1 else 1,
            bias=False,
        )
        shortcut = nn.Sequential(shortcut_conv, nn.BatchNorm2d(width * 4))
        layers = [Bottleneck(inputs, width, stride, padding, first_dilation, shortcut)]
        layers += [Bottleneck(width * 4, width, 1, dilation, dilation, None) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def trainable_stages(self) -> list[nn.Module]:
        """Parts in depth order, for freezing from the front."""
        return [nn.ModuleList([self.conv1, self.bn1]), self.layer1, self.layer2]

    def level2(self, image: Tensor) -> Tensor:
        """Features of layer2, 512 channels."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        return self.layer2(self.layer1(x))


class ResNet50Dilated(ResNet50):
    """ResNet-50 of total stride 8 with dilated last stages; parameter names are pysot's.

    For an input of 127 / 255 pixels the three outputs (512, 1024 and 2048 channels) are 15x15 / 31x31 maps, and cell
    ``k`` of each is centred on pixel ``7 + 8 k``. The stem convolution and the strided block are unpadded (SiamCAN
    erratum S1: "without padding" cannot hold for the other stages).
    """

    stages = ("layer2", "layer3", "layer4")

    def __init__(self) -> None:
        super().__init__(stem_padding=0, padded=False)
        self.layer3 = self.stage(512, 256, blocks=6, stride=1, dilation=2, shortcut_kernel=3)
        self.layer4 = self.stage(1024, 512, blocks=3, stride=1, dilation=4, shortcut_kernel=3)

    def trainable_stages(self) -> list[nn.Module]:
        return [*super().trainable_stages(), self.layer3, self.layer4]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature maps of layer2, layer3 and layer4 for ``image`` ``[N, 3, H, W]`` (BGR, 0..255)."""
        level2 = self.level2(image)
        level3 = self.layer3(level2)
        return level2, level3, self.layer4(level3)


class ResNet50Layer3(ResNet50):
    """Torchvision's ResNet-50 up to layer3, whose stride is taken out without dilation (DASTSiam's release).

    For an input of 127 / 287 pixels the 1024 channels are 16x16 / 36x36 maps, and cell ``k`` is centred on pixel
    ``8 k``: everything is padded.
    """

    def __init__(self) -> None:
        super().__init__(stem_padding=3, padded=True)
        self.layer3 = self.stage(512, 256, blocks=6, stride=1, dilation=1, shortcut_kernel=1)

    def trainable_stages(self) -> list[nn.Module]:
        return [*super().trainable_stages(), self.layer3]

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Features of layer3 for ``image`` ``[N, 3, H, W]`` (BGR)."""
        return (self.layer3(self.level2(image)),)


class TwoBackbones(nn.Module):
    """One backbone for templates and one for searches, of the same kind (DASTSiam's release, erratum D9)."""

    def __init__(self, template: ResNet50Layer3, search: ResNet50Layer3) -> None:
        super().__init__()
        self.template, self.search = template, search

    def trainable_stages(self) -> list[nn.Module]:
        """Parts of both in depth order, for freezing from the front."""
        pairs = zip(self.template.trainable_stages(), self.search.trainable_stages(), strict=True)
        return [nn.ModuleList(pair) for pair in pairs]


class AlexNetV1(nn.Module):
    """SiamFC's AlexNet: unpadded, two convolution groups, no activation at the end; names are siamfc-pytorch's.

    For an input of 127 / 255 pixels the 256 channels are 6x6 / 22x22 maps of stride 8.
    """

    def __init__(self) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)
            return [conv, nn.BatchNorm2d(outputs, eps=1e-6, momentum=0.05), nn.ReLU(inplace=True)]

        self.conv1 = nn.Sequential(*layer(3, 96, 11, stride=2), nn.MaxPool2d(3, 2))
        self.conv2 = nn.Sequential(*layer(96, 256, 5, groups=2), nn.MaxPool2d(3, 2))
        self.conv3 = nn.Sequential(*layer(256, 384, 3))
        self.conv4 = nn.Sequential(*layer(384, 384, 3, groups=2))
        self.conv5 = nn.Sequential(nn.Conv2d(384, 256, 3, groups=2))

    def trainable_stages(self) -> list[nn.Module]:
        """Parts in depth order, for freezing from the front."""
        return [self.conv1, self.conv2, self.conv3, self.conv4, self.conv5]

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Features of ``image`` ``[N, 3, H, W]`` (BGR, 0..255)."""
        return (self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(image))))),)


class AlexNet(nn.Module):
    """SiamRPN's AlexNet: unpadded, no groups, pooling before activation; names are those of pysot's legacy models.

    For an input of 127 / 287 pixels the 256 channels are 6x6 / 26x26 maps, and cell ``k`` is centred on pixel
    ``43 + 8 k``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 96, 11, 2), nn.BatchNorm2d(96), nn.MaxPool2d(3, 2), nn.ReLU(inplace=True)),
            *(nn.Conv2d(96, 256, 5), nn.BatchNorm2d(256), nn.MaxPool2d(3, 2), nn.ReLU(inplace=True)),
            *(nn.Conv2d(256, 384, 3), nn.BatchNorm2d(384), nn.ReLU(inplace=True)),
            *(nn.Conv2d(384, 384, 3), nn.BatchNorm2d(384), nn.ReLU(inplace=True)),
            *(nn.Conv2d(384, 256, 3), nn.BatchNorm2d(256)),
        )

    def trainable_stages(self) -> list[nn.Module]:
        """Parts in depth order, for freezing from the front: one a convolution."""
        edges = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.Conv2d)] + [len(self.features)]
        return [self.features[a:b] for a, b in itertools.pairwise(edges)]

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Features of ``image`` ``[N, 3, H, W]`` (BGR, 0..255)."""
        return (self.features(image),)


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
    127 and 209 pixels.
    """

    # Outputs, blocks, stride and expansion of each stage (Sandler et al. 2018, table 2, up to stride 16). The last
    # stage keeps two of its three blocks: without the third the network is cheaper.
    STAGES = ((16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 2, 1, 6))
    in_a_row = 4  # leading `trainable_stages` whose output goes nowhere but to the next: up to the stride-8 features

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
        early = self.in_a_row - 1
        for stage in self.stages[:early]:
            x = stage(x)
        stride8 = x
        for stage in self.stages[early:]:
            x = stage(x)
        return stride8, x
