"""Cross-correlations of template and search features.

Depthwise correlation with a runtime kernel has two interchangeable forms that agree to rounding; exporters pick the one
their target takes (`DEPTHWISE_FORMS`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def depthwise_grouped(search: Tensor, kernel: Tensor) -> Tensor:
    """Valid per-channel correlation as one grouped convolution: fastest on CPUs.

    Args:
        search: ``[N, C, H, W]``.
        kernel: ``[N, C, K, K]``, one kernel a sample.

    Returns:
        ``[N, C, H - K + 1, W - K + 1]``.
    """
    n, c = kernel.shape[:2]
    out = functional.conv2d(
        search.reshape(1, n * c, *search.shape[2:]), kernel.reshape(n * c, 1, *kernel.shape[2:]), groups=n * c
    )
    return out.reshape(n, c, *out.shape[2:])


def depthwise_matmul(search: Tensor, kernel: Tensor) -> Tensor:
    """The same as `depthwise_grouped` with constant convolution weights only, for targets that want initialisers.

    A one-hot depthwise convolution gathers the K x K neighbourhood of every cell, a batched product weighs it.
    """
    n, c, k, _ = kernel.shape
    rows, columns = search.shape[2] - k + 1, search.shape[3] - k + 1
    gather = torch.eye(k * k, dtype=search.dtype, device=search.device).reshape(k * k, 1, k, k).repeat(c, 1, 1, 1)
    patches = functional.conv2d(search, gather, groups=c).reshape(n, c, k * k, rows * columns)
    return (kernel.reshape(n, c, 1, k * k) @ patches).reshape(n, c, rows, columns)


DEPTHWISE_FORMS = {"grouped": depthwise_grouped, "matmul": depthwise_matmul}


def pixelwise(search: Tensor, kernel: Tensor) -> Tensor:
    """Inner product of every search cell with every template cell.

    Args:
        search: ``[N, C, H, W]``.
        kernel: ``[N, M, C]``, the M template cells.

    Returns:
        ``[N, M, H, W]``.
    """
    n, c, height, width = search.shape
    return (kernel @ search.reshape(n, c, height * width)).reshape(n, kernel.shape[1], height, width)
