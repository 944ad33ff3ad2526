"""Engine folders as the builder leaves them, made of arbitrary bytes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from siamtrack import Bundle, load_bundle
from siamtrack.engine_files import (
    EngineGraph,
    EngineManifest,
    engine_key,
    write_engine_manifest,
)
from siamtrack.gpu import GpuInfo, RuntimeInfo

ORIN = GpuInfo("Orin", "8.7", 8 << 30)
RUNTIME = RuntimeInfo("tensorrt", "10.3.0", ORIN)
ADA = GpuInfo("NVIDIA GeForce RTX 4090", "8.9", 24 << 30)
RTX = RuntimeInfo("tensorrt-rtx", "1.7.1.116", ADA)
Change = Callable[[EngineManifest], EngineManifest]


def writable(bundle: Bundle, parent: Path) -> Bundle:
    """A copy of a bundle where engines may be written."""
    folder = parent / "a bundle"  # with a space, so that commands must be quoted
    folder.mkdir()
    for file in bundle.path.glob("*"):
        if file.is_file():
            shutil.copy(file, folder)
    return load_bundle(folder)


def put_engines(
    bundle: Bundle, runtime: RuntimeInfo = RUNTIME, precision: str = "fp16", change: Change = lambda manifest: manifest
) -> Path:
    """A folder of engines as the builder leaves it, made of arbitrary bytes; `change` alters the manifest."""
    assert runtime.gpu is not None
    portable = runtime.flavour == "tensorrt-rtx"
    capabilities = ("8.6", "8.9") if portable else ()
    folder = bundle.path / "engines" / engine_key(runtime, precision, capabilities)
    folder.mkdir(parents=True)
    graphs = {}
    for name, spec in bundle.manifest.graphs.items():
        content = f"{name} engine".encode() * 100
        (folder / f"{name}.engine").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        graphs[name] = EngineGraph(f"{name}.engine", digest, spec.sha256, spec.inputs, spec.outputs)
    manifest = EngineManifest(
        schema_version=1,
        model=bundle.manifest.model,
        flavour=runtime.flavour,
        version=runtime.version,
        gpu="" if portable else runtime.gpu.name,
        compute_capabilities=capabilities or (runtime.gpu.compute_capability,),
        precision=precision,
        batches=(1, 4, 8),
        graphs=graphs,
    )
    write_engine_manifest(folder, change(manifest))
    return folder


def key_file(path: Path, content: bytes = b"0123456789abcdef") -> Path:
    path.write_bytes(content)
    return path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
