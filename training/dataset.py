"""Pairs as a PyTorch data set: labelled arrays, and which process sees which.

Sample ``i`` of a run depends on the run's seed and ``i`` alone, so a resumed run sees exactly the pairs it would have
seen, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from training.labels import Labels, Points, sample, siamcan_labels
from training.pairs import Pair, PairSampler

Rng = np.random.Generator
Sample = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LabelConfig:
    """How cells are labelled: `nearest` as in `siamcan_labels`, limits as in `sample`; two zeros keep all."""

    nearest: bool = False
    positives: int = 16
    negatives: int = 48


class PairDataset(Dataset[Sample]):
    """Sample ``i`` as arrays: ``template``, ``search`` uint8; ``box`` f32 [4]; ``labels`` int8 [H, W]; ``positive``.

    Args:
        sampler: draws the pairs.
        points: cells of the network's grid ``[H * W, 2]``.
        labels: labelling switches.
        seed: of the whole run.
        length: samples in an epoch; any index may be asked for.
    """

    def __init__(self, sampler: PairSampler, points: Points, labels: LabelConfig, seed: int, length: int) -> None:
        self.sampler, self.points, self.labels, self.seed, self.length = sampler, points, labels, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        pair = self.sampler.draw(rng)
        side = int(round(len(self.points) ** 0.5))
        return {
            "template": pair.template,
            "search": pair.search,
            "box": pair.box_cxcywh.astype(np.float32),
            "labels": self._label(pair, rng).reshape(side, side),
            "positive": np.array(pair.positive),
        }

    def _label(self, pair: Pair, rng: Rng) -> Labels:
        if pair.positive:
            labels = siamcan_labels(self.points, pair.box_cxcywh, self.labels.nearest)
        else:
            labels = np.zeros(len(self.points), np.int8)
        if self.labels.positives or self.labels.negatives:
            labels = sample(labels, self.labels.positives, self.labels.negatives, rng)
        return labels


class EpochSampler(Sampler[int]):
    """Indices ``epoch * length + rank, + world, ...``: every process its share, every epoch new samples."""

    def __init__(self, length: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.rank, self.world, self.epoch = length, rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        return iter(range(start + self.rank, start + len(self) * self.world, self.world))


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Stack samples into tensors."""
    return {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in samples[0]}
