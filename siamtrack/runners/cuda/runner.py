"""`CudaRunner`: a bundle on a GPU, whatever engine runs its graphs.

A frame is one upload (crop windows and their pixels), one crop kernel, one engine call and one download of a few
numbers per target. The four are captured as a CUDA graph, one for each number of windows, and replayed; the size of the
upload is all that changes in it. Template tensors stay on the GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siamtrack.bundle import SEARCH_OUTPUTS, SIZE, Bundle
from siamtrack.crop import Image, Window
from siamtrack.runners import Features, SearchResult, Size, size_in_crop
from siamtrack.runners.cuda.device import CudaError, Device
from siamtrack.runners.cuda.engine import Engine, check_engines
from siamtrack.runners.cuda.kernels import KERNELS, THREADS, Kernels
from siamtrack.runners.cuda.memory import TargetTensors
from siamtrack.runners.cuda.search import SearchFrame
from siamtrack.runners.cuda.staging import Staging
from siamtrack.runners.cuda.targets import TargetMaker

__all__ = ["KERNELS", "THREADS", "CudaRunner"]

logger = logging.getLogger(__name__)
_open_runners: weakref.WeakSet[CudaRunner] = weakref.WeakSet()


class CudaRunner:
    """Runs a bundle on a GPU; see `siamtrack.runners.Runner` for the methods.

    Args:
        bundle: a verified bundle.
        device: opened on this thread, which alone may use the runner. Closed with it, also when this fails.
        engines: for each graph of the bundle; closed with the runner, also when this fails.
        max_batch: windows in one launch; more are searched in turns.
        ready_for: numbers of windows to be ready for at once; others cost their first frame some milliseconds.
        response: copy the response maps back; without, `SearchResult.response` is ``[N, 0, 0]``.
        graphs: replay frames as CUDA graphs.

    Raises:
        OutOfMemory: the GPU is too full. Everything is given back.
        BundleError: an engine does not fit its graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        engines: Mapping[str, Engine],
        max_batch: int = 8,
        ready_for: Iterable[int] = (1,),
        response: bool = True,
        graphs: bool = True,
    ) -> None:
        self.bundle = bundle
        self.device = device
        self.max_batch = max_batch
        self.last_timing: dict[str, float] = {}
        self.helper_cores: frozenset[int] = frozenset()
        self.uses_graphs = graphs
        """False once a capture failed, or an engine replays graphs of its own."""
        self.capture_error = ""
        """Why a capture failed."""
        self._engines = dict(engines)
        self._frame: SearchFrame | None = None
        self._running = False
        self._closed = False
        try:
            device.enter()
            self._maker, self._frame = self._prepare(response)
            self._warm_up(ready_for)
        except BaseException:
            self.close()
            raise
        _open_runners.add(self)

    def template(
        self, image: Image, window: Window, fill_bgr: tuple[float, float, float], size: Size | None = None
    ) -> Features:
        """See `siamtrack.runners.Runner.template`."""
        self._enter()
        in_crop = size_in_crop(self.bundle, window, size)
        upload = self._stage_template(image, window, fill_bgr)
        if in_crop is not None:
            self._staging.field(SIZE, 1)[:] = in_crop
        self._running = True
        target = self._maker.make(upload)
        self._wait()
        return self._features(target, fill_bgr)

    def update(self, image: Image, window: Window, features: Features) -> Features:
        """See `siamtrack.runners.Runner.update`."""
        if not self._maker.renews:
            raise ValueError(f"{self.bundle.manifest.model} has no update graph: its template stays that of the start")
        self._enter()
        began = time.perf_counter()
        old = self._own(features)
        upload = self._stage_template(image, window, features.fill_bgr)
        self._running = True
        target = self._maker.renew(old, upload)
        self._wait()
        self.last_timing = {**self.last_timing, "update": time.perf_counter() - began}
        return self._features(target, features.fill_bgr) if self._maker.is_finite() else features

    def search(
        self,
        image: Image,
        windows: Sequence[Window],
        features: Sequence[Features],
        prev_size: NDArray[np.float32],
        tuning: tuple[float, float, float],
    ) -> SearchResult:
        """See `siamtrack.runners.Runner.search`."""
        self._enter()
        count = len(windows)
        if not count or len(features) != count or np.shape(prev_size) != (count, 2):
            raise ValueError(
                f"expected as many features and rows of prev_size as windows, and at least one; got {count} windows, "
                f"{len(features)} features and prev_size of shape {list(np.shape(prev_size))}"
            )
        parts = []
        timing = {"crop": 0.0, "network": 0.0}
        for start in range(0, count, self.max_batch):
            part = slice(start, start + self.max_batch)
            parts.append(self._search(image, windows[part], features[part], prev_size[part], tuning, timing))
        self.last_timing = timing
        if len(parts) == 1:
            return SearchResult(*parts[0])
        return SearchResult(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def profile(
        self,
        image: Image,
        windows: Sequence[Window],
        features: Sequence[Features],
        prev_size: NDArray[np.float32],
        tuning: tuple[float, float, float],
    ) -> dict[str, float]:
        """GPU milliseconds of the stages of one search, run plainly: "upload", "crop", "engine", "download".

        The device must be a `siamtrack.runners.cuda.device.CudaDevice`, which has events. At most `max_batch` windows.
        """
        self._enter()
        device: Any = self.device
        assert self._frame is not None
        upload = self._fill(self._frame, image, windows, features, prev_size, tuning)
        stages = self._frame.stages(len(windows), upload)
        self._running = True
        marks = [device.event()]
        for work in stages.values():
            work()
            marks.append(device.event())
        self._wait()
        gaps = [device.milliseconds(*pair) for pair in itertools.pairwise(marks)]
        device.release(marks)
        return dict(zip(stages, gaps, strict=True))

    @property
    def facts(self) -> dict[str, str]:
        """See `siamtrack.runners.facts_of`."""
        graphs = (
            "replayed" if self.uses_graphs else f"not used: {self.capture_error}" if self.capture_error else "not used"
        )
        return {"backend": "cuda", "binding": self.device.binding, "CUDA graphs": graphs}

    def close(self) -> None:
        """Give everything back, in order; safe to call twice.

        Raises:
            RuntimeError: called on another thread than the one that opened the runner.
        """
        if self._closed:
            return
        # A GPU that failed refuses every call. It must not keep the rest from being given back.
        with contextlib.suppress(CudaError):
            self.device.enter()
            self.device.synchronize()
        self._closed = True
        _open_runners.discard(self)
        self._forget_addresses()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self.device.close()

    def __enter__(self) -> CudaRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or collected on another thread: goes with the process
            self.close()

    def _prepare(self, response: bool) -> tuple[TargetMaker, SearchFrame]:
        """Check the engines, compile the kernels, take the memory that lasts."""
        check_engines(self.bundle, self._engines)
        kernels = Kernels(self.device, check="update" in self._engines)
        # The flag is set on the GPU alone, and cleared by every upload: on the host it is 0 for ever.
        numbers: list[tuple[str, Any, tuple[int, ...]]] = [(SIZE, np.float32, (2,)), ("prev_size", np.float32, (2,))]
        numbers += [("tuning", np.float32, (3,)), ("flag", np.int32, ())]
        # Windows up to twice the crop's side are sent whole: for them this never grows.
        crop = self.bundle.manifest.crop
        pixels = self.max_batch * (2 * max(crop.template_px, crop.search_px)) ** 2 * 3
        staging = Staging(self.device, numbers, self.max_batch, pixels, self._forget_addresses)
        maker = TargetMaker(self.bundle, self.device, self._engines, kernels, staging)
        search = self._engines["search"]
        frame = SearchFrame(self.bundle, self.device, search, kernels, staging, maker.kept, self.max_batch, response)
        self._staging = staging
        return maker, frame

    def _warm_up(self, ready_for: Iterable[int]) -> None:
        """Run what is slow the first time: engines choose kernels, frames are captured."""
        t, s = self.bundle.manifest.crop.template_px, self.bundle.manifest.crop.search_px
        image, black = np.zeros((s, s, 3), np.uint8), (0.0, 0.0, 0.0)
        features = self.template(image, Window(0, 0, t, t), black, (t / 2, t / 2))
        for count in sorted({min(count, self.max_batch) for count in ready_for}):
            size = np.full((count, 2), t / 2, np.float32)
            for _ in range(2):  # the first is captured, the second is a replay
                self.search(image, [Window(0, 0, s, s)] * count, [features] * count, size, (0.0, 0.0, 0.0))
        self.last_timing = {}

    def _enter(self) -> None:
        if self._closed:
            raise RuntimeError(f"this runner of {self.bundle.manifest.model} is closed; open a new one")
        self.device.enter()
        if self._running:  # an interrupt came between launch and wait: the GPU may still read the host's buffers
            self._wait()

    def _wait(self) -> None:
        self.device.synchronize()
        self._running = False

    def _own(self, features: Features) -> TargetTensors:
        """The target's tensors.

        Raises:
            ValueError: they are not of this runner.
        """
        target = features.tensors[0] if features.tensors else None
        if not isinstance(target, TargetTensors) or target.store is not self._maker.store:
            raise ValueError("these features are of another runner; features stay with the runner that made them")
        return target

    def _search(
        self,
        image: Image,
        windows: Sequence[Window],
        features: Sequence[Features],
        prev_size: NDArray[np.float32],
        tuning: tuple[float, float, float],
        timing: dict[str, float],
    ) -> tuple[NDArray[np.float32], ...]:
        frame = self._frame
        assert frame is not None
        began = time.perf_counter()
        count = len(windows)
        upload = self._fill(frame, image, windows, features, prev_size, tuning)
        filled = time.perf_counter()
        self._running = True
        frame.run(count, upload)
        self._wait()
        results = tuple(self._result(name, count) for name in SEARCH_OUTPUTS)
        timing["crop"] += filled - began
        timing["network"] += time.perf_counter() - filled
        if self.uses_graphs and not frame.is_captured(count):
            self._capture(frame, count)
        return results

    def _fill(
        self,
        frame: SearchFrame,
        image: Image,
        windows: Sequence[Window],
        features: Sequence[Features],
        prev_size: NDArray[np.float32],
        tuning: tuple[float, float, float],
    ) -> int:
        """Write the host's side of a search and put the targets' tensors in place; returns the bytes to upload."""
        targets = [self._own(f) for f in features]
        fills = [f.fill_bgr for f in features]
        upload = self._staging.write(image, windows, fills, self.bundle.manifest.crop.search_px)
        self._staging.field("prev_size", len(windows))[:] = prev_size
        self._staging.field("tuning", 1)[0] = tuning
        frame.place(targets, self._maker.store)
        return upload

    def _stage_template(self, image: Image, window: Window, fill_bgr: tuple[float, float, float]) -> int:
        """Write the host's side of a template; returns the bytes to upload."""
        return self._staging.write(image, [window], [fill_bgr], self.bundle.manifest.crop.template_px)

    def _features(self, target: TargetTensors, fill_bgr: tuple[float, float, float]) -> Features:
        if not self._maker.renews:
            return Features((target,), fill_bgr)
        return Features((target,), fill_bgr, first=target, history=target)

    def _forget_addresses(self) -> None:
        if self._frame is not None:
            self._maker.forget()
            self._frame.forget()

    def _capture(self, frame: SearchFrame, count: int) -> None:
        """Record the frame that just ran. Where that fails, frames go on being queued call by call."""
        try:
            if not frame.capture(count):
                logger.info("the engine replays CUDA graphs of its own; uploads and crops are queued beside them")
                self.uses_graphs = False
        except RuntimeError as error:
            self.uses_graphs, self.capture_error = False, str(error)
            logger.warning("no CUDA graphs: every frame is queued call by call, which is slower (%s)", error)

    def _result(self, name: str, count: int) -> NDArray[np.float32]:
        assert self._frame is not None
        return self._frame.result(name, count)


def _close_all() -> None:
    """At the interpreter's end: close what this thread opened. What belongs to other threads goes with the process."""
    for runner in list(_open_runners):
        with contextlib.suppress(RuntimeError):
            runner.close()


atexit.register(_close_all)
