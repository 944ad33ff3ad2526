"""A training recipe: one YAML file, read into frozen dataclasses that say what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from siamtrack.nets import MODELS
from siamtrack.nets.build import check_model_config
from siamtrack.nets.decode import AnchorBased
from siamtrack.plain import from_plain, read_recipe
from training.checks import not_negative, one_of
from training.dataset import LabelConfig
from training.layouts import LAYOUTS
from training.objectives import Objective, build_objective
from training.pairs import PairConfig

AUGMENT = ("cpu", "device")


@dataclass(frozen=True)
class DataSet:
    """One data set in a layout of `training.layouts.LAYOUTS`.

    Attributes:
        layout: name of the layout.
        path: its folder or annotation file, relative to the data root.
        images: folder of its images, for layouts whose path does not say it; "" for the others.
        frame_range: furthest frame distance of a pair; 0 for the layout's own, or else `PairConfig.frame_range`.
        share: how often its videos (or stills) are drawn against those of other sets; 0 for as often as their number
            and length has it. Of the sets that give videos all have a share or none, and so of those that give stills.
    """

    layout: str
    path: str
    images: str = ""
    frame_range: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        one_of("layout", self.layout, LAYOUTS)
        not_negative(frame_range=self.frame_range, share=self.share)
        if LAYOUTS[self.layout].needs_images and not self.images:
            raise ValueError(
                f"layout {self.layout} needs `images`, the folder of the images; {self.path} does not say it"
            )
        if self.images and not LAYOUTS[self.layout].needs_images:
            raise ValueError(
                f"layout {self.layout} takes no `images` (got {self.images}): it looks like "
                f"{LAYOUTS[self.layout].looks_like}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where the data lies, relative to the data root given at the command line.

    Attributes:
        sets: data sets by their layout.
        shards: folder that `training.prepare` wrote, of this very data; then nothing else is read.
        videos: folders of videos (each child folder is one; see `training.data.read_video`).
        stills: folders with ``img/`` and ``boxes.csv``.
        coco: mapping of ``instances_*.json`` files to their image folders.
        photos: folders of images without annotations.
        validation_videos: names of videos held out for validation.
        pairs: how pairs are drawn.
        labels: how cells are labelled; `Recipe.labels` is this with the rule filled in.
        augment: where training crops get light and noise: "cpu", in the loader, or "device", a batch at a time where
            the network is, for GPUs that wait for their loaders.
        cache_gb: memory for decoded images, a process.
        workers: loader processes a training process; 0 loads inline, on the network's own threads, which is fastest
            when all cores train.
    """

    sets: tuple[DataSet, ...] = ()
    shards: str = ""
    videos: tuple[str, ...] = ()
    stills: tuple[str, ...] = ()
    coco: dict[str, str] = field(default_factory=dict)
    photos: tuple[str, ...] = ()
    validation_videos: tuple[str, ...] = ()
    pairs: PairConfig = PairConfig()
    labels: LabelConfig = LabelConfig()
    augment: str = "cpu"
    cache_gb: float = 3.0
    workers: int = 0

    def __post_init__(self) -> None:
        one_of("augment", self.augment, AUGMENT)


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
        one_of("optimiser", self.optimiser, ("sgd", "adamw"))
        one_of("decay", self.decay, ("exponential", "cosine"))
        for name in ("lr", "warmup_start", "final_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class DistilConfig:
    """Networks to learn from besides the truth; see `training.distil`.

    Attributes:
        teachers: checkpoints of models with the same crops and candidates, relative to the working folder; empty for
            none.
        share: of the loss that is distance to the teachers; the objective has the rest.
    """

    teachers: tuple[str, ...] = ()
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}; without teachers leave it out")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run.

    Attributes:
        model: name in `siamtrack.nets.MODELS`.
        model_config: fields of the model's configuration that differ from its defaults: the switches of the papers'
            ablations. Checkpoints keep them, so that export builds the same network.
        objective: name in `training.objectives.OBJECTIVES`; empty for the one that the model's name begins with.
        objective_config: fields of the objective that differ from its defaults: weights of the terms, switches.
        backbone: ImageNet weights of the backbone, relative to the data root, or the ``.ckpt`` of a run of any model
            with this backbone, relative to the working folder; empty for none.
        weights: checkpoint of this model to start from, such as `siamtrack import-checkpoint` writes, relative to the
            working folder; empty for none. It holds the backbone too.
        seed: of weights and of every pair.
        epochs: passes of `pairs_per_epoch` pairs.
        pairs_per_epoch: a checkpoint is written after each epoch.
        batch_size: pairs a step, over all processes together.
        unfreeze_epoch: from this epoch on the last `unfreeze_stages` stages of the backbone train too.
        unfreeze_stages: how many.
        validation_pairs: pairs from the held-out videos, scored after every epoch; 0 for none.
        precision: Lightning's precision, such as "32-true", "bf16-mixed", "16-mixed".
    """

    model: str
    model_config: dict[str, Any] = field(default_factory=dict)
    objective: str = ""
    objective_config: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""
    weights: str = ""
    seed: int = 1
    epochs: int = 20
    pairs_per_epoch: int = 600_000
    batch_size: int = 28
    unfreeze_epoch: int = 10
    unfreeze_stages: int = 3
    validation_pairs: int = 512
    precision: str = "32-true"
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    distil: DistilConfig = DistilConfig()

    def __post_init__(self) -> None:
        one_of("model", self.model, tuple(MODELS))
        for name in ("epochs", "pairs_per_epoch", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pairs_per_epoch < self.batch_size:
            raise ValueError(
                f"pairs_per_epoch {self.pairs_per_epoch} is less than one batch of batch_size {self.batch_size}"
            )
        check_model_config(self.model, self.model_config)
        objective = self.build_objective()
        if self.labels.rule == "siamrpn" and objective.decoder is not AnchorBased:
            raise ValueError(
                f"labels by rule siamrpn are anchors' labels; objective {self.objective_name} has no anchors"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches, of all processes together; what is over is left out."""
        return self.pairs_per_epoch // self.batch_size

    @property
    def objective_name(self) -> str:
        """`objective`, or the model's own."""
        return self.objective or self.model.split("-")[0]

    @property
    def labels(self) -> LabelConfig:
        """How cells are labelled, by the objective's own rule where the recipe names none."""
        labels = self.data.labels
        return labels if labels.rule else replace(labels, rule=self.build_objective().rule)

    def build_objective(self) -> Objective:
        """What the run minimises."""
        return build_objective(self.objective_name, self.objective_config)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None, shards: str = "") -> Recipe:
    """Read a recipe file.

    Args:
        path: YAML. With `base`, another recipe beside it, it has that one's fields, but for those that it names itself.
        overrides: top-level fields to replace.
        shards: replaces `DataConfig.shards`, unless empty.

    Raises:
        OSError: the file cannot be read.
        ValueError: not YAML, unknown or missing fields, values that cannot be, or recipes that are bases of each other.
    """
    recipe = recipe_from_dict({**read_recipe(path), **(overrides or {})}, str(path))
    return replace(recipe, data=replace(recipe.data, shards=shards)) if shards else recipe


def recipe_from_dict(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values, such as those of `siamtrack.plain.to_plain`."""
    return from_plain(Recipe, content, where)
