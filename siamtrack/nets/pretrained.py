"""ImageNet weights of public files, turned into the layout of our backbones and their BGR order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from siamtrack.nets.backbones import InvertedResidual, MobileNetV2, ResNet50

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
MOBILENETV2_BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # of the whole classifier's stages


def load_mobilenetv2_imagenet(backbone: MobileNetV2, state: Mapping[str, Tensor], eps: float = 1e-5) -> list[str]:
    """Load ImageNet weights in timm's `mobilenetv2_100` key names, folding BatchNorm and turning the stem to BGR.

    Args:
        backbone: filled in place.
        state: timm state dict; keys past stride 16 are not needed.
        eps: BatchNorm epsilon of the source model.

    Returns:
        The keys that were not used.

    Raises:
        ValueError: a key is missing or has another shape.
    """
    used: set[str] = set()

    def fold(into: nn.Conv2d, conv: str, norm: str) -> None:
        names = [f"{conv}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"not timm mobilenetv2_100 weights: {', '.join(missing)} missing")
        used.update(names)
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
    return sorted(set(state) - used)


def load_resnet50_imagenet(backbone: ResNet50, state: Mapping[str, Tensor]) -> list[str]:
    """Load ImageNet ResNet-50 weights (pysot's `resnet50.model`, or torchvision's).

    `ResNet50Dilated`: pysot's file takes BGR 0..255 as this network does, so it is the exact start. Torchvision's, of
    RGB in another normalisation, is a warm one; its 1x1 shortcuts go into the centre of the 3x3 ones, which computes
    the same function.

    `ResNet50Layer3`: torchvision's file fits, and its first convolution is turned to BGR.

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
    if backbone.padded:
        loaded["conv1.weight"] = loaded["conv1.weight"].flip(1)  # RGB -> BGR input order
    backbone.load_state_dict(loaded)
    return sorted(set(state) - set(own))


def import_mobilenetv2(backbone: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load MobileNetV2 weights of timm or torchvision.

    Returns:
        The keys that were not used.

    Raises:
        ValueError: a key is missing or does not fit.
    """
    names = timm_names(state)
    return sorted(
        names[key]
        for key in load_mobilenetv2_imagenet(cast(MobileNetV2, backbone), {k: state[n] for k, n in names.items()})
    )


def timm_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Timm's names of MobileNetV2 weights to those in `state`, which may be torchvision's `mobilenet_v2`.

    Torchvision counts blocks from 1 on, through all stages, and the layers of a block in a nested sequence. What has no
    name in timm keeps its own.
    """
    blocks = [f"blocks.{s}.{b}" for s, count in enumerate(MOBILENETV2_BLOCKS) for b in range(count)]
    prefixes = {"features.0.0.": "conv_stem.", "features.0.1.": "bn1."}
    for number, block in enumerate(blocks, start=1):
        theirs = f"features.{number}.conv"
        layers = (
            ("conv_dw", "bn1", "conv_pw", "bn2")
            if number == 1
            else ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        )
        places = ("0.0", "0.1", "1", "2") if number == 1 else ("0.0", "0.1", "1.0", "1.1", "2", "3")
        prefixes |= {f"{theirs}.{place}.": f"{block}.{layer}." for place, layer in zip(places, layers, strict=True)}
    names = {}
    for key in state:
        prefix, _, last = key.rpartition(".")
        names[prefixes.get(f"{prefix}.", f"{prefix}." if prefix else "") + last] = key
    return names


def import_resnet50(backbone: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load ResNet-50 weights of pysot, torchvision or timm, for the input that the backbone takes.

    `load_resnet50_imagenet`, and for `ResNet50Dilated`, which takes raw BGR, `raw_bgr` before it unless the file is
    pysot's.

    Returns:
        The keys that were not used.

    Raises:
        ValueError: a key is missing or does not fit.
    """
    resnet = cast(ResNet50, backbone)
    shortcut = state.get("layer2.0.downsample.0.weight")
    if not resnet.padded and shortcut is not None and shortcut.shape[2:] == (1, 1):
        state = raw_bgr(state)
    return load_resnet50_imagenet(resnet, state)


def raw_bgr(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ResNet weights for normalised RGB as weights for BGR in 0..255.

    Scale and mean of the input go into the first convolution and the mean of its BatchNorm. Exact where the convolution
    is not padded.

    Raises:
        ValueError: the first convolution or its BatchNorm is missing or has another shape.
    """
    for name, dims in (("conv1.weight", 4), ("bn1.running_mean", 1)):
        if name not in state or state[name].dim() != dims:
            raise ValueError(f"not ResNet-50 weights: {name} missing or of another shape")
    weight = state["conv1.weight"].float()
    if weight.shape[1] != 3:
        raise ValueError(f"conv1.weight has shape {tuple(weight.shape)}, expected three input channels")
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    offset = (weight * mean / deviation).sum(dim=(1, 2, 3))
    return {
        **state,
        "conv1.weight": (weight / (255 * deviation)).flip(1),
        "bn1.running_mean": state["bn1.running_mean"].float() + offset,
    }
