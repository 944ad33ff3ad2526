"""Crops to verify and calibrate on: noise, the rendered scene, or photos, through the tracker's own crop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.boxes import xywh_to_cxcywh
from siamtrack.bundle import Bundle
from siamtrack.crop import Image, context_size, crop, mean_bgr, square_window
from siamtrack.scene import Scene
from siamtrack.sources import open_source


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
