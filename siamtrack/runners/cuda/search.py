"""`SearchFrame`: one search as one upload, one crop, one engine call and one download, or as their CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siamtrack.bundle import SEARCH_OUTPUTS, Bundle
from siamtrack.runners.cuda.device import Device, Graph
from siamtrack.runners.cuda.engine import Engine, item_shape
from siamtrack.runners.cuda.kernels import Kernels
from siamtrack.runners.cuda.memory import TargetTensors, TensorStore, addresses, layout
from siamtrack.runners.cuda.staging import Staging


class SearchFrame:
    """The search graph with its memory. Queues work; waiting is the caller's.

    Args:
        bundle: whose search graph the engine runs.
        device: owns memory and stream.
        engine: of the search graph, checked.
        kernels: cuts the windows.
        staging: brings them, with "prev_size" and "tuning".
        kept: name, dtype and shape of the targets' tensors.
        max_batch: windows in one launch.
        response: copy the response maps back.

    Raises:
        OutOfMemory: no room.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        engine: Engine,
        kernels: Kernels,
        staging: Staging,
        kept: Sequence[tuple[str, Any, Sequence[int]]],
        max_batch: int,
        response: bool,
    ) -> None:
        self._device, self._engine, self._kernels, self._staging = device, engine, kernels, staging
        self._size_px = bundle.manifest.crop.search_px
        self._response = response
        results = [(spec.name, spec.dtype, item_shape(spec)) for spec in engine.outputs]
        results.sort(key=lambda result: SEARCH_OUTPUTS.index(result[0]))  # response last: it is left out at will
        self._outputs = layout(results, max_batch)
        tensors = layout(kept, max_batch)
        self._tensors, self._fields = addresses(device.allocate(max(tensors.nbytes, 1)), tensors), tensors.fields
        self._slots = [0] * max_batch  # serial of the target whose tensors lie there
        self._images = device.allocate(max_batch * self._size_px**2 * 3)
        self._results = device.allocate(self._outputs.nbytes)
        self._host = device.allocate_host(self._outputs.nbytes)
        self._work: dict[int, Callable[[], None]] = {}
        self._graphs: dict[int, Graph] = {}

    def place(self, targets: Sequence[TargetTensors], store: TensorStore) -> None:
        """Queue copies of the targets' tensors to where the engine takes them, unless they lie there already."""
        for slot, target in enumerate(targets):
            if self._slots[slot] != target.serial:
                for name, field in self._fields.items():
                    to = self._tensors[name] + slot * field.item_bytes
                    self._device.copy(to, store.address(target, name), field.item_bytes)
                self._slots[slot] = target.serial

    def is_captured(self, count: int) -> bool:
        """Whether `run` replays a graph for so many windows."""
        return count in self._graphs

    def run(self, count: int, upload: int) -> None:
        """Queue a search of the staged windows, whose upload has so many bytes."""
        if count in self._graphs:
            self._graphs[count].launch(self._staging.rounded(upload))
            return
        for work in self.stages(count, upload).values():
            work()

    def stages(self, count: int, upload: int) -> dict[str, Callable[[], None]]:
        """The four parts of a search, in order."""
        if count not in self._work:
            header, outputs = self._staging.addresses, addresses(self._results, self._outputs)
            places = {"image": self._images, "prev_size": header["prev_size"], "tuning": header["tuning"]}
            self._work[count] = self._engine.bind(count, {**places, **self._tensors, **outputs})
        last = self._outputs.fields["response"]
        wanted = last.offset + (count * last.item_bytes if self._response else 0)
        return {
            "upload": lambda: self._device.upload(self._staging.address, self._staging.host, upload),
            "crop": lambda: self._kernels.crop(self._staging.address, self._images, self._size_px, count),
            "engine": self._work[count],
            "download": lambda: self._device.download(self._host, self._results, wanted),
        }

    def capture(self, count: int) -> bool:
        """Record the search that ran last, to be replayed; False where the engine replays graphs of its own.

        Raises:
            CudaError: it cannot be captured.
        """
        if not self._engine.capturable(count):
            return False
        stages = self.stages(count, len(self._staging.host))

        def queue() -> None:
            for work in stages.values():
                work()

        self._graphs[count] = self._device.capture(queue)
        return True

    def result(self, name: str, count: int) -> NDArray[np.float32]:
        """One of `SEARCH_OUTPUTS`, after the wait."""
        if name == "response" and not self._response:
            return np.empty((count, 0, 0), np.float32)
        return self._outputs.fields[name].view(self._host, count).copy()

    def forget(self) -> None:
        """Drop graphs and bindings: they have addresses of buffers that move or go."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._work.clear()
