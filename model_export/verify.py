"""Do the exported graphs compute what the network computes?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from siamtrack.boxes import xywh_to_cxcywh
from siamtrack.bundle import SEARCH_OUTPUTS, Bundle
from siamtrack.crop import Image, context_size, crop, mean_bgr, square_window
from siamtrack.nets.decode import SearchGraph, SiameseNet, TemplateGraph
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import Scene
from siamtrack.sources import open_source

TENSOR_TOLERANCE = 1e-4
BOX_TOLERANCE_PX = 0.05


@dataclass(frozen=True)
class Difference:
    """Largest differences between two runtimes over a set of crops.

    Attributes:
        crops: crops compared.
        template: of template tensors, relative to the largest value of each tensor.
        response: of raw confidence, absolute.
        box_px: of box coordinates, crop pixels, where both chose the same cell.
        other_cell: crops on which they chose different cells, whose scores differ by more than the tolerance.
    """

    crops: int
    template: float
    response: float
    box_px: float
    other_cell: int

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
            f"other cell chosen {self.other_cell}: {'ok' if self.ok else 'OUTSIDE TOLERANCE'}"
        )


def compare_with_onnxruntime(
    net: nn.Module, bundle: Bundle, pairs: Iterator[tuple[Image, Image, NDArray[np.float32]]]
) -> Difference:
    """PyTorch against ONNX Runtime.

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
    count = other_cell = 0
    with OnnxRuntimeRunner(bundle) as runner, torch.no_grad():
        template_session, search_session = runner.session("template"), runner.session("search")
        for template_crop, search_crop, size in pairs:
            count += 1
            ours = template_session.run(None, {"image": template_crop[None]})
            reference = template_graph(torch.from_numpy(template_crop[None].copy()))
            for a, b in zip(ours, reference, strict=True):
                scale = max(float(b.abs().max()), 1e-12)
                template_error = _larger(template_error, float(np.abs(a - b.numpy()).max()) / scale)
            feeds = {"image": search_crop[None], "prev_size": size[None], "tuning": tuning}
            feeds |= dict(zip(siamese.template_names, ours, strict=True))
            box, score, _, response = search_session.run(list(SEARCH_OUTPUTS), feeds)
            box_t, score_t, _, response_t = search_graph(
                torch.from_numpy(search_crop[None].copy()),
                *reference,
                torch.from_numpy(size[None]),
                torch.from_numpy(tuning),
            )
            response_error = _larger(response_error, float(np.abs(response - response_t.numpy()).max()))
            difference_px = float(np.abs(box - box_t.numpy()).max())
            if difference_px > siamese.grid.stride / 4 and abs(float(score[0]) - float(score_t[0])) > TENSOR_TOLERANCE:
                other_cell += 1
            else:
                box_error = _larger(box_error, difference_px)
    return Difference(count, template_error, response_error, box_error, other_cell)


def _larger(a: float, b: float) -> float:
    """The larger of two; NaN when one is NaN, which `max` would swallow."""
    return float(np.maximum(a, b))


def random_pairs(bundle: Bundle, count: int, seed: int = 0) -> Iterator[tuple[Image, Image, NDArray[np.float32]]]:
    """Noise of random contrast and graininess: values no photo shows."""
    rng = np.random.default_rng(seed)
    spec = bundle.manifest.crop

    def noise(side: int) -> Image:
        grain = int(rng.integers(2, side))
        coarse = rng.integers(0, 256, (grain, grain, 3)).astype(np.uint8)
        return np.asarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)

    for _ in range(count):
        yield noise(spec.template_px), noise(spec.search_px), rng.uniform(20, 160, 2).astype(np.float32)


def real_pairs(
    bundle: Bundle, count: int, images: Path | None = None, seed: int = 0
) -> Iterator[tuple[Image, Image, NDArray[np.float32]]]:
    """Crops of the rendered scene's target, or of random places in the images of a folder."""
    rng = np.random.default_rng(seed)
    spec = bundle.manifest.crop
    for image, box in _places(images, count, rng):
        cx, cy, w, h = xywh_to_cxcywh(box).tolist()
        side = context_size(w, h, spec.context)
        fill = mean_bgr(image)
        template = crop(image, square_window(cx, cy, side), spec.template_px, fill)
        drift = rng.uniform(-0.25, 0.25, 2) * side
        window = square_window(cx + drift[0], cy + drift[1], side * spec.search_px / spec.template_px)
        size = np.array([w, h]) * spec.search_px / window.width
        yield template, crop(image, window, spec.search_px, fill), size.astype(np.float32)


def _places(
    images: Path | None, count: int, rng: np.random.Generator
) -> Iterator[tuple[Image, tuple[float, float, float, float]]]:
    if images is None:
        scene = Scene(width=640, height=360, frames=count)
        for i in range(count):
            frame = scene.render(i)
            yield frame.image, frame.box_xywh
        return
    done = 0
    while done < count:
        with open_source(str(images)) as source:
            for _, image in source:
                height, width = image.shape[:2]
                w, h = rng.uniform(0.05, 0.4, 2) * (width, height)
                yield image, (rng.uniform(0, width - w), rng.uniform(0, height - h), w, h)
                done += 1
                if done == count:
                    return
