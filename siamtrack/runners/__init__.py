"""Backends behind one protocol; one file each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from siamtrack.bundle import PRECISIONS, Bundle, BundleError
from siamtrack.cpu import dot_products_here
from siamtrack.crop import Image, Window

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """A target as the template graph sees it.

    Attributes:
        tensors: opaque to everyone but the runner that made them.
        fill_bgr: colour of pixels outside the image, in this target's crops.
        first: feature of the first frame, where the model has an update graph; opaque like `tensors`.
        history: what the next update takes as history, likewise.
    """

    tensors: tuple[Any, ...]
    fill_bgr: tuple[float, float, float]
    first: Any = None
    history: Any = None


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


Size = tuple[float, float]


def size_in_crop(bundle: Bundle, window: Window, size: Size | None) -> NDArray[np.float32] | None:
    """``[1, 2]`` width and height of a target in its template crop's pixels; None for a model that does not ask.

    Args:
        bundle: says whether the model asks for it.
        window: the target's template window.
        size: width and height of the target in image pixels.

    Raises:
        ValueError: the model asks for the size and there is none.
    """
    if not bundle.manifest.takes_size:
        return None
    if size is None:
        raise ValueError(f"the template of {bundle.manifest.model} needs the target's size: give width and height")
    scale = bundle.manifest.crop.template_px / np.array([window.width, window.height])
    return (np.array([size]) * scale).astype(np.float32)


class Runner(Protocol):
    """Runs one bundle's graphs. Not thread-safe: one thread owns a runner."""

    bundle: Bundle
    last_timing: dict[str, float]
    """Seconds of the last `search` by stage: "crop", "network"; and of an `update` since then: "update"."""
    helper_cores: frozenset[int]
    """Cores that threads of the runner are bound to; the thread that owns the runner does well to keep off them."""

    def template(
        self, image: Image, window: Window, fill_bgr: tuple[float, float, float], size: Size | None = None
    ) -> Features:
        """Features of the target whose template window is given.

        Where the model has an update graph, it starts the history: all three features are this one.

        Args:
            image: uint8 ``[H, W, 3]`` BGR.
            window: the target's template window.
            fill_bgr: colour of pixels outside the image.
            size: width and height of the target in image pixels; models that do not ask for it do without.

        Raises:
            ValueError: the model asks for the size and there is none.
        """
        ...

    def update(self, image: Image, window: Window, features: Features) -> Features:
        """Renew a target's features with what it looks like now; costs about a template and a fraction of a search.

        Args:
            image: uint8 ``[H, W, 3]`` BGR.
            window: the target's template window in this image.
            features: of `template`, or of the update before.

        Returns:
            New features; `features` itself if any value of the new ones is not finite.

        Raises:
            ValueError: the model has no update graph.
        """
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


BACKENDS = ("onnxruntime", "tensorrt", "auto")
"""What runs a model: ONNX Runtime on the CPU, TensorRT or TensorRT-RTX on an NVIDIA GPU, or TensorRT where it can."""
PRECISION_CHOICES = ("auto", *PRECISIONS)
"""What a model may be asked to compute in; auto: `siamtrack.engine_files.DEFAULT_PRECISION` for TensorRT, what is
fastest here of what the bundle holds for ONNX Runtime (`cpu_precision`)."""


@dataclass(frozen=True)
class EngineOptions:
    """How the GPU's engines are chosen; see `siamtrack.engines.open_engines`.

    Attributes:
        flavour: "tensorrt", "tensorrt-rtx", or "auto" for the first that is installed.
        key_file: key that the engines must be signed with; None takes unsigned ones too.
        build: "never" refuses where engines are missing or unfit; "auto" builds them at once, which takes minutes.
        max_batch: windows in one launch; 0 for as many as a lost target is searched in at once.
    """

    flavour: str = "auto"
    key_file: Path | None = None
    build: str = "never"
    max_batch: int = 0


@dataclass(frozen=True)
class CpuPrecision:
    """In what ONNX Runtime computes a bundle's graphs; as text "int8 (this CPU has avx512_vnni)".

    Attributes:
        precision: of `siamtrack.bundle.PRECISIONS`.
        reason: why, in a few words.
    """

    precision: str
    reason: str

    def __str__(self) -> str:
        return f"{self.precision} ({self.reason})"


def cpu_precision(bundle: Bundle, wanted: str = "auto") -> CpuPrecision:
    """In what ONNX Runtime computes a bundle on this CPU.

    FP16 is for GPUs: the bundle's own precision runs in its place, with a warning, so that one setting serves on
    machines with a GPU and without. INT8 that was asked for runs on any CPU, with a warning where it gains nothing.

    Args:
        bundle: a verified bundle.
        wanted: one of `PRECISION_CHOICES`. "auto" takes INT8 where the bundle has such graphs and the CPU has
            instructions for them (`siamtrack.cpu.dot_products`), else the bundle's own precision.

    Raises:
        ValueError: no such precision.
        BundleError: the bundle has no graphs of this precision.
    """
    if wanted not in PRECISION_CHOICES:
        raise ValueError(f"unknown precision {wanted!r}; known: {', '.join(PRECISION_CHOICES)}")
    own, fast = bundle.manifest.precision, dot_products_here()
    if wanted == own:
        return CpuPrecision(own, "as asked")
    if wanted == "fp16":
        logger.warning("%s runs in %s: FP16 was asked for, which is for GPUs", bundle.manifest.model, own)
        return CpuPrecision(own, "fp16 is for GPUs")
    if own != "fp32":
        if wanted != "auto":
            raise BundleError(
                f"{bundle.path} is {own} and has no {wanted} graphs; take the FP32 bundle it was made from"
            )
        return CpuPrecision(own, "the bundle's only graphs")
    if wanted == "int8":
        if not bundle.int8_paths:
            raise BundleError(f"{bundle.path} has no INT8 graphs; make them: {bundle.int8_command}")
        if not fast:
            slow = "this CPU has no dot products of bytes: FP32 may be faster, and 8-bit sums may saturate"
            logger.warning("%s runs in INT8 as asked; %s", bundle.manifest.model, slow)
        return CpuPrecision("int8", "as asked")
    if not bundle.int8_paths:
        return CpuPrecision("fp32", "the bundle has no INT8 graphs")
    if not fast:
        return CpuPrecision("fp32", "this CPU has no dot products of bytes")
    return CpuPrecision("int8", f"this CPU has {fast}")


def open_runner(
    bundle: Bundle,
    backend: str = "onnxruntime",
    threads: int = 0,
    engines: EngineOptions | None = None,
    precision: str = "auto",
) -> Runner:
    """A runner for a bundle.

    Args:
        bundle: a verified bundle.
        backend: one of `BACKENDS`. "tensorrt" refuses where it cannot run; "auto" then takes ONNX Runtime, with a
            warning that says why.
        threads: CPU threads for CPU backends; 0 takes up to 4.
        engines: for the GPU; defaults when None.
        precision: one of `PRECISION_CHOICES`.

    Raises:
        ValueError: no such backend or precision.
        BundleError: a graph or an engine cannot be used, or there is none of this precision.
        RuntimeError: CUDA cannot be used, or there is not enough GPU memory.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if backend != "onnxruntime":
        from siamtrack.runners.cuda.device import CudaError
        from siamtrack.runners.tensorrt import TensorRTRunner

        try:
            return TensorRTRunner(bundle, precision=precision, **vars(engines or EngineOptions()))
        except (BundleError, CudaError) as error:
            if backend == "tensorrt":
                raise
            logger.warning("running on the CPU with ONNX Runtime, because TensorRT cannot be used: %s", error)
            if precision == "int8" and not bundle.int8_paths:
                precision = "auto"  # INT8 may have been there as engines alone, which is no reason to refuse here
    from siamtrack.runners.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle, threads, precision=precision)


def facts_of(runner: Runner) -> dict[str, str]:
    """What runs a model, for people: "backend", and what else the runner says of itself in an attribute ``facts``."""
    facts: dict[str, str] = getattr(runner, "facts", {"backend": "onnxruntime"})
    return facts
