"""A network as a bundle: ``template.onnx``, ``search.onnx``, for some ``update.onnx``, and the manifest."""

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

from model_export.convert import int8_file
from siamtrack.bundle import (
    SCHEMA_VERSION,
    SEARCH_OUTPUTS,
    SIZE,
    UPDATE_INPUTS,
    Bundle,
    CropSpec,
    GraphSpec,
    GridSpec,
    Manifest,
    ScoreSpec,
    TensorSpec,
    TrackingSpec,
    UpdateSpec,
    load_bundle,
    sha256,
    write_manifest,
)
from siamtrack.nets.correlation import depthwise_grouped, depthwise_matmul
from siamtrack.nets.decode import SearchGraph, SiameseNet, TemplateGraph, UpdateGraph, is_adaptive, takes_size
from siamtrack.state import Thresholds

OPSET = 18
IR_VERSION = 8  # the oldest that holds this opset: read by ONNX Runtime from 1.14 on, so by older robots too
FIXED_INPUTS = ("image", "prev_size", "tuning", *UPDATE_INPUTS)  # of the contract, whether a model looks at them or not
SCORE_MEANING = "probability, as trained, that the chosen cell lies on the target; before size penalty and window"
UNCALIBRATED = Thresholds(tracking_above=0.5, uncertain_below=0.4, lost_below=0.2, lost_after=10, found_above=0.6)


def export_bundle(
    model: str,
    net: nn.Module,
    out: Path,
    licence: str,
    provenance: dict[str, str] | None = None,
    tracking: TrackingSpec | None = None,
    update: UpdateSpec | None = None,
) -> Bundle:
    """Write a bundle and read it back, verified.

    Args:
        model: its name in `siamtrack.nets.MODELS`.
        net: the network; put into eval mode.
        out: bundle folder, made when missing. Only graphs and manifest in it are replaced; INT8 graphs, which were made
            from the old ones, are removed.
        licence: of the weights.
        provenance: where the weights come from.
        tracking: tracking parameters; when None the network's own (`tracking`), or the defaults.
        update: when an adaptive network renews its template; by its own `update_rule` when None.

    Raises:
        ValueError: `update` for a network that is not adaptive.
    """
    siamese = cast(SiameseNet, net)
    adaptive = net if is_adaptive(net) else None
    if update is not None and adaptive is None:
        raise ValueError(f"{model} has no template update, so there is nothing for update to set")
    net.eval()
    out.mkdir(parents=True, exist_ok=True)
    t, s = siamese.template_size, siamese.search_size
    template_in: tuple[Tensor, ...] = (torch.zeros(1, t, t, 3, dtype=torch.uint8),)
    template_inputs: tuple[str, ...] = ("image",)
    if takes_size(net):
        template_in, template_inputs = (*template_in, torch.full((1, 2), t / 2)), ("image", SIZE)
    with torch.no_grad():
        tensors = TemplateGraph(siamese)(*template_in)
        update_in = tuple(tensors[0].clone() for _ in UPDATE_INPUTS)  # one tensor thrice would become one input
        if adaptive is not None:
            tensors = adaptive.update(*update_in)
            update = update or adaptive.update_rule
    names = siamese.template_names if adaptive is None else adaptive.update_names
    # Two samples in the example: an axis of one would be taken for a constant.
    search_in = (
        torch.zeros(2, s, s, 3, dtype=torch.uint8),
        *(tensor.repeat(2, *[1] * (tensor.dim() - 1)) for tensor in tensors),
        torch.full((2, 2), 64.0),
        torch.zeros(3),
    )
    with _fixed_groups(net):
        graphs = {
            "template": _export(
                TemplateGraph(siamese),
                template_in,
                template_inputs,
                siamese.template_names,
                out / "template.onnx",
                batched=False,
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
        if adaptive is not None:
            graphs["update"] = _export(
                UpdateGraph(adaptive), update_in, UPDATE_INPUTS, names, out / "update.onnx", batched=False
            )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        graphs=graphs,
        crop=CropSpec(template_px=t, search_px=s),
        grid=GridSpec(siamese.grid.size, siamese.grid.stride, siamese.grid.origin),
        score=ScoreSpec(getattr(net, "score_meaning", SCORE_MEANING), UNCALIBRATED),
        licence=licence,
        tracking=tracking or getattr(net, "tracking", None) or TrackingSpec(),
        update=update,
        provenance={**(provenance or {}), **_git_commit()},
    )
    write_manifest(out, manifest)
    for name in graphs:
        (out / int8_file(name)).unlink(missing_ok=True)
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
    _drop_unused_inputs(model)
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


def _drop_unused_inputs(model: onnx.ModelProto) -> None:
    """A search that does not look at the fused template need not be fed it; TensorRT would drop the input anyway."""
    used = {name for node in model.graph.node for name in node.input}
    for value in list(model.graph.input):
        if value.name not in used and value.name not in FIXED_INPUTS:
            model.graph.input.remove(value)


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
