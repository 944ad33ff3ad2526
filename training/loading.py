"""Which pairs a run sees: the samplers of a recipe, and Lightning's loaders of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from siamtrack.nets.decode import learns_update
from training.collect import Collected, collect
from training.dataset import EpochSampler, PairDataset, collate
from training.images import ImageCache
from training.module import cells_of
from training.pairs import PairSampler
from training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class CropShape:
    """What a network takes: sides of its crops, and whether a sample has three templates."""

    template_px: int
    search_px: int
    triplets: bool


def crop_shape(net: nn.Module) -> CropShape:
    """What `net` takes."""
    return CropShape(cast(int, net.template_size), cast(int, net.search_size), learns_update(net))


def make_samplers(recipe: Recipe, found: Collected, shape: CropShape) -> tuple[PairSampler, PairSampler | None]:
    """Samplers of training pairs, with all augmentation, and of validation pairs; None without held-out videos.

    Raises:
        ValueError: the recipe's mix asks for pairs that the data does not have.
    """
    pairs, images = recipe.data.pairs, ImageCache(recipe.data.cache_gb)
    sizes = (shape.template_px, shape.search_px, shape.triplets)
    deferred = recipe.data.augment == "device"
    training = PairSampler(found.videos, found.stills, found.photos, pairs, images, *sizes, deferred)
    if not found.validation:
        return training, None
    negative = 0.3 if len(recipe.data.validation_videos) > 1 else 0.0
    plain: dict[str, Any] = dict.fromkeys(("distractor", "occluder", "rotation", "flip"), 0.0)
    clean = dataclasses.replace(pairs, mix={"video": 1.0}, negative=negative, **plain)
    return training, PairSampler(found.validation, [], found.photos, clean, images, *sizes)


class PairDataModule(L.LightningDataModule):
    """Training and validation loaders of a recipe.

    Args:
        recipe: what to train.
        data_root: folder the recipe's data paths are relative to.
        net: the network that takes the batches; says how large crops are and where its candidates stand.
    """

    def __init__(self, recipe: Recipe, data_root: Path, net: nn.Module) -> None:
        super().__init__()
        self.recipe, self.data_root = recipe, data_root
        self.cells, self.shape = cells_of(net), crop_shape(net)

    def setup(self, stage: str) -> None:
        """Read annotations; called on every process."""
        found = collect(self.recipe, self.data_root, self.shape.template_px, self.shape.search_px)
        self._training, self._validation = make_samplers(self.recipe, found, self.shape)

    def training_set(self) -> PairDataset:
        """The training samples."""
        return self._dataset(self._training, self.recipe.seed, self.recipe.pairs_per_epoch)

    def train_dataloader(self) -> Iterable[Any]:
        return self.training_loader(self.training_set())

    def training_loader(self, dataset: PairDataset) -> DataLoader[Any]:
        """Batches of `dataset` for this process, those of an epoch, from where the run stands."""
        recipe, trainer = self.recipe, self.trainer
        assert trainer is not None
        sampler = EpochSampler(
            recipe.pairs_per_epoch,
            trainer.global_rank,
            trainer.world_size,
            recipe.batch_size // trainer.world_size,
            lambda: trainer.global_step,
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self._validation is None or not self.recipe.validation_pairs:
            return []
        assert self.trainer is not None
        dataset = self._dataset(self._validation, 0, self.recipe.validation_pairs)
        # As a list: the trainer would move a sampler on to new pairs every epoch, and scores could not be compared.
        indices = list(EpochSampler(len(dataset), self.trainer.global_rank, self.trainer.world_size))
        return self._loader(dataset, indices)

    def _dataset(self, sampler: PairSampler, seed: int, length: int) -> PairDataset:
        return PairDataset(sampler, self.cells, self.recipe.labels, seed, length)

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
