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

    A one-hot convolution gathers the K x K neighbourhood of every cell, a batched product weighs it. Channels are its
    samples, so that its weights are K^4 numbers whatever C.
    """
    n, c, k, _ = kernel.shape
    height, width = search.shape[2:]
    rows, columns = height - k + 1, width - k + 1
    gather = torch.eye(k * k, dtype=search.dtype, device=search.device).reshape(k * k, 1, k, k)
    patches = functional.conv2d(search.reshape(n * c, 1, height, width), gather).reshape(n, c, k * k, rows * columns)
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


def summed_cells(products: Tensor, cells: int) -> Tensor:
    """Naive correlation from pixelwise products: the template laid on each search cell, all products summed.

    Args:
        products: ``[N, K * K, H, W]`` of `pixelwise`, template cells row by row.
        cells: K.

    Returns:
        ``[N, 1, H, W]``: with the template's cell K // 2 on a cell; what lies beyond the map counts nothing. An even K
        gives a row and a column more, ``[N, 1, H + 1, W + 1]``: there the template starts K / 2 cells before.
    """
    # A one-hot convolution: template cell (a, b) is met where the search map is (a, b) - centre further on.
    here = torch.eye(cells * cells, dtype=products.dtype, device=products.device)
    return functional.conv2d(products, here.reshape(1, cells * cells, cells, cells), padding=cells // 2)
