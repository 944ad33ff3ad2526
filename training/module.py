"""The Lightning module: what one training step does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from siamtrack.nets.backbones import MobileNetV2, ResNet50, TwoBackbones
from siamtrack.nets.build import build_model
from siamtrack.nets.decode import AnchorBased, SearchGraph, TemplateGraph, learns_update, normalise, takes_size
from siamtrack.nets.importing import read_weights
from siamtrack.nets.pretrained import import_mobilenetv2, import_resnet50
from siamtrack.nets.tensorfile import read_tensors
from training.device_augment import augmented
from training.distil import Teachers, candidates, distil_terms, in_full
from training.labels import Cells
from training.losses import box_iou
from training.objectives import check_fit
from training.recipe import OptimConfig, recipe_from_dict

Batch = dict[str, Tensor]
CROPS = ("template", "search", "history", "current")
CHECKPOINT = ".ckpt"  # what Lightning writes, and so a run of ours
VALIDATION = ("val/iou", "val/hit", "val/score_seen", "val/score_absent")
LOSS_LIMIT = 1e4  # a batch with a larger loss is broken (pysot)


class SiameseModule(L.LightningModule):
    """Trains any model of `siamtrack.nets.MODELS` on template-search pairs or triplets of templates.

    Args:
        recipe: as plain values (`siamtrack.plain.to_plain`), so that checkpoints load without unpickling code.
        data_root: where the recipe's backbone weights are; None when loading a checkpoint.
    """

    def __init__(self, recipe: dict[str, Any], data_root: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("recipe")
        self.recipe = recipe_from_dict(recipe)
        self.net = build_model(self.recipe.model, self.recipe.model_config)
        self.objective = self.recipe.build_objective()
        check_fit(self.recipe.objective_name, self.objective, self.recipe.model, self.net.decoder)
        if data_root is not None and self.recipe.backbone:
            path = Path(self.recipe.backbone)
            load_backbone(
                cast(nn.Module, self.net.backbone), path if path.suffix == CHECKPOINT else Path(data_root) / path
            )
        if data_root is not None and self.recipe.weights:
            load_weights(self.net, Path(self.recipe.weights))
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.search_graph = SearchGraph(self.net)  # type: ignore[arg-type]
        self.template_graph = TemplateGraph(self.net)  # type: ignore[arg-type]
        self.epoch_loss = MeanMetric()  # of batches that were not skipped
        self._statistics: list[Tensor] = []
        if not 0 <= self.recipe.unfreeze_stages <= len(self._stages()):
            raise ValueError(
                f"unfreeze_stages must be 0 to {len(self._stages())} for {self.recipe.model}, "
                f"got {self.recipe.unfreeze_stages}"
            )
        # Stages that never train must not be known to DistributedDataParallel.
        for stage in self._stages()[: len(self._stages()) - self.recipe.unfreeze_stages]:
            stage.requires_grad_(False)
        self._teachers: Teachers | None = None
        if data_root is not None and self.recipe.distil.teachers:
            self._teachers = Teachers([Path(path) for path in self.recipe.distil.teachers], self.net)

    def _stages(self) -> list[nn.Module]:
        return cast(Any, self.net).backbone.trainable_stages()

    def on_train_start(self) -> None:
        """A run resumed within an epoch starts none (Lightning calls no `on_train_epoch_start` then)."""
        self.set_stages()
        if self._teachers is not None:
            self._teachers.to(self.device)

    def on_train_epoch_start(self) -> None:
        self.set_stages()

    def set_stages(self) -> None:
        """Freeze the backbone, or thaw its last stages; statistics of frozen stages stay fixed."""
        self.net.backbone.eval()  # type: ignore[union-attr]
        thawed = self.current_epoch >= self.recipe.unfreeze_epoch
        for stage in self._stages()[len(self._stages()) - self.recipe.unfreeze_stages :]:
            stage.requires_grad_(thawed).train(thawed)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout depends on seed, step and process alone, so that a resumed run repeats it."""
        torch.manual_seed(_step_seed(self.recipe.seed, self.global_step, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = augmented(batch)
        self._statistics = [buffer.clone() for buffer in self.net.buffers()]
        normalisation = cast(Any, self.net).normalisation
        crops = {name: normalise(batch[name], normalisation) for name in CROPS if name in batch}
        raw = in_full(self.net(**crops, **self._size(batch)))
        with torch.autocast(self.device.type, enabled=False):  # half precision is too coarse for boxes
            terms = self.objective(raw, batch, self.net.decoder)
        loss = self.objective.total(terms)
        if self._teachers is not None:
            soft = distil_terms(candidates(self.net, raw), self._teachers(crops, batch["size"]))
            share = self.recipe.distil.share
            loss = (1 - share) * loss + share * torch.stack(list(soft.values())).sum()
            terms |= {f"distil_{name}": term for name, term in soft.items()}
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        self.log("train/loss", loss.detach())
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        # A broken batch must not reach the weights. Its gradients are made NaN, which every process learns of when they
        # are averaged: all of them skip the step (`on_before_optimizer_step`), and none waits for another.
        broken = ~torch.isfinite(loss.detach()) | (loss.detach() > LOSS_LIMIT)
        self.epoch_loss.update(torch.where(broken, 0.0, loss.detach()), weight=(~broken).float())
        self.log("train/epoch_loss", self.epoch_loss, on_step=False, on_epoch=True)
        return loss * torch.where(broken, torch.nan, 1.0)

    def _size(self, batch: Batch) -> Batch:
        """What a network that is told the target's size takes besides the crops."""
        return {"size": batch["size"]} if takes_size(self.net) else {}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make a step with a gradient that is not finite do nothing: neither weights nor momentum nor statistics move.

        Without a gradient, optimisers leave a weight and its state alone; a gradient of zero would still let momentum
        and decay act. Gradients are already shared between processes here, so all of them do the same.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        broken = not torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        self.log("train/skipped", float(broken), on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
        if broken:
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in zip(self.net.buffers(), self._statistics, strict=True):
                    buffer.copy_(before)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        template = self.template_graph(batch["template"], *self._size(batch).values())
        if learns_update(self.net):
            further = (self.template_graph(batch[name])[0] for name in ("history", "current"))
            template = self.net.update(template[0], *further)
        tuning = torch.zeros(3, device=self.device)
        raw = in_full(self.search_graph.raw(batch["search"], *template))
        with torch.autocast(self.device.type, enabled=False):  # as in training
            box, score, _, _ = cast(Any, self.net.decoder)(raw, batch["box"][:, 2:], tuning)
        positive = batch["positive"]
        overlap = box_iou(box, batch["box"])[positive]
        for row, values in enumerate((overlap, overlap > 0.5, score[positive], score[~positive])):
            self._validated[row, 0] += values.double().sum()
            self._validated[row, 1] += len(values)

    def on_validation_epoch_start(self) -> None:
        """Begin sum and count of each of `VALIDATION`."""
        self._validated = torch.zeros(len(VALIDATION), 2, dtype=torch.float64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Means over the pairs of all processes: one of them may have no pair of a sort, and counts as little."""
        sums = cast(Tensor, self.trainer.strategy.reduce(self._validated, reduce_op="sum"))
        for name, (total, count) in zip(VALIDATION, sums, strict=True):
            if count:
                self.log(name, (total / count).float(), prog_bar=name == "val/iou")

    def configure_optimizers(self) -> Any:
        backbone = {id(p) for p in self.net.backbone.parameters()}  # type: ignore[union-attr]
        optim = self.recipe.optim
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.net.parameters() if p.requires_grad and id(p) not in backbone], "lr": optim.lr},
            {
                "params": [p for p in self.net.parameters() if p.requires_grad and id(p) in backbone],
                "lr": optim.lr * optim.backbone_lr,
            },
        ]
        if optim.optimiser == "sgd":
            optimiser: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=optim.weight_decay)
        else:
            optimiser = torch.optim.AdamW(groups, weight_decay=optim.weight_decay)
        total = self.recipe.epochs * self.recipe.steps_per_epoch
        warmup = int(total * optim.warmup_epochs / self.recipe.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: lr_factor(step, total, warmup, optim))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lr_factor(step: int, total: int, warmup: int, optim: OptimConfig) -> float:
    """Learning rate at `step` as a share of the peak: geometric warm-up, then exponential or cosine decay.

    SiamCAN section 4.1: 0.001 to 0.005 in five epochs, then exponentially to 0.00005 in fifteen.
    """
    if step < warmup:
        return float((optim.warmup_start / optim.lr) ** (1 - step / warmup))
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    final = optim.final_lr / optim.lr
    if optim.decay == "exponential":
        return float(final**progress)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def cells_of(net: nn.Module) -> Cells:
    """Where a network's candidates stand."""
    decoder = cast(Any, net.decoder)
    if isinstance(decoder, AnchorBased):
        return Cells(decoder.points.cpu().numpy(), decoder.grid.stride, decoder.sizes.cpu().numpy())
    return Cells(decoder.grid.points().numpy(), decoder.grid.stride)


def load_weights(net: nn.Module, path: Path) -> None:
    """Fill a whole network from a checkpoint of the same model, trained here or imported.

    Raises:
        ValueError: unreadable, or of another model or configuration.
    """
    state = read_weights(path).state
    _fill(net, _part(state, "net.") or state, path)  # a training run's graphs hold the network once more


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Fill a backbone from ImageNet weights or from a checkpoint trained here.

    Args:
        backbone: filled in place.
        path: ImageNet weights (``.safetensors``, or a tensors-only ``.pth``), or a ``.ckpt`` of a run of any model with
            this backbone.

    Raises:
        ValueError: not there, not readable, or of another backbone.
    """
    if not path.exists():
        raise ValueError(f"no backbone weights at {path}; check --data, or set `backbone: ''` to start from random")
    if path.suffix == CHECKPOINT:
        _fill(backbone, _part(read_weights(path).state, "net.backbone."), path)
        return
    state = read_tensors(path)
    if isinstance(backbone, TwoBackbones):
        import_resnet50(backbone.template, state)
        import_resnet50(backbone.search, state)
    elif isinstance(backbone, MobileNetV2):
        import_mobilenetv2(backbone, state)
    elif isinstance(backbone, ResNet50):
        import_resnet50(backbone, state)
    else:
        raise ValueError(f"no ImageNet import for {type(backbone).__name__}")


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _fill(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights that fit in every name and shape; BatchNorm's counters may be missing."""
    misfit = f"{path} does not fit {type(module).__name__}"
    try:
        missing, unknown = module.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(f"{misfit}: {error}") from error
    wrong = sorted({*missing, *unknown} - {name for name in missing if name.endswith("num_batches_tracked")})
    if wrong:
        raise ValueError(f"{misfit}: {', '.join(wrong[:5])} and {len(wrong)} in all")


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
