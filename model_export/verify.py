"""Do the exported graphs compute what the network computes?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model_export.compare import Clip, Comparison, Pair, SubstituteRunner, compare, literal_runner
from model_export.convert import CALIBRATION_CROPS, convert_bundle
from model_export.crops import random_pairs, real_pairs
from siamtrack.bundle import SEARCH_OUTPUTS, SIZE, UPDATE_INPUTS, Bundle, BundleError
from siamtrack.crop import Image
from siamtrack.nets.checkpoint import load_checkpoint
from siamtrack.nets.decode import (
    SearchGraph,
    SiameseNet,
    TemplateGraph,
    UpdateGraph,
    is_adaptive,
    normalise,
    takes_size,
)
from siamtrack.runners import EngineOptions, Runner, open_runner
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner

__all__ = ["Difference", "compare_runtimes", "compare_with_onnxruntime", "random_pairs", "real_pairs"]

TENSOR_TOLERANCE = 1e-4
BOX_TOLERANCE_PX = 0.05
TIE_TRIALS = 64


@dataclass(frozen=True)
class Difference:
    """Largest differences between two runtimes over a set of crops.

    Attributes:
        crops: crops compared.
        template: of template and update tensors, relative to the largest value of each tensor.
        response: of raw confidence, absolute.
        box_px: of box coordinates, crop pixels, where both chose the same cell; where they chose different ones of two
            that are practically equal, of the one chosen.
        other_cell: crops on which they chose different cells, whose scores differ by more than the tolerance.
        ties: crops on which they chose different cells that are practically equal (`_tied_box_px`).
    """

    crops: int
    template: float
    response: float
    box_px: float
    other_cell: int
    ties: int = 0

    @property
    def ok(self) -> bool:
        """Within tolerance."""
        return (
            self.crops > 0
            and self.template <= TENSOR_TOLERANCE
            and self.response <= TENSOR_TOLERANCE
            and self.box_px < BOX_TOLERANCE_PX
            and self.other_cell == 0
        )

    def __str__(self) -> str:
        return (
            f"{self.crops} crops: template {self.template:.1e}, response {self.response:.1e} (tolerance "
            f"{TENSOR_TOLERANCE:.0e}), box {self.box_px:.4f} px (tolerance {BOX_TOLERANCE_PX} px), "
            f"other cell chosen {self.other_cell}, tied {self.ties}: {'ok' if self.ok else 'OUTSIDE TOLERANCE'}"
        )


def compare_with_onnxruntime(
    net: nn.Module, bundle: Bundle, pairs: Iterator[tuple[Image, Image, NDArray[np.float32]]]
) -> Difference:
    """PyTorch against ONNX Runtime, update graph included: the two templates before stand for history and current.

    Args:
        net: the network the bundle was made from.
        bundle: its bundle.
        pairs: template crop, search crop, previous size ``[2]`` in crop pixels.
    """
    siamese = cast(SiameseNet, net.eval())
    template_graph, search_graph = TemplateGraph(siamese).eval(), SearchGraph(siamese).eval()
    tracking = bundle.manifest.tracking
    tuning = np.array([tracking.penalty_k, tracking.window_influence, 0], np.float32)
    template_error = response_error = box_error = 0.0
    count = other_cell = ties = 0
    recent: list[tuple[NDArray[np.float32], Tensor]] = []
    with OnnxRuntimeRunner(bundle) as runner, torch.no_grad():
        template_session, search_session = runner.session("template"), runner.session("search")
        for template_crop, search_crop, size in pairs:
            count += 1
            sizes = {SIZE: size[None]} if takes_size(net) else {}  # search crops have the scale of template crops
            names = siamese.template_names
            ours = template_session.run(None, {"image": template_crop[None], **sizes})
            reference = template_graph(torch.from_numpy(template_crop[None].copy()), *map(torch.tensor, sizes.values()))
            template_error = _larger(template_error, _largest_difference(ours, reference))
            if is_adaptive(net):
                recent = [(ours[0], reference[0]), *recent[:2]]
                fed = [recent[min(i, len(recent) - 1)] for i in range(len(UPDATE_INPUTS))]
                features = dict(zip(UPDATE_INPUTS, (a for a, _ in fed), strict=True))
                names, ours = net.update_names, runner.session("update").run(None, features)
                reference = UpdateGraph(net)(*(b for _, b in fed))
                template_error = _larger(template_error, _largest_difference(ours, reference))
            feeds = {"image": search_crop[None], "prev_size": size[None], "tuning": tuning}
            feeds |= {n: a for n, a in zip(names, ours, strict=True) if n in bundle.manifest.template_tensors}
            box, score, _, response = search_session.run(list(SEARCH_OUTPUTS), feeds)
            given = [torch.from_numpy(search_crop[None].copy()), *reference, torch.from_numpy(size[None])]
            box_t, score_t, _, response_t = search_graph(*given, torch.from_numpy(tuning))
            response_error = _larger(response_error, float(np.abs(response - response_t.numpy()).max()))
            difference_px = float(np.abs(box - box_t.numpy()).max())
            tied_px = _tied_box_px(siamese, given, tuning, box) if difference_px > BOX_TOLERANCE_PX else math.inf
            if tied_px <= BOX_TOLERANCE_PX:
                ties += 1
                box_error = _larger(box_error, tied_px)
            elif (
                difference_px > siamese.grid.stride / 4 and abs(float(score[0]) - float(score_t[0])) > TENSOR_TOLERANCE
            ):
                other_cell += 1
            else:
                box_error = _larger(box_error, difference_px)
                response_error = _larger(response_error, abs(float(score[0]) - float(score_t[0])))
    return Difference(count, template_error, response_error, box_error, other_cell, ties)


def _tied_box_px(siamese: SiameseNet, given: Sequence[Tensor], tuning: NDArray[np.float32], box: NDArray[Any]) -> float:
    """How near PyTorch's choice comes to a box, crop pixels, when its scores move by no more than rounding.

    Of two cells whose scores are practically equal, rounding picks one: another in PyTorch than in ONNX Runtime. So the
    logits, and nothing else, are moved at random by up to `TENSOR_TOLERANCE` of the largest; where the box belongs to a
    cell that is worse by more than that, no trial comes near it.
    """
    image, *template, prev_size = given
    raw = siamese.search(normalise(image, siamese.normalisation), *template)
    generator = torch.Generator().manual_seed(0)
    reach = TENSOR_TOLERANCE * float(raw.logits.abs().max())
    nearest = math.inf
    for _ in range(TIE_TRIALS):
        noise = torch.rand(raw.logits.shape, generator=generator) * 2 - 1
        moved = raw._replace(logits=raw.logits + reach * noise)
        chosen = siamese.decoder(moved, prev_size, torch.from_numpy(tuning))[0]
        nearest = min(nearest, float(np.abs(box - chosen.numpy()).max()))
    return nearest


def _largest_difference(ours: Sequence[NDArray[np.float32]], reference: Sequence[Tensor]) -> float:
    """Of all tensors, relative to the largest value of each."""
    largest = 0.0
    for a, b in zip(ours, reference, strict=True):
        scale = max(float(b.abs().max()), 1e-12)
        largest = _larger(largest, float(np.abs(a - b.numpy()).max()) / scale)
    return largest


def _larger(a: float, b: float) -> float:
    """The larger of two; NaN when one is NaN, which `max` would swallow."""
    return float(np.maximum(a, b))


def compare_runtimes(
    bundle: Bundle,
    pairs: Sequence[Pair],
    clip: Clip,
    precisions: Sequence[str] = ("fp16", "int8"),
    runtime: str = "auto",
    checkpoint: Path | None = None,
    model: str | None = None,
    images: Path | None = None,
    calibration_crops: int = CALIBRATION_CROPS,
) -> list[Comparison]:
    """Everything that can run a bundle here against its FP32 graphs on ONNX Runtime.

    That is PyTorch where there is a checkpoint; the graphs that engines are built from, in each precision, on ONNX
    Runtime; INT8 as ONNX Runtime likes it, the bundle's own where it has such; and the engines that are built and fit
    this machine.

    Args:
        bundle: an FP32 bundle.
        pairs: see `model_export.compare.compare`.
        clip: likewise.
        precisions: of `siamtrack.bundle.PRECISIONS`.
        runtime: TensorRT flavour, or "auto".
        checkpoint: of `siamtrack.nets.checkpoint.load_checkpoint`; None leaves PyTorch out.
        model: likewise.
        images: folder of photos to calibrate INT8 on; None for the rendered scene.
        calibration_crops: number of crops to calibrate INT8 on.

    Raises:
        ValueError: the bundle is not FP32, or the checkpoint cannot be read.
    """
    if bundle.manifest.precision != "fp32":
        raise ValueError(f"{bundle.path} is {bundle.manifest.precision}; verify the FP32 bundle that it was made from")
    with tempfile.TemporaryDirectory() as scratch, OnnxRuntimeRunner(bundle) as reference:

        def subjects() -> Iterator[tuple[str, str, Runner]]:
            if checkpoint is not None:
                with torch_runner(bundle, load_checkpoint(checkpoint, model).net) as runner:
                    yield "PyTorch", "fp32", runner
            for precision in precisions:
                if precision != "fp32":
                    folder = Path(scratch) / precision
                    converted = convert_bundle(bundle, precision, folder, images, calibration_crops, "tensorrt")
                    with literal_runner(converted) as runner:
                        yield f"ONNX Runtime {precision}", precision, runner
                if precision == "int8":
                    has_own, folder = bool(bundle.int8_paths), Path(scratch) / "cpu"
                    int8 = bundle if has_own else convert_bundle(bundle, precision, folder, images, calibration_crops)
                    with OnnxRuntimeRunner(int8, precision=precision) as cpu:
                        yield "ONNX Runtime int8, for CPUs", precision, cpu
                try:
                    options = EngineOptions(flavour=runtime)
                    engine = open_runner(bundle, "tensorrt", engines=options, precision=precision)
                except (BundleError, RuntimeError) as error:
                    print(f"no {precision} engine to compare: {error}")
                    continue
                with engine:
                    yield f"TensorRT {precision}", precision, engine

        return list(compare(reference, subjects(), pairs, clip))


def torch_runner(bundle: Bundle, net: nn.Module) -> OnnxRuntimeRunner:
    """A CPU runner that computes with a network in place of a bundle's graphs."""
    siamese = cast(SiameseNet, net.eval())
    modules: dict[str, nn.Module] = {"template": TemplateGraph(siamese), "search": SearchGraph(siamese)}
    if is_adaptive(net):
        modules["update"] = UpdateGraph(net)
    graphs = bundle.manifest.graphs
    sessions = {
        name: _TorchSession(
            module, [spec.name for spec in graphs[name].inputs], [spec.name for spec in graphs[name].outputs]
        )
        for name, module in modules.items()
    }
    return SubstituteRunner(bundle, sessions)


class _TorchSession:
    """A module behind ONNX Runtime's ``run``."""

    def __init__(self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._module, self._inputs, self._outputs = module.eval(), inputs, outputs

    def run(self, names: Sequence[str], feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        with torch.no_grad():
            values = self._module(*(torch.from_numpy(np.array(feeds[name])) for name in self._inputs))
        found = dict(zip(self._outputs, values, strict=True))
        return [found[name].numpy() for name in names]
