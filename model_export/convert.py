"""A bundle's graphs in another precision: for an engine, as a bundle of its own, or INT8 beside FP32 in one."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from model_export.crops import real_pairs
from model_export.precision import INT8_SCHEMES, Feeds, to_fp16, to_int8
from siamtrack.bundle import (
    FEATURE,
    PRECISIONS,
    SIZE,
    UPDATE_INPUTS,
    Bundle,
    BundleError,
    Int8Graph,
    load_bundle,
    sha256,
    write_manifest,
)

CALIBRATION_CROPS = 128
INT8_GRAPHS = ("search",)
"""What is worth it: this graph runs every frame."""


def calibration_feeds(bundle: Bundle, count: int = CALIBRATION_CROPS, images: Path | None = None) -> Iterator[Feeds]:
    """Inputs of the search graph as tracking gives them: real crops, and the templates their targets have.

    Args:
        bundle: an FP32 bundle.
        count: number of crops.
        images: folder of photos to cut them from; None for the rendered scene.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = {
        name: onnxruntime.InferenceSession(str(bundle.graph_path(name)), options, providers=["CPUExecutionProvider"])
        for name in bundle.manifest.graphs
        if name != "search"
    }
    graphs, tracking = bundle.manifest.graphs, bundle.manifest.tracking
    wanted = {spec.name for spec in graphs["search"].inputs}
    for template_crop, search_crop, size in real_pairs(bundle, count, images):
        names = [spec.name for spec in graphs["template"].outputs]
        feeds = {"image": template_crop[None], **({SIZE: size[None]} if bundle.manifest.takes_size else {})}
        tensors = dict(zip(names, sessions["template"].run(names, feeds), strict=True))
        if "update" in sessions:  # a track starts so
            names = [spec.name for spec in graphs["update"].outputs]
            feature = dict.fromkeys(UPDATE_INPUTS, tensors[FEATURE])
            tensors = dict(zip(names, sessions["update"].run(names, feature), strict=True))
        yield {
            **{name: tensor for name, tensor in tensors.items() if name in wanted},
            "image": search_crop[None],
            "prev_size": size[None],
            "tuning": np.array([tracking.penalty_k, tracking.window_influence, 0], np.float32),
        }


def read_graph(bundle: Bundle, graph: str) -> onnx.ModelProto:
    """A graph of a bundle, which may have been verified long ago: what is made from it bears the manifest's hash.

    Raises:
        BundleError: the file was changed since.
    """
    path = bundle.graph_path(graph)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != bundle.manifest.graphs[graph].sha256:
        raise BundleError(f"{path}: changed while the bundle was in use; once its files are complete, start again")
    return onnx.load_model_from_string(content)


def convert_graph(
    bundle: Bundle,
    graph: str,
    precision: str,
    target: str,
    images: Path | None = None,
    keep_fp32: Collection[str] = (),
    crops: int = CALIBRATION_CROPS,
) -> onnx.ModelProto:
    """A graph of an FP32 bundle in another precision.

    INT8 is for `INT8_GRAPHS`; the others are then as the scheme's rest: FP16 for TensorRT, FP32 for ONNX Runtime.

    Args:
        bundle: the bundle; one that has another precision gives its graphs as they are, in that precision only.
        graph: its name in the bundle.
        precision: one of `siamtrack.bundle.PRECISIONS`.
        target: key of `model_export.precision.INT8_SCHEMES`.
        images: folder of photos to calibrate INT8 on; None for the rendered scene.
        keep_fp32: names of further nodes that stay FP32.
        crops: number of crops to calibrate INT8 on.

    Raises:
        ValueError: unknown precision or target, or a bundle that is not FP32.
        BundleError: the graph's file was changed since the bundle was verified.
    """
    if precision not in PRECISIONS or target not in INT8_SCHEMES:
        raise ValueError(
            f"got precision {precision!r} for {target!r}; precisions: {', '.join(PRECISIONS)}; "
            f"targets: {', '.join(INT8_SCHEMES)}"
        )
    model = read_graph(bundle, graph)
    if bundle.manifest.precision != "fp32":
        if precision != bundle.manifest.precision:
            raise ValueError(
                f"{bundle.path} is {bundle.manifest.precision} already and cannot become {precision}; "
                "convert the FP32 bundle that it was made from"
            )
        return model
    scheme = INT8_SCHEMES[target]
    if precision == "int8" and graph in INT8_GRAPHS:
        with _quiet():
            return to_int8(model, calibration_feeds(bundle, crops, images), scheme, keep_fp32)
    rest = scheme.rest if precision == "int8" else precision
    return to_fp16(model, keep_fp32) if rest == "fp16" else model


def convert_bundle(
    bundle: Bundle,
    precision: str,
    out: Path,
    images: Path | None = None,
    crops: int = CALIBRATION_CROPS,
    target: str = "onnxruntime",
) -> Bundle:
    """Write an FP32 bundle in another precision.

    What was measured of the FP32 bundle is left out of the new manifest; the score's thresholds stay.

    Args:
        bundle: an FP32 bundle.
        precision: "fp16" or "int8".
        out: folder to write; not the bundle's own.
        images: folder of photos to calibrate INT8 on; None for the rendered scene.
        crops: number of crops to calibrate INT8 on.
        target: key of `model_export.precision.INT8_SCHEMES`.

    Raises:
        ValueError: the bundle is not FP32, or `out` is its own folder.
    """
    if bundle.manifest.precision != "fp32" or precision == "fp32":
        raise ValueError(f"{bundle.path} is {bundle.manifest.precision}: only an fp32 bundle becomes fp16 or int8")
    if out.resolve() == bundle.path.resolve():
        raise ValueError(f"{out} is the bundle itself; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    graphs = {}
    for name, spec in bundle.manifest.graphs.items():
        onnx.save(convert_graph(bundle, name, precision, target, images, crops=crops), str(out / spec.file))
        graphs[name] = dataclasses.replace(spec, sha256=sha256(out / spec.file))
    facts = {"converted_from_search_sha256": bundle.manifest.graphs["search"].sha256}
    if precision == "int8":
        facts["calibration_crops"] = f"{crops} of {'photos' if images else 'the rendered scene'}"
    manifest = dataclasses.replace(
        bundle.manifest,
        graphs=graphs,
        precision=precision,
        int8={},
        provenance={**bundle.manifest.provenance, **facts},
        accuracy={},
    )
    write_manifest(out, manifest)
    return load_bundle(out)


def add_int8(bundle: Bundle, converted: Bundle) -> Bundle:
    """Put the INT8 graphs of a converted bundle beside the FP32 graphs they were made from; replaces what is there.

    Whoever reads meanwhile, or after a break in the middle, finds a whole bundle: with the old INT8 graphs, with none,
    or with the new ones.

    Args:
        bundle: the FP32 bundle.
        converted: made from it by `convert_bundle`, as "int8" for "onnxruntime".

    Returns:
        The bundle with its INT8 graphs, verified.

    Raises:
        BundleError: it was changed meanwhile, and is none any more.
        OSError: its folder cannot be written to.
    """
    path, manifest = bundle.path, load_bundle(bundle.path).manifest
    if manifest.int8:
        write_manifest(path, dataclasses.replace(manifest, int8={}))
    int8 = {}
    for name in INT8_GRAPHS:
        scratch = path / f".{int8_file(name)}.{os.getpid()}"
        shutil.copyfile(converted.graph_path(name), scratch)
        scratch.replace(path / int8_file(name))
        graph = converted.manifest.graphs[name]
        int8[name] = Int8Graph(int8_file(name), graph.sha256, source_sha256=bundle.manifest.graphs[name].sha256)
    facts = {"int8_calibration_crops": converted.manifest.provenance["calibration_crops"]}
    write_manifest(path, dataclasses.replace(manifest, int8=int8, provenance={**manifest.provenance, **facts}))
    return load_bundle(path)


def int8_file(graph: str) -> str:
    """Name of an INT8 graph's file beside the FP32 one."""
    return f"{graph}.int8.onnx"


@contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantiser recommends a pre-processing on the root logger, for graphs that were not simplified."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)
