"""Makes the tensors of targets on the GPU: from a template window, and renewed from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from siamtrack.bundle import FEATURE, SIZE, UPDATE_INPUTS, Bundle
from siamtrack.runners.cuda.device import Device
from siamtrack.runners.cuda.engine import Engine, item_shape
from siamtrack.runners.cuda.kernels import Kernels
from siamtrack.runners.cuda.memory import TargetTensors, TensorStore, addresses, layout
from siamtrack.runners.cuda.staging import Staging


class TargetMaker:
    """Runs the template graph, and the update graph of a model that has one. Queues work; waiting is the caller's.

    Args:
        bundle: whose graphs the engines run.
        device: owns memory and stream.
        engines: of the bundle, checked.
        kernels: with the check, where there is an update graph.
        staging: brings the window that is cut, and clears the flag.

    Raises:
        OutOfMemory: no room for what the graphs give.
    """

    def __init__(
        self, bundle: Bundle, device: Device, engines: Mapping[str, Engine], kernels: Kernels, staging: Staging
    ) -> None:
        self._device, self._engines, self._kernels, self._staging = device, engines, kernels, staging
        self._size_px = bundle.manifest.crop.template_px
        self.renews = "update" in engines
        taken = [spec for spec in engines["search"].inputs if spec.name in bundle.manifest.template_tensors]
        self.kept: list[tuple[str, Any, tuple[int, ...]]] = [(s.name, s.dtype, item_shape(s)) for s in taken]
        """Name, dtype and shape of each tensor that search takes."""
        stored = list(self.kept)
        made = layout([(spec.name, spec.dtype, item_shape(spec)) for spec in engines["template"].outputs])
        self._made = addresses(device.allocate(made.nbytes), made)
        self._image = device.allocate(self._size_px**2 * 3)
        if self.renews:
            feature = next(spec for spec in engines["template"].outputs if spec.name == FEATURE)
            fused = [(name, feature.dtype, item_shape(feature)) for name in UPDATE_INPUTS]
            fused += [(spec.name, spec.dtype, item_shape(spec)) for spec in engines["update"].outputs]
            used = layout(fused)
            self._fused = addresses(device.allocate(used.nbytes), used)
            self._host_flag = device.allocate_host(np.dtype(np.int32).itemsize)
            stored += [(name, feature.dtype, item_shape(feature)) for name in ("first", "history")]
        self.store = TensorStore(device, layout(stored))
        self._work: dict[str, Callable[[], None]] = {}

    def make(self, upload: int) -> TargetTensors:
        """Queue the making of a target from the staged window.

        Args:
            upload: bytes that are staged.

        Raises:
            OutOfMemory: no room for the target.
        """
        target = self.store.take()
        self._run_template(upload)
        if self.renews:
            self._run_update(target, *[self._made[FEATURE]] * 3)
        else:
            self._keep(target, self._made)
        return target

    def renew(self, old: TargetTensors, upload: int) -> TargetTensors:
        """Queue the renewal of a target with the staged window, into memory of its own; then see `is_finite`."""
        target = self.store.take()
        self._run_template(upload)
        first, history = (self.store.address(old, name) for name in ("first", "history"))
        self._run_update(target, first, history, self._made[FEATURE])
        self._check_finite(target)
        return target

    def is_finite(self) -> bool:
        """Whether all values of the target renewed last are finite numbers, after the wait."""
        return not self._host_flag.view(np.int32)[0]

    def forget(self) -> None:
        """Drop bindings: they have addresses of buffers that move or go."""
        self._work.clear()

    def _run_template(self, upload: int) -> None:
        if "template" not in self._work:
            places = {"image": self._image, SIZE: self._staging.addresses[SIZE], **self._made}
            self._work["template"] = self._engines["template"].bind(1, places)
        self._device.upload(self._staging.address, self._staging.host, upload)
        self._kernels.crop(self._staging.address, self._image, self._size_px, 1)
        self._work["template"]()

    def _run_update(self, target: TargetTensors, first: int, history: int, current: int) -> None:
        """Queue the fusion of three features, at these addresses, into all that search and the next update take."""
        if "update" not in self._work:
            self._work["update"] = self._engines["update"].bind(1, self._fused)
        size = self.store.content.fields["first"].item_bytes
        for name, source in zip(UPDATE_INPUTS, (first, history, current), strict=True):
            self._device.copy(self._fused[name], source, size)
        self._work["update"]()
        self._keep(target, self._fused)
        history_made = self._fused[self._engines["update"].outputs[0].name]
        self._device.copy(self.store.address(target, "first"), first, size)
        self._device.copy(self.store.address(target, "history"), history_made, size)

    def _keep(self, target: TargetTensors, tensors: Mapping[str, int]) -> None:
        """Copy what search takes to the target's own memory."""
        for name, *_ in self.kept:
            size = self.store.content.fields[name].item_bytes
            self._device.copy(self.store.address(target, name), tensors[name], size)

    def _check_finite(self, target: TargetTensors) -> None:
        """Queue a look at a target's new tensors, and the download of the flag."""
        flag = self._staging.addresses["flag"]
        for name in (*(name for name, *_ in self.kept), "history"):
            field = self.store.content.fields[name]
            values = field.item_bytes // field.dtype.itemsize
            self._kernels.check_finite(self.store.address(target, name), values, field.dtype.itemsize == 2, flag)
        self._device.download(self._host_flag, flag, len(self._host_flag))
