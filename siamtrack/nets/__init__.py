"""The networks, in PyTorch. Training and export need this package; tracking does not."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from siamtrack.nets.dastsiam import DASTSiam, DASTSiamEdge
from siamtrack.nets.siamban import SiamBAN
from siamtrack.nets.siamcan import SiamCAN, SiamCANEdge
from siamtrack.nets.siamcar import SiamCAR
from siamtrack.nets.siamfc import SiamFC, SiamFCST
from siamtrack.nets.siamla import SiamLA, SiamLAEdge
from siamtrack.nets.siamrpn import SiamRPN, SiamRPNpp

MODELS: dict[str, Callable[[], nn.Module]] = {
    "siamfc": SiamFC,
    "siamfc-st": SiamFCST,
    "siamrpn-alexnet": SiamRPN,
    "siamrpnpp-r50": SiamRPNpp,
    "siamban-r50": SiamBAN,
    "siamcar-r50": SiamCAR,
    "siamcan-r50": SiamCAN,
    "siamcan-mobilenetv2": SiamCANEdge,
    "siamla-r50": SiamLA,
    "siamla-mobilenetv2": SiamLAEdge,
    "dastsiam-r50": DASTSiam,
    "dastsiam-mobilenetv2": DASTSiamEdge,
}
"""Every model by name; calling one builds it with its default configuration and random weights."""
