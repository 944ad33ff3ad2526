"""A bundle: a folder with a model's graphs and the manifest that says everything a runtime must know of them.

``manifest.json`` is the one place where training and tracking meet. Every graph speaks the same contract:

* ``template``: ``image`` uint8 ``[1, T, T, 3]`` BGR -> template tensors, opaque to the host;
* ``search``: ``image`` uint8 ``[N, S, S, 3]`` BGR, the template tensors ``[N, ...]``, ``prev_size`` f32 ``[N, 2]``
  (w, h in crop pixels), ``tuning`` f32 ``[3]`` (penalty_k, window_influence, spare) -> ``box`` f32 ``[N, 4]`` (cx, cy,
  w, h in crop pixels), ``score`` f32 ``[N]`` in [0, 1], ``penalty`` f32 ``[N]``, ``response`` f32 ``[N, H, W]``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from siamtrack.plain import from_plain, to_plain
from siamtrack.state import Thresholds

SCHEMA_VERSION = 1
SEARCH_OUTPUTS = ("box", "score", "penalty", "response")
MANIFEST_NAME = "manifest.json"
MODELS_DIR = Path(__file__).parent / "models"
DEFAULT_MODEL = "siamcan-mobilenetv2"


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
        motion_rate: how fast the velocity follows, 0..1; multiplied by the score, so that weak evidence coasts on. The
            search window is centred where the target will be at this velocity; 0 centres it where the target was.
        min_size_px: the box never gets thinner than this, unless it was so at the start.
        lost_windows: windows searched a frame while LOST, the place of loss among them.
    """

    penalty_k: float = 0.06
    window_influence: float = 0.4
    size_rate: float = 0.4
    motion_rate: float = 0.5
    min_size_px: float = 4.0
    lost_windows: int = 2

    def __post_init__(self) -> None:
        if not self.penalty_k >= 0:
            raise ValueError(f"penalty_k must be at least 0, got {self.penalty_k}")
        for name in ("window_influence", "size_rate", "motion_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.min_size_px >= 1:
            raise ValueError(f"min_size_px must be at least 1, got {self.min_size_px}")
        if self.lost_windows < 1:
            raise ValueError(f"lost_windows must be at least 1, got {self.lost_windows}")


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
        precision: "fp32", "fp16" or "int8".
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
    precision: str = "fp32"
    provenance: dict[str, str] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest

    def graph_path(self, name: str) -> Path:
        """File of a graph."""
        return self.path / self.manifest.graphs[name].file

    def size_bytes(self) -> int:
        """Size of all graph files."""
        return sum(self.graph_path(name).stat().st_size for name in self.manifest.graphs)


def load_bundle(name_or_dir: str | Path | None = None) -> Bundle:
    """Find, read and verify a bundle.

    Args:
        name_or_dir: a shipped model's name, a bundle folder, or None for the default model.

    Raises:
        BundleError: not found, unreadable, of another schema, or a file's SHA-256 differs.
    """
    path = _find(name_or_dir)
    manifest = _read_manifest(path)
    _check_contract(path, manifest)
    for graph in manifest.graphs.values():
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
    return Bundle(path, manifest)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a bundle folder."""
    (path / MANIFEST_NAME).write_text(json.dumps(to_plain(manifest), indent=2) + "\n")


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


def _check_contract(path: Path, manifest: Manifest) -> None:
    """Graphs must be there, take crops of the manifest's sizes, and be chained by the template tensors' names."""
    for name in ("template", "search"):
        if name not in manifest.graphs:
            raise BundleError(f"{path}: no {name} graph; export the model again")
    template, search = manifest.graphs["template"], manifest.graphs["search"]
    tensors = tuple(spec.name for spec in template.outputs)
    t, s = manifest.crop.template_px, manifest.crop.search_px
    for what, actual, expected in (
        ("template inputs", [(i.name, i.shape[1:]) for i in template.inputs], [("image", (t, t, 3))]),
        ("search image", [i.shape[1:] for i in search.inputs if i.name == "image"], [(s, s, 3)]),
        ("search inputs", tuple(i.name for i in search.inputs), ("image", *tensors, "prev_size", "tuning")),
        ("search outputs", tuple(o.name for o in search.outputs), SEARCH_OUTPUTS),
    ):
        if actual != expected:
            raise BundleError(f"{path}: {what} are {actual}, expected {expected}; export the model again")


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
