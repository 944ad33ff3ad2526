"""A network as a bundle: ``template.onnx``, ``search.onnx`` and the manifest."""

from __future__ import annotations

import logging
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn

from siamtrack.bundle import (
    SCHEMA_VERSION,
    SEARCH_OUTPUTS,
    Bundle,
    CropSpec,
    GraphSpec,
    GridSpec,
    Manifest,
    ScoreSpec,
    TensorSpec,
    TrackingSpec,
    load_bundle,
    sha256,
    write_manifest,
)
from siamtrack.nets.correlation import depthwise_grouped, depthwise_matmul
from siamtrack.nets.decode import SearchGraph, SiameseNet, TemplateGraph
from siamtrack.state import Thresholds

OPSET = 18
IR_VERSION = 8  # the oldest that holds this opset: read by ONNX Runtime from 1.14 on, so by older robots too
SCORE_MEANING = "probability, as trained, that the chosen cell lies on the target; before size penalty and window"
UNCALIBRATED = Thresholds(tracking_above=0.5, uncertain_below=0.4, lost_below=0.2, lost_after=10, found_above=0.6)


def export_bundle(
    model: str,
    net: nn.Module,
    out: Path,
    licence: str,
    provenance: dict[str, str] | None = None,
    tracking: TrackingSpec | None = None,
) -> Bundle:
    """Write a bundle and read it back, verified.

    Args:
        model: its name in `siamtrack.nets.MODELS`.
        net: the network; put into eval mode.
        out: bundle folder, made when missing. Only graphs and manifest in it are replaced.
        licence: of the weights.
        provenance: where the weights come from.
        tracking: tracking parameters; defaults when None.
    """
    siamese = cast(SiameseNet, net)
    net.eval()
    out.mkdir(parents=True, exist_ok=True)
    t, s = siamese.template_size, siamese.search_size
    template_in = (torch.zeros(1, t, t, 3, dtype=torch.uint8),)
    template = TemplateGraph(siamese)
    with torch.no_grad():
        tensors = template(*template_in)
    # Two samples in the example: an axis of one would be taken for a constant.
    search_in = (
        torch.zeros(2, s, s, 3, dtype=torch.uint8),
        *(tensor.repeat(2, *[1] * (tensor.dim() - 1)) for tensor in tensors),
        torch.full((2, 2), 64.0),
        torch.zeros(3),
    )
    names = siamese.template_names
    with _fixed_groups(net):
        graphs = {
            "template": _export(
                TemplateGraph(siamese), template_in, ("image",), names, out / "template.onnx", batched=False
            ),
            "search": _export(
                SearchGraph(siamese),
                search_in,
                ("image", *names, "prev_size", "tuning"),
                SEARCH_OUTPUTS,
                out / "search.onnx",
                batched=True,
            ),
        }
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        graphs=graphs,
        crop=CropSpec(template_px=t, search_px=s),
        grid=GridSpec(siamese.grid.size, siamese.grid.stride, siamese.grid.origin),
        score=ScoreSpec(SCORE_MEANING, UNCALIBRATED),
        licence=licence,
        tracking=tracking or TrackingSpec(),
        provenance={**(provenance or {}), **_git_commit()},
    )
    write_manifest(out, manifest)
    return load_bundle(out)


@contextmanager
def _fixed_groups(net: nn.Module) -> Iterator[None]:
    """Correlate by matrix products meanwhile: ONNX takes no convolution whose number of groups grows with the batch."""
    grouped = [part for part in net.modules() if getattr(part, "correlate", None) is depthwise_grouped]
    for part in grouped:
        part.correlate = depthwise_matmul  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in grouped:
            part.correlate = depthwise_grouped  # type: ignore[assignment]


def _export(
    graph: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
    batched: bool,
) -> GraphSpec:
    batch = torch.export.Dim("N", min=1)
    shapes = tuple({0: batch} if batched and name != "tuning" else None for name in inputs)
    # A graph that takes *args takes its shapes as (first, (rest...)).
    dynamic: Any = (shapes[0], shapes[1:]) if len(inputs) > 1 else shapes
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic if batched else None,
            verbose=False,
        )
        assert program is not None
        scratch_file = Path(scratch) / path.name
        program.save(str(scratch_file), external_data=False)
        model = onnx.load(str(scratch_file))
    model.ir_version = IR_VERSION
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return GraphSpec(path.name, sha256(path), _specs(model.graph.input), _specs(model.graph.output))


def _strip(model: onnx.ModelProto) -> None:
    """Drop what only a debugger of the exporter wants: source paths of this machine, and half the file's size."""
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""


def _specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        specs.append(TensorSpec(value.name, dtype, shape))
    return tuple(specs)


def _git_commit() -> dict[str, str]:
    """The checkout's commit; nothing where this package is installed, perhaps inside a repository of the user's."""
    checkout = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return {}
        return {"git_commit": git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")}
    except (OSError, subprocess.CalledProcessError):
        return {}
