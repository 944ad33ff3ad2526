"""What accompanies a run: its speed, what it is shown, its metrics, how it was started and how it may be ended."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import threading
import time
from collections import deque
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

from siamtrack.version import __version__
from training.loading import PairDataModule
from training.show import draw_sheet

CHECKOUT = Path(__file__).resolve().parents[1]
WINDOW = 20  # steps that the speed is a mean of


class Throughput(Callback):
    """Logs ``train/samples_per_s``, over all processes, and ``train/data_wait``, the share of time without a batch.

    Both are means over the last `WINDOW` steps. With loader processes that keep up, the wait is that for a queue.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # seconds waited, seconds in all
        self._ended = self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = time.perf_counter()  # validation is no wait for data

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._steps.append((self._started - self._ended, now - self._ended))
        self._ended = now
        waited, took = (sum(column) for column in zip(*self._steps, strict=True))
        samples = len(self._steps) * len(batch["search"]) * trainer.world_size
        pl_module.log("train/samples_per_s", samples / took, prog_bar=True)
        pl_module.log("train/data_wait", waited / took, prog_bar=True)


class EndOnSigterm(Callback):
    """Makes SIGTERM end a run as Ctrl-C does.

    Lightning's own handler tells the other processes there and then. One that is sharing gradients does not listen, and
    all of them wait for ever. Under SLURM, where SIGTERM means that a requeue is near, Lightning's stays.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        requeues = isinstance(getattr(trainer.strategy, "cluster_environment", None), SLURMEnvironment)
        if threading.current_thread() is threading.main_thread() and not requeues:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # until Lightning puts back what was there


class StartOver(Callback):
    """Deletes what an earlier run wrote into this one's folder, lest anything of it be taken for part of this.

    Args:
        out: the run's folder.
    """

    WRITTEN = ("last.ckpt", "best.ckpt", "frozen.ckpt", "metrics.jsonl", "run.json", "events.out.tfevents*")

    def __init__(self, out: Path) -> None:
        self._out = out

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """By now weights and data have been read: a run that cannot start deletes nothing."""
        if trainer.is_global_zero:
            for path in itertools.chain.from_iterable(map(self._out.glob, self.WRITTEN)):
                path.unlink()


class KeepFrozen(Callback):
    """Keeps ``frozen.ckpt``, the state after the last epoch with a frozen backbone: one to average with the last.

    Args:
        out: the run's folder.
        epochs: how many the backbone is frozen for.
    """

    def __init__(self, out: Path, epochs: int) -> None:
        self._out, self._epochs = out, epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == self._epochs:
            trainer.save_checkpoint(self._out / "frozen.ckpt")


class SampleSheets(Callback):
    """Puts a sheet of training samples (`training.show`) into TensorBoard before every so many epochs.

    Args:
        epochs: how many.
        samples: on a sheet; they are the first of the epoch.
    """

    def __init__(self, epochs: int = 5, samples: int = 6) -> None:
        self.epochs, self.samples = epochs, samples

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch % self.epochs or not trainer.is_global_zero or trainer.logger is None:
            return
        data: PairDataModule = trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.training_set()
        sheet = draw_sheet(dataset, range(epoch * len(dataset), epoch * len(dataset) + self.samples))
        # Encoded here, because TensorBoard's own `add_image` needs Pillow.
        png = cv2.imencode(".png", sheet)[1].tobytes()
        image = Summary.Image(height=sheet.shape[0], width=sheet.shape[1], colorspace=3, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag="train/samples", image=image)])
        trainer.logger.experiment._get_file_writer().add_summary(summary, trainer.global_step)  # type: ignore[attr-defined]


class RunRecord(Callback):
    """Writes ``run.json``, an entry a start, and ``metrics.jsonl``, a line an epoch, beside recipe and checkpoints.

    Args:
        folder: of the run.
        seed: of the recipe.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        path = self.folder / "run.json"
        starts = json.loads(path.read_text()) if path.exists() else []
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        starts.append(
            {
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "from_step": trainer.global_step,
                "git_commit": git_commit(),
                "seed": self.seed,
                "device": device,
                "processes": trainer.world_size,
                "siamtrack": __version__,
                "torch": torch.__version__,
            }
        )
        path.write_text(json.dumps(starts, indent=2) + "\n")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # In all processes: means over them are taken when they are asked for.
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no NaN
        if trainer.is_global_zero:
            line = {"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def git_commit(folder: Path = CHECKOUT) -> str:
    """The commit that a folder's checkout is at, with ``+changes`` behind it where tracked files differ; "" outside."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
