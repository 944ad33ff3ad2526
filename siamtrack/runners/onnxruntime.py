"""ONNX Runtime on the CPU: OpenCV crops, one session a graph."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from siamtrack.bundle import SEARCH_OUTPUTS, Bundle, BundleError
from siamtrack.crop import Image, Window, crop
from siamtrack.runners import Features, SearchResult

TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)"}


class OnnxRuntimeRunner:
    """Runs a bundle on CPU threads.

    Args:
        bundle: a verified bundle.
        threads: threads a graph may use; 0 takes the available cores, up to 4.
        spinning: let threads spin between the operations of a run, which is faster. They stop with the run:
            threads that spin on would take the cores from everything else.

    Raises:
        BundleError: a graph cannot be loaded or does not match its manifest.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, spinning: bool = True) -> None:
        self.bundle = bundle
        self.last_timing: dict[str, float] = {}
        self.threads = threads or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 4)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._template_names = [spec.name for spec in bundle.manifest.graphs["template"].outputs]
        self._sessions = {name: _open(bundle, name, options) for name in bundle.manifest.graphs}

    def template(self, image: Image, window: Window, fill_bgr: tuple[float, float, float]) -> Features:
        """See `siamtrack.runners.Runner.template`."""
        crops = crop(image, window, self.bundle.manifest.crop.template_px, fill_bgr)[None]
        return Features(tuple(self.session("template").run(self._template_names, {"image": crops})), fill_bgr)

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
        for i, name in enumerate(self._template_names):
            feeds[name] = _join([f.tensors[i] for f in features])
        cropped = time.perf_counter()
        box, score, penalty, response = session.run(list(SEARCH_OUTPUTS), feeds)
        self.last_timing = {"crop": cropped - start, "network": time.perf_counter() - cropped}
        return SearchResult(box, score, penalty, response)

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


def _join(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _open(bundle: Bundle, name: str, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    path, graph = bundle.graph_path(name), bundle.manifest.graphs[name]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
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
