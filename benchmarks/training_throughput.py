"""Does training wait for its data? Samples a second of a recipe, beside those of random crops that need no loading.

    python -m benchmarks.training_throughput training/recipes/siamla-mobilenetv2.yaml --data DATA

One run of the real trainer takes blocks of steps by turns: on one batch of random crops again and again, then on pairs
of the recipe's data, with light and noise put on in the loader (cpu) or by the network's device (device). So whatever
else the machine does meets all of them alike. Each block's first steps are not timed: loader processes have batches
ready from the block before. Without --data, clips are rendered (`siamtrack.scene`) in place of the recipe's data.

Writes ``training_throughput.csv``, with --shards ``training_throughput_shards.csv``: a row for each backbone, frozen or
thawed, and source of crops. `of_random` is the share of the speed on random crops that is left; data is no bottleneck
where it is near 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from benchmarks import command, markdown_table, write_csv
from siamtrack.plain import to_plain
from siamtrack.scene import Scene
from training.device_augment import augmented
from training.loading import PairDataModule
from training.module import CROPS, Batch, SiameseModule
from training.recipe import AUGMENT, DataConfig, Recipe, load_recipe
from training.train import all_devices, make_trainer, set_up_process

BACKBONES = ("frozen", "thawed")
DEFAULT_OUT = Path("benchmarks/results")

Row = dict[str, Any]


@dataclass(frozen=True)
class Turns:
    """What comes after what in an epoch.

    Attributes:
        augment: where light and noise are put on the pairs of each source but the first, which is random crops.
        rounds: how often each source has its turn.
        untimed: steps at the start of a turn that are not timed.
        timed: steps after them.
    """

    augment: tuple[str, ...]
    rounds: int
    untimed: int
    timed: int

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all sources."""
        return ("random", *self.augment)

    @property
    def block(self) -> int:
        """Steps of one turn."""
        return self.untimed + self.timed

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.rounds * len(self.sources) * self.block

    def seconds(self, steps_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean seconds of a timed step in each turn ``[epochs, rounds, sources]``, of those of every step."""
        shape = (-1, self.rounds, len(self.sources), self.block)
        return steps_s.reshape(shape)[..., self.untimed :].mean(axis=-1)


class Epoch:
    """The batches of an epoch: blocks of several endless streams by turns; every epoch goes on where they stand."""

    def __init__(self, streams: Sequence[Iterator[Batch]], turns: Turns) -> None:
        self.streams, self.turns = streams, turns

    def __len__(self) -> int:
        return self.turns.steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.turns.rounds):
            for stream in self.streams:
                yield from itertools.islice(stream, self.turns.block)


class Sources(PairDataModule):
    """Training batches by turns.

    Args:
        recipe: what is trained.
        data_root: as of `PairDataModule`.
        net: as of `PairDataModule`.
        turns: which sources, and how long each.
        warmup: batches of each source drawn before the first step, so that images are decoded.
    """

    def __init__(self, recipe: Recipe, data_root: Path, net: nn.Module, turns: Turns, warmup: int) -> None:
        super().__init__(recipe, data_root, net)
        self.turns, self.warmup = turns, warmup

    def train_dataloader(self) -> Iterable[Batch]:
        assert self.trainer is not None
        streams = [iter(self._pairs(*numbered)) for numbered in enumerate(self.turns.augment)]
        for stream, _ in itertools.product(streams, range(self.warmup + 1)):
            last = next(stream)
        batch = augmented(last)  # with real labels: what a step computes depends on them
        crops = {name: torch.randint_like(batch[name], 256) for name in CROPS if name in batch}
        device = self.trainer.strategy.root_device
        random = itertools.repeat({name: value.to(device) for name, value in (batch | crops).items()})
        return Epoch([random, *streams], self.turns)

    def _pairs(self, number: int, augment: str) -> DataLoader[Any]:
        dataset = self.training_set()
        dataset.sampler = copy.copy(dataset.sampler)  # the images in memory are those of all sources
        dataset.sampler.defer_effects = augment == "device"
        loader = self.training_loader(dataset)
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]  # each source has pairs of its own
        return loader


class StepTimes(Callback):
    """Seconds of every step, from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._ended = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._ended)
        self._ended = now


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 for a recipe, data or numbers that cannot be."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    try:
        rows = measure(options)
    except (OSError, ValueError) as error:
        print(f"training_throughput: {error}", file=sys.stderr)
        return 2
    if rows:
        line = command("benchmarks.training_throughput", arguments)
        name = "training_throughput_shards.csv" if rows[0]["data"] == "shards" else "training_throughput.csv"
        write_csv(options.out / name, rows, line)
        print(format_rows(rows))
    return 0


def measure(options: argparse.Namespace) -> list[Row]:
    """The rows of ``training_throughput.csv`` for the parsed command line; none in a process that only helps.

    Raises:
        ValueError: the recipe or its data cannot be used, a count is out of range, or the batch does not split evenly.
    """
    if min(options.rounds, options.steps) < 1 or min(options.warmup, options.devices) < 0:
        raise ValueError(
            "expected --rounds and --steps of at least 1, --warmup and --devices of at least 0, got "
            f"{options.rounds}, {options.steps}, {options.warmup}, {options.devices}"
        )
    if options.shards and options.data is None:
        raise ValueError(f"--shards {options.shards} needs --data, the folder it is below")
    recipe = load_recipe(options.recipe, shards=options.shards)
    devices = options.devices or all_devices(recipe.batch_size)
    if recipe.batch_size % devices:
        raise ValueError(f"batch_size {recipe.batch_size} does not split evenly over {devices} devices")
    workers = recipe.data.workers if options.workers is None else options.workers
    # A loader process holds two batches ready; one step more sees the next being waited for.
    turns = Turns(tuple(options.augment), options.rounds, 2 * workers + 1, options.steps)
    backbones = [backbone for backbone in BACKBONES if backbone in options.backbone]
    with tempfile.TemporaryDirectory() as folder:
        data_root = options.data
        if data_root is None:
            data_root = Path(folder) / "data"
            recipe = replace(recipe, data=rendered(recipe.data, data_root), backbone="")
        recipe = replace(
            recipe,
            epochs=len(backbones),
            unfreeze_epoch=backbones.count("frozen"),
            pairs_per_epoch=recipe.batch_size * (options.warmup + 1 + len(backbones) * turns.rounds * turns.block),
            validation_pairs=0,
            weights="",
            data=replace(recipe.data, workers=workers),
        )
        set_up_process(recipe.seed, devices)
        module = SiameseModule(to_plain(recipe), str(data_root))
        trainer, times = make_trainer(recipe, Path(folder) / "run", devices), StepTimes()
        trainer.callbacks.append(times)  # type: ignore[attr-defined]
        trainer.fit(module, Sources(recipe, data_root, module.net, turns, options.warmup))
    if not trainer.is_global_zero:
        return []
    run: Row = {
        "model": recipe.model,
        "data": "rendered" if options.data is None else "shards" if recipe.data.shards else "files",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "processes": devices,
        "threads": torch.get_num_threads(),
        "workers": workers,
        "precision": recipe.precision,
        "batch_size": recipe.batch_size,
    }
    return [
        {**run, **row} for row in speeds(turns.seconds(np.array(times.seconds)), turns, recipe.batch_size, backbones)
    ]


def speeds(
    seconds: NDArray[np.float64], turns: Turns, batch_size: int, backbones: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each backbone and source: median, least and most samples a second of its turns, and the ratio.

    Args:
        seconds: of a step ``[backbones, rounds, sources]``.
        turns: what was measured.
        batch_size: samples a step, over all processes.
        backbones: names of the epochs.
    """
    for backbone, rates in zip(backbones, batch_size / seconds, strict=True):
        medians = np.median(rates, axis=0)
        for source, median, turn_rates in zip(turns.sources, medians, rates.T, strict=True):
            yield {
                "backbone": backbone,
                "crops": source,
                "steps": turns.rounds * turns.timed,
                "samples_per_s": float(median),
                "samples_per_s_min": float(turn_rates.min()),
                "samples_per_s_max": float(turn_rates.max()),
                "of_random": float(median / medians[0]),
            }


def rendered(data: DataConfig, root: Path, clips: int = 3, frames: int = 40) -> DataConfig:
    """Render clips of 640 x 360 with outlines below `root`, and say so in place of the data that a recipe names.

    They serve as videos, cut-outs and photos; stills they are not, the shares of the others stay.
    """
    for clip in range(clips):
        folder, scene = root / "clips" / str(clip), Scene(640, 360, frames, seed=clip)
        for part in ("img", "mask"):
            (folder / part).mkdir(parents=True)
        for index in range(frames):
            frame, without = scene.render(index), scene.render(index, with_target=False)
            outline = (frame.image != without.image).any(axis=2)
            cv2.imwrite(str(folder / "img" / f"{index:04d}.jpg"), frame.image)
            cv2.imwrite(str(folder / "mask" / f"{index:04d}.png"), 255 * outline.astype(np.uint8))
    mix = {kind: share for kind, share in data.pairs.mix.items() if kind != "still"}
    return DataConfig(
        videos=("clips",),
        photos=tuple(f"clips/{clip}/img" for clip in range(clips)),
        pairs=replace(data.pairs, mix=mix),
        labels=data.labels,
        cache_gb=data.cache_gb,
        workers=data.workers,
    )


def format_rows(rows: Sequence[Row]) -> str:
    """Markdown: samples a second and the share of random crops' for each backbone and source."""
    titles = ["backbone", "crops", "samples a second", "of random"]
    cells = [[r["backbone"], r["crops"], f"{r['samples_per_s']:.1f}", f"{r['of_random']:.0%}"] for r in rows]
    return markdown_table(titles, cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_throughput", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("recipe", type=Path, help="YAML file, see training/recipes/")
    parser.add_argument("--data", type=Path, help="folder the recipe's data paths are relative to (default: rendered)")
    parser.add_argument("--shards", default="", help="shards of the recipe's data, below --data, to train on instead")
    parser.add_argument("--devices", type=int, default=0, help="GPUs, or CPU processes (default: as training.train)")
    parser.add_argument("--workers", type=int, help="loader processes a training process (default: the recipe's)")
    parser.add_argument("--augment", nargs="+", choices=AUGMENT, default=list(AUGMENT), help="default: all")
    parser.add_argument("--backbone", nargs="+", choices=BACKBONES, default=list(BACKBONES), help="default: both")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each source (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a turn (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=60, help="batches of each source drawn beforehand (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the table (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
