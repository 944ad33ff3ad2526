"""The Lightning modules: what one training step does, and which pairs it sees."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from siamtrack.nets import MODELS
from siamtrack.nets.backbones import MobileNetV2, ResNet50Dilated, load_mobilenetv2_imagenet, load_resnet50_imagenet
from siamtrack.nets.decode import SearchGraph, TemplateGraph, decode_boxes, normalise
from siamtrack.sources import list_images
from training.data import Track, read_coco, read_stills, read_video, usable
from training.dataset import EpochSampler, PairDataset, collate
from training.images import ImageCache
from training.losses import balanced_cross_entropy, diou_loss, focal_loss
from training.pairs import PairSampler
from training.recipe import OptimConfig, Recipe, recipe_from_dict

Batch = dict[str, Tensor]


class SiameseModule(L.LightningModule):
    """Trains any model of `siamtrack.nets.MODELS` on template-search pairs.

    Args:
        recipe: as plain values (`siamtrack.plain.to_plain`), so that checkpoints load without unpickling code.
        data_root: where the recipe's backbone weights are; None when loading a checkpoint.
    """

    def __init__(self, recipe: dict[str, Any], data_root: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("recipe")
        self.recipe = recipe_from_dict(recipe)
        self.net = MODELS[self.recipe.model]()
        if data_root is not None and self.recipe.backbone:
            load_backbone(cast(nn.Module, self.net.backbone), Path(data_root) / self.recipe.backbone)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.search_graph = SearchGraph(self.net)  # type: ignore[arg-type]
        self.template_graph = TemplateGraph(self.net)  # type: ignore[arg-type]
        if not 0 <= self.recipe.unfreeze_stages <= len(self._stages()):
            raise ValueError(
                f"unfreeze_stages must be 0 to {len(self._stages())} for {self.recipe.model}, "
                f"got {self.recipe.unfreeze_stages}"
            )
        # Stages that never train must not be known to DistributedDataParallel.
        for stage in self._stages()[: len(self._stages()) - self.recipe.unfreeze_stages]:
            stage.requires_grad_(False)

    def _stages(self) -> list[nn.Module]:
        return cast(Any, self.net).backbone.trainable_stages()

    def on_train_epoch_start(self) -> None:
        """Freeze the backbone, or thaw its last stages; statistics of frozen stages stay fixed."""
        self.net.backbone.eval()  # type: ignore[union-attr]
        thawed = self.current_epoch >= self.recipe.unfreeze_epoch
        for stage in self._stages()[len(self._stages()) - self.recipe.unfreeze_stages :]:
            stage.requires_grad_(thawed).train(thawed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        normalisation = cast(Any, self.net).normalisation
        raw = self.net(normalise(batch["template"], normalisation), normalise(batch["search"], normalisation))
        logits, labels = raw.logits.float(), batch["labels"]
        classify = focal_loss if self.recipe.classification == "focal" else balanced_cross_entropy
        cls_loss = classify(logits, labels)
        boxes = decode_boxes(raw.ltrb.float(), self.search_graph.points)  # [N, H*W, 4]
        target = labels.flatten(1) == 1
        wanted = batch["box"][:, None].expand_as(boxes)[target]
        loc_loss = diou_loss(boxes[target], wanted).sum() / target.sum().clamp(min=1)
        loss = self.recipe.cls_weight * cls_loss + self.recipe.loc_weight * loc_loss
        self.log_dict({"train/cls": cls_loss, "train/loc": loc_loss, "train/loss": loss.detach()})
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if not torch.isfinite(loss) or loss > 1e4:
            # A broken batch must not reach the weights; zero gradients keep all processes in step.
            return torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero a gradient that is not finite: zero times NaN is NaN, so a zero loss alone stops none.

        What momentum and weight decay then still do is harmless. Gradients are already shared between processes here,
        so all of them do the same.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not all(torch.isfinite(norm) for norm in torch._foreach_norm(gradients)):
            for gradient in gradients:
                gradient.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        template = self.template_graph(batch["template"])
        size = batch["box"][:, 2:]
        box, score, _, _ = self.search_graph(batch["search"], *template, size, torch.zeros(3, device=self.device))
        positive = batch["positive"]
        overlap = _iou(box, batch["box"])[positive]
        metrics = {
            "val/iou": overlap.mean(),
            "val/hit": (overlap > 0.5).float().mean(),
            "val/score_seen": score[positive].mean(),
            "val/score_absent": score[~positive].mean(),
        }
        for name, value in metrics.items():
            if torch.isfinite(value):  # a batch may have no pair of one sort
                self.log(name, value, prog_bar=name == "val/iou", sync_dist=True)

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
        total = int(self.trainer.estimated_stepping_batches)
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


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Fill a backbone from ImageNet weights (``.safetensors``, or a tensors-only ``.pth``)."""
    if not path.exists():
        raise ValueError(f"no backbone weights at {path}; check --data, or set `backbone: ''` to start from random")
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if isinstance(backbone, MobileNetV2):
        load_mobilenetv2_imagenet(backbone, state)
    elif isinstance(backbone, ResNet50Dilated):
        load_resnet50_imagenet(backbone, state)
    else:
        raise ValueError(f"no ImageNet import for {type(backbone).__name__}")


class PairDataModule(L.LightningDataModule):
    """Training and validation loaders of a recipe."""

    def __init__(self, recipe: Recipe, data_root: Path) -> None:
        super().__init__()
        self.recipe, self.data_root = recipe, data_root

    def setup(self, stage: str) -> None:
        """Read annotations; called on every process."""
        data = self.recipe.data
        videos = usable([t for folder in self._folders(data.videos) for t in read_video(folder)])
        stills = [t for name in data.stills for t in read_stills(self.data_root / name)]
        for instances, folder in data.coco.items():
            stills += read_coco(self.data_root / instances, self.data_root / folder)
        photos = [p for name in data.photos for p in list_images(self.data_root / name)]
        held_out = set(data.validation_videos)

        def is_held_out(track: Track) -> bool:
            return track.name.split(":")[0] in held_out

        absent = held_out - {t.name.split(":")[0] for t in videos}
        if absent:
            raise ValueError(f"validation videos not found: {', '.join(sorted(absent))}")
        images = ImageCache(data.cache_gb)
        training = [t for t in videos if not is_held_out(t)]
        self._training = PairSampler(training, usable(stills), photos, data.pairs, images, *self._sides())
        validation = [t for t in videos if is_held_out(t)]
        clean = dataclasses.replace(
            data.pairs,
            mix={"video": 1.0},
            distractor=0.0,
            occluder=0.0,
            negative=0.3 if len(held_out) > 1 else 0.0,
            rotation=0.0,
            flip=0.0,
        )
        self._validation = PairSampler(validation, [], photos, clean, images, *self._sides()) if validation else None

    def train_dataloader(self) -> DataLoader[Any]:
        recipe, trainer = self.recipe, self.trainer
        assert trainer is not None
        dataset = self._dataset(self._training, recipe.seed, recipe.pairs_per_epoch)
        sampler = EpochSampler(recipe.pairs_per_epoch, trainer.global_rank, trainer.world_size)
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self._validation is None or not self.recipe.validation_pairs:
            return []
        assert self.trainer is not None
        dataset = self._dataset(self._validation, 0, self.recipe.validation_pairs)
        # As a list: the trainer would move a sampler on to new pairs every epoch, and scores could not be compared.
        indices = list(EpochSampler(len(dataset), self.trainer.global_rank, self.trainer.world_size))
        return self._loader(dataset, indices)

    def _sides(self) -> tuple[int, int]:
        net = cast(Any, MODELS[self.recipe.model])
        return net.template_size, net.search_size

    def _dataset(self, sampler: PairSampler, seed: int, length: int) -> PairDataset:
        points = cast(Any, MODELS[self.recipe.model]).grid.points().numpy()
        return PairDataset(sampler, points, self.recipe.data.labels, seed, length)

    def _loader(self, dataset: PairDataset, sampler: EpochSampler | list[int]) -> DataLoader[Any]:
        assert self.trainer is not None
        workers = self.recipe.data.workers
        return DataLoader(
            dataset,
            batch_size=self.recipe.batch_size // self.trainer.world_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            drop_last=isinstance(sampler, EpochSampler),  # BatchNorm wants full batches; validation every pair
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def _folders(self, names: tuple[str, ...]) -> list[Path]:
        folders = []
        for name in names:
            root = self.data_root / name
            if not root.is_dir():
                raise ValueError(f"no folder of videos at {root}; check --data")
            folders += sorted(p for p in root.iterdir() if p.is_dir())
        return folders


def _iou(a: Tensor, b: Tensor) -> Tensor:
    low = torch.maximum(a[:, :2] - a[:, 2:] / 2, b[:, :2] - b[:, 2:] / 2)
    high = torch.minimum(a[:, :2] + a[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2)
    overlap = (high - low).clamp(min=0).prod(dim=1)
    return overlap / (a[:, 2:].prod(dim=1) + b[:, 2:].prod(dim=1) - overlap)
