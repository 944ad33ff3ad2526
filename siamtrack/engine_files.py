"""Engine files and their manifest: ``BUNDLE/engines/<key>/`` with an engine a graph and ``engine.json``.

An engine is code: deserialising one runs whatever is in it, and a damaged one can end the process. So everything that
``engine.json`` says is checked on bytes in memory, and `EngineSet.read` gives out those very bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from siamtrack.bundle import PRECISIONS, Bundle, TensorSpec
from siamtrack.gpu import FLAVOURS, EngineError, RuntimeInfo
from siamtrack.plain import from_plain, to_plain

ENGINE_SCHEMA_VERSION = 1
ENGINES_FOLDER = "engines"
ENGINE_MANIFEST_NAME = "engine.json"
SIGNATURE_NAME = "engine.json.hmac"
DEFAULT_PRECISION = "fp16"
DEFAULT_BATCHES = (1, 4, 8)
SHORTEST_KEY_BYTES = 16
NEW_KEY_COMMAND = "head -c 32 /dev/urandom > engine.key; chmod 600 engine.key"


@dataclass(frozen=True)
class EngineGraph:
    """One engine file.

    Attributes:
        file: plain name inside the engine folder.
        sha256: of the file.
        onnx_sha256: of the bundle's ONNX graph it was made from, before any conversion of precision.
        inputs: with the types and shapes the engine has; "N" is the batch.
        outputs: likewise.
    """

    file: str
    sha256: str
    onnx_sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class EngineManifest:
    """Content of ``engine.json``.

    Attributes:
        schema_version: layout of this file.
        model: the bundle's model.
        flavour: key of `FLAVOURS`.
        version: of the TensorRT that built it. Engines load in that very version only.
        gpu: the GPU it was built on and for; empty for one built ahead of time for compute capabilities.
        compute_capabilities: it runs on these, such as "8.7"; empty for every one that the flavour supports.
        precision: one of `siamtrack.bundle.PRECISIONS`.
        batches: ascending. Optimisation profile i of a batched graph takes N from batches[i - 1] + 1 (the first: 1)
            up to batches[i], and is tuned for the latter.
        graphs: by name, as in the bundle.
        fp32_nodes: nodes kept in FP32 because the build failed otherwise.
    """

    schema_version: int
    model: str
    flavour: str
    version: str
    gpu: str
    compute_capabilities: tuple[str, ...]
    precision: str
    batches: tuple[int, ...]
    graphs: dict[str, EngineGraph]
    fp32_nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            raise ValueError(f"unknown flavour {self.flavour!r}; known: {', '.join(FLAVOURS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")
        if not self.batches or list(self.batches) != sorted(set(self.batches)) or self.batches[0] < 1:
            raise ValueError(f"batches must be ascending and at least 1, got {list(self.batches)}")

    def profile(self, batch: int) -> int:
        """Index of the optimisation profile that takes a batch.

        Raises:
            ValueError: none does.
        """
        for index, largest in enumerate(self.batches):
            if 1 <= batch <= largest:
                return index
        raise ValueError(f"a batch of {batch} was asked for; this engine takes 1 to {self.batches[-1]}")


@dataclass(frozen=True)
class EngineSet:
    """Checked engines of one bundle."""

    folder: Path
    manifest: EngineManifest

    def read(self, graph: str) -> bytes:
        """The bytes of a graph's engine, to be deserialised.

        They are hashed as read: what was checked is what TensorRT gets, even if the file changes meanwhile.

        Raises:
            EngineError: damaged or gone since `open_engines`.
        """
        return _read_checked(self.folder, self.manifest.graphs[graph])


def engine_key(runtime: RuntimeInfo, precision: str, compute_capabilities: Sequence[str] = ()) -> str:
    """Name of an engine folder: flavour, version, GPU or "any", compute capabilities, precision.

    Args:
        runtime: what builds the engine; its GPU counts unless there are compute capabilities.
        precision: one of `siamtrack.bundle.PRECISIONS`.
        compute_capabilities: of an engine that is built ahead of time for several GPUs.
    """
    if compute_capabilities:
        gpu, capabilities = "any", "+".join(compute_capabilities)
    elif runtime.gpu is not None:
        gpu, capabilities = runtime.gpu.name, runtime.gpu.compute_capability
    else:
        raise ValueError("an engine is for a GPU or for compute capabilities; got neither")
    slug = re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")
    return f"{runtime.flavour}-{runtime.version}-{slug}-sm{capabilities.replace('.', '')}-{precision}"


def engine_folders(bundle: Bundle) -> list[Path]:
    """Folders of the bundle that hold an ``engine.json``, by name."""
    return sorted(file.parent for file in (bundle.path / ENGINES_FOLDER).glob(f"[!.]*/{ENGINE_MANIFEST_NAME}"))


def read_engine_manifest(folder: Path, key_file: Path | None = None) -> EngineManifest:
    """``engine.json`` of a folder, its signature checked first where there is a key.

    Raises:
        EngineError: not signed with the key, or unreadable.
    """
    file = folder / ENGINE_MANIFEST_NAME
    try:
        content = _read_plain(file)
        if key_file is not None:
            _check_signature(content, folder, key_file)
        plain = json.loads(content)
    except OSError as error:
        raise EngineError(f"{file}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, EngineError):
            raise
        raise EngineError(f"{file}: damaged: not JSON ({error})") from error
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if version != ENGINE_SCHEMA_VERSION:
        raise EngineError(f"{file}: foreign: schema version {version!r}, this siamtrack reads {ENGINE_SCHEMA_VERSION}")
    try:
        return from_plain(EngineManifest, plain, str(file))
    except ValueError as error:
        raise EngineError(f"damaged: {error}") from error


def read_engines(folder: Path, bundle: Bundle, key_file: Path | None = None) -> EngineSet:
    """Read ``engine.json`` and check everything but whether it fits this machine (`why_unfit`).

    Raises:
        EngineError: not signed with the key, unreadable, of another bundle or another state of it, or damaged.
    """
    manifest = read_engine_manifest(folder, key_file)
    if folder.is_symlink() or folder.parent.is_symlink():
        raise EngineError(f"{folder}: foreign: it is a link; engines lie in the bundle itself")
    if set(manifest.graphs) != set(bundle.manifest.graphs):
        graphs = f"it holds {sorted(manifest.graphs)}, the bundle {sorted(bundle.manifest.graphs)}"
        raise EngineError(f"{folder}: foreign: {graphs}")
    for name, graph in manifest.graphs.items():
        onnx_sha256 = bundle.manifest.graphs[name].sha256
        if graph.onnx_sha256 != onnx_sha256:
            raise EngineError(
                f"{folder}: stale: {graph.file} was made from a {name} graph with SHA-256 {graph.onnx_sha256[:12]}..., "
                f"the bundle's has {onnx_sha256[:12]}..."
            )
        _read_checked(folder, graph)
    return EngineSet(folder, manifest)


def write_engine_manifest(folder: Path, manifest: EngineManifest) -> None:
    """Write ``engine.json`` into an engine folder."""
    (folder / ENGINE_MANIFEST_NAME).write_text(json.dumps(to_plain(manifest), indent=2) + "\n")


def check_key(key_file: Path) -> None:
    """Can this key sign?

    Raises:
        EngineError: it cannot be read or is too short.
    """
    _hmac(b"", key_file)


def sign(folder: Path, key_file: Path) -> None:
    """Sign ``engine.json`` of a folder, and with it the hashes of all its engines.

    Raises:
        EngineError: the key cannot be read or is too short.
    """
    signature = _hmac((folder / ENGINE_MANIFEST_NAME).read_bytes(), key_file)
    (folder / SIGNATURE_NAME).write_text(signature + "\n")


def _check_signature(content: bytes, folder: Path, key_file: Path) -> None:
    expected = _hmac(content, key_file)
    file = folder / SIGNATURE_NAME
    if not file.is_file():
        raise EngineError(f"{folder}: unsigned, and only engines signed with {key_file} are taken")
    if not hmac.compare_digest(_read_plain(file).strip(), expected.encode()):
        raise EngineError(f"{folder}: {ENGINE_MANIFEST_NAME} was changed, or signed with another key than {key_file}")


def _hmac(content: bytes, key_file: Path) -> str:
    try:
        key = key_file.read_bytes()
    except OSError as error:
        raise EngineError(f"the signing key cannot be read: {error}; make one: {NEW_KEY_COMMAND}") from error
    if len(key) < SHORTEST_KEY_BYTES:
        raise EngineError(
            f"{key_file}: a signing key has at least {SHORTEST_KEY_BYTES} bytes, this one {len(key)}; "
            f"make one: {NEW_KEY_COMMAND}"
        )
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _read_plain(path: Path) -> bytes:
    """A file's bytes, if it is a plain file: a link leads elsewhere, a pipe never ends.

    Raises:
        EngineError: it is none.
        OSError: it cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not path.is_symlink():
        with os.fdopen(os.open(path, flags), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
    raise EngineError(f"{path.parent}: {path.name!r} is not a plain file inside the engine folder")


def _read_checked(folder: Path, graph: EngineGraph) -> bytes:
    """An engine file's bytes, whose hash is that of the manifest."""
    path = folder / graph.file
    if Path(graph.file).name != graph.file or "\0" in graph.file:
        raise EngineError(f"{folder}: {graph.file!r} is not a plain file inside the engine folder")
    try:
        content = _read_plain(path)
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error}") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != graph.sha256:
        raise EngineError(
            f"{path}: damaged or changed: {len(content)} bytes with SHA-256 {actual[:12]}..., "
            f"{ENGINE_MANIFEST_NAME} says {graph.sha256[:12]}..."
        )
    return content
