"""A bundle: a folder with a model's graphs and the manifest that says everything a runtime must know of them.

``manifest.json`` is the one place where training and tracking meet. Every graph speaks the same contract:

* ``template``: ``image`` uint8 ``[1, T, T, 3]`` BGR, for some models also ``size`` f32 ``[1, 2]`` (w, h of the target
  in crop pixels) -> template tensors, opaque to the host; one of them, ``feature``, for a model whose template is
  renewed while tracking, which takes no ``size``;
* ``update``, of such a model alone: three such features, ``first``, ``history`` and ``current`` -> template tensors.
  ``first`` is of the first frame, ``history`` the first output of the update before; the track starts with three times
  the same feature. The first output is the next history; search takes those outputs that its inputs name;
* ``search``: ``image`` uint8 ``[N, S, S, 3]`` BGR, the template tensors ``[N, ...]``, ``prev_size`` f32 ``[N, 2]``
  (w, h in crop pixels), ``tuning`` f32 ``[3]`` (penalty_k, window_influence, spare) -> ``box`` f32 ``[N, 4]`` (cx, cy,
  w, h in crop pixels), ``score`` f32 ``[N]`` in [0, 1], ``penalty`` f32 ``[N]``, ``response`` f32 ``[N, H, W]``.

Beside an FP32 graph there may lie an INT8 form of it, with the same inputs and outputs, for CPUs that gain by it. All
else is made from the FP32 graphs and held against their hashes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from siamtrack.plain import from_plain, to_plain
from siamtrack.state import Thresholds

SCHEMA_VERSION = 1
PRECISIONS = ("fp32", "fp16", "int8")
SEARCH_OUTPUTS = ("box", "score", "penalty", "response")
FEATURE = "feature"
UPDATE_INPUTS = ("first", "history", "current")
SIZE = "size"
MANIFEST_NAME = "manifest.json"
MODELS_DIR = Path(__file__).parent / "models"
DEFAULT_MODEL = "siamcan-mobilenetv2"

logger = logging.getLogger(__name__)


class BundleError(ValueError):
    """A bundle is missing, incomplete, damaged or of another version."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output; a text dimension, such as "N", is free."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph file of the bundle."""

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Int8Graph:
    """The INT8 form of a graph; its inputs and outputs are those of the FP32 graph.

    Attributes:
        file: plain name inside the bundle.
        sha256: of the file.
        source_sha256: of the FP32 graph it was made from. Where the bundle has another one now, this one is stale.
    """

    file: str
    sha256: str
    source_sha256: str


@dataclass(frozen=True)
class CropSpec:
    """Crop geometry: template and search crop sides in pixels, context share, fill of outside pixels."""

    template_px: int
    search_px: int
    context: float = 0.5
    fill: str = "first_frame_mean"

    def __post_init__(self) -> None:
        if self.template_px < 1 or self.search_px < 1 or not self.context >= 0:
            raise ValueError(
                f"crop sides must be at least 1 px and context at least 0, got template_px {self.template_px}, "
                f"search_px {self.search_px}, context {self.context}"
            )
        if self.fill != "first_frame_mean":
            raise ValueError(f"unknown fill {self.fill!r}; known: first_frame_mean")


@dataclass(frozen=True)
class GridSpec:
    """Where response cell ``i`` lies in the search crop: ``origin + stride * i`` continuous pixels."""

    size: int
    stride: int
    origin: float


@dataclass(frozen=True)
class TrackingSpec:
    """Tracking parameters, one set for all sequences.

    Attributes:
        penalty_k: strength of the size-change penalty, at least 0.
        window_influence: weight of the cosine window in cell choice, 0..1.
        size_rate: how fast the size follows, 0..1; multiplied by penalty and score.
        uncertain_rate: factor on `size_rate` after a frame that is not TRACKING, 0..1: weak evidence makes sizes creep.
            Published trackers have none, which is 1.
        motion_rate: how fast the velocity follows, 0..1; multiplied by the score, so that weak evidence coasts on. The
            search window is centred where the target will be at this velocity; 0 centres it where the target was.
        min_size_px: the box never gets thinner than this, unless it was so at the start.
        lost_windows: windows searched a frame while LOST, the place of loss among them.
        second_look: width of a second window that is searched after a weak frame (see `siamtrack.state.advance`), round
            the box of the last frame that was not weak, in widths of the ordinary window, 1..2. What it shows counts if
            it scores more and at least `lost_below`. 0 for none, as published; nor is there one where `lost_windows` is
            1.
    """

    penalty_k: float = 0.06
    window_influence: float = 0.4
    size_rate: float = 0.4
    uncertain_rate: float = 1.0
    motion_rate: float = 0.5
    min_size_px: float = 4.0
    lost_windows: int = 2
    second_look: float = 0.0

    def __post_init__(self) -> None:
        if not self.penalty_k >= 0:
            raise ValueError(f"penalty_k must be at least 0, got {self.penalty_k}")
        for name in ("window_influence", "size_rate", "uncertain_rate", "motion_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.min_size_px >= 1:
            raise ValueError(f"min_size_px must be at least 1, got {self.min_size_px}")
        if self.lost_windows < 1:
            raise ValueError(f"lost_windows must be at least 1, got {self.lost_windows}")
        if self.second_look != 0 and not 1 <= self.second_look <= 2:
            raise ValueError(f"second_look must be 0 or in [1, 2], got {self.second_look}")


@dataclass(frozen=True)
class UpdateSpec:
    """When a model with an update graph renews its template.

    Attributes:
        min_score: only after a frame whose raw score is above this, 0..1; 1 keeps the first template for ever.
        interval: at least so many frames from one try to the next; 1 allows every frame.
    """

    min_score: float
    interval: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score must be in [0, 1], got {self.min_score}")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 frame, got {self.interval}")


@dataclass(frozen=True)
class ScoreSpec:
    """What the score means and where it was cut; `calibration` says on which data and how."""

    meaning: str
    thresholds: Thresholds
    calibration: str = "uncalibrated"


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        schema_version: layout of this file.
        model: name in `siamtrack.nets.MODELS`.
        graphs: by name: "template", "search", and "update" where a model has one.
        crop: crop geometry.
        grid: response geometry.
        score: meaning and thresholds of the score.
        licence: of the weights.
        tracking: tracking parameters.
        update: when the template is renewed; there exactly if there is an update graph.
        precision: of `graphs`, one of `PRECISIONS`.
        int8: INT8 forms of some of an FP32 bundle's graphs, by the graph's name.
        provenance: text facts: checkpoint hash, git commit, data, command.
        accuracy: measured figures by name.
    """

    schema_version: int
    model: str
    graphs: dict[str, GraphSpec]
    crop: CropSpec
    grid: GridSpec
    score: ScoreSpec
    licence: str
    tracking: TrackingSpec = TrackingSpec()
    update: UpdateSpec | None = None
    precision: str = "fp32"
    int8: dict[str, Int8Graph] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)

    @property
    def takes_size(self) -> bool:
        """Does the template graph want to know how large the target is?"""
        return any(spec.name == SIZE for spec in self.graphs["template"].inputs)

    @property
    def template_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that search takes from the update graph, or where there is none from template."""
        return tuple(spec.name for spec in self.graphs["search"].inputs[1:-2])


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest

    def graph_path(self, name: str) -> Path:
        """File of a graph."""
        return self.path / self.manifest.graphs[name].file

    @property
    def int8_paths(self) -> dict[str, Path]:
        """Files of the INT8 graphs that can be used, by graph: those made from the FP32 graph that is there now."""
        graphs = self.manifest.graphs
        return {n: self.path / g.file for n, g in self.manifest.int8.items() if g.source_sha256 == graphs[n].sha256}

    @property
    def int8_command(self) -> str:
        """Shell command that makes the INT8 graphs."""
        return shlex.join(["siamtrack-export", "precision", str(self.path.resolve()), "--precision", "int8", "--add"])

    def size_bytes(self) -> int:
        """Size of all graph files that can be used."""
        paths = [*map(self.graph_path, self.manifest.graphs), *self.int8_paths.values()]
        return sum(path.stat().st_size for path in paths)


def load_bundle(name_or_dir: str | Path | None = None) -> Bundle:
    """Find, read and verify a bundle.

    INT8 graphs that were made from other FP32 graphs than the bundle has now are passed over, with a warning.

    Args:
        name_or_dir: a shipped model's name, a bundle folder, or None for the default model.

    Raises:
        BundleError: not found, unreadable, of another schema, or a file's SHA-256 differs.
    """
    path = _find(name_or_dir)
    manifest = _read_manifest(path)
    _check_contract(path, manifest)
    bundle = Bundle(path, manifest)
    for graph in manifest.graphs.values():
        _check_file(path, graph)
    for name, int8 in manifest.int8.items():
        if name in bundle.int8_paths:
            _check_file(path, int8)
        else:
            stale = f"the INT8 {name} graph was made from another {name} graph than is here now, and is not used"
            logger.warning("%s: %s; make it anew: %s", path, stale, bundle.int8_command)
    return bundle


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a bundle folder; who reads meanwhile gets the old one or the new one, whole."""
    scratch = path / f".{MANIFEST_NAME}.{os.getpid()}"
    scratch.write_text(json.dumps(to_plain(manifest), indent=2) + "\n")
    scratch.replace(path / MANIFEST_NAME)


def shipped_models() -> list[str]:
    """Names of the bundles inside the package."""
    return sorted(p.parent.name for p in MODELS_DIR.glob(f"*/{MANIFEST_NAME}"))


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path, graph: GraphSpec | Int8Graph) -> None:
    """A graph's file is there, and is what the manifest says."""
    if Path(graph.file).name != graph.file:
        raise BundleError(f"{path}: graph file {graph.file!r} is not a plain file name inside the bundle")
    if not (path / graph.file).is_file():
        raise BundleError(f"{path}: {graph.file} is missing; copy the whole bundle folder, or export it again")
    actual = sha256(path / graph.file)
    if actual != graph.sha256:
        raise BundleError(
            f"{path}: {graph.file} is damaged or was changed: SHA-256 is {actual[:12]}..., the manifest says "
            f"{graph.sha256[:12]}...; copy it anew, or export the model again"
        )


def _check_contract(path: Path, manifest: Manifest) -> None:
    """Graphs must be there, take crops of the manifest's sizes, and be chained by their tensors' names."""
    for name in ("template", "search"):
        if name not in manifest.graphs:
            raise BundleError(f"{path}: no {name} graph; export the model again")
    if ("update" in manifest.graphs) != (manifest.update is not None):
        problem = "an update graph without" if manifest.update is None else "no update graph for the"
        raise BundleError(f"{path}: there is {problem} update parameters; export the model again")
    if manifest.int8 and (manifest.precision != "fp32" or not manifest.int8.keys() <= manifest.graphs.keys()):
        raise BundleError(
            f"{path}: INT8 graphs {sorted(manifest.int8)} beside {manifest.precision} graphs "
            f"{sorted(manifest.graphs)}; each belongs beside an FP32 graph of its name; export the model again"
        )
    template, search = manifest.graphs["template"], manifest.graphs["search"]
    tensors = _names(template.outputs)
    t, s = manifest.crop.template_px, manifest.crop.search_px
    shown = [("image", (t, t, 3)), *([(SIZE, (2,))] if manifest.takes_size else [])]
    checks: list[tuple[str, object, object]] = [
        ("template inputs", [(i.name, i.shape[1:]) for i in template.inputs], shown),
        ("search image", [i.shape[1:] for i in search.inputs if i.name == "image"], [(s, s, 3)]),
    ]
    if "update" in manifest.graphs:
        update = manifest.graphs["update"]
        feature = [(o.dtype, o.shape) for o in template.outputs[:1]]
        wanted = [(name, *kind) for name in UPDATE_INPUTS for kind in feature]
        checks += [
            ("template inputs before an update graph", _names(template.inputs), ("image",)),
            ("template outputs before an update graph", tensors, (FEATURE,)),
            ("update inputs", [(i.name, i.dtype, i.shape) for i in update.inputs], wanted),
            ("first update output", [(o.dtype, o.shape) for o in update.outputs[:1]], feature),
        ]
        taken = set(_names(search.inputs))  # search may leave out what the next update alone needs
        tensors = tuple(name for name in _names(update.outputs) if name in taken)
    checks += [
        ("search inputs", _names(search.inputs), ("image", *tensors, "prev_size", "tuning")),
        ("search outputs", _names(search.outputs), SEARCH_OUTPUTS),
    ]
    for what, actual, expected in checks:
        if actual != expected:
            raise BundleError(f"{path}: {what} are {actual}, expected {expected}; export the model again")


def _names(specs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    return tuple(spec.name for spec in specs)


def _find(name_or_dir: str | Path | None) -> Path:
    if name_or_dir is None:
        name_or_dir = DEFAULT_MODEL
    if isinstance(name_or_dir, str) and name_or_dir in shipped_models():
        return MODELS_DIR / name_or_dir
    path = Path(name_or_dir)
    if (path / MANIFEST_NAME).is_file():
        return path
    problem = f"no {MANIFEST_NAME} in it" if path.is_dir() else "no such folder"
    known = ", ".join(shipped_models()) or "none"
    raise BundleError(f"{name_or_dir}: not a bundle ({problem}) and not a shipped model (shipped: {known})")


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST_NAME
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: not JSON ({error})") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{file}: schema version is {version!r}, this siamtrack reads {SCHEMA_VERSION}; "
            "export the model again with this version"
        )
    try:
        return from_plain(Manifest, content, str(file))
    except ValueError as error:
        raise BundleError(str(error)) from error
