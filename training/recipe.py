"""A training recipe: one YAML file, read into frozen dataclasses that say what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from siamtrack.nets import MODELS
from siamtrack.plain import from_plain
from training.dataset import LabelConfig
from training.pairs import PairConfig


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class DataConfig:
    """Where the data lies, relative to the data root given at the command line.

    Attributes:
        videos: folders of videos (each child folder is one; see `training.data.read_video`).
        stills: folders with ``img/`` and ``boxes.csv``.
        coco: mapping of ``instances_*.json`` files to their image folders.
        photos: folders of images without annotations.
        validation_videos: names of videos held out for validation.
        pairs: how pairs are drawn.
        labels: how cells are labelled.
        cache_gb: memory for decoded images, a process.
        workers: loader processes a training process; 0 loads inline, which is fastest when all cores train.
    """

    videos: tuple[str, ...] = ("videos",)
    stills: tuple[str, ...] = ()
    coco: dict[str, str] = field(default_factory=dict)
    photos: tuple[str, ...] = ()
    validation_videos: tuple[str, ...] = ()
    pairs: PairConfig = PairConfig()
    labels: LabelConfig = LabelConfig()
    cache_gb: float = 3.0
    workers: int = 0


@dataclass(frozen=True)
class OptimConfig:
    """How weights move.

    Attributes:
        optimiser: "sgd" (momentum 0.9, as the papers) or "adamw".
        lr: peak learning rate of the head.
        backbone_lr: factor on `lr` for backbone weights.
        weight_decay: L2 decay.
        warmup_epochs: geometric rise to `lr`.
        warmup_start: learning rate at step 0.
        decay: "exponential" (SiamCAN) or "cosine" down to `final_lr`.
        final_lr: learning rate at the last step.
        clip: gradient norm limit.
        ema: decay of the exponential moving average of weights; 0 switches it off.
    """

    optimiser: str = "sgd"
    lr: float = 0.005
    backbone_lr: float = 0.1
    weight_decay: float = 1e-4
    warmup_epochs: float = 5.0
    warmup_start: float = 0.001
    decay: str = "exponential"
    final_lr: float = 0.00005
    clip: float = 10.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        _one_of("optimiser", self.optimiser, ("sgd", "adamw"))
        _one_of("decay", self.decay, ("exponential", "cosine"))
        for name in ("lr", "warmup_start", "final_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run.

    Attributes:
        model: name in `siamtrack.nets.MODELS`.
        backbone: ImageNet weights of the backbone, relative to the data root; empty for none.
        seed: of weights and of every pair.
        epochs: passes of `pairs_per_epoch` pairs.
        pairs_per_epoch: a checkpoint is written after each epoch.
        batch_size: pairs a step, over all processes together.
        classification: "balanced_ce" (SiamCAN) or "focal".
        cls_weight, loc_weight: lambda_1 and lambda_2 of SiamCAN Eq. 16.
        unfreeze_epoch: from this epoch on the last `unfreeze_stages` stages of the backbone train too.
        unfreeze_stages: how many.
        validation_pairs: pairs from the held-out videos, scored after every epoch; 0 for none.
        precision: Lightning's precision, such as "32-true", "bf16-mixed", "16-mixed".
    """

    model: str
    backbone: str = ""
    seed: int = 1
    epochs: int = 20
    pairs_per_epoch: int = 600_000
    batch_size: int = 28
    classification: str = "balanced_ce"
    cls_weight: float = 1.0
    loc_weight: float = 1.0
    unfreeze_epoch: int = 10
    unfreeze_stages: int = 3
    validation_pairs: int = 512
    precision: str = "32-true"
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()

    def __post_init__(self) -> None:
        _one_of("model", self.model, tuple(MODELS))
        _one_of("classification", self.classification, ("balanced_ce", "focal"))
        for name in ("epochs", "pairs_per_epoch", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: YAML.
        overrides: top-level fields to replace.

    Raises:
        ValueError: unknown or missing fields, or values that cannot be.
    """
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of recipe fields, got {type(content).__name__}")
    return recipe_from_dict({**content, **(overrides or {})}, str(path))


def recipe_from_dict(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values, such as those of `siamtrack.plain.to_plain`."""
    return from_plain(Recipe, content, where)
