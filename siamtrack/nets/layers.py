"""Parts that several networks are built from: the ResNet-50 feature pyramid, correlation branches, towers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siamtrack.nets.backbones import ResNet50Dilated
from siamtrack.nets.correlation import DEPTHWISE_FORMS
from siamtrack.nets.decode import Grid, Normalisation


class Neck(nn.Module):
    """1x1 convolution and BatchNorm to the common width, no activation (SiamRPN++)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x)


class PyramidFeatures(nn.Module):
    """What the ResNet-50 trackers share: modified ResNet-50, three necks, 25x25 grid of stride 8.

    Args:
        channels: common width of the levels.
    """

    template_size, search_size = 127, 255
    grid = Grid(size=25, stride=8, origin=31.5)
    normalisation = Normalisation(mean=0.0, scale=1.0)  # raw BGR, as every pysot descendant
    levels = (512, 1024, 2048)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = ResNet50Dilated()
        self.necks = nn.ModuleList(Neck(inputs, channels) for inputs in self.levels)

    def features(self, image: Tensor) -> list[Tensor]:
        """``[N, 3, 255, 255]`` to three maps ``[N, C, 31, 31]``; cell k is centred on pixel 7 + 8 k."""
        return [neck(level) for neck, level in zip(self.necks, self.backbone(image), strict=True)]

    def template_features(self, image: Tensor) -> list[Tensor]:
        """``[N, 3, 127, 127]`` to three maps ``[N, C, 7, 7]``, the centre of 15x15 cells."""
        return [z[:, :, 4:11, 4:11] for z in self.features(image)]


class CorrelationBranch(nn.Module):
    """One branch of one level of SiamRPN++ and its descendants: correlate depthwise, predict.

    Args:
        width: channels of both features.
        outputs: channels of the prediction.
        correlation: key of `siamtrack.nets.correlation.DEPTHWISE_FORMS`.
        adjust: 3x3 convolutions of both features before the correlation.
    """

    def __init__(self, width: int, outputs: int, correlation: str = "grouped", adjust: bool = True) -> None:
        super().__init__()
        self.conv_kernel = conv_norm_act(width, width, 3, padding=0) if adjust else nn.Identity()
        self.conv_search = conv_norm_act(width, width, 3, padding=0) if adjust else nn.Identity()
        self.correlate = DEPTHWISE_FORMS[correlation]
        self.head = nn.Sequential(*conv_norm_act(width, width, 1), nn.Conv2d(width, outputs, 1))

    def correlated(self, kernel: Tensor, search: Tensor) -> Tensor:
        """``kernel`` already through `conv_kernel` [N, C, 5, 5]; ``search`` [N, C, 31, 31] -> [N, C, 25, 25]."""
        return self.correlate(self.conv_search(search), kernel)

    def forward(self, kernel: Tensor, search: Tensor) -> Tensor:
        """As `correlated`, to ``[N, outputs, 25, 25]``."""
        return self.head(self.correlated(kernel, search))


def conv_norm_act(inputs: int, outputs: int, kernel: int, groups: int = 1, padding: int | None = None) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU; the map keeps its size unless `padding` says otherwise."""
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def separable_tower(width: int, blocks: int) -> nn.Sequential:
    """`blocks` times a 3x3 depthwise and a 1x1 convolution, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [conv_norm_act(width, width, 3, groups=width), conv_norm_act(width, width, 1)]
    return nn.Sequential(*layers)


def group_norm_tower(width: int, blocks: int = 4, groups: int = 32) -> nn.Sequential:
    """`blocks` times 3x3 convolution with bias, GroupNorm, ReLU (FCOS, SiamCAR)."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(groups, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def small_weights(*parts: nn.Module) -> None:
    """Weights of all convolutions in `parts` from a normal distribution of deviation 0.01, no bias (FCOS's heads)."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def positive_distances(raw: Tensor) -> Tensor:
    """Crop pixels ``exp(raw)``, in bounds that no target reaches: 0.0025 and 493 px, which FP16 holds."""
    return torch.exp(raw.clamp(-6.0, 6.2))


def check_correlation(name: str) -> None:
    """Raise ValueError when `name` is no form of depthwise correlation."""
    if name not in DEPTHWISE_FORMS:
        raise ValueError(f"correlation must be one of {sorted(DEPTHWISE_FORMS)}, got {name!r}")
