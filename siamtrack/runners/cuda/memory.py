"""Buffers with several arrays in each, and the tensors of targets, which never leave the GPU."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siamtrack.runners.cuda.device import Device

ALIGNMENT = 256
"""TensorRT wants its tensors at multiples of this many bytes."""


@dataclass(frozen=True)
class Field:
    """An array inside a buffer: `count` items of `shape`, one after the other from `offset` on."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int

    @property
    def item_bytes(self) -> int:
        """Size of one item."""
        return self.dtype.itemsize * math.prod(self.shape)

    def view(self, buffer: NDArray[np.uint8], count: int) -> NDArray[Any]:
        """The first items, ``[count, *shape]``, as part of a buffer on the host."""
        flat = buffer[self.offset : self.offset + count * self.item_bytes]
        return flat.view(self.dtype).reshape(count, *self.shape)


@dataclass(frozen=True)
class Layout:
    """Arrays by name, each aligned, one after the other."""

    fields: dict[str, Field]
    nbytes: int


def layout(arrays: Iterable[tuple[str, Any, Sequence[int]]], count: int = 1) -> Layout:
    """Lay arrays out in one buffer.

    Args:
        arrays: name, dtype and shape of one item.
        count: items of each.
    """
    fields, end = {}, 0
    for name, dtype, shape in arrays:
        fields[name] = Field(end, np.dtype(dtype), tuple(shape), count)
        end = align(end + count * fields[name].item_bytes)
    return Layout(fields, end)


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """The next multiple."""
    return -(-nbytes // to) * to


class TargetTensors:
    """The tensors of one target on the GPU; what `Features.tensors` of a `CudaRunner` holds.

    Its memory returns to the store when the last reference goes, on whatever thread that happens: no CUDA is called.
    """

    def __init__(self, store: TensorStore, address: int, serial: int) -> None:
        self.store = store
        self.address = address
        self.serial = serial
        """Of the contents: no two targets have the same, even one after the other in the same memory."""


class TensorStore:
    """Device memory for the tensors of targets, used again and again.

    Args:
        device: the memory's owner.
        content: of one target's memory.
    """

    def __init__(self, device: Device, content: Layout) -> None:
        self.content = content
        self._device = device
        self._unused: deque[int] = deque()
        self._serials = itertools.count(1)

    def take(self) -> TargetTensors:
        """Memory for a target, contents undefined.

        Raises:
            OutOfMemory: there is none left.
        """
        try:
            address = self._unused.popleft()
        except IndexError:
            address = self._device.allocate(max(self.content.nbytes, ALIGNMENT))
        tensors = TargetTensors(self, address, next(self._serials))
        weakref.finalize(tensors, self._unused.append, address).atexit = False
        return tensors

    def address(self, tensors: TargetTensors, name: str) -> int:
        """Where a target's tensor lies."""
        return tensors.address + self.content.fields[name].offset


def addresses(buffer: int, content: Layout) -> Mapping[str, int]:
    """Where each array of a device buffer lies."""
    return {name: buffer + field.offset for name, field in content.fields.items()}
