"""The networks, in PyTorch. Training and export need this package; tracking does not."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from siamtrack.nets.siamcan import SiamCAN, SiamCANEdge

MODELS: dict[str, Callable[[], nn.Module]] = {
    "siamcan-r50": SiamCAN,
    "siamcan-mobilenetv2": SiamCANEdge,
}
"""Every model by name; calling one builds it with its default configuration and random weights."""
