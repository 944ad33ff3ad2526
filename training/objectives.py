"""What each paper minimises: raw maps of a network and a labelled batch to named loss terms.

An objective is a frozen dataclass: its weights and switches are the `objective_config` of a recipe. The weight of a
term is the field of the term's name. Which cells are target, the labels of the batch say (`training.labels`).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from siamtrack.nets.decode import AnchorBased, AnchorFree, AnchorMaps
from siamtrack.nets.siamfc import ScaleDecoder
from siamtrack.plain import from_plain
from training.checks import not_negative, one_of
from training.losses import (
    BOX_LOSSES,
    CLASSIFICATIONS,
    DELTA_LOSSES,
    balanced_cross_entropy,
    box_deltas,
    box_iou,
    centreness,
    centreness_loss,
    dynamic_labels,
    iou_quality_loss,
    ladl_loss,
    soft_cross_entropy,
)

Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Objective(abc.ABC):
    """Base of all objectives.

    Attributes:
        cls: weight of the classification term.
    """

    cls: float = 1.0

    def __post_init__(self) -> None:
        not_negative(**{f.name: getattr(self, f.name) for f in fields(self) if f.type == "float"})

    @property
    @abc.abstractmethod
    def rule(self) -> str:
        """The paper's labels: a key of `training.labels.RULES`."""

    @property
    @abc.abstractmethod
    def decoder(self) -> type[nn.Module]:
        """Which networks it fits: those whose decoder is of this type."""

    @abc.abstractmethod
    def __call__(self, raw: Any, batch: Batch, decoder: Any) -> Terms:
        """The terms, scalars without their weights.

        Args:
            raw: what the network's ``forward`` gave.
            batch: ``box`` ``[N, 4]`` (cx, cy, w, h in search-crop pixels) and ``labels`` ``[N, M]``, one a candidate.
            decoder: the network's.

        Raises:
            ValueError: the network has a branch that the objective would leave untrained.
        """

    def total(self, terms: Terms) -> Tensor:
        """The weighted sum."""
        return torch.stack([getattr(self, name) * term for name, term in terms.items()]).sum()


@dataclass(frozen=True)
class SiamFC(Objective):
    """SiamFC: class-balanced logistic loss on the response. SiamFC+ST learns by the same."""

    rule = "siamfc"
    decoder = ScaleDecoder

    def __call__(self, raw: Any, batch: Batch, decoder: Any) -> Terms:
        return {"cls": balanced_cross_entropy(raw.logits.float().flatten(2), batch["labels"])}


# --- anchor-free ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiamBAN(Objective):
    """Classify cells, regress a box from every target cell (SiamBAN; with other defaults SiamCAN and SiamCAR).

    A network with a quality branch learns centre-ness in it: SiamCAR, and the row "ellipse label + centerness" of
    SiamCAN's table 3.

    Attributes:
        loc: weight of the regression term, lambda_2 of SiamCAN Eq. 16.
        quality: weight of the centre-ness term, where the network has that branch.
        classification: "balanced_ce" as in the papers, or "focal".
        regression: "iou", "log_iou", "giou" or "diou", see `training.losses`.
        centred: cells count in the regression term by their centre-ness.
    """

    loc: float = 1.0
    quality: float = 1.0
    classification: str = "balanced_ce"
    regression: str = "iou"
    centred: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("classification", self.classification, CLASSIFICATIONS)
        one_of("regression", self.regression, BOX_LOSSES)

    rule = "siamban"
    decoder = AnchorFree

    def __call__(self, raw: Any, batch: Batch, decoder: Any) -> Terms:
        labels = batch["labels"]
        boxes, target = decoder.boxes(raw.ltrb.float()), labels > 0  # [N, M, 4], [N, M]
        wanted = batch["box"][:, None].expand_as(boxes)
        losses = BOX_LOSSES[self.regression](boxes[target], wanted[target])  # [targets]
        if self.centred:
            share = centreness(wanted, decoder.points)[target]
            loc = (losses * share).sum() / share.sum().clamp(min=1e-6)
        else:
            loc = losses.sum() / target.sum().clamp(min=1)
        terms = {"cls": CLASSIFICATIONS[self.classification](raw.logits.float().flatten(2), labels), "loc": loc}
        if raw.quality is not None:
            terms["quality"] = centreness_loss(raw.quality.float().flatten(1), labels, wanted, decoder.points)
        return terms


@dataclass(frozen=True)
class SiamCAN(SiamBAN):
    """SiamCAN Eq. 16: `SiamBAN` with circle-and-ellipse labels and DIoU."""

    regression: str = "diou"

    rule = "siamcan"


@dataclass(frozen=True)
class SiamCAR(SiamBAN):
    """SiamCAR: ``L_cls + 3 L_reg + L_cen``; the regression, ``-ln IoU``, counts by centre-ness."""

    loc: float = 3.0
    regression: str = "log_iou"
    centred: bool = True

    rule = "siamcar"


@dataclass(frozen=True)
class SiamLA(Objective):
    """SiamLA Eq. 11: classification by the quality of the cells' own boxes, regression, localisation.

    All target cells regress, unweighted (Eq. 2, erratum L6).

    Attributes:
        loc: weight of the regression term, lambda_1.
        quality: weight of the localisation term, lambda_2, where the network has that branch.
        ladl: localization-aware dynamic labels: "nonlinear" (Eq. 5), "linear" (table IV) or "off", which classifies
            as SiamCAR does.
        lals: localization-aware label smoothing: the cells between centre and border are target too. Without `ladl`
            their label is the constant `boundary` (table III, third row): "smooth their labels as lambda".
        boundary: lambda of these cells (Eq. 7, table V).
        regression: see `training.losses`.
        localisation: what the localisation branch learns: "iou" of the cell's own box (Eq. 10), or "centreness", the
            baseline's (rows without LAFA).
    """

    loc: float = 1.0
    quality: float = 1.0
    ladl: str = "nonlinear"
    lals: bool = True
    boundary: float = 0.2
    regression: str = "log_iou"
    localisation: str = "iou"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("ladl", self.ladl, ("nonlinear", "linear", "off"))
        one_of("regression", self.regression, BOX_LOSSES)
        one_of("localisation", self.localisation, ("iou", "centreness"))
        if not 0 < self.boundary <= 1:
            raise ValueError(f"boundary must be above 0 and at most 1, got {self.boundary}")

    @property
    def rule(self) -> str:
        return "siamla" if self.lals else "siamcar"

    decoder = AnchorFree

    def __call__(self, raw: Any, batch: Batch, decoder: Any) -> Terms:
        labels, logits = batch["labels"], raw.logits.float().flatten(2)
        boxes, target = decoder.boxes(raw.ltrb.float()), labels > 0  # [N, M, 4], [N, M]
        wanted = batch["box"][:, None].expand_as(boxes)
        losses = BOX_LOSSES[self.regression](boxes[target], wanted[target])
        # [N, M]; a label (erratum L4). In a negative pair the box is a foreign target's: overlap with it is no quality.
        iou = box_iou(boxes, wanted).detach() * target.any(dim=1, keepdim=True)
        terms = {
            "cls": self._classification(logits, labels, iou),
            "loc": losses.sum() / target.sum().clamp(min=1),
        }
        if raw.quality is not None:
            logit = raw.quality.float().flatten(1)
            terms["quality"] = (
                iou_quality_loss(logit, labels, iou)
                if self.localisation == "iou"
                else centreness_loss(logit, labels, wanted, decoder.points)
            )
        return terms

    def _classification(self, logits: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
        if self.ladl == "off":
            return soft_cross_entropy(logits, labels, torch.where(labels == 2, self.boundary, 1.0))
        return ladl_loss(logits, labels, dynamic_labels(iou, labels, self.boundary, linear=self.ladl == "linear"))


# --- anchor-based --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiamRPN(Objective):
    """SiamRPN: classify anchors, regress those on the target by four deltas.

    The regression term is the mean over the target anchors of an image, then over all images of the batch; the four
    deltas are summed.

    Attributes:
        loc: weight of the regression term; 1.2 in pysot.
        regression: "smooth_l1" (SiamRPN's paper) or "l1" (SiamRPN++'s code).
    """

    loc: float = 1.2
    regression: str = "smooth_l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("regression", self.regression, DELTA_LOSSES)

    rule = "siamrpn"
    decoder = AnchorBased

    def __call__(self, raw: Any, batch: Batch, decoder: Any) -> Terms:
        if raw.second is not None:
            raise ValueError("the network has a second classification branch, which only objective dastsiam trains")
        return self._anchor_terms(raw, batch, decoder)

    def _anchor_terms(self, raw: AnchorMaps, batch: Batch, decoder: AnchorBased) -> Terms:
        labels = batch["labels"]  # [N, M]
        target = labels > 0
        logits = raw.logits.float().unflatten(1, (2, decoder.anchors)).flatten(2)  # [N, 2, M]
        deltas = raw.deltas.float().unflatten(1, (4, decoder.anchors)).flatten(2).transpose(1, 2)  # [N, M, 4]
        wanted = box_deltas(batch["box"][:, None].expand_as(deltas), decoder.points, decoder.sizes)
        losses = DELTA_LOSSES[self.regression](deltas, wanted) * target
        return {
            "cls": balanced_cross_entropy(logits, labels),
            "loc": (losses.sum(dim=1) / target.sum(dim=1).clamp(min=1)).mean(),
        }


@dataclass(frozen=True)
class SiamRPNpp(SiamRPN):
    """SiamRPN++: as `SiamRPN`, with plain L1."""

    regression: str = "l1"


@dataclass(frozen=True)
class DASTSiam(SiamRPN):
    """DASTSiam Eq. 7: ``lambda_1 (lambda CE(cls1) + BCE(cls2)) + smooth L1``, labels by centre distance.

    Both branches learn the same mask (erratum D12), each with half the weight on either side. The update threshold of
    1.18 stands on a sum of both scores, so on equal weights of both terms (D13).

    Attributes:
        second: weight of the second classification term, where the network has that branch: lambda_1. `cls` is
            lambda_1 lambda. Neither is in the paper.
        regression: of all four deltas of the one anchor (D11).
    """

    loc: float = 1.0
    second: float = 1.0
    regression: str = "smooth_l1"

    rule = "dastsiam"

    def __call__(self, raw: Any, batch: Batch, decoder: Any) -> Terms:
        terms = self._anchor_terms(raw, batch, decoder)
        if raw.second is not None:
            terms["second"] = balanced_cross_entropy(raw.second.float().flatten(1)[:, None], batch["labels"])
        return terms


OBJECTIVES: dict[str, type[Objective]] = {
    "siamfc": SiamFC,
    "siamrpn": SiamRPN,
    "siamrpnpp": SiamRPNpp,
    "siamban": SiamBAN,
    "siamcar": SiamCAR,
    "siamcan": SiamCAN,
    "siamla": SiamLA,
    "dastsiam": DASTSiam,
}
"""Every objective by name, which is how a model's name begins."""


def build_objective(name: str, config: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a recipe.

    Args:
        name: key of `OBJECTIVES`.
        config: its fields, as a parser gives them.

    Raises:
        ValueError: unknown name or field, or a value that cannot be.
    """
    one_of("objective", name, OBJECTIVES)
    return from_plain(OBJECTIVES[name], config or {}, f"objective_config of {name}")


def check_fit(name: str, objective: Objective, model: str, decoder: Any) -> None:
    """Refuse an objective for other maps than a network gives.

    Raises:
        ValueError: the network's decoder is of another type.
    """
    if not isinstance(decoder, objective.decoder):
        raise ValueError(
            f"objective {name} does not fit {model}: it needs {objective.decoder.__name__} maps, "
            f"the network gives {type(decoder).__name__} ones"
        )
