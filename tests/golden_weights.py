"""Weights and images drawn from names and shapes alone, so that a test can draw what a reference was computed with.

Every tensor comes from raw bytes of NumPy's legacy generator, whose stream is frozen, seeded by the tensor's name. How
large the values are depends on what the name says they are for: a network filled with them keeps its activations of
about unit size from layer to layer, as trained BatchNorm statistics do.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values in [-1, 1), always the same ones for a name."""
    raw = np.random.RandomState(zlib.crc32(name.encode())).bytes(2 * math.prod(shape))
    return torch.from_numpy(np.frombuffer(raw, "<i2").astype(np.float32) / 32768).reshape(shape)


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter or buffer of a network, by its name in the network's state dict."""
    values, part = uniform(name, shape), name.rpartition(".")[2]
    if part == "running_var":
        return 1 + 0.3 * values
    if len(shape) > 1:
        return values * math.sqrt(3 * gain(name) / math.prod(shape[1:]))
    # A correlation adds up many products.
    small = 0.002 if ".conv_kernel.1." in name else 0.0005 if ".adj_1.1." in name or ".adj_3.1." in name else 1.0
    if part == "weight":  # of a normalisation
        return small * ((0.4 if ".bn3." in name else 1.0) + 0.2 * values)
    if part == "loc_scale":
        return 1 + 0.3 * values
    return small * (1.0 if part in ("cls_weight", "loc_weight", "W") else 0.1) * values


def gain(name: str) -> float:
    """Variance a layer adds: 2 before a ReLU, little where boxes are predicted."""
    predicts_boxes = "bbox_pred" in name or ".loc.head.3." in name or "convloc.9" in name
    return 0.02 if predicts_boxes else 1.0 if "attn" in name else 2.0


def image(name: str, side: int) -> Tensor:
    """``[1, 3, side, side]`` of about unit size, in patches of 6 px with some noise."""
    patches = uniform(name, (3, -(-side // 6), -(-side // 6))).repeat_interleave(6, 1).repeat_interleave(6, 2)
    return (1.5 * patches[:, :side, :side] + 0.3 * uniform(f"{name} noise", (3, side, side)))[None]
