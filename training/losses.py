"""Losses as pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Distance-IoU loss ``1 - IoU + rho^2 / c^2`` of each box pair (SiamCAN Eq. 15).

    The equation divides by c, "the diagonal length"; only c squared makes it free of scale (erratum S13, DIoU paper).

    Args:
        predicted: ``[N, 4]`` cx, cy, w, h; sizes positive.
        target: ``[N, 4]`` likewise.

    Returns:
        ``[N]`` in [0, 2).
    """
    p_min, p_max = predicted[:, :2] - predicted[:, 2:] / 2, predicted[:, :2] + predicted[:, 2:] / 2
    t_min, t_max = target[:, :2] - target[:, 2:] / 2, target[:, :2] + target[:, 2:] / 2
    intersection = (torch.minimum(p_max, t_max) - torch.maximum(p_min, t_min)).clamp(min=0).prod(dim=1)
    union = predicted[:, 2:].prod(dim=1) + target[:, 2:].prod(dim=1) - intersection
    diagonal2 = (torch.maximum(p_max, t_max) - torch.minimum(p_min, t_min)).square().sum(dim=1)
    distance2 = (predicted[:, :2] - target[:, :2]).square().sum(dim=1)
    return 1 - intersection / union.clamp(min=1e-6) + distance2 / diagonal2.clamp(min=1e-6)


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Half the mean loss over target cells plus half the mean over background cells (SiamRPN++ to SiamCAN).

    Args:
        logits: ``[N, 2, H, W]`` softmax logits (channel 1 = target) or ``[N, 1, H, W]`` sigmoid logits.
        labels: ``[N, H, W]`` 1, 0 or -1 (ignored).

    Returns:
        Scalar; 0 for a side without cells.
    """
    if logits.shape[1] == 2:
        losses = functional.cross_entropy(logits, labels.clamp(min=0).long(), reduction="none")
    else:
        losses = functional.binary_cross_entropy_with_logits(logits[:, 0], (labels == 1).float(), reduction="none")
    target, background = (labels == 1).float(), (labels == 0).float()
    mean_target = (losses * target).sum() / target.sum().clamp(min=1)
    mean_background = (losses * background).sum() / background.sum().clamp(min=1)
    return 0.5 * mean_target + 0.5 * mean_background


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss over labelled cells, divided by the number of target cells (Lin et al. 2017).

    Args:
        logits: ``[N, 1, H, W]``.
        labels: ``[N, H, W]`` 1, 0 or -1 (ignored).
        alpha: weight of target cells; background cells take ``1 - alpha``.
        gamma: how strongly easy cells are discounted.
    """
    truth = (labels == 1).float()
    losses = functional.binary_cross_entropy_with_logits(logits[:, 0], truth, reduction="none")
    probability = torch.sigmoid(logits[:, 0])
    miss = torch.where(labels == 1, 1 - probability, probability)
    weight = torch.where(labels == 1, alpha, 1 - alpha) * miss**gamma * (labels >= 0)
    return (weight * losses).sum() / truth.sum().clamp(min=1)
