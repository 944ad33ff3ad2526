"""ONNX Runtime on the CPU: OpenCV crops, one session a graph."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from siamtrack.bundle import FEATURE, SEARCH_OUTPUTS, SIZE, UPDATE_INPUTS, Bundle, BundleError, GraphSpec
from siamtrack.crop import Image, Window, crop
from siamtrack.runners import Features, SearchResult, Size, cpu_precision, size_in_crop

TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)"}
REWRITES_WEIGHTS = ["WeightBiasQuantization"]
"""Optimisers of ONNX Runtime to do without: this one rounds weights that an INT8 graph keeps in FP32, one scale for all
channels (of a depthwise convolution it leaves little)."""


class OnnxRuntimeRunner:
    """Runs a bundle on CPU threads.

    Args:
        bundle: a verified bundle.
        threads: threads a graph may use; 0 takes the available cores, up to 4.
        spinning: let threads spin between the operations of a run, which is faster. They stop with the run:
            threads that spin on would take the cores from everything else.
        precision: one of `siamtrack.runners.PRECISION_CHOICES`; None for the bundle's own, whatever this CPU can: what
            everything else is compared with.

    Attributes:
        facts: see `siamtrack.runners.facts_of`.

    Raises:
        ValueError: no such precision.
        BundleError: a graph cannot be loaded or does not match its manifest, or there is none of this precision.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, spinning: bool = True, precision: str | None = None) -> None:
        self.bundle = bundle
        chosen = cpu_precision(bundle, precision or bundle.manifest.precision)
        self.facts = {"backend": "onnxruntime", "precision": str(chosen)}
        self.last_timing: dict[str, float] = {}
        self.threads = threads or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 4)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.helper_cores = _helper_cores(self.threads)
        if self.helper_cores:  # counted from 1 there
            affinities = ";".join(str(core + 1) for core in sorted(self.helper_cores))
            options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
        graphs = bundle.manifest.graphs
        paths = {name: bundle.graph_path(name) for name in graphs}
        if chosen.precision == "int8":
            paths |= bundle.int8_paths
        self._sessions = {name: _open(path, graphs[name], options) for name, path in paths.items()}

    def template(
        self, image: Image, window: Window, fill_bgr: tuple[float, float, float], size: Size | None = None
    ) -> Features:
        """See `siamtrack.runners.Runner.template`."""
        tensors = self._template(image, window, fill_bgr, size)
        if "update" not in self.bundle.manifest.graphs:
            return Features(tuple(tensors[name] for name in self.bundle.manifest.template_tensors), fill_bgr)
        feature = tensors[FEATURE]
        return self._fuse(feature, feature, feature, fill_bgr)

    def update(self, image: Image, window: Window, features: Features) -> Features:
        """See `siamtrack.runners.Runner.update`."""
        if "update" not in self.bundle.manifest.graphs:
            raise ValueError(f"{self.bundle.manifest.model} has no update graph: its template stays that of the start")
        start = time.perf_counter()
        current = self._template(image, window, features.fill_bgr)[FEATURE]
        fused = self._fuse(features.first, features.history, current, features.fill_bgr)
        self.last_timing = {**self.last_timing, "update": time.perf_counter() - start}
        finite = all(np.isfinite(tensor).all() for tensor in (fused.history, *fused.tensors))
        return fused if finite else features

    def search(
        self,
        image: Image,
        windows: Sequence[Window],
        features: Sequence[Features],
        prev_size: NDArray[np.float32],
        tuning: tuple[float, float, float],
    ) -> SearchResult:
        """See `siamtrack.runners.Runner.search`."""
        session = self.session("search")
        size_px = self.bundle.manifest.crop.search_px
        start = time.perf_counter()
        crops = [crop(image, w, size_px, f.fill_bgr)[None] for w, f in zip(windows, features, strict=True)]
        feeds = {"image": _join(crops), "prev_size": prev_size, "tuning": np.asarray(tuning, np.float32)}
        for i, name in enumerate(self.bundle.manifest.template_tensors):
            feeds[name] = _join([f.tensors[i] for f in features])
        cropped = time.perf_counter()
        box, score, penalty, response = session.run(list(SEARCH_OUTPUTS), feeds)
        self.last_timing = {"crop": cropped - start, "network": time.perf_counter() - cropped}
        return SearchResult(box, score, penalty, response)

    def _template(
        self, image: Image, window: Window, fill_bgr: tuple[float, float, float], size: Size | None = None
    ) -> dict[str, NDArray[np.float32]]:
        feeds = {"image": crop(image, window, self.bundle.manifest.crop.template_px, fill_bgr)[None]}
        in_crop = size_in_crop(self.bundle, window, size)
        return self._run("template", feeds if in_crop is None else {**feeds, SIZE: in_crop})

    def _fuse(
        self,
        first: NDArray[np.float32],
        history: NDArray[np.float32],
        current: NDArray[np.float32],
        fill_bgr: tuple[float, float, float],
    ) -> Features:
        manifest = self.bundle.manifest
        tensors = self._run("update", dict(zip(UPDATE_INPUTS, (first, history, current), strict=True)))
        history = tensors[manifest.graphs["update"].outputs[0].name]
        return Features(tuple(tensors[name] for name in manifest.template_tensors), fill_bgr, first, history)

    def _run(self, name: str, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """All outputs of a graph by name."""
        names = [spec.name for spec in self.bundle.manifest.graphs[name].outputs]
        return dict(zip(names, self.session(name).run(names, feeds), strict=True))

    def close(self) -> None:
        """Free the sessions; safe to call twice."""
        self._sessions.clear()

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def session(self, name: str) -> onnxruntime.InferenceSession:
        """The session of a graph, for verification and profiling.

        Raises:
            RuntimeError: the runner is closed.
        """
        if name not in self._sessions:
            raise RuntimeError(f"this runner of {self.bundle.manifest.model} is closed; open a new one")
        return self._sessions[name]


def _helper_cores(threads: int) -> frozenset[int]:
    """A core for each thread but the calling one; none where there are not enough cores, or no telling.

    A camera's frames come with pauses, in which the threads sleep. Woken together, two often land on one core, and the
    one that spins there keeps the other waiting for a scheduler tick, as long as a whole frame takes. The last cores
    are taken: interrupts and whatever else starts first prefer the first.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return frozenset(cores[1 - threads :]) if 1 < threads <= len(cores) else frozenset()


def _join(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _open(path: Path, graph: GraphSpec, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=REWRITES_WEIGHTS
        )
    except Exception as error:  # ONNX Runtime raises its own unrelated exception classes
        raise BundleError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}") from error
    for side, nodes, specs in (
        ("inputs", session.get_inputs(), graph.inputs),
        ("outputs", session.get_outputs(), graph.outputs),
    ):
        actual = [(node.name, node.type, _shape(node.shape)) for node in nodes]
        wanted = [(spec.name, TYPES.get(spec.dtype, spec.dtype), _shape(spec.shape)) for spec in specs]
        if actual != wanted:
            raise BundleError(f"{path.name}: {side} are {actual}, the manifest says {wanted}; export the model again")
    return session


def _shape(dimensions: Sequence[int | str | None]) -> list[int | None]:
    """Dimensions as numbers; None where free."""
    return [d if isinstance(d, int) else None for d in dimensions]
