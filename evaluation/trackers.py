"""What is evaluated: a tracker by its description, which can be sent to another process and hashed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import cv2

from evaluation.onepass import Tracker
from evaluation.peers import create_peer
from siamtrack.bundle import TrackingSpec, load_bundle, shipped_models
from siamtrack.runners import cpu_precision, open_runner
from siamtrack.tracker import SiamTracker


@dataclass(frozen=True)
class TrackerSpec:
    """A tracker that can be made anywhere.

    Attributes:
        name: what tables and folders call it.
        model: shipped model or bundle folder; "" for a peer.
        peer: name in `evaluation.peers.PEERS`; "" for a model.
        backend: see `siamtrack.runners.BACKENDS`.
        precision: of `siamtrack.runners.PRECISION_CHOICES`.
        threads: CPU threads of one tracker. One thread gives the same boxes however many processes there are.
        tracking: tracking parameters that replace those of the manifest, by name.
    """

    name: str
    model: str = ""
    peer: str = ""
    backend: str = "onnxruntime"
    precision: str = "auto"
    threads: int = 1
    tracking: tuple[tuple[str, float], ...] = ()

    def fingerprint(self) -> str:
        """Hash of everything that decides which boxes come out: weights, geometry, parameters, backend, precision.

        Raises:
            BundleError: the model cannot be found or is damaged.
        """
        return hashlib.sha256(json.dumps(self._facts(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _facts(self) -> dict[str, object]:
        if self.peer:
            return {"peer": self.peer, "opencv": cv2.__version__}
        bundle = load_bundle(self.model)
        manifest = bundle.manifest
        graphs = {name: graph.sha256 for name, graph in manifest.graphs.items()}
        if self.precision in ("auto", "int8"):
            graphs |= {f"{name} in INT8": manifest.int8[name].sha256 for name in bundle.int8_paths}
        return {
            "graphs": graphs,
            "crop": asdict(manifest.crop),
            "grid": asdict(manifest.grid),
            "thresholds": asdict(manifest.score.thresholds),
            "tracking": asdict(_tracking(manifest.tracking, self.tracking)),
            "update": asdict(manifest.update) if manifest.update else None,
            "backend": self.backend,
            "precision": self.precision,
        }


def model_spec(
    text: str, backend: str, threads: int, tracking: Sequence[tuple[str, float]], precision: str = ""
) -> TrackerSpec:
    """A model from the command line: ``MODEL``, or ``NAME=MODEL`` where tables shall call it otherwise.

    Without a `precision` ONNX Runtime computes in the bundle's own, so that boxes do not depend on what the CPU is
    fast at; other backends choose theirs.

    Raises:
        BundleError: no such model, or a damaged one.
        ValueError: a tracking parameter that does not exist, or a fraction for one that is a count.
    """
    name, separator, model = text.rpartition("=")
    bundle = load_bundle(model)
    _tracking(bundle.manifest.tracking, tracking)
    title = name if separator else bundle.path.resolve().name
    # A shipped model goes by its name, which holds on every machine; a folder by a path that holds in every process.
    where = model if model in shipped_models() else str(bundle.path.resolve())
    if backend == "onnxruntime":  # settled here: what "auto" means must not change from process to process
        precision = cpu_precision(bundle, precision or bundle.manifest.precision).precision
    precision = precision or "auto"
    return TrackerSpec(title, where, "", backend, precision, threads, tuple(tracking))


def peer_spec(name: str) -> TrackerSpec:
    """A peer by its name in `evaluation.peers.PEERS`; raises as `evaluation.peers.create_peer`."""
    create_peer(name)
    return TrackerSpec(name, peer=name)


@functools.lru_cache(maxsize=4)
def make_tracker(spec: TrackerSpec) -> Tracker:
    """The tracker; a process makes each one once and keeps it, since `init` forgets the last target."""
    if spec.peer:
        return create_peer(spec.peer)
    bundle = load_bundle(spec.model)
    runner = open_runner(bundle, spec.backend, spec.threads, precision=spec.precision)
    return SiamTracker(runner, tracking=_tracking(bundle.manifest.tracking, spec.tracking))


def _tracking(tracking: TrackingSpec, changes: Sequence[tuple[str, float]]) -> TrackingSpec:
    known = [field.name for field in fields(tracking)]
    whole = {field.name for field in fields(tracking) if field.type in ("int", int)}
    values: dict[str, Any] = {}
    for name, value in changes:
        if name not in known:
            raise ValueError(f"no tracking parameter {name!r}; expected one of {', '.join(known)}")
        if name in whole and not float(value).is_integer():
            raise ValueError(f"{name} is a whole number, got {value:g}")
        values[name] = int(value) if name in whole else value
    return replace(tracking, **values)
