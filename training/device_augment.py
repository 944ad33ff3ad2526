"""Light, blur and noise on a whole batch, on the device that it is on: the work of `training.augment` on one crop.

Which effects a crop gets is drawn with its pair, by the same function, so that sample ``i`` of a run is the same in
both places and whatever the number of processes: light and blur but for rounding, noise by what it is drawn with. It
travels with the crop as small arrays ``CROP.FIELD``:

| field | array | what |
|---|---|---|
| `table` | uint8 [256, 3] | what becomes of a value in each channel |
| `grey` | bool | no colour |
| `kernel` | f32 [K, K] | of the blur, K being `LightConfig.kernel_px` |
| `blurred` | bool | whether there is one |
| `coarse_px` | int64 | side that the crop is shrunk to and enlarged from; 0 for none |
| `deviation` | f32 | of the noise; 0 for none |
| `noise_seed` | int64 | of the noise |
| `patch_xyxy` | int64 [4] | rectangle that is painted over; without area for none |
| `patch_bgr` | f32 [3] | its colour |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training.augment import Effects

GREY = (0.114, 0.587, 0.299)  # shares of blue, green and red (ITU-R BT.601), as OpenCV has them


def as_arrays(effects: Mapping[str, Effects]) -> dict[str, NDArray[Any]]:
    """The effects of a sample's crops, by the crop's name, as arrays to go into the sample."""
    arrays: dict[str, NDArray[Any]] = {}
    for crop, drawn in effects.items():
        kernel = drawn.light.kernel()
        fields = {
            "table": drawn.light.table(),
            "grey": np.array(drawn.light.grey),
            "kernel": np.zeros((drawn.light.kernel_px,) * 2, np.float32) if kernel is None else kernel,
            "blurred": np.array(kernel is not None),
            "coarse_px": np.array(drawn.light.coarse_px),
            "deviation": np.array(drawn.corruption.deviation, np.float32),
            "noise_seed": np.array(drawn.noise_seed),
            "patch_xyxy": np.array(drawn.corruption.patch_xyxy),
            "patch_bgr": np.array(drawn.corruption.patch_bgr, np.float32),
        }
        arrays |= {f"{crop}.{field}": value for field, value in fields.items()}
    return arrays


def augmented(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with the effects that it carries put on its crops, and without their arrays.

    A batch that carries none, as those of validation, comes back as it is. Nothing is written into.
    """
    fields: dict[str, dict[str, Tensor]] = {}
    done: dict[str, Tensor] = {}
    for key, value in batch.items():
        crop, dot, field = key.partition(".")
        if dot:
            fields.setdefault(crop, {})[field] = value
        else:
            done[key] = value
    return done | {crop: put_on(done[crop], effects) for crop, effects in fields.items()}


@torch.no_grad()
def put_on(crops: Tensor, effects: Mapping[str, Tensor]) -> Tensor:
    """Effects on crops.

    Args:
        crops: uint8 ``[N, S, S, 3]`` BGR, at least as wide as a kernel.
        effects: the fields of `as_arrays`, each ``[N, ...]``, on the same device.

    Returns:
        New uint8 ``[N, S, S, 3]``; as in `training.augment`, values are rounded after each effect.
    """
    tables = effects["table"].transpose(1, 2).flatten()  # [N * 3 * 256]
    starts = torch.arange(0, len(tables), 256, dtype=torch.int32, device=crops.device).view(-1, 1, 1, 3)
    out = tables.index_select(0, (starts + crops).flatten()).view_as(crops)

    def change(chosen: Tensor, effect: Callable[..., Tensor], *names: str) -> None:
        (index,) = chosen.nonzero(as_tuple=True)
        if len(index):
            images = out[index].permute(0, 3, 1, 2).float()  # [M, 3, S, S]
            images = effect(images, *(effects[name][index] for name in names))
            out[index] = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    with torch.autocast(crops.device.type, enabled=False):  # half precision has no room for the values 0 to 255
        change(effects["grey"], greyed)
        change(effects["blurred"], blurred, "kernel")
        change(effects["coarse_px"] > 0, coarsened, "coarse_px")
        change(effects["deviation"] > 0, noised, "deviation", "noise_seed")
        change(effects["patch_xyxy"].any(dim=1), patched, "patch_xyxy", "patch_bgr")
    return out


def greyed(images: Tensor) -> Tensor:
    """Images ``[M, 3, S, S]`` without colour."""
    grey = (images * images.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)
    return grey.expand_as(images)


def blurred(images: Tensor, kernels: Tensor) -> Tensor:
    """Images ``[M, 3, S, S]``, each correlated with its own kernel ``[M, K, K]``; mirrored at the edge."""
    count, channels, _, _ = images.shape
    margin = kernels.shape[-1] // 2
    padded = functional.pad(images, (margin,) * 4, mode="reflect").flatten(0, 1)  # [3 M, S + K - 1, S + K - 1]
    weights = kernels.repeat_interleave(channels, dim=0)[:, None]  # [3 M, 1, K, K]
    return functional.conv2d(padded[None], weights, groups=len(weights)).view(count, channels, *images.shape[2:])


def coarsened(images: Tensor, coarse_px: Tensor) -> Tensor:
    """Images ``[M, 3, S, S]`` shrunk to their `coarse_px` ``[M]`` by area and enlarged again bilinearly.

    Both are linear in rows and in columns, so that a matrix for each image does it, whatever their sizes.
    """
    side = images.shape[-1]
    matrix = enlarging(coarse_px, side) @ shrinking(coarse_px, side)
    return matrix[:, None] @ images @ matrix[:, None].transpose(2, 3)


def shrinking(coarse_px: Tensor, side_px: int) -> Tensor:
    """Matrices ``[M, S, S]`` that take a line of S values to means over its `coarse_px` ``[M]`` equal parts.

    Row i is the share of each value in part i; rows from `coarse_px` on are 0.
    """
    number = torch.arange(side_px, device=coarse_px.device)
    part = (side_px / coarse_px)[:, None, None]  # values in a part
    begin = number[:, None] * part  # [M, S, 1]
    covered = torch.minimum(begin + part, number + 1.0) - torch.maximum(begin, number)
    return covered.clamp(min=0) / part * (number[:, None] < coarse_px[:, None, None])


def enlarging(coarse_px: Tensor, side_px: int) -> Tensor:
    """Matrices ``[M, S, S]`` that take the first `coarse_px` ``[M]`` values of a line to S ones, bilinearly."""
    number = torch.arange(side_px, device=coarse_px.device)
    coarse = coarse_px[:, None]
    at = ((number + 0.5) * (coarse / side_px) - 0.5).clamp(min=0)  # [M, S]
    at = torch.minimum(at, coarse - 1.0)
    return (1 - (at[:, :, None] - number).abs()).clamp(min=0)


def noised(images: Tensor, deviation: Tensor, seed: Tensor) -> Tensor:
    """Images ``[M, 3, S, S]`` plus Gaussian noise of `deviation` ``[M]``, each drawn with its own seed ``[M]``."""
    generator = torch.Generator(images.device)
    noise = [
        torch.randn(images.shape[1:], generator=generator.manual_seed(s), device=images.device) for s in seed.tolist()
    ]
    return images + deviation[:, None, None, None] * torch.stack(noise)


def patched(images: Tensor, xyxy: Tensor, bgr: Tensor) -> Tensor:
    """Images ``[M, 3, S, S]`` with a rectangle ``[M, 4]`` of one colour ``[M, 3]`` over each."""
    number = torch.arange(images.shape[-1], device=images.device)
    left, top, right, bottom = xyxy[:, :, None].unbind(dim=1)  # [M, 1]
    columns, rows = (number >= left) & (number < right), (number >= top) & (number < bottom)  # [M, S]
    inside = rows[:, None, :, None] & columns[:, None, None, :]  # [M, 1, S, S]
    return torch.where(inside, bgr[:, :, None, None], images)
