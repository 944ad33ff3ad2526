"""Draw what a network is trained on: ``python -m training.show RECIPE --data DATA --out sheet.png``.

A tile is a sample, after all augmentation: its template on the left (below it history and current, for a model that
renews its template), and its search crop with the target's box and a dot a labelled cell. Green is target, yellow
target at the boundary (SiamLA), red background, as is the box of a negative pair's foreign target; cells without a dot
are ignored. An anchor-based model has several candidates a cell: a cell is target if one of them is, background if none
is and one is background.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.nets.build import build_model
from training.collect import collect
from training.dataset import PairDataset, Sample, collate
from training.device_augment import augmented
from training.labels import Cells
from training.loading import crop_shape, make_samplers
from training.module import cells_of
from training.recipe import load_recipe

Image = NDArray[np.uint8]
ZOOM = 2  # of search crops, so that boxes and dots do not cover them
GAP_PX = 8
COLUMNS = 3
TARGET, BOUNDARY, BACKGROUND, BOX, INK = (60, 220, 60), (40, 220, 240), (60, 60, 235), (255, 160, 30), (235, 235, 235)


def cell_labels(labels: NDArray[np.int8], cells: Cells) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Cells ``[C, 2]``, each once, and their labels ``[C]``: the largest among the candidates that stand there."""
    points, where = np.unique(cells.points, axis=0, return_inverse=True)
    found = np.full(len(points), -1, np.int8)
    np.maximum.at(found, where.ravel(), labels)
    return points, found


def draw_sample(sample: Sample, cells: Cells) -> Image:
    """The tile of one sample."""
    template_px, side = sample["template"].shape[0], sample["search"].shape[0] * ZOOM
    crops = [sample[name] for name in ("template", "history", "current") if name in sample]
    tile = np.full((max(side, len(crops) * template_px), template_px + side, 3), 24, np.uint8)
    for row, crop in enumerate(crops):
        tile[row * template_px : (row + 1) * template_px, :template_px] = crop
    search: Any = cv2.resize(sample["search"], (side, side), interpolation=cv2.INTER_LINEAR)
    cx, cy, w, h = (float(v) * ZOOM for v in sample["box"])
    corners = [round(v) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)]
    positive = bool(sample["positive"])
    cv2.rectangle(search, corners[:2], corners[2:], BOX if positive else BACKGROUND, 2)
    points, labels = cell_labels(sample["labels"], cells)
    for (x, y), label in zip(points, labels, strict=True):
        if label >= 0:
            at = (round(float(x) * ZOOM), round(float(y) * ZOOM))
            cv2.circle(search, at, 4 if label else 2, (BACKGROUND, TARGET, BOUNDARY)[label], -1, cv2.LINE_AA)
    tile[:side, template_px:] = search
    text = "positive" if positive else "negative"
    cv2.putText(tile, text, (6, tile.shape[0] - 12), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
    return tile


def as_fed(sample: Sample) -> Sample:
    """A sample as it is when it reaches the network: with light and noise, where the loader leaves them out."""
    return {name: value[0].numpy() for name, value in augmented(collate([sample])).items()}


def draw_sheet(dataset: PairDataset, indices: range) -> Image:
    """The tiles of some samples, uint8 ``[H, W, 3]`` BGR."""
    tiles = [draw_sample(as_fed(dataset[i]), dataset.cells) for i in indices]
    height, width = tiles[0].shape[0] + GAP_PX, tiles[0].shape[1] + GAP_PX
    columns = min(COLUMNS, len(tiles))
    sheet = np.full((-(-len(tiles) // columns) * height + GAP_PX, columns * width + GAP_PX, 3), 64, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height + GAP_PX, i % columns * width + GAP_PX
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.show", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file, see training/recipes/")
    parser.add_argument("--data", type=Path, required=True, help="folder the recipe's data paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="image file to write, such as sheet.png")
    parser.add_argument("--pairs", type=int, default=12, help="how many samples (default 12)")
    parser.add_argument("--seed", type=int, help="replace the recipe's seed; a run's first samples have its own")
    options = parser.parse_args(arguments)
    try:
        if options.pairs < 1:
            raise ValueError(f"--pairs must be at least 1, got {options.pairs}")
        recipe = load_recipe(options.recipe, {} if options.seed is None else {"seed": options.seed})
        net = build_model(recipe.model, recipe.model_config)
        shape = crop_shape(net)
        found = collect(recipe, options.data, shape.template_px, shape.search_px)
        sampler, _ = make_samplers(recipe, found, shape)
        dataset = PairDataset(sampler, cells_of(net), recipe.labels, recipe.seed, options.pairs)
        sheet = draw_sheet(dataset, range(options.pairs))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(options.out), sheet):
            raise ValueError(f"cannot write {options.out}: expected a name that ends in .png or .jpg")
    except (ValueError, FileNotFoundError, cv2.error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.pairs} samples of {recipe.model}: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
