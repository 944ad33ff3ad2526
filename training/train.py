"""Train a tracker: ``python -m training.train training/recipes/siamcan-mobilenetv2.yaml --data DATA``.

Writes ``runs/NAME/``: ``recipe.yaml``, ``run.json`` (commit, seed, machine), ``metrics.jsonl``, checkpoints after every
epoch (``last.ckpt`` and the best by validation IoU), ``frozen.ckpt`` from before the backbone was thawed, and
TensorBoard curves and images. Started again, it resumes from ``last.ckpt``, exactly.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from siamtrack.plain import to_plain
from training.loading import PairDataModule
from training.module import SiameseModule
from training.recipe import Recipe, load_recipe, recipe_from_dict
from training.watch import EndOnSigterm, KeepFrozen, RunRecord, SampleSheets, StartOver, Throughput


def train(
    recipe: Recipe,
    data_root: Path,
    out: Path,
    devices: int = 1,
    resume: bool = True,
    checkpoint_steps: int = 0,
    nodes: int = 1,
) -> Path:
    """Run a recipe to its end.

    Args:
        recipe: what to train.
        data_root: folder the recipe's data paths are relative to.
        out: the run's folder, made when missing.
        devices: GPUs, or processes on a CPU, of each machine.
        resume: go on from ``out/last.ckpt`` if it is there. False deletes what an earlier run has written, as soon as
            recipe, weights and data have been read.
        checkpoint_steps: write it after every so many steps too, not only after epochs; 0 for epochs alone.
        nodes: machines, each of which runs this with the same arguments; they share `out`.

    Returns:
        Path of the last checkpoint.

    Raises:
        ValueError: the recipe or its data cannot be used, or its batch does not split evenly over the devices.
    """
    if recipe.batch_size % (devices * nodes):
        raise ValueError(f"batch_size {recipe.batch_size} does not split evenly over {devices * nodes} devices")
    last = out / "last.ckpt"
    resuming = resume and last.exists()
    if resuming:
        check_same_recipe(recipe, last)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(to_plain(recipe), sort_keys=False))
    set_up_process(recipe.seed, devices)
    module = SiameseModule(to_plain(recipe), str(data_root))
    trainer = make_trainer(recipe, out, devices, checkpoint_steps, nodes)
    if not resume:
        trainer.callbacks.insert(0, StartOver(out))  # type: ignore[attr-defined]
    resume_from = str(last) if resuming else None
    trainer.fit(module, PairDataModule(recipe, data_root, module.net), ckpt_path=resume_from, weights_only=True)
    return last


def set_up_process(seed: int, devices: int) -> None:
    """Seed this process and divide the machine among `devices` of its sort; to be called before anything is built."""
    L.seed_everything(seed, verbose=False)
    cv2.setNumThreads(0)  # loaders are parallel already
    keep_freed_memory()
    if not torch.cuda.is_available() and devices > 1:
        torch.set_num_threads(1)  # one-thread processes beat one process of many threads on small images


def make_trainer(recipe: Recipe, out: Path, devices: int = 1, checkpoint_steps: int = 0, nodes: int = 1) -> L.Trainer:
    """What drives a run and notes into `out` what happens; arguments as of `train`."""
    validates = bool(recipe.data.validation_videos) and recipe.validation_pairs > 0
    callbacks: list[Callback] = [LearningRateMonitor("step"), Throughput(), SampleSheets(), EndOnSigterm()]
    callbacks.append(RunRecord(out, recipe.seed))
    if recipe.optim.ema:
        warmup = recipe.optim.warmup_epochs * recipe.steps_per_epoch
        # Callbacks are set up before the model moves to its GPU: without a word the average would stay behind.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        callbacks.append(EMAWeightAveraging(device, decay=recipe.optim.ema, update_starting_at_step=int(warmup)))
    if validates:
        callbacks.append(ModelCheckpoint(out, "best", "val/iou", mode="max", enable_version_counter=False))
    if 0 < recipe.unfreeze_epoch < recipe.epochs and recipe.unfreeze_stages:
        callbacks.append(KeepFrozen(out, recipe.unfreeze_epoch))
    # A callback of its own: `save_last` of the one above would write only when the epoch is also the best.
    callbacks.append(ModelCheckpoint(out, "last", enable_version_counter=False))
    if checkpoint_steps:
        callbacks.append(
            StepCheckpoint(out, "last", every_n_train_steps=checkpoint_steps, enable_version_counter=False)
        )
    # Its advice is a loader with a state. Ours needs none: `EpochSampler` knows the step.
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    return L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=devices,
        num_nodes=nodes,
        # The backbone is frozen at first: its weights take no part in the loss then.
        strategy=DDPStrategy(find_unused_parameters=True) if devices * nodes > 1 else "auto",
        use_distributed_sampler=False,  # EpochSampler splits by rank
        precision=recipe.precision,  # type: ignore[arg-type]
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.optim.clip,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        callbacks=callbacks,
        logger=TensorBoardLogger(out, name="", version=""),
        default_root_dir=out,
    )


def check_same_recipe(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse to go on with another recipe than the run was started with: the result would be neither.

    Raises:
        ValueError: a field differs; how data is loaded may.
    """
    before = torch.load(checkpoint, map_location="cpu", weights_only=True)["hyper_parameters"]["recipe"]
    before = to_plain(recipe_from_dict(before, str(checkpoint)))  # fields that are new since have their defaults
    ours = to_plain(recipe)
    for content in (before, ours):
        content["data"] = {k: v for k, v in content["data"].items() if k not in ("workers", "cache_gb")}
    changed = sorted(key for key in {*before, *ours} if before.get(key) != ours.get(key))
    if changed:
        raise ValueError(
            f"{checkpoint} was started with another recipe (other: {', '.join(changed)}): "
            "give another --out, or --fresh to start over"
        )


class StepCheckpoint(ModelCheckpoint):
    """Leaves the last step of an epoch to the checkpoint after the epoch.

    A run that goes on from one before its end would pass over its validation, and over what callbacks do then.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def launched() -> tuple[int, int]:
    """Processes of each machine, and machines, that torchrun or SLURM has started; 0 and 1 where neither has."""
    if TorchElasticEnvironment.detect():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return 0, 1


def all_devices(batch_size: int) -> int:
    """As many GPUs, or on a CPU cores up to 4, as split a batch evenly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = torch.cuda.device_count() or min(cores, 4)
    return max(count for count in range(1, most + 1) if batch_size % count == 0)


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks instead of handing them back to the kernel.

    Feature maps are megabytes, allocated and freed each step; mapping them anew costs more than the convolution that
    fills them. Does nothing on another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 256 * 2**20)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file, see training/recipes/")
    parser.add_argument("--data", type=Path, required=True, help="folder the recipe's data paths are relative to")
    parser.add_argument("--out", type=Path, help="run folder (default runs/<recipe name>)")
    parser.add_argument(
        "--devices",
        type=int,
        default=0,
        help="GPUs, or CPU processes, of each machine (default: as started by torchrun or SLURM, or all that split "
        "the batch)",
    )
    parser.add_argument("--nodes", type=int, default=0, help="machines (default: as started by torchrun or SLURM)")
    parser.add_argument("--shards", default="", help="shards of the recipe's data, below --data, to train on instead")
    parser.add_argument("--seed", type=int, help="replace the recipe's seed")
    parser.add_argument("--epochs", type=int, help="replace the recipe's epochs")
    parser.add_argument("--weights", help="replace the checkpoint that the recipe starts from")
    parser.add_argument(
        "--checkpoint-steps", type=int, default=0, metavar="N", help="write last.ckpt after every N steps too"
    )
    parser.add_argument("--fresh", action="store_true", help="start over, and delete what the run has written")
    options = parser.parse_args(arguments)
    overrides = {k: v for k in ("seed", "epochs", "weights") if (v := getattr(options, k)) is not None}
    out = options.out or Path("runs") / options.recipe.stem
    try:
        recipe = load_recipe(options.recipe, overrides, options.shards)
        processes, machines = launched()
        devices = options.devices or processes or all_devices(recipe.batch_size)
        nodes = options.nodes or machines
        requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"  # SLURM repeats the command, --fresh and all
        resume = requeued or not options.fresh
        last = train(recipe, options.data, out, devices, resume, options.checkpoint_steps, nodes)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"checkpoint: {last}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
