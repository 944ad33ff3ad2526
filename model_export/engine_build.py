"""Every graph of a bundle as an engine, with the manifest that says for what; nodes that fail in FP16 stay FP32."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from model_export.convert import CALIBRATION_CROPS, convert_graph, read_graph
from model_export.plan import EngineBuildError, Plan, build_plan, target_capabilities
from model_export.precision import delicate_nodes
from siamtrack.bundle import Bundle, sha256
from siamtrack.engine_files import (
    DEFAULT_BATCHES,
    DEFAULT_PRECISION,
    ENGINE_SCHEMA_VERSION,
    ENGINES_FOLDER,
    EngineGraph,
    EngineManifest,
    EngineSet,
    check_key,
    engine_key,
    read_engines,
    sign,
    write_engine_manifest,
)
from siamtrack.engines import trial_load, why_unfit
from siamtrack.gpu import RuntimeInfo


@dataclass(frozen=True)
class BuildSettings:
    """How engines are built.

    Attributes:
        precision: one of `siamtrack.bundle.PRECISIONS`.
        batches: numbers of windows to tune for, ascending.
        compute_capabilities: such as "8.9", to build ahead of time for (TensorRT-RTX); empty for the GPU here, or with
            TensorRT-RTX, which needs none, for `PORTABLE_CAPABILITIES`.
        timing_cache: file that keeps the measured times of kernels between builds; TensorRT-RTX measures none.
        calibration_images: folder of photos for INT8; None for the rendered scene.
        calibration_crops: number of crops for INT8.
        key_file: key that signs ``engine.json``.
    """

    precision: str = DEFAULT_PRECISION
    batches: tuple[int, ...] = DEFAULT_BATCHES
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    calibration_images: Path | None = None
    calibration_crops: int = CALIBRATION_CROPS
    key_file: Path | None = None


@dataclass(frozen=True)
class BuiltGraph:
    """A row of the summary."""

    name: str
    plan: Plan
    fp32_nodes: tuple[str, ...]


def build_engines(
    bundle: Bundle, runtime: RuntimeInfo, settings: BuildSettings, say: Callable[[str], None] = print
) -> tuple[EngineSet, list[BuiltGraph]]:
    """Build every graph of a bundle into ``BUNDLE/engines/<key>/``, which is replaced as a whole when all are built.

    Args:
        bundle: a verified bundle.
        runtime: from `siamtrack.gpu.runtime_info`.
        settings: how.
        say: takes lines about what was done otherwise than asked.

    Raises:
        EngineError: the settings do not fit the runtime, or a graph cannot be built (then `EngineBuildError`).
        ValueError: the bundle cannot have this precision.
        OSError: the bundle's folder cannot be written to.
    """
    if settings.key_file is not None:
        check_key(settings.key_file)
    if settings.timing_cache is not None and not settings.timing_cache.parent.is_dir():
        raise NotADirectoryError(f"--timing-cache: there is no folder {settings.timing_cache.parent}; make it first")
    capabilities = target_capabilities(runtime, settings.compute_capabilities)
    folder = bundle.path / ENGINES_FOLDER / engine_key(runtime, settings.precision, capabilities)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{error}; engines lie in the bundle: copy it to a folder of yours (cp -r), build there"
        ) from error
    try:
        built, graphs = [], {}
        for name, spec in bundle.manifest.graphs.items():
            row = _build_graph(bundle, name, runtime, settings, capabilities, say)
            file = scratch / f"{name}.engine"
            file.write_bytes(row.plan.content)
            digest = sha256(file)
            graphs[name] = EngineGraph(file.name, digest, spec.sha256, row.plan.inputs, row.plan.outputs)
            built.append(row)
        manifest = EngineManifest(
            schema_version=ENGINE_SCHEMA_VERSION,
            model=bundle.manifest.model,
            flavour=runtime.flavour,
            version=runtime.version,
            gpu="" if capabilities or runtime.gpu is None else runtime.gpu.name,
            compute_capabilities=capabilities or (() if runtime.gpu is None else (runtime.gpu.compute_capability,)),
            precision=settings.precision,
            batches=settings.batches,
            graphs=graphs,
            fp32_nodes=tuple(f"{row.name}/{node}" for row in built for node in row.fp32_nodes),
        )
        write_engine_manifest(scratch, manifest)
        if settings.key_file is not None:
            sign(scratch, settings.key_file)
        if runtime.gpu is not None and not why_unfit(manifest, runtime, settings.precision):
            trial_load(EngineSet(scratch, manifest))  # unless they are for other GPUs
        _replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return read_engines(folder, bundle, settings.key_file), built


def summary(built: Sequence[BuiltGraph]) -> str:
    """A table: size, build time and what computes in what, a graph a line."""
    lines = [f"{'graph':<10}{'MB':>8}{'seconds':>9}  layers by precision"]
    for row in built:
        by_precision: dict[str, list[str]] = {}
        for (kind, precision), count in row.plan.layers.most_common():
            by_precision.setdefault(precision, []).append(f"{count} {kind.lower()}")
        layers = "; ".join(f"{precision}: {', '.join(by_precision[precision])}" for precision in sorted(by_precision))
        lines.append(f"{row.name:<10}{len(row.plan.content) / 1e6:>8.1f}{row.plan.seconds:>9.1f}  {layers}")
    return "\n".join(lines)


def _build_graph(
    bundle: Bundle,
    name: str,
    runtime: RuntimeInfo,
    settings: BuildSettings,
    capabilities: Sequence[str],
    say: Callable[[str], None],
) -> BuiltGraph:
    """Build a graph, with ever more nodes in FP32 while TensorRT refuses them in less."""
    kept: frozenset[str] = frozenset()
    source = read_graph(bundle, name)
    while True:
        model = convert_graph(
            bundle,
            name,
            settings.precision,
            "tensorrt",
            settings.calibration_images,
            kept,
            settings.calibration_crops,
        )
        try:
            plan = build_plan(model, runtime, settings.batches, capabilities, settings.timing_cache, name)
            return BuiltGraph(name, plan, tuple(sorted(kept)))
        except EngineBuildError as error:
            fixed = settings.precision == "fp32" or bundle.manifest.precision != "fp32"
            more = frozenset() if fixed else _next_in_fp32(source, error.said, kept)
            if not more:
                raise
            nodes = ", ".join(sorted(more)) if len(more) <= 8 else f"{len(more)} nodes"
            say(f"{error}; trying again with {nodes} in FP32")
            kept |= more


def _next_in_fp32(model: onnx.ModelProto, said: Sequence[str], kept: Collection[str]) -> frozenset[str]:
    """What to keep in FP32 next: the nodes that TensorRT names, or the grouped convolutions, or everything.

    Nothing where it names only nodes that are in FP32 already: those fail in any precision. But of a fused run of nodes
    it names the first and the last alone, "ForeignNode[a...b]", and it may be one between them that fails.
    """
    fp32 = delicate_nodes(model) | set(kept)
    text = "\n".join(said)
    named = {n.name for n in model.graph.node if re.search(rf"(?<!\w){re.escape(n.name)}(?!\w)", text)}
    if named - fp32 or (named and not re.search(r"ForeignNode\[[^\]]*\.\.\.", text)):
        return frozenset(named - fp32)
    groups = {n.name for n in model.graph.node for a in n.attribute if a.name == "group" and a.i > 1}
    everything = {n.name for n in model.graph.node}
    return frozenset(groups - fp32 or everything - fp32)


def _replace(new: Path, folder: Path) -> None:
    """Put a finished folder in another's place; whoever opens it meanwhile finds one of the two or none."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
