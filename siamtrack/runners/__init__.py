"""Backends behind one protocol; one file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from siamtrack.bundle import Bundle
from siamtrack.crop import Image, Window


@dataclass(frozen=True)
class Features:
    """A target as the template graph sees it.

    Attributes:
        tensors: opaque to everyone but the runner that made them.
        fill_bgr: colour of pixels outside the image, in this target's crops.
    """

    tensors: tuple[Any, ...]
    fill_bgr: tuple[float, float, float]


@dataclass(frozen=True)
class SearchResult:
    """What the search graph says of N windows.

    Attributes:
        box_cxcywh: ``[N, 4]`` in pixels of each window's crop.
        score: ``[N]`` raw confidence in [0, 1].
        penalty: ``[N]`` size-change penalty of the chosen cell, in (0, 1].
        response: ``[N, H, W]`` raw confidence of every cell.
    """

    box_cxcywh: NDArray[np.float32]
    score: NDArray[np.float32]
    penalty: NDArray[np.float32]
    response: NDArray[np.float32]


class Runner(Protocol):
    """Runs one bundle's graphs. Not thread-safe: one thread owns a runner."""

    bundle: Bundle
    last_timing: dict[str, float]
    """Seconds of the last `search` by stage: "crop", "network"."""

    def template(self, image: Image, window: Window, fill_bgr: tuple[float, float, float]) -> Features:
        """Features of the target whose template window is given; ``image`` uint8 ``[H, W, 3]`` BGR."""
        ...

    def search(
        self,
        image: Image,
        windows: Sequence[Window],
        features: Sequence[Features],
        prev_size: NDArray[np.float32],
        tuning: tuple[float, float, float],
    ) -> SearchResult:
        """Search N windows of one image in one batch.

        Args:
            image: uint8 ``[H, W, 3]`` BGR.
            windows: N search windows.
            features: the target sought in each window.
            prev_size: ``[N, 2]`` previous width and height in crop pixels.
            tuning: penalty_k, window_influence, spare.
        """
        ...

    def close(self) -> None:
        """Give all resources back; the runner cannot be used afterwards. Safe to call twice."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


BACKENDS = ("onnxruntime",)


def open_runner(bundle: Bundle, backend: str = "onnxruntime", threads: int = 0) -> Runner:
    """A runner for a bundle.

    Args:
        bundle: a verified bundle.
        backend: one of `BACKENDS`.
        threads: CPU threads for CPU backends; 0 takes up to 4.

    Raises:
        ValueError: no such backend.
    """
    if backend == "onnxruntime":
        from siamtrack.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(bundle, threads)
    raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
