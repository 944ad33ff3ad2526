"""Losses as pure functions on tensors.

Boxes are ``[..., 4]`` cx, cy, w, h in crop pixels. Labels are those of `training.labels`: above 0 target, 0 background,
-1 ignored. Logits are ``[N, 2, ...]`` softmax logits (channel 1 = target) or ``[N, 1, ...]`` sigmoid logits, labels
``[N, ...]`` of the same cells. Every function is finite, gradients too, for boxes without area or overlap and for
probabilities of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# --- boxes ---------------------------------------------------------------------------------------------------------


def corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Top left and bottom right ``[..., 2]`` (of Eq. 18's corner SiamCAN says "bottom-left": erratum S14)."""
    return boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2


def meet(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How each box pair lies: areas of intersection and union ``[...]``, sides ``[..., 2]`` of the box around both."""
    (p_min, p_max), (t_min, t_max) = corners(predicted), corners(target)
    intersection = (torch.minimum(p_max, t_max) - torch.maximum(p_min, t_min)).clamp(min=0).prod(dim=-1)
    union = predicted[..., 2:].prod(dim=-1) + target[..., 2:].prod(dim=-1) - intersection
    return intersection, union, torch.maximum(p_max, t_max) - torch.minimum(p_min, t_min)


def box_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Intersection over union ``[...]`` in [0, 1] of each box pair."""
    intersection, union, _ = meet(predicted, target)
    return intersection / union.clamp(min=1e-6)


def iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """``1 - (I + 1) / (U + 1)`` (SiamBAN's code; areas I and U in square pixels), ``[...]`` in [0, 1)."""
    intersection, union, _ = meet(predicted, target)
    return 1 - (intersection + 1) / (union + 1)


def log_iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """``-ln((I + 1) / (U + 1))`` (SiamCAR's code, after UnitBox), ``[...]`` from 0."""
    intersection, union, _ = meet(predicted, target)
    return torch.log(union + 1) - torch.log(intersection + 1)


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """``1 - IoU + (C - U) / C``, C the area of the box around both (Rezatofighi et al. 2019), ``[...]`` in [0, 2)."""
    intersection, union, sides = meet(predicted, target)
    around = sides.prod(dim=-1).clamp(min=1e-6)
    return 1 - intersection / union.clamp(min=1e-6) + (around - union) / around


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Distance-IoU loss ``1 - IoU + rho^2 / c^2`` of each box pair (SiamCAN Eq. 15), ``[...]`` in [0, 2).

    The equation divides by c, "the diagonal length"; only c squared makes it free of scale (erratum S13, DIoU paper).
    """
    intersection, union, sides = meet(predicted, target)
    diagonal2 = sides.square().sum(dim=-1)
    distance2 = (predicted[..., :2] - target[..., :2]).square().sum(dim=-1)
    return 1 - intersection / union.clamp(min=1e-6) + distance2 / diagonal2.clamp(min=1e-6)


BOX_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iou": iou_loss,
    "log_iou": log_iou_loss,
    "giou": giou_loss,
    "diou": diou_loss,
}


def centreness(boxes: Tensor, points: Tensor) -> Tensor:
    """``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`` of each point in its box (FCOS, SiamCAR).

    Args:
        boxes: ``[..., 4]``.
        points: ``[..., 2]`` in crop pixels.

    Returns:
        ``[...]``: 1 at the centre, 0 on the border and outside.
    """
    low, high = corners(boxes)
    before, after = points - low, high - points
    share = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)
    return share.clamp(min=0).prod(dim=-1).sqrt()


def box_deltas(boxes: Tensor, points: Tensor, sizes: Tensor) -> Tensor:
    """Boxes ``[..., 4]`` as ``(dx / w, dy / h, ln w'/w, ln h'/h)`` of anchors at `points` with `sizes` ``[..., 2]``."""
    return torch.cat([(boxes[..., :2] - points) / sizes, torch.log(boxes[..., 2:] / sizes)], dim=-1)


def l1(predicted: Tensor, target: Tensor) -> Tensor:
    """``[..., 4]`` deltas: sum of the four absolute differences, ``[...]`` (pysot's code of SiamRPN++)."""
    return (predicted - target).abs().sum(dim=-1)


def smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """``[..., 4]`` deltas: sum of ``d^2 / 2`` below 1, ``|d| - 1/2`` above, ``[...]`` (SiamRPN's paper, DASTSiam)."""
    return functional.smooth_l1_loss(predicted, target, reduction="none").sum(dim=-1)


DELTA_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "smooth_l1": smooth_l1}


# --- classification ------------------------------------------------------------------------------------------------


def balanced_mean(losses: Tensor, labels: Tensor) -> Tensor:
    """Half the mean over target cells plus half the mean over background cells; 0 for a side without cells."""
    target, background = (labels > 0).float(), (labels == 0).float()
    mean_target = (losses * target).sum() / target.sum().clamp(min=1)
    mean_background = (losses * background).sum() / background.sum().clamp(min=1)
    return 0.5 * mean_target + 0.5 * mean_background


def target_logit(logits: Tensor) -> Tensor:
    """One sigmoid logit ``[N, ...]`` a cell; of two softmax logits it is their difference."""
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Half the mean loss over target cells plus half the mean over background cells (SiamRPN++ to SiamCAN).

    With one logit a cell this is also SiamFC's class-balanced logistic loss, whose weights sum to 1.
    """
    if logits.shape[1] == 2:
        losses = functional.cross_entropy(logits, labels.clamp(0, 1).long(), reduction="none")
    else:
        losses = functional.binary_cross_entropy_with_logits(logits[:, 0], (labels > 0).float(), reduction="none")
    return balanced_mean(losses, labels)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss over labelled cells, divided by the number of target cells (Lin et al. 2017).

    Args:
        logits: one or two a cell.
        labels: of the cells.
        alpha: weight of target cells; background cells take ``1 - alpha``.
        gamma: how strongly easy cells are discounted.
    """
    logit, truth = target_logit(logits), (labels > 0).float()
    losses = functional.binary_cross_entropy_with_logits(logit, truth, reduction="none")
    probability = torch.sigmoid(logit)
    miss = torch.where(labels > 0, 1 - probability, probability)
    weight = torch.where(labels > 0, alpha, 1 - alpha) * miss**gamma * (labels >= 0)
    return (weight * losses).sum() / truth.sum().clamp(min=1)


def soft_focal_loss(scores: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross-entropy with soft labels, discounted where they are met already: ``|y - p|^gamma CE(p, y)``.

    Divided by the sum of the labels. The quality focal loss of Li et al., "Generalized Focal Loss", 2020.

    Args:
        scores: p, probabilities of target ``[N, M]``.
        labels: y in [0, 1] ``[N, M]``; takes no gradient.
        gamma: how strongly cells that agree are discounted.
    """
    labels, sure = labels.detach(), scores.clamp(1e-6, 1 - 1e-6)
    # Written out: PyTorch's own cannot be used with probabilities where a GPU computes in mixed precision.
    losses = -(labels * torch.log(sure) + (1 - labels) * torch.log1p(-sure))
    return ((labels - scores).abs() ** gamma * losses).sum() / labels.sum().clamp(min=1)


CLASSIFICATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "balanced_ce": balanced_cross_entropy,
    "focal": focal_loss,
}


def centreness_loss(logit: Tensor, labels: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """Cross-entropy of a quality branch with the target cells' centre-ness, their mean (FCOS, SiamCAR).

    Args:
        logit: ``[N, M]`` of the branch.
        labels: of the cells.
        boxes: ``[N, M, 4]`` ground truth of each cell.
        points: ``[M, 2]`` cells in crop pixels.
    """
    target = labels > 0
    losses = functional.binary_cross_entropy_with_logits(logit, centreness(boxes, points), reduction="none")
    return (losses * target).sum() / target.sum().clamp(min=1)


# --- SiamLA --------------------------------------------------------------------------------------------------------

ALPHA, BETA = 0.5, 10.0  # SiamLA Eq. 5


def dynamic_labels(iou: Tensor, labels: Tensor, boundary: float = 0.2, linear: bool = False) -> Tensor:
    """What SiamLA's classification should say in each target cell: the better the cell's own box, the more.

    ``q = sigmoid(beta (IoU - alpha))^(1 / lambda)`` with lambda = 1 in the centre and `boundary` at the boundary (Eq. 5
    and 7; printed with the sign turned, so that the label would fall with IoU: erratum L2), then stretched to [0, 1]
    over the target cells of each image, centre and boundary together (Eq. 6, L3), unless all are the same.

    Args:
        iou: ``[N, M]`` of the predicted boxes with the ground truth. Labels take no gradient (L4).
        labels: ``[N, M]`` 1 centre, 2 boundary, 0 background, -1 ignored.
        boundary: lambda of the boundary cells.
        linear: IoU itself in place of the sigmoid (table IV, "linear").

    Returns:
        ``[N, M]`` in [0, 1]; 0 in cells that are not target.
    """
    iou, target = iou.detach(), labels > 0
    quality = iou if linear else torch.sigmoid(BETA * (iou - ALPHA))
    quality = torch.where(labels == 2, quality ** (1 / boundary), quality)
    low = quality.masked_fill(~target, torch.inf).amin(dim=1, keepdim=True)
    high = quality.masked_fill(~target, -torch.inf).amax(dim=1, keepdim=True)
    spread = high - low  # -inf in an image without target cells
    stretched = (quality - low) / spread.clamp(min=1e-6)
    return torch.where(spread < 1e-6, quality, stretched).masked_fill(~target, 0.0)


def soft_cross_entropy(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Cross-entropy of target cells with soft labels `quality` ``[N, M]``, of background cells with 0; balanced."""
    losses = functional.binary_cross_entropy_with_logits(target_logit(logits), quality * (labels > 0), reduction="none")
    return balanced_mean(losses, labels)


def ladl_loss(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Localization-aware dynamic label loss (SiamLA Eq. 4).

    ``-q ln c - (1 - q) ln(1 - c)`` in target cells (the first term's logarithm is printed as that of 1 - c: erratum
    L1), ``-(1 + c) ln(1 - c)`` in background cells, where 1 + c is part of the graph (L4). Half the mean of each (L5).

    Args:
        logits: one or two a cell.
        labels: of the cells.
        quality: ``[N, M]`` soft labels, see `dynamic_labels`.
    """
    logit = target_logit(logits)
    positive = functional.binary_cross_entropy_with_logits(logit, quality, reduction="none")
    negative = (1 + torch.sigmoid(logit)) * functional.softplus(logit)  # -ln(1 - sigmoid(x)) = softplus(x)
    return balanced_mean(torch.where(labels > 0, positive, negative), labels)


def iou_quality_loss(logit: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
    """Cross-entropy of a localisation score with the IoU of the cell's own predicted box (SiamLA Eq. 10, erratum L7).

    The paper draws as many background cells as there are target cells. Taken here is what that gives on average: the
    mean over target cells and the mean over all background cells weigh the same. Steps stay reproducible so.

    Args:
        logit: ``[N, M]`` of the localisation score.
        labels: of the cells.
        iou: ``[N, M]`` of the predicted boxes; takes no gradient.
    """
    losses = functional.binary_cross_entropy_with_logits(logit, iou.detach(), reduction="none")
    return balanced_mean(losses, labels)
