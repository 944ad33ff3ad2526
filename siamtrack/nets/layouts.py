"""How public implementations name their weights, as tables from their names to ours.

A layout is a table of name prefixes. Where a weight has another form than ours, `changes` holds what to do with it;
what a file has and we do not is `spare`, what we have and a file cannot is `fresh`: a warm start. Names of the public
files are those of STVIR/pysot, hqucv/siamban, ohhhyeahhh/SiamCAR, huanglianghua/siamfc-pytorch and
huangliqwe2020/DASTSiam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from siamtrack.nets.pretrained import import_mobilenetv2, import_resnet50

State = Mapping[str, Tensor]
LEVELS = range(3)


@dataclass(frozen=True)
class Layout:
    """The weights of one public network, for one of our models.

    Attributes:
        source: what such a file holds.
        model: our model, a key of `siamtrack.nets.MODELS`.
        signature: names by which a file is known.
        names: prefix of a name there to its prefix here; the longest that fits counts.
        changes: our name to what makes the file's tensor ours; all others are taken as they are.
        config: fields of our model's configuration that the file asks for.
        spare: prefixes of names there that may find no place here.
        fresh: prefixes of names here that the file does not have.
        backbone: for ImageNet files, in place of `names`: fills a backbone and says which names it did not use.
    """

    source: str
    model: str
    signature: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    config: Callable[[State], dict[str, Any]] = lambda _: {}
    spare: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    backbone: Callable[[nn.Module, State], list[str]] | None = None


def flipped(weight: Tensor) -> Tensor:
    """A first convolution for RGB as one for BGR."""
    return weight.flip(1) if weight.dim() == 4 else weight


def transposed(weight: Tensor) -> Tensor:
    """The weight of a transposed 1x1 convolution as that of a plain one."""
    return weight.transpose(0, 1) if weight.dim() == 4 else weight


def logit_difference(weight: Tensor) -> Tensor:
    """Two softmax logits as the one sigmoid logit of the same probability: the second less the first."""
    return weight[1:2] - weight[0:1]


PYRAMID = {"backbone.": "backbone.", **{f"neck.downsample{n + 2}.": f"necks.{n}." for n in LEVELS}}

SIAMRPNPP = {
    **PYRAMID,
    **{f"rpn_head.rpn{n + 2}.": f"heads.{n}." for n in LEVELS},
    "rpn_head.cls_weight": "cls_weight",
    "rpn_head.loc_weight": "loc_weight",
}

SIAMRPN_LEGACY = {"backbone.features.": "backbone.features.", "rpn_head.": "head."}

# The retrained AlexNet has its layers in five blocks, the legacy one in a row: convolution and norm of each block.
BLOCKS = {1: (0, 1), 2: (4, 5), 3: (8, 9), 4: (11, 12), 5: (14, 15)}
SIAMRPN_RETRAINED = {
    **{f"backbone.layer{b}.{i}.": f"backbone.features.{n}." for b, ns in BLOCKS.items() for i, n in enumerate(ns)},
    "rpn_head.": "head.",
}

SIAMBAN = {
    **PYRAMID,
    **{f"head.box{n + 2}.{branch}.": f"{branch}.{n}." for n in LEVELS for branch in ("cls", "loc")},
    **{f"head.{name}": name for name in ("cls_weight", "loc_weight", "loc_scale")},
}

SIAMCAR = {
    **PYRAMID,
    "down.": "down.",
    **{
        f"car_head.{part}.": f"{part}." for part in ("cls_tower", "bbox_tower", "cls_logits", "bbox_pred", "centerness")
    },
}

DASTSIAM = {
    "tbackbone.": "backbone.template.",
    "sbackbone.": "backbone.search.",
    "tAugmentation.downsample.": "reduce.",
    "tAugmentation.transformer.encoder.layers.": "st.layers.",
    "tAugmentation.transformer.filter.": "st.filter.",
    "tAugmentation.transformer.cw.1.": "st.gate.0.",
    "tAugmentation.transformer.cw.3.": "st.gate.2.",
    "tAugmentation.transformer.filter1.": "st.gated_filter.",
    "tAugmentation.transformer.W": "st.branch_weight",
    "tAugmentation.transformer.decoder.layers.": "da.layers.",
    "tAugmentation.transformer.decoder.norm.": "da.norm.",
    "tAugmentation.retif2.": "da.filter.",
    "rpnfusion.conv4_6_RPN.adj_1.": "adjust.z_loc.",
    "rpnfusion.conv4_6_RPN.adj_2.": "adjust.x_loc.",
    "rpnfusion.conv4_6_RPN.adj_3.": "adjust.z_cls.",
    "rpnfusion.conv4_6_RPN.adj_4.": "adjust.x_cls.",
    "rpnfusion.conv4_6_RPN.fusion_module_1.": "loc_trunk.",
    "rpnfusion.conv4_6_RPN.fusion_module_2.": "cls_trunk.",
    # Our trunks begin with the 1x1 convolution of the fusion, its norm and a ReLU.
    **{f"rpnfusion.conv{b}.{i}.": f"{b}_trunk.{i + 3}." for b in ("cls", "loc") for i in (0, 1, 3, 4)},
    **{f"rpnfusion.convloc.{i + 6}.": f"loc.{i}." for i in (0, 1, 3)},
    "rpnfusion.convcls1.": "cls.",
    "rpnfusion.convcls2.": "second.",
}
DASTSIAM_GATED = ("tAugmentation.transformer.cw.", "tAugmentation.transformer.filter1.", "tAugmentation.transformer.W")


def _siamrpnpp_config(state: State) -> dict[str, Any]:
    return {} if "rpn_head.cls_weight" in state else {"weighted_levels": False}


def _siamcar_config(_: State) -> dict[str, Any]:
    return {"origin_px": 32}  # quirk B1: what it was trained with


def _dastsiam_config(state: State) -> dict[str, Any]:
    gated = any(name.startswith(DASTSIAM_GATED) for name in state)
    return {"untied": True, "attention": "release", "gated": gated}  # errata D9, D2, D7


RESNET_MODELS = ("siamrpnpp-r50", "siamban-r50", "siamcan-r50", "siamcar-r50", "siamla-r50", "dastsiam-r50")
EDGE_MODELS = ("siamcan-mobilenetv2", "siamla-mobilenetv2", "dastsiam-mobilenetv2")
BAN_SIGNATURE, CAR_SIGNATURE = ("head.box2.cls.head.3.weight",), ("car_head.cls_logits.weight",)

LAYOUTS = (
    Layout(
        source="SiamRPN++ on ResNet-50 (pysot)",
        model="siamrpnpp-r50",
        signature=("rpn_head.rpn2.cls.head.3.weight",),
        names=SIAMRPNPP,
        config=_siamrpnpp_config,
    ),
    Layout(
        source="SiamRPN on AlexNet, legacy (pysot)",
        model="siamrpn-alexnet",
        signature=("backbone.features.0.weight", "rpn_head.cls.head.3.weight"),
        names=SIAMRPN_LEGACY,
    ),
    Layout(
        source="SiamRPN on AlexNet, retrained (pysot)",
        model="siamrpn-alexnet",
        signature=("backbone.layer1.0.weight", "rpn_head.cls.head.3.weight"),
        names=SIAMRPN_RETRAINED,
    ),
    Layout(source="SiamBAN", model="siamban-r50", signature=BAN_SIGNATURE, names=SIAMBAN),
    Layout(
        source="SiamBAN",
        model="siamcan-r50",
        signature=BAN_SIGNATURE,
        names=SIAMBAN,
        fresh=("attentions.", *(f"{branch}.{n}.spatial." for branch in ("cls", "loc") for n in LEVELS)),
    ),
    Layout(
        source="SiamCAR",
        model="siamcar-r50",
        signature=CAR_SIGNATURE,
        names=SIAMCAR,
        changes={"down.weight": transposed},
        config=_siamcar_config,
    ),
    Layout(
        source="SiamCAR",
        model="siamla-r50",
        signature=CAR_SIGNATURE,
        names=SIAMCAR,
        changes={
            "down.weight": transposed,
            "cls_logits.weight": logit_difference,
            "cls_logits.bias": logit_difference,
        },
        spare=("car_head.centerness.",),
        fresh=("localise.",),
    ),
    *(
        Layout(
            source="SiamFC (siamfc-pytorch)",
            model=model,
            signature=("backbone.conv1.0.weight", "backbone.conv5.0.weight"),
            names={"backbone.": "backbone."},
            changes={"backbone.conv1.0.weight": flipped},  # trained on RGB
            fresh=fresh,
        )
        for model, fresh in (("siamfc", ()), ("siamfc-st", ("st.",)))
    ),
    Layout(
        source="DASTSiam",
        model="dastsiam-r50",
        signature=("tAugmentation.downsample.0.weight",),
        names=DASTSIAM,
        config=_dastsiam_config,
        spare=DASTSIAM_GATED,
    ),
    *(
        Layout("ResNet-50 of ImageNet", model, ("conv1.weight", "layer1.0.conv1.weight"), backbone=import_resnet50)
        for model in RESNET_MODELS
    ),
    *(
        Layout(f"MobileNetV2 of ImageNet ({where})", model, signature, backbone=import_mobilenetv2)
        for model in EDGE_MODELS
        for where, signature in (
            ("timm", ("conv_stem.weight", "blocks.0.0.conv_dw.weight")),
            ("torchvision", ("features.0.0.weight", "features.1.conv.0.0.weight")),
        )
    ),
)
